package tenantprom

import (
	"context"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// What happens is what is told, by names and units that Prometheus' own rules find nothing wrong with.
func TestACollectorTellsWhatHappened(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db := openDB(t, withDatabaseTenant(t))
	catalog, sessions, api := memory(t), lostRedis(t), limiter(t)
	c := NewCollector(db, WithCache("catalog", catalog), WithCache("sessions", sessions), WithLimiter("api", api),
		ConstLabels(prometheus.Labels{"db": "main"}))

	for range 3 {
		_, err := db.Exec(as(t, "acme"), "select pg_sleep(0.01)")
		require.NoError(t, err)
	}
	_, err := db.Exec(as(t, "umbrella"), "select pg_sleep(0.05)")
	require.NoError(t, err)
	_, err = db.Exec(as(t, "acme"), "select 1/0")
	require.Error(t, err)
	_, err = db.Audit(ctx)
	require.NoError(t, err)
	for _, store := range []tenantcache.Store{catalog, sessions} {
		cache, err := tenantcache.New(store, tenantcache.Config[int]{Namespace: "n"})
		require.NoError(t, err)
		for range 2 {
			_, err = cache.GetOrLoad(as(t, "acme"), "key", 0, func(context.Context) (int, error) { return 1, nil })
			require.NoError(t, err)
		}
	}
	for range 3 {
		g, err := api.Take(pgxtenant.WithTenant(ctx, pgxtenant.Tenant{ID: "acme", Plan: "free"}), tenantlimit.Call{})
		if err == nil {
			g.Release()
		}
	}
	held, err := db.Acquire(as(t, "acme"))
	require.NoError(t, err)
	defer held.Release()

	s := scrape(t, c)
	for _, want := range []struct {
		name, labels string
		value        float64
	}{
		{"pgxtenant_connections", "db=main,pool=shared,state=acquired", 1},
		{"pgxtenant_connections", "db=main,pool=isolated,state=idle", 1},
		{"pgxtenant_connections_max", "db=main,pool=shared", 4},
		{"pgxtenant_connections_max", "db=main,pool=isolated", 2},
		{"pgxtenant_connections_limit", "db=main", 6},
		{"pgxtenant_connections_opened_total", "db=main", 2},
		{"pgxtenant_acquires_total", "db=main,result=acquired", 7}, // one opened the isolated pool
		{"pgxtenant_acquires_total", "db=main,result=refused", 0},
		{"pgxtenant_pools", "db=main,state=open", 1},
		{"pgxtenant_pools", "db=main,state=draining", 0},
		{"pgxtenant_pools_opened_total", "db=main", 1},
		{"pgxtenant_pools_failed_total", "db=main", 0},
		{"pgxtenant_directory_lookups_total", "db=main,result=miss", 6},
		{"pgxtenant_audit_findings", "db=main,severity=error", 0},
		{"pgxtenant_audit_allowed_findings", "db=main", 0},
		{"pgxtenant_statements_total", "db=main,kind=query", 4},
		{"pgxtenant_statements_total", "db=main,kind=exec", 1},
		{"pgxtenant_statement_errors_total", "db=main", 1},
		{"pgxtenant_rows_total", "db=main", 4},
		{"pgxtenant_active_tenants", "db=main,window=1m", 2},
		{"pgxtenant_tenant_held_connections", "db=main,tenant=acme", 1},
		{"pgxtenant_tenant_held_connections", "db=main,tenant=other", 0},
		{"pgxtenant_tenant_shared_time_ratio", "db=main,tenant=acme", 1},
		{"pgxtenant_tenant_shared_time_ratio", "db=main,tenant=umbrella", 0},
		{"pgxtenant_cache_requests_total", "cache=catalog,db=main,result=hit", 1},
		{"pgxtenant_cache_requests_total", "cache=catalog,db=main,result=miss", 1},
		{"pgxtenant_cache_entries", "cache=catalog,db=main", 1},
		{"pgxtenant_cache_requests_total", "cache=sessions,db=main,result=miss", 2},
		{"pgxtenant_cache_loads_total", "cache=sessions,db=main", 2},
		{"pgxtenant_limiter_decisions_total", "db=main,decision=allowed,limiter=api", 2},
		{"pgxtenant_limiter_decisions_total", "db=main,decision=refused_rate,limiter=api", 1},
		{"pgxtenant_limiter_local_buckets", "db=main,limiter=api", 1},
		{"pgxtenant_limiter_redis_lost", "db=main,limiter=api", 0},
	} {
		require.InDelta(t, want.value, s.value(t, want.name, want.labels), 1e-9, "%s{%s}", want.name, want.labels)
	}
	require.Positive(t, s.value(t, "pgxtenant_cache_redis_errors_total", "cache=sessions,db=main"))
	require.NotContains(t, s["pgxtenant_cache_entries"], "cache=sessions,db=main", "that is Redis' own business")
	require.NotContains(t, s["pgxtenant_cache_redis_errors_total"], "cache=catalog,db=main")
	require.GreaterOrEqual(t, s.value(t, "pgxtenant_bindings_total", "db=main"), 5.0)
	require.GreaterOrEqual(t, s.value(t, "pgxtenant_statement_seconds_total", "db=main,pool=shared"), 0.03)
	require.GreaterOrEqual(t, s.value(t, "pgxtenant_statement_seconds_total", "db=main,pool=isolated"), 0.05)
	require.WithinDuration(t, time.Now(), time.UnixMilli(int64(1000*s.value(t, "pgxtenant_audit_timestamp_seconds", "db=main"))), time.Minute)
	waits := s["pgxtenant_acquire_wait_seconds"]["db=main"].GetHistogram()
	require.EqualValues(t, 7, waits.GetSampleCount(), "every checkout, those that found a connection idle too")
	require.Len(t, waits.GetBucket(), 13)
	require.InDelta(t, 0.001, waits.GetBucket()[0].GetUpperBound(), 1e-9)
	require.Positive(t, waits.GetSampleSum(), "the first waited for its connection to be made")
}

func TestNothingIsWrongWithNamesAndHelp(t *testing.T) {
	t.Parallel()
	db := openDB(t)
	_, err := db.Audit(t.Context())
	require.NoError(t, err)
	c, r := NewCollector(db, WithCache("a", memory(t)), WithCache("b", lostRedis(t)), WithLimiter("c", limiter(t))), NewRequests()
	r.count.WithLabelValues("a", "b", "c").Inc()
	r.duration.WithLabelValues("a", "b").Observe(1)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c, r)
	problems, err := testutil.GatherAndLint(registry)
	require.NoError(t, err)
	require.Empty(t, problems)

	// Whatever is described is there, once there is something to tell.
	described := make(chan *prometheus.Desc)
	go func() {
		defer close(described)
		c.Describe(described)
		r.Describe(described)
	}()
	s, n := scrape(t, c, r), 0
	for d := range described {
		name, _, _ := strings.Cut(strings.TrimPrefix(d.String(), `Desc{fqName: "`), `"`)
		require.Contains(t, s, name)
		n++
	}
	require.Len(t, s, n)
}

// The heaviest have series of their own, and all together are the total.
func TestTheHeaviestTenantsAreToldByName(t *testing.T) {
	t.Parallel()
	db := openDB(t)
	var all sync.WaitGroup
	for tenant, seconds := range map[string]float64{"acme": 3, "other": 1, "": 2, "globex": 0, "none": 0, "initech": 0} {
		all.Go(func() {
			ctx := pgxtenant.WithoutTenant(t.Context())
			if tenant != "" {
				ctx = as(t, tenant)
			}
			if _, err := db.Exec(ctx, "select pg_sleep($1)", seconds); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	held, err := db.Acquire(as(t, "none"))
	require.NoError(t, err)
	defer held.Release()

	const name = "pgxtenant_tenant_busy_connections"
	span := func() float64 { return max(1, db.Load().Minute.Span.Seconds()) }
	before := span()
	s := scrape(t, NewCollector(db, TopK(3)))
	after := span()
	require.ElementsMatch(t, []string{"tenant=acme", "tenant=none", "tenant=other (tenant)", "tenant=other"}, keys(s[name]))
	require.Greater(t, s.value(t, name, "tenant=acme"), s.value(t, name, "tenant=none"))
	rate := s.value(t, "pgxtenant_tenant_statements_per_second", "tenant=other")
	require.LessOrEqual(t, rate*before, 3+1e-9, "globex, none and initech, over a window that goes on")
	require.GreaterOrEqual(t, rate*after, 3-1e-9)
	require.InDelta(t, 1, s.value(t, "pgxtenant_tenant_held_connections", "tenant=other"), 0)
	shares := 0.0
	for _, m := range s["pgxtenant_tenant_shared_time_ratio"] {
		shares += m.GetGauge().GetValue()
	}
	require.InDelta(t, 1, shares, 1e-9)

	for _, window := range []Window{Minute, FiveMinutes, Hour} {
		require.Len(t, scrape(t, NewCollector(db, Over(window)))[name], 7, "six, and other")
	}
	require.ElementsMatch(t, []string{"tenant=other"}, keys(scrape(t, NewCollector(db, TopK(0)))[name]))
	require.ElementsMatch(t, []string{"tenant=acme", "tenant=none", "tenant=other"}, keys(scrape(t, NewCollector(db, MinShare(0.25)))[name]))
}

// Without load there are no series that say that nothing was done.
func TestWithoutLoadNothingIsToldOfIt(t *testing.T) {
	t.Parallel()
	db := openDB(t, func(c *pgxtenant.Config) { c.DisableLoad = true })
	_, err := db.Exec(as(t, "acme"), "select 1")
	require.NoError(t, err)
	s := scrape(t, NewCollector(db))
	for _, name := range []string{"pgxtenant_statements_total", "pgxtenant_active_tenants", "pgxtenant_tenant_busy_connections",
		"pgxtenant_acquire_wait_seconds", "pgxtenant_audit_findings"} {
		require.NotContains(t, s, name)
	}
	require.InDelta(t, 1, s.value(t, "pgxtenant_acquires_total", "result=acquired"), 0)
}

// peeking knows all its tenants by heart.
type peeking struct{ directory }

func (p peeking) Peek(id string) (pgxtenant.Tenant, bool) { t, ok := p.directory[id]; return t, ok }

// Whoever waits, gives up, is refused or is not reached is told of as that, and where.
func TestCheckoutsThatWaitOrFailAreTold(t *testing.T) {
	t.Parallel()
	own := pgtest.New(t).Database("app.current_tenant_id=umbrella")
	db := openDB(t, func(c *pgxtenant.Config) {
		c.Shared.MaxConns = 1
		c.Limits = func(pgxtenant.Tenant) pgxtenant.Limits { return pgxtenant.Limits{MaxWaiting: 1} }
		c.Directory = peeking{directory{"acme": {ID: "acme"},
			"umbrella": {ID: "umbrella", Isolation: pgxtenant.IsolationDatabase, ConnString: own.AppURL("pool_max_conns=1")},
			"lost":     {ID: "lost", Isolation: pgxtenant.IsolationDatabase, ConnString: "postgres://127.0.0.1:1/x"}}}
	})
	c := NewCollector(db)
	waiting, leave := context.WithCancel(t.Context())
	left := make(chan error)
	for _, tenant := range []string{"acme", "umbrella"} {
		held, err := db.Acquire(as(t, tenant))
		require.NoError(t, err)
		defer held.Release()
		go func() { _, err := db.Acquire(pgxtenant.WithTenantID(waiting, tenant)); left <- err }()
	}
	require.Eventually(t, func() bool {
		s := scrape(t, c)
		return s.value(t, "pgxtenant_acquires_waiting", "pool=shared") == 1 && s.value(t, "pgxtenant_acquires_waiting", "pool=isolated") == 1
	}, 10*time.Second, time.Millisecond)
	_, err := db.Acquire(as(t, "acme"))
	require.ErrorIs(t, err, pgxtenant.ErrTenantOverloaded)
	leave()
	for range 2 {
		require.ErrorIs(t, <-left, context.Canceled)
	}
	require.Error(t, db.Ping(as(t, "lost")))

	s := scrape(t, c)
	for want, value := range map[[2]string]float64{
		{"pgxtenant_acquires_waiting", "pool=shared"}:             0,
		{"pgxtenant_acquires_total", "result=canceled"}:           2,
		{"pgxtenant_acquires_total", "result=refused"}:            1,
		{"pgxtenant_pools_failed_total", ""}:                      1,
		{"pgxtenant_pools_opened_total", ""}:                      1,
		{"pgxtenant_pools_evicted_total", ""}:                     0,
		{"pgxtenant_leases", ""}:                                  0,
		{"pgxtenant_directory_lookups_total", "result=hit"}:       6,
		{"pgxtenant_directory_lookups_total", "result=miss"}:      0,
		{"pgxtenant_connections", "pool=isolated,state=acquired"}: 1,
		{"pgxtenant_connections", "pool=shared,state=acquired"}:   1,
		{"pgxtenant_connections", "pool=shared,state=idle"}:       0,
	} {
		require.InDelta(t, value, s.value(t, want[0], want[1]), 0, "%v", want)
	}
}

// What stores and limiters count is told, all of it and each number as what it is.
func TestEachCountOfStoresAndLimitersIsTold(t *testing.T) {
	t.Parallel()
	remote := tenantcache.Stats{Hits: 1, Misses: 2, Stale: 3, Undecodable: 4, Loads: 5, LoadErrors: 6, Shared: 7, Refreshes: 8, Overtaken: 9,
		TooLarge: 10, Invalidations: 11, Failures: 12, Refused: 13, Breaker: tenantcache.BreakerOpen, BreakerOpens: 14}
	inside := remote
	inside.Failures, inside.Refused, inside.Breaker, inside.BreakerOpens = 0, 0, 0, 0
	inside.Tenants, inside.Entries, inside.Bytes, inside.Evictions = 15, 16, 17, 18
	common := map[string]float64{"requests_total hit": 1, "requests_total miss": 2, "stale_total": 3, "undecodable_total": 4, "loads_total": 5,
		"load_errors_total": 6, "shared_loads_total": 7, "refreshes_total": 8, "overtaken_total": 9, "too_large_total": 10, "invalidations_total": 11}
	with := func(more map[string]float64) map[string]float64 { maps.Copy(more, common); return more }
	require.Equal(t, with(map[string]float64{"redis_errors_total": 12, "redis_spared_total": 13, "breaker_opens_total": 14,
		"breaker_state open": 1, "breaker_state closed": 0, "breaker_state half-open": 0}), told(cacheFamilies, cacheStats{remote, false}))
	require.Equal(t, with(map[string]float64{"tenants": 15, "entries": 16, "bytes": 17, "evictions_total": 18}), told(cacheFamilies, cacheStats{inside, true}))

	decided := tenantlimit.Stats{Allowed: 1, RefusedByRate: 2, RefusedByConcurrency: 3, RefusedByCost: 4, Failed: 5, Fallbacks: 6, RedisErrors: 7,
		Lost: true, Leases: 8, LocalBuckets: 9}
	require.Equal(t, map[string]float64{"decisions_total allowed": 1, "decisions_total refused_rate": 2, "decisions_total refused_concurrency": 3,
		"decisions_total refused_cost": 4, "decisions_total failed": 5, "fallbacks_total": 6, "redis_errors_total": 7, "redis_lost": 1, "leases": 8,
		"local_buckets": 9}, told(limiterFamilies, decided))

	// None is forgotten here that is counted there.
	for _, all := range [][]any{{remote, inside}, {decided}} {
		for i := range reflect.TypeOf(all[0]).NumField() {
			require.True(t, slices.ContainsFunc(all, func(s any) bool { return !reflect.ValueOf(s).Field(i).IsZero() }),
				reflect.TypeOf(all[0]).Field(i).Name)
		}
	}
}

// told is what families say of s, by the rest of their names and their labels.
func told[S any](families []family[S], s S) map[string]float64 {
	all := map[string]float64{}
	for _, f := range families {
		_, name, _ := strings.Cut(strings.TrimPrefix(f.name, "pgxtenant_"), "_")
		f.read(s, func(value float64, labels ...string) {
			all[strings.Join(append([]string{name}, labels...), " ")] = value
		})
	}
	return all
}

func TestScrapesAndStatementsAtTheSameTime(t *testing.T) {
	t.Parallel()
	db := openDB(t, withDatabaseTenant(t))
	c := NewCollector(db, TopK(2))
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	stop, done := make(chan struct{}), make(chan error, 3)
	for _, tenant := range []string{"acme", "globex", "umbrella"} {
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if _, err := db.Exec(as(t, tenant), "select 1"); err != nil {
					done <- err
					return
				}
			}
		}()
	}
	before := series{}
	for range 50 {
		s := scrape(t, c)
		for name, family := range before {
			for labels, m := range family {
				if m.Counter != nil || m.Histogram != nil {
					require.GreaterOrEqual(t, s.value(t, name, labels), before.value(t, name, labels), "%s{%s}", name, labels)
				}
			}
		}
		before = s
	}
	close(stop)
	for range 3 {
		require.NoError(t, <-done)
	}
	db.Close()
	scrape(t, c)
}

func TestBadOptionsAreRefused(t *testing.T) {
	t.Parallel()
	db, store, l := openDB(t), memory(t), limiter(t)
	for want, options := range map[string][]Option{
		"TopK is -1; want 0 to 256":              {TopK(-1)},
		"TopK is 257; want 0 to 256":             {TopK(257)},
		"Over is given Window(3)":                {Over(3)},
		"MinShare is 1.1; want 0 to 1":           {MinShare(1.1)},
		`WithCache is given "a" twice`:           {WithCache("a", store), WithCache("a", store)},
		`WithLimiter is given "a" twice`:         {WithLimiter("a", l), WithLimiter("a", l)},
		`the store of WithCache("a") is nil`:     {WithCache("a", nil)},
		`the limiter of WithLimiter("a") is nil`: {WithLimiter("a", nil)},
		`the store of WithCache("b") is nil`:     {WithCache("b", (*tenantcache.Memory)(nil))},
		"duplicate label names":                  {ConstLabels(prometheus.Labels{"tenant": "a"})},
		"not valid UTF-8":                        {ConstLabels(prometheus.Labels{"db": "\xff"})},
		`"le" is the label`:                      {ConstLabels(prometheus.Labels{"le": "a"})},
	} {
		requirePanic(t, want, func() { NewCollector(db, options...) })
	}
	require.Panics(t, func() { NewCollector(nil) })
	require.Panics(t, func() { NewRequests(ByEndpoint(nil)) })
	for want, option := range map[string]RequestsOption{
		"Buckets has none": Buckets(), "Buckets are [2 1]": Buckets(2, 1), "Buckets are [1 1]": Buckets(1, 1), "Buckets are [NaN]": Buckets(math.NaN()),
		"duplicate label names": RequestsLabels(prometheus.Labels{"plan": "a"}), `"le" is the label`: RequestsLabels(prometheus.Labels{"le": "a"}),
	} {
		requirePanic(t, want, func() { NewRequests(option) })
	}
	scrape(t, NewCollector(db, WithCache("a", store), WithLimiter("a", l), WithCache("\xff", store)), NewRequests())
}
