package dashboardtest

import (
	"net/http"
	"net/http/httptest"
	"strings"
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
	"github.com/pgxtenant/pgxtenant/contrib/tenantprom"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) {
	logging.Disable() // go-redis reports the Redis that is not there
	pgtest.Main(m)
}

// live is what a service with everything that can be told of exports, on a real server.
func live(t *testing.T) []*dto.MetricFamily {
	t.Helper()
	d := pgtest.New(t)
	config, err := pgxtenant.ParseConfig(d.AppURL())
	require.NoError(t, err)
	config.Admin, err = pgxpool.ParseConfig(d.OwnerURL())
	require.NoError(t, err)
	db, err := pgxtenant.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	ctx := pgxtenant.WithTenant(t.Context(), pgxtenant.Tenant{ID: "acme", Plan: "free"})
	_, err = db.Exec(ctx, "select 1")
	require.NoError(t, err)
	_, err = db.Audit(t.Context())
	require.NoError(t, err)

	memory, err := tenantcache.NewMemory(tenantcache.MemoryConfig{})
	require.NoError(t, err)
	t.Cleanup(memory.Close)
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}) // which is not there, and need not be
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	remote, err := tenantcache.NewRedis(client, tenantcache.RedisConfig{})
	require.NoError(t, err)
	t.Cleanup(remote.Close)
	limiter, err := tenantlimit.New(tenantlimit.Config{Plans: tenantlimit.StarterPlans()})
	require.NoError(t, err)
	t.Cleanup(limiter.Close)

	requests := tenantprom.NewRequests()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /broken", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
	for _, path := range []string{"/", "/nowhere", "/broken"} {
		requests.Middleware(mux).ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", path, nil))
	}

	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(requests, tenantprom.NewCollector(db,
		tenantprom.WithCache("memory", memory), tenantprom.WithCache("redis", remote), tenantprom.WithLimiter("api", limiter)))
	families, err := registry.Gather()
	require.NoError(t, err)
	return families
}

// The check itself finds what it is to find.
func TestTheCheckFindsMistakes(t *testing.T) {
	t.Parallel()
	counter, gauge, histogram := dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_HISTOGRAM
	name := func(s string) *string { return &s }
	label := func(n, v string) *dto.LabelPair { return &dto.LabelPair{Name: &n, Value: &v} }
	bound, value, n := 0.5, 1.0, uint64(1)
	e := newExported([]*dto.MetricFamily{
		{Name: name("a_total"), Type: &counter, Metric: []*dto.Metric{
			{Label: []*dto.LabelPair{label("kind", "x")}, Counter: &dto.Counter{Value: &value}}}},
		{Name: name("b"), Type: &gauge, Metric: []*dto.Metric{{Gauge: &dto.Gauge{Value: &value}}}},
		{Name: name("c_seconds"), Type: &histogram, Metric: []*dto.Metric{
			{Histogram: &dto.Histogram{SampleCount: &n, Bucket: []*dto.Bucket{{UpperBound: &bound, CumulativeCount: &n}}}}}},
	})
	for query, want := range map[string]string{
		`sum by (kind) (rate(a_total{job=~"$job"}[$__rate_interval]))`:      "",
		`histogram_quantile(0.9, sum by (le) (rate(c_seconds_bucket[5m])))`: "",
		`a_total{kind="x"} / ignoring (kind) b`:                             "",
		`sum(rate(c_seconds_sum[5m])) / sum(rate(c_seconds_count[5m])) > 1`: "",
		`sum by (kind) (rate(a_totals[5m]))`:                                "no metric a_totals",
		`rate(c_seconds[5m])`:                                               "no metric c_seconds",
		`a_total{sort="x"}`:                                                 "a_total has no label sort",
		`a_total{kind="y"}`:                                                 "no series of a_total is",
		`sum by (sort) (a_total)`:                                           "sum by sort, which is not among",
		`sum by (kind) (sum(a_total))`:                                      "sum by kind, which is not among",
		`a_total / b`:                                                       "never finds a pair",
		`sum by (kind) (a_total) / sum(b)`:                                  "never finds a pair",
		`a_total * on (sort) b`:                                             "matches on sort",
		`histogram_quantile(0.9, sum(rate(c_seconds_bucket[5m])))`:          "histogram_quantile without le",
		`sum(`: "unclosed left parenthesis",
	} {
		_, errs := e.check(query)
		if want == "" {
			require.Empty(t, errs, query)
			continue
		}
		require.NotEmpty(t, errs, query)
		require.ErrorContains(t, errs[0], want)
	}
	result, _ := e.check(`sum by (kind) (a_total)`)
	require.Equal(t, "kind", strings.Join(result, " "))
}
