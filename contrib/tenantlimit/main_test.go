package tenantlimit

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

func TestMain(m *testing.M) {
	if os.Getenv(envWorker) != "" {
		work()
		return
	}
	logging.Disable() // go-redis reports each server that a test has killed
	code := m.Run()
	if s, err := sharedServer(); err == nil {
		_ = s.Close()
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// sharedServer is for the tests that do no harm to it. Each has a prefix of its own.
var sharedServer = sync.OnceValues(func() (*redistest.Server, error) { return redistest.Start(context.Background()) })

func server(t testing.TB) *redistest.Server {
	t.Helper()
	s, err := sharedServer()
	require.NoError(t, err)
	return s
}

// clientOf makes a client with these options, but for the address.
func clientOf(t testing.TB, s *redistest.Server, options redis.Options) *redis.Client {
	t.Helper()
	options.Addr = s.Addr
	client := redis.NewClient(&options)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// open makes a Limiter that is closed after the test.
func open(t testing.TB, c Config) *Limiter {
	t.Helper()
	l, err := New(c)
	require.NoError(t, err)
	t.Cleanup(l.Close)
	return l
}

// shared is open on the shared server, with more patience than a crowded machine needs.
func shared(t testing.TB, c Config) *Limiter {
	t.Helper()
	c.Redis = clientOf(t, server(t), redis.Options{ContextTimeoutEnabled: true})
	c.Prefix = prefix(t)
	c.Timeout = orDefault(c.Timeout, time.Minute)
	return open(t, c)
}

const (
	// shortLease is waited for. It is renewed thrice in its time, also by a process that has to wait for a CPU.
	shortLease = 3 * time.Second
	// longTimeout is waited for where Redis is silent, and long enough for its answer where it is not.
	longTimeout = time.Second
)

// prefix is one of the caller's own, also if the test runs again.
func prefix(t testing.TB) string { return t.Name() + ":" + rand.Text() + ":" }

// backend is one of the two ways to count, for tests of promises that both keep.
type backend struct {
	*testing.T
	open func(Config) *Limiter
	pass func(l *Limiter, d time.Duration) // lets time pass
}

// both runs a test within the process, by synctest's clock, and on Redis.
func both(t *testing.T, test func(b *backend)) {
	t.Parallel()
	t.Run("local", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			test(&backend{T: t, open: func(c Config) *Limiter { return open(t, c) },
				pass: func(_ *Limiter, d time.Duration) { time.Sleep(d) }})
		})
	})
	t.Run("redis", func(t *testing.T) {
		t.Parallel()
		test(&backend{T: t, open: func(c Config) *Limiter { return shared(t, c) },
			pass: func(l *Limiter, d time.Duration) { shift(t, l, d) }})
	})
}

// shifted moves all that Redis has counted back in time: what it would find if its clock had gone forward, or
// backwards if that is negative.
var shifted = redis.NewScript(`
for _, key in ipairs(KEYS) do
	if redis.call('TYPE', key).ok == 'string' then
		local tokens, was = struct.unpack('<dd', redis.call('GET', key))
		redis.call('SET', key, struct.pack('<dd', tokens, was - ARGV[1]), 'KEEPTTL')
	else
		for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do
			redis.call('ZINCRBY', key, -ARGV[1], id)
		end
	end
end`)

func shift(t testing.TB, l *Limiter, d time.Duration) {
	t.Helper()
	if keys := keysOf(t, l); len(keys) > 0 {
		err := shifted.Run(context.Background(), l.config.Redis, keys, d.Microseconds()).Err()
		if err != redis.Nil {
			require.NoError(t, err)
		}
	}
}

func keysOf(t testing.TB, l *Limiter) []string {
	t.Helper()
	var keys []string
	scan := l.config.Redis.Scan(context.Background(), 0, l.config.Prefix+"*", 100).Iterator()
	for scan.Next(context.Background()) {
		keys = append(keys, scan.Val())
	}
	require.NoError(t, scan.Err())
	return keys
}

// plan is a Config with one plan, which the tenants of as are on.
func plan(p Plan) Config { return Config{Plans: map[string]Plan{"plan": p}} }

func rated(r Rate) Plan { return Plan{Limits: Limits{Rate: r}} }

func slots(n int) Plan { return Plan{Limits: Limits{Rate: Rate{Unlimited: true}, Concurrency: n}} }

// as is the context of a tenant as a Middleware would leave it.
func as(tenant string) context.Context {
	return pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{ID: tenant, Plan: "plan"})
}

// pass requires that a call passes.
func pass(t testing.TB, l *Limiter, tenant string, c Call) *Grant {
	t.Helper()
	g, err := l.Take(as(tenant), c)
	require.NoError(t, err)
	return g
}

// refused requires that a call is refused.
func refused(t testing.TB, l *Limiter, tenant string, c Call, kind Kind) *LimitError {
	t.Helper()
	g, err := l.Take(as(tenant), c)
	require.ErrorIs(t, err, ErrLimited)
	require.Nil(t, g)
	e := (*LimitError)(nil)
	require.ErrorAs(t, err, &e)
	require.Equal(t, kind, e.Kind, "%v", err)
	return e
}

// passes counts how many of n calls pass.
func passes(t testing.TB, l *Limiter, tenant string, c Call, n int) (passed int) {
	t.Helper()
	for range n {
		g, err := l.Take(as(tenant), c)
		if err == nil {
			g.Release()
			passed++
		} else {
			require.ErrorIs(t, err, ErrLimited)
		}
	}
	return passed
}
