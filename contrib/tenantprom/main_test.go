package tenantprom

import (
	"context"
	"maps"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) {
	logging.Disable() // go-redis reports the Redis that is not there
	pgtest.Main(m)
}

// openDB opens a TenantDB on a database of its own, with an Admin, that is closed after the test.
func openDB(t testing.TB, change ...func(*pgxtenant.Config)) *pgxtenant.TenantDB {
	t.Helper()
	d := pgtest.New(t)
	config, err := pgxtenant.ParseConfig(d.AppURL("pool_max_conns=4"))
	require.NoError(t, err)
	config.Admin, err = pgxpool.ParseConfig(d.OwnerURL())
	require.NoError(t, err)
	for _, f := range change {
		f(config)
	}
	db, err := pgxtenant.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	return db
}

// withDatabaseTenant gives the TenantDB a directory with "umbrella", who has a database of its own.
func withDatabaseTenant(t testing.TB) func(*pgxtenant.Config) {
	t.Helper()
	own := pgtest.New(t).Database("app.current_tenant_id=umbrella")
	return func(c *pgxtenant.Config) {
		c.Directory = directory{"umbrella": {ID: "umbrella", Isolation: pgxtenant.IsolationDatabase, ConnString: own.AppURL("pool_max_conns=2")}}
	}
}

// directory has the tenants in it, and every other ID as one with shared tables.
type directory map[string]pgxtenant.Tenant

func (d directory) Lookup(_ context.Context, id string) (pgxtenant.Tenant, error) {
	if t, ok := d[id]; ok {
		return t, nil
	}
	return pgxtenant.Tenant{ID: id}, nil
}

func as(t testing.TB, tenant string) context.Context {
	return pgxtenant.WithTenantID(t.Context(), tenant)
}

// memory makes a store in the process.
func memory(t testing.TB) *tenantcache.Memory {
	t.Helper()
	store, err := tenantcache.NewMemory(tenantcache.MemoryConfig{})
	require.NoError(t, err)
	t.Cleanup(store.Close)
	return store
}

// lostRedis makes a store in a Redis that is not there.
func lostRedis(t testing.TB) *tenantcache.Redis {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	store, err := tenantcache.NewRedis(client, tenantcache.RedisConfig{})
	require.NoError(t, err)
	t.Cleanup(store.Close)
	return store
}

func limiter(t testing.TB) *tenantlimit.Limiter {
	t.Helper()
	l, err := tenantlimit.New(tenantlimit.Config{Plans: map[string]tenantlimit.Plan{
		"free": {Limits: tenantlimit.Limits{Rate: tenantlimit.PerHour(1, 2)}},
	}})
	require.NoError(t, err)
	t.Cleanup(l.Close)
	return l
}

// series are what a scrape has, by name and by labels, each as "name=value" and in order.
type series map[string]map[string]*dto.Metric

// scrape gathers collectors as Prometheus would, and finds fault with what is not quite right.
func scrape(t testing.TB, collectors ...prometheus.Collector) series {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	for _, c := range collectors {
		require.NoError(t, registry.Register(c))
	}
	families, err := registry.Gather()
	require.NoError(t, err)
	all := series{}
	for _, f := range families {
		all[f.GetName()] = map[string]*dto.Metric{}
		for _, m := range f.GetMetric() {
			key := ""
			for _, l := range m.GetLabel() {
				if key != "" {
					key += ","
				}
				key += l.GetName() + "=" + l.GetValue()
			}
			all[f.GetName()][key] = m
		}
	}
	return all
}

// value returns the value of a counter or gauge, or the count of a histogram.
func (s series) value(t testing.TB, name, labels string) float64 {
	t.Helper()
	m := s[name][labels]
	require.NotNil(t, m, "no %s{%s}; there are %v", name, labels, keys(s[name]))
	switch {
	case m.Counter != nil:
		return m.Counter.GetValue()
	case m.Histogram != nil:
		return float64(m.Histogram.GetSampleCount())
	}
	return m.Gauge.GetValue()
}

// count returns how many series there are, each bucket counted.
func (s series) count() (n int) {
	for _, family := range s {
		for _, m := range family {
			n += 1 + len(m.GetHistogram().GetBucket())
		}
	}
	return n
}

func keys[V any](m map[string]V) (all []string) {
	for k := range maps.Keys(m) {
		all = append(all, k)
	}
	return all
}

// requirePanic requires that f panics with a text that has want in it.
func requirePanic(t testing.TB, want string, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		require.Contains(t, recover(), want)
	}()
	f()
	t.Fatal("it does not panic")
}
