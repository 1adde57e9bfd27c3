package tenantlimit

import (
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

func TestStarterPlansAreGood(t *testing.T) {
	plans := StarterPlans()
	l := open(t, Config{Plans: plans})
	for name, want := range map[string]string{
		"free": "60 per 1m0s, burst 10", "pro": "600 per 1m0s, burst 50", "enterprise": "6000 per 1m0s, burst 200",
	} {
		require.Equal(t, want, plans[name].Rate.String())
	}
	clear(plans)
	require.Len(t, *l.plans.Load(), 3, "the Limiter has a copy")
}

func TestBadPlansAreRefusedByName(t *testing.T) {
	good := PerMinute(1, 1)
	for _, c := range []struct {
		plan Plan
		want string
	}{
		{Plan{}, `plan "p": Rate is not set; say Unlimited where no bound is meant`},
		{rated(PerMinute(0, 1)), `plan "p": Rate has Requests 0; want 1 to 1000000000000`},
		{rated(PerMinute(-5, 1)), `plan "p": Rate has Requests -5; want 1 to 1000000000000`},
		{rated(PerMinute(math.MaxInt, 1)), `plan "p": Rate has Requests 9223372036854775807; want 1 to 1000000000000`},
		{rated(PerMinute(1, 0)), `plan "p": Rate has Burst 0; want 1 to 1000000000000`},
		{rated(PerMinute(1, -1)), `plan "p": Rate has Burst -1; want 1 to 1000000000000`},
		{rated(Rate{Requests: 1, Burst: 1}), `plan "p": Rate has Period 0s; want 1µs or more`},
		{rated(Rate{Requests: 1, Burst: 1, Period: -time.Second}), `plan "p": Rate has Period -1s; want 1µs or more`},
		{rated(Rate{Requests: 1, Burst: 1e6, Period: 10000 * time.Hour}), `plan "p": Rate takes more than 100 years to fill a Burst of 1000000`},
		{rated(Rate{Requests: 1, Unlimited: true}), `plan "p": Rate is Unlimited and has numbers; want one of them`},
		{Plan{Limits: Limits{Rate: good, Concurrency: -1}}, `plan "p": Concurrency is -1; want 0 or more`},
		{Plan{Limits: Limits{Rate: good}, Endpoints: map[string]Limits{"": {Rate: good}}}, `plan "p": an endpoint has no name`},
		{Plan{Limits: Limits{Rate: good}, Endpoints: map[string]Limits{"e": {}}}, `plan "p", endpoint "e": no limit is set`},
		{Plan{Limits: Limits{Rate: good}, Endpoints: map[string]Limits{"e": {Rate: PerHour(0, 1)}}}, `plan "p", endpoint "e": Rate has Requests 0; want 1 to 1000000000000`},
		{Plan{Limits: Limits{Rate: good}, Endpoints: map[string]Limits{"e": {Concurrency: -1}}}, `plan "p", endpoint "e": Concurrency is -1; want 0 or more`},
	} {
		_, err := New(Config{Plans: map[string]Plan{"p": c.plan}})
		require.EqualError(t, err, "tenantlimit: "+c.want)
	}
	_, err := New(Config{Plans: map[string]Plan{"a": {}, "b": rated(PerHour(0, 0))}, Timeout: -1})
	require.Equal(t, 3, len(strings.Split(err.Error(), "\n")), "each of them, and the rest of the Config: %v", err)
}

func TestABadConfigIsRefused(t *testing.T) {
	for want, c := range map[string]Config{
		"tenantlimit: there are no plans; StarterPlans has some":                        {},
		"tenantlimit: Config.Redis is a nil *redis.Client":                              {Redis: (*redis.Client)(nil)},
		"tenantlimit: Config.Directory is a nil *tenantlimit.pointer":                   {Directory: (*pointer)(nil)},
		"tenantlimit: Config.OnLoss is OnLoss(3); want UseLocal, AllowAll or RefuseAll": {OnLoss: 3},
		"tenantlimit: Config.Timeout is -1s; want 0 or more":                            {Timeout: -time.Second},
		"tenantlimit: Config.Retry is -1s; want 0 or more":                              {Retry: -time.Second},
		"tenantlimit: Config.Lease is 1ms; want 100ms or more":                          {Lease: time.Millisecond},
		`tenantlimit: Config.Prefix is "{x}"; want one without braces`:                  {Prefix: "{x}"},
	} {
		if !strings.Contains(want, "plans") {
			c.Plans = StarterPlans()
		}
		_, err := New(c)
		require.EqualError(t, err, want)
	}
}

type pointer struct{ directory }

func TestALimiterComesFromNew(t *testing.T) {
	require.PanicsWithValue(t, "tenantlimit: a Limiter must come from New", func() { _, _ = new(Limiter).Take(as("acme"), Call{}) })
}

func TestFullBucketsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, plan(rated(PerSecond(10, 10))))
		for i := range 50_000 {
			pass(t, l, fmt.Sprintf("tenant-%d", i), Call{})
			if i%1000 == 0 {
				time.Sleep(time.Second)
			}
		}
		require.LessOrEqual(t, l.Stats().LocalBuckets, 2*sweepFirst)
	})
}

func TestLossAndReturnAreLogged(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	config := plan(rated(PerHour(1, 10)))
	config.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	config.Timeout = time.Minute
	l, s := lossy(t, config)
	s.Kill()
	lose(t, l)
	require.NoError(t, s.Restart())
	regain(t, l)
	require.Equal(t, "level=WARN msg=\"tenantlimit: Redis is lost\" calls=local\nlevel=INFO msg=\"tenantlimit: Redis is back\"\n", log.String())
}
