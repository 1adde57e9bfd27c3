package tenantlimit

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

func TestAClockThatGoesBackNeitherLocksOutNorHandsOut(t *testing.T) {
	t.Parallel()
	for _, back := range []time.Duration{time.Second, time.Hour, 10 * 365 * 24 * time.Hour} {
		l := shared(t, plan(rated(PerHour(60, 10))))
		l.config.Prefix += back.String() + ":"
		pass(t, l, "acme", Call{Cost: 8})
		shift(t, l, -back)
		// What was left is left, and flows in as ever from now on, also if the first call after is refused.
		e := refused(t, l, "acme", Call{Cost: 3}, KindRate)
		require.Equal(t, 2, e.State.Remaining, "%v", back)
		require.LessOrEqual(t, e.RetryAfter, time.Minute+time.Microsecond)
		shift(t, l, e.RetryAfter)
		pass(t, l, "acme", Call{Cost: 3})
		refused(t, l, "acme", Call{}, KindRate)
		shift(t, l, 10*time.Minute)
		require.Equal(t, 10, passes(t, l, "acme", Call{}, 20))
	}
}

func TestSlotsComeBackAlsoWhenTheClockGoesBack(t *testing.T) {
	t.Parallel()
	for _, back := range []time.Duration{time.Second, time.Hour, 10 * 365 * 24 * time.Hour} {
		config := plan(slots(1))
		config.Lease = time.Hour // so that its holder does not renew it in this test
		l := shared(t, config)
		l.config.Prefix += back.String() + ":"
		held := pass(t, l, "acme", Call{})
		shift(t, l, -back)
		refused(t, l, "acme", Call{}, KindConcurrency)
		shift(t, l, config.Lease) // it ends no later than one that is taken now
		require.Equal(t, 1, pass(t, l, "acme", Call{}).State.UnderWay, "%v", back)
		held.Release()
	}
}

func TestAClockThatGoesForwardHandsOutOneBurst(t *testing.T) {
	t.Parallel()
	l := shared(t, plan(rated(PerHour(60, 10))))
	require.Equal(t, 10, passes(t, l, "acme", Call{}, 20))
	shift(t, l, 1000*time.Hour)
	require.Equal(t, 10, passes(t, l, "acme", Call{}, 20))
	shift(t, l, -1000*time.Hour)
	require.Zero(t, passes(t, l, "acme", Call{}, 20))
	shift(t, l, time.Minute+time.Millisecond)
	require.Equal(t, 1, passes(t, l, "acme", Call{}, 20))
}

func TestABucketOfNonsenseIsEmptyAndFills(t *testing.T) {
	t.Parallel()
	l := shared(t, plan(rated(PerHour(60, 10))))
	pass(t, l, "acme", Call{})
	key := keysOf(t, l)[0]
	nan, negative := "\x00\x00\x00\x00\x00\x00\xf8\x7f", "\x00\x00\x00\x00\x00\x00\xf0\xc0"
	for _, nonsense := range []string{"", "1", nan + nan, negative + nan, negative + negative, strings.Repeat("x", 16), strings.Repeat("\xff", 16)} {
		require.NoError(t, l.config.Redis.Set(t.Context(), key, nonsense, 0).Err())
		require.LessOrEqual(t, passes(t, l, "acme", Call{}, 30), 10, "%q", nonsense)
		refused(t, l, "acme", Call{}, KindRate)
		shift(t, l, 2*time.Minute+time.Millisecond)
		require.Equal(t, 2, passes(t, l, "acme", Call{}, 30), "%q", nonsense)
	}
}

func TestMemoryDoesNotGrowWithCalls(t *testing.T) {
	t.Parallel()
	p := rated(PerHour(1000, 1_000_000)) // no bucket is full again, and gone, before it is looked at
	p.Concurrency = 1
	l := shared(t, plan(p))
	memory := func() (sum int64) {
		for _, key := range keysOf(t, l) {
			n, err := l.config.Redis.MemoryUsage(t.Context(), key).Result()
			require.NoError(t, err)
			sum += n
		}
		return sum
	}
	held := pass(t, l, "acme", Call{})
	before := memory()
	held.Release()
	passes(t, l, "acme", Call{}, 2000)
	held = pass(t, l, "acme", Call{})
	// IDs of leases count up, and have a digit more by now.
	require.LessOrEqual(t, memory(), before+16)
	require.LessOrEqual(t, memory(), int64(512))
	held.Release()
}

// trips counts commands and pipelines.
type trips struct {
	redis.Hook
	atomic.Int64
}

func (n *trips) DialHook(next redis.DialHook) redis.DialHook { return next }

func (n *trips) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, c redis.Cmder) error { n.Add(1); return next(ctx, c) }
}

func (n *trips) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, c []redis.Cmder) error { n.Add(1); return next(ctx, c) }
}

func TestADecisionIsOneRoundTrip(t *testing.T) {
	t.Parallel()
	rateAndSlot := rated(PerHour(1, 2))
	rateAndSlot.Concurrency = 1
	for _, p := range []Plan{rated(PerHour(1, 2)), slots(1), rateAndSlot} {
		l := shared(t, plan(p))
		pass(t, l, "first", Call{}).Release() // has the server learn the scripts
		n := &trips{}
		l.config.Redis.AddHook(n)
		g := pass(t, l, "acme", Call{})
		require.EqualValues(t, 1, n.Load(), "%+v", p)
		for _, err := l.Take(as("acme"), Call{}); err == nil; _, err = l.Take(as("acme"), Call{}) {
			require.EqualValues(t, 2, n.Load(), "%+v", p)
			n.Store(1)
		}
		require.EqualValues(t, 2, n.Load(), "a refusal is one, too: %+v", p)
		g.Release()
		released := int64(2)
		if p.Concurrency > 0 {
			released = 3
		}
		require.EqualValues(t, released, n.Load(), "%+v", p)
	}
}

func TestKeysGoWhenTheirBucketIsFull(t *testing.T) {
	t.Parallel()
	p := rated(PerSecond(100, 10))
	p.Concurrency = 1
	config := plan(p)
	config.Lease = MinLease
	l := shared(t, config)
	for range 10 {
		pass(t, l, "acme", Call{}).Release()
	}
	held := pass(t, l, "globex", Call{})
	l.Close() // so that nobody renews
	require.Eventually(t, func() bool { return len(keysOf(t, l)) == 0 }, time.Minute, 10*time.Millisecond)
	held.Release()
}

func TestOneTenantsKeysAreInOneSlotOfACluster(t *testing.T) {
	t.Parallel()
	servers, err := redistest.StartCluster(t.Context())
	require.NoError(t, err)
	var addrs []string
	for _, s := range servers {
		t.Cleanup(func() { _ = s.Close() })
		addrs = append(addrs, s.Addr)
	}
	client := redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs})
	t.Cleanup(func() { _ = client.Close() })
	config := plan(Plan{Limits: Limits{Rate: PerHour(1, 3), Concurrency: 2},
		Endpoints: map[string]Limits{"{export}": {Rate: PerHour(1, 2)}, "}{": {Concurrency: 1}}})
	config.Redis, config.Timeout, config.OnLoss = client, time.Minute, RefuseAll
	l := open(t, config)
	for i := range 50 { // on all three nodes
		tenant := fmt.Sprintf("tenant-%d", i)
		first := pass(t, l, tenant, Call{Endpoint: "{export}"})
		second := pass(t, l, tenant, Call{Endpoint: "}{"})
		refused(t, l, tenant, Call{Endpoint: "}{"}, KindConcurrency)
		first.Release()
		second.Release()
		require.Equal(t, 2, passes(t, l, tenant, Call{}, 5))
	}
	require.NoError(t, client.ForEachMaster(t.Context(), func(ctx context.Context, c *redis.Client) error {
		n, err := c.DBSize(ctx).Result()
		if n == 0 {
			return fmt.Errorf("no tenant is on %v", c)
		}
		return err
	}))
	require.Zero(t, l.Stats().RedisErrors)
}

// lossy is a Limiter on a server of its own, that the test may harm. Its client would wait for ever.
func lossy(t *testing.T, c Config) (*Limiter, *redistest.Server) {
	t.Helper()
	return lossyWith(t, c, redis.Options{ReadTimeout: -1, WriteTimeout: -1, DialerRetries: 1})
}

func lossyWith(t *testing.T, c Config, o redis.Options) (*Limiter, *redistest.Server) {
	t.Helper()
	s, err := redistest.Start(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	c.Redis = clientOf(t, s, o)
	c.Retry = orDefault(c.Retry, 10*time.Millisecond)
	return open(t, c), s
}

// lose takes until Redis is left alone.
func lose(t *testing.T, l *Limiter) {
	t.Helper()
	for range tripAfter {
		g, _ := l.Take(as("loser"), Call{})
		g.Release()
	}
	require.EqualValues(t, tripAfter, l.Stats().RedisErrors)
}

// regain waits until Redis decides again.
func regain(t *testing.T, l *Limiter) {
	t.Helper()
	require.Eventually(t, func() bool {
		g, _ := l.Take(as("loser"), Call{})
		g.Release()
		return !l.Stats().Lost
	}, time.Minute, time.Millisecond)
}

func TestRedisKilledAndRestarted(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		loss   OnLoss
		passed int // of 20 meanwhile
	}{{UseLocal, 10}, {AllowAll, 20}, {RefuseAll, 0}} {
		t.Run(c.loss.String(), func(t *testing.T) {
			t.Parallel()
			config := plan(rated(PerHour(1, 10)))
			config.OnLoss = c.loss
			config.Timeout = time.Minute
			l, s := lossy(t, config)
			require.Equal(t, 10, passes(t, l, "acme", Call{}, 20))

			s.Kill()
			passed := 0
			for range 20 {
				g, err := l.Take(as("acme"), Call{})
				if err == nil {
					passed++
				} else if c.loss == RefuseAll {
					require.ErrorIs(t, err, ErrLost)
					require.ErrorIs(t, err, pgxtenant.ErrUnreachable)
					require.NotErrorIs(t, err, ErrLimited)
				} else {
					require.ErrorIs(t, err, ErrLimited)
				}
				g.Release()
			}
			require.Equal(t, c.passed, passed)
			stats := l.Stats()
			require.EqualValues(t, 20, stats.Fallbacks)
			require.GreaterOrEqual(t, stats.RedisErrors, uint64(tripAfter))
			if c.loss == AllowAll {
				require.True(t, pass(t, l, "acme", Call{}).State.Rate.Unlimited, "nothing is known of its limits")
			}

			require.NoError(t, s.Restart())
			regain(t, l)
			require.Equal(t, 10, passes(t, l, "acme", Call{}, 20), "the server has forgotten: one burst, no more")
		})
	}
}

func TestASilentRedisKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	for name, options := range map[string]redis.Options{
		"client without time-outs":      {ReadTimeout: -1, WriteTimeout: -1},
		"client that looks at contexts": {ReadTimeout: time.Hour, ContextTimeoutEnabled: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := plan(rated(PerHour(1, 10)))
			config.Retry, config.Timeout = time.Hour, longTimeout
			l, s := lossyWith(t, config, options)
			pass(t, l, "acme", Call{})
			require.NoError(t, s.Pause())
			require.Equal(t, 10, passes(t, l, "acme", Call{}, 20))
			stats := l.Stats()
			require.EqualValues(t, tripAfter, stats.RedisErrors, "then it is not asked any more")
			require.EqualValues(t, 20, stats.Fallbacks)
			require.True(t, stats.Lost)
			require.NoError(t, s.Resume())
		})
	}
}

func TestACallWaitsNoLongerThanItsContext(t *testing.T) {
	t.Parallel()
	config := plan(rated(PerHour(1, 10)))
	config.Timeout = time.Hour
	for _, prompt := range []bool{false, true} {
		l, s := lossyWith(t, config, redis.Options{ReadTimeout: time.Hour, ContextTimeoutEnabled: prompt})
		require.NoError(t, s.Pause())
		ctx, cancel := context.WithTimeout(as("acme"), 10*time.Millisecond)
		defer cancel()
		_, err := l.Take(ctx, Call{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Zero(t, l.Stats().Fallbacks)
		if !prompt { // the other is looked at again after Config.Timeout
			ctx, cancel = context.WithCancel(as("acme"))
			defer time.AfterFunc(10*time.Millisecond, cancel).Stop()
			_, err = l.Take(ctx, Call{})
			require.ErrorIs(t, err, context.Canceled)
			require.EqualValues(t, 1, l.Stats().RedisErrors, "a caller that went away says nothing about Redis")
		}
		require.NoError(t, s.Resume())
	}
}

func TestCallsThatNobodyWaitsForAreNotSentLater(t *testing.T) {
	t.Parallel()
	config := plan(rated(PerHour(1, 10)))
	config.Timeout = time.Minute
	l, s := lossy(t, config)
	pass(t, l, "acme", Call{})
	require.NoError(t, s.Pause())
	ctx, cancel := context.WithCancel(as("acme"))
	var calls sync.WaitGroup
	call := func() {
		if _, err := l.Take(ctx, Call{}); !errors.Is(err, context.Canceled) {
			t.Errorf("Take = %v; want context.Canceled", err)
		}
	}
	queued := func(n int) func() bool {
		return func() bool {
			l.remote.mu.Lock()
			defer l.remote.mu.Unlock()
			return l.remote.flight != nil && len(l.remote.queue) == n
		}
	}
	calls.Go(call)
	require.Eventually(t, queued(0), time.Minute, time.Millisecond, "one is on its way")
	for range 4 {
		calls.Go(call)
	}
	require.Eventually(t, queued(4), time.Minute, time.Millisecond, "the others wait for it")
	cancel()
	calls.Wait()
	require.NoError(t, s.Resume())
	require.GreaterOrEqual(t, passes(t, l, "acme", Call{}, 20), 8, "one at most has been counted")
}

func TestAServerThatHasForgottenItsScriptsIsToldThemAgain(t *testing.T) {
	t.Parallel()
	config := plan(rated(PerHour(1, 200)))
	config.Timeout, config.OnLoss = time.Minute, RefuseAll
	l, _ := lossy(t, config)
	var passed atomic.Int64
	var calls sync.WaitGroup
	for i := range 8 {
		calls.Go(func() {
			for range 40 {
				if i == 0 {
					if err := l.config.Redis.ScriptFlush(t.Context()).Err(); err != nil {
						t.Error(err)
					}
				}
				if _, err := l.Take(as("acme"), Call{}); err == nil {
					passed.Add(1)
				} else if !errors.Is(err, ErrLimited) {
					t.Error(err)
				}
			}
		})
	}
	calls.Wait()
	require.EqualValues(t, 200, passed.Load())
}

func TestASlotThatNobodyWaitedForComesBack(t *testing.T) {
	t.Parallel()
	config := plan(slots(1))
	config.Lease, config.Retry, config.Timeout = time.Hour, time.Millisecond, longTimeout
	l, s := lossy(t, config)
	pass(t, l, "acme", Call{}).Release()
	require.NoError(t, s.Pause())
	lose(t, l) // the server takes a slot of the tenant "loser", and says so too late
	require.NoError(t, s.Resume())
	other := plan(slots(1))
	other.Redis, other.Lease, other.Timeout, other.OnLoss = l.config.Redis, time.Hour, time.Minute, RefuseAll
	o := open(t, other)
	require.Eventually(t, func() bool {
		g, err := o.Take(as("loser"), Call{})
		g.Release()
		return err == nil
	}, time.Minute, 10*time.Millisecond)
}

// However many slots have to be renewed, or have been given back while they were, all are.
func TestManySlotsAreRenewedAndGivenBack(t *testing.T) {
	t.Parallel()
	l := shared(t, plan(slots(1)))
	var ids []any
	for range 10_000 {
		ids = append(ids, l.remote.leases.newID())
	}
	key := l.config.Prefix + "{acme}c"
	l.remote.renew(t.Context(), key, ids)
	require.EqualValues(t, len(ids), l.config.Redis.ZCard(t.Context(), key).Val())
	l.remote.giveBack(key, ids...)
	pass(t, l, "acme", Call{}).Release()
}

func TestSlotsAreKnownAgainAfterARestart(t *testing.T) {
	t.Parallel()
	config := plan(slots(2))
	config.Lease, config.OnLoss, config.Timeout = shortLease, RefuseAll, time.Minute
	l, s := lossy(t, config)
	first, second := pass(t, l, "acme", Call{}), pass(t, l, "acme", Call{})
	s.Kill()
	require.NoError(t, s.Restart())
	require.Eventually(t, func() bool {
		n, err := l.config.Redis.ZCard(t.Context(), l.config.Prefix+"{acme}c").Result()
		return err == nil && n == 2
	}, time.Minute, 10*time.Millisecond, "their holder renews them")
	refused(t, l, "acme", Call{}, KindConcurrency)
	first.Release()
	pass(t, l, "acme", Call{}).Release()
	second.Release()
	require.Zero(t, l.Stats().Leases)
}
