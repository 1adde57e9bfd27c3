package tenantcache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

// startRedis starts a server of the test's own, and a client of it.
func startRedis(t *testing.T, settings ...string) (*redistest.Server, *redis.Client) {
	t.Helper()
	server, err := redistest.Start(t.Context(), settings...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	client := redis.NewClient(&redis.Options{Addr: server.Addr, DialerRetries: 1})
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	return server, client
}

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestRedisIsKilledAndComesBack(t *testing.T) {
	t.Parallel()
	server, client := startRedis(t)
	log := new(syncBuffer)
	store := newRedisOn(t, client, tenantcache.RedisConfig{
		BreakerFailures: 2, BreakerPause: 50 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	strict := newRedisOn(t, client, tenantcache.RedisConfig{OnFailure: tenantcache.ReturnError, BreakerFailures: -1})
	cache := newCache(t, store, tenantcache.Config[string]{})
	strictCache := newCache(t, strict, tenantcache.Config[string]{})
	ctx := as(t, "acme")
	require.NoError(t, cache.Set(ctx, "k", "cached", time.Hour))
	requireHit(t, ctx, strictCache, "k", "cached")

	server.Kill()
	for store.Stats().BreakerOpens == 0 {
		value, err := cache.GetOrLoad(ctx, "k", 0, returns("source"))
		require.NoError(t, err)
		require.Equal(t, "source", value)
	}
	requireMiss(t, ctx, cache, "k")
	require.Contains(t, log.String(), "circuit breaker open")
	// Nobody is told that something was kept, or is gone, when that is not so.
	require.ErrorIs(t, cache.Set(ctx, "k", "v", 0), tenantcache.ErrUnavailable)
	require.ErrorIs(t, cache.Delete(ctx, "k"), tenantcache.ErrUnavailable)
	require.ErrorIs(t, cache.Invalidate(ctx), tenantcache.ErrUnavailable)
	require.ErrorIs(t, store.InvalidateTenant(ctx), tenantcache.ErrUnavailable)
	_, err := strictCache.GetOrLoad(ctx, "k", 0, noLoad(t))
	require.ErrorIs(t, err, tenantcache.ErrUnavailable)
	require.ErrorContains(t, err, `tenant "acme"`)
	_, _, err = strictCache.Get(ctx, "k")
	require.ErrorIs(t, err, tenantcache.ErrUnavailable)
	require.Equal(t, tenantcache.BreakerClosed, strict.Stats().Breaker)

	require.NoError(t, server.Restart())
	require.Eventually(t, func() bool {
		value, err := cache.GetOrLoad(ctx, "k", 0, returns("source"))
		if err != nil || value != "source" {
			t.Errorf("got %q, %v", value, err)
		}
		_, ok, _ := cache.Get(ctx, "k")
		return ok
	}, slow, time.Millisecond)
	require.Equal(t, tenantcache.BreakerClosed, store.Stats().Breaker)
	require.Contains(t, log.String(), "circuit breaker closed")
	require.NotZero(t, store.Stats().Failures)
}

// A Redis that accepts connections and says nothing.
func TestARedisThatHangsHoldsNobody(t *testing.T) {
	t.Parallel()
	server, client := startRedis(t)
	hasty := newRedisOn(t, client, tenantcache.RedisConfig{Timeout: 10 * time.Millisecond, BreakerFailures: 3, BreakerPause: slow})
	patient := newRedisOn(t, client, tenantcache.RedisConfig{Timeout: slow})
	ctx := as(t, "acme")
	cache := newCache(t, hasty, tenantcache.Config[string]{})
	patientCache := newCache(t, patient, tenantcache.Config[string]{})
	require.NoError(t, patientCache.Set(ctx, "k", "cached", time.Hour))

	require.NoError(t, server.Pause())
	t.Cleanup(func() { require.NoError(t, server.Resume()) }) // before Close waits for the calls
	for range 3 {
		value, err := cache.GetOrLoad(ctx, "k", 0, returns("source"))
		require.NoError(t, err)
		require.Equal(t, "source", value)
	}
	require.Equal(t, tenantcache.BreakerOpen, hasty.Stats().Breaker)
	require.ErrorIs(t, cache.Delete(ctx, "k"), tenantcache.ErrUnavailable) // it did try
	require.EqualValues(t, 4, hasty.Stats().Failures)

	// The patient one is left by its callers only.
	leaving, leave := context.WithCancel(ctx)
	left := make(chan error, 2)
	go func() { _, _, err := patientCache.Get(leaving, "k"); left <- err }()
	go func() { left <- patientCache.Set(leaving, "k", "v", 0) }()
	leave()
	require.ErrorIs(t, <-left, context.Canceled)
	require.ErrorIs(t, <-left, context.Canceled)
	// Half of the time is left for the load.
	brief, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	_, _, err := patientCache.Get(brief, "k")
	require.NoError(t, err)
	require.NoError(t, brief.Err())
	require.Equal(t, tenantcache.BreakerClosed, patient.Stats().Breaker)
}

func TestAHitIsOneRoundTrip(t *testing.T) {
	t.Parallel()
	client := dial(t, standalone)
	require.NoError(t, client.Ping(t.Context()).Err()) // the handshake is not to be counted
	trips := new(tripCounter)
	client.AddHook(trips)
	store := newRedisOn(t, client, tenantcache.RedisConfig{})
	cache := newCache(t, store, tenantcache.Config[string]{})
	ctx := as(t, "acme")
	for _, step := range []struct {
		what string
		want int32
		do   func() error
	}{
		{"first load", 3, func() error { return second(cache.GetOrLoad(ctx, "k", 0, returns("v"))) }},
		{"hit", 1, func() error { return second(cache.GetOrLoad(ctx, "k", 0, noLoad(t))) }},
		{"get", 1, func() error { _, _, err := cache.Get(ctx, "k"); return err }},
		{"load", 2, func() error { return second(cache.GetOrLoad(ctx, "other", 0, returns("v"))) }},
		{"set", 2, func() error { return cache.Set(ctx, "k", "v", 0) }},
		{"delete", 1, func() error { return cache.Delete(ctx, "k", "other") }},
		{"invalidate", 1, func() error { return cache.Invalidate(ctx) }},
		{"invalidate tenant", 1, func() error { return store.InvalidateTenant(ctx) }},
	} {
		trips.n.Store(0)
		require.NoError(t, step.do())
		require.Equal(t, step.want, trips.n.Load(), step.what)
	}
}

// tripCounter counts commands and pipelines.
type tripCounter struct{ n atomic.Int32 }

func (c *tripCounter) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (c *tripCounter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { c.n.Add(1); return next(ctx, cmd) }
}

func (c *tripCounter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		c.n.Add(1)
		return next(ctx, cmds)
	}
}

// names lists all keys of the test's store.
func names(t *testing.T, client redis.UniversalClient, prefix string) (all []string) {
	t.Helper()
	var mu sync.Mutex
	scan := func(ctx context.Context, node *redis.Client) error {
		found, err := node.Keys(ctx, prefix+"{*").Result()
		mu.Lock()
		defer mu.Unlock()
		all = append(all, found...)
		return err
	}
	var err error
	switch client := client.(type) {
	case *redis.ClusterClient:
		err = client.ForEachMaster(t.Context(), scan)
	case *redis.Client:
		err = scan(t.Context(), client)
	}
	require.NoError(t, err)
	return all
}

func TestAllThatIsKeptExpires(t *testing.T) {
	t.Parallel()
	client := dial(t, standalone)
	store := newRedisOn(t, client, tenantcache.RedisConfig{})
	cache := newCache(t, store, tenantcache.Config[string]{TTL: time.Hour, LoadTimeout: 2 * time.Minute})
	ctx := as(t, "acme")
	require.NoError(t, cache.Set(ctx, "set", "v", 0))
	require.NoError(t, cache.Set(ctx, "longer", "v", 2*time.Hour))
	require.NoError(t, cache.Set(ctx, "shorter", "v", time.Minute))
	_, err := cache.GetOrLoad(ctx, "loaded", 3*time.Hour, returns("v"))
	require.NoError(t, err)
	require.NoError(t, cache.Delete(ctx, "deleted"))
	all := names(t, client, prefixOf(t))
	require.GreaterOrEqual(t, len(all), 6)
	for _, name := range all {
		ttl := client.TTL(ctx, name).Val()
		require.Positive(t, ttl, name)
		if !strings.Contains(name, ":e") { // the generations outlive the longest entry
			require.Greater(t, ttl, 3*time.Hour, name)
		}
	}
}

// Redis may evict anything. A generation that is gone must not come back with what was written before.
func TestALostGenerationRevivesNothing(t *testing.T) {
	t.Parallel()
	client := dial(t, standalone)
	store := newRedisOn(t, client, tenantcache.RedisConfig{})
	cache := newCache(t, store, tenantcache.Config[string]{})
	ctx := as(t, "acme")
	for _, suffix := range []string{"acme:t", "acme:n:test"} {
		require.NoError(t, cache.Set(ctx, "k", "old", time.Hour))
		require.NoError(t, cache.Invalidate(ctx))
		require.NoError(t, cache.Set(ctx, "other", "new", time.Hour))
		require.EqualValues(t, 1, client.Del(ctx, prefixOf(t)+"{}"+suffix).Val())
		requireMiss(t, ctx, cache, "k")
		require.NoError(t, cache.Set(ctx, "another", "new", time.Hour)) // makes a new generation
		requireMiss(t, ctx, cache, "k")
		requireMiss(t, ctx, cache, "other")
		requireHit(t, ctx, cache, "another", "new")
	}
	// All at once, in the middle of a load.
	g := newGate("old", nil)
	loading := getOrLoad(ctx, cache, "k", g.load)
	<-g.begun
	for _, name := range names(t, client, prefixOf(t)) {
		client.Del(ctx, name)
	}
	require.NoError(t, cache.Set(ctx, "another", "new", time.Hour))
	close(g.open)
	require.Equal(t, result{"old", nil}, <-loading)
	requireMiss(t, ctx, cache, "k")
}

// What a broken connection, a proxy or a hand at the console puts under a key is not believed.
func TestAnEntryThatIsNotTheKeysOwnIsAMiss(t *testing.T) {
	t.Parallel()
	client := dial(t, standalone)
	store := newRedisOn(t, client, tenantcache.RedisConfig{})
	cache := newCache(t, store, tenantcache.Config[string]{})
	acme, globex := as(t, "acme"), as(t, "globex")
	require.NoError(t, cache.Set(acme, "k", "acme's", time.Hour))
	require.NoError(t, cache.Set(globex, "k", "globex's", time.Hour))
	requireHit(t, acme, cache, "k", "acme's")
	for _, suffix := range []string{":t", ":n:test", ":e4:test:k"} { // all of globex's as acme's
		require.EqualValues(t, 1, client.Copy(acme, prefixOf(t)+"{}globex"+suffix, prefixOf(t)+"{}acme"+suffix, 0, true).Val())
	}
	requireMiss(t, acme, cache, "k")
	require.EqualValues(t, 1, store.Stats().Stale)
	for _, garbage := range []string{"", "v", strings.Repeat("v", 25), strings.Repeat("v", 1000), "\x00"} {
		require.NoError(t, client.Set(acme, prefixOf(t)+"{}acme:e4:test:k", garbage, time.Hour).Err())
		value, err := cache.GetOrLoad(acme, "k", 0, returns("loaded"))
		require.NoError(t, err)
		require.Equal(t, "loaded", value)
		requireHit(t, acme, cache, "k", "loaded")
	}
	require.NoError(t, client.Set(acme, prefixOf(t)+"{}acme:t", "", time.Hour).Err())
	value, err := cache.GetOrLoad(acme, "k", 0, returns("again"))
	require.NoError(t, err)
	require.Equal(t, "again", value)
	requireHit(t, acme, cache, "k", "again")
}

func TestATenantsSlotsInACluster(t *testing.T) {
	t.Parallel()
	client := dial(t, cluster)
	for _, oneSlot := range []bool{true, false} {
		t.Run(fmt.Sprint("oneSlot=", oneSlot), func(t *testing.T) {
			t.Parallel()
			store := newRedisOn(t, client, tenantcache.RedisConfig{OneSlot: oneSlot})
			cache := newCache(t, store, tenantcache.Config[string]{})
			for i := range 40 {
				// A key's braces must not choose the slot.
				require.NoError(t, cache.Set(as(t, "acme"), fmt.Sprintf("{x}%d", i), "v", 0))
			}
			slots := map[int64]bool{}
			all := names(t, client, prefixOf(t))
			require.Len(t, all, 42)
			for _, name := range all {
				slots[client.ClusterKeySlot(t.Context(), name).Val()] = true
			}
			if oneSlot {
				require.Len(t, slots, 1)
			} else {
				require.Greater(t, len(slots), 30)
			}
		})
	}
}

func TestASweepFreesWhatIsInvalidAndNothingElse(t *testing.T) {
	t.Parallel()
	for name, servers := range map[string]func() ([]*redistest.Server, error){"standalone": standalone, "cluster": cluster} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := dial(t, servers)
			store := newRedisOn(t, client, tenantcache.RedisConfig{})
			prefix := prefixOf(t)
			users := newCache(t, store, tenantcache.Config[string]{Namespace: "user"})
			cache := newCache(t, store, tenantcache.Config[string]{})
			acme, acme2 := as(t, "acme"), as(t, "acme2")
			for i := range 20 {
				for _, ctx := range []context.Context{acme, acme2} {
					require.NoError(t, cache.Set(ctx, fmt.Sprint(i), "v", time.Hour))
					require.NoError(t, users.Set(ctx, fmt.Sprint(i), "v", time.Hour))
				}
			}
			foreign := prefix + "{}acme:note"
			require.NoError(t, client.Set(acme, foreign, "not ours", time.Minute).Err())
			require.NoError(t, cache.Delete(acme, "0")) // leaves a tombstone
			require.NoError(t, cache.Invalidate(acme))
			require.NoError(t, cache.Invalidate(acme2))
			require.NoError(t, cache.Set(acme, "new", "v", time.Hour))
			before := len(names(t, client, prefix))

			removed, err := store.Sweep(acme)
			require.NoError(t, err)
			require.Equal(t, 19, removed)
			require.Len(t, names(t, client, prefix), before-19)
			requireHit(t, acme, cache, "new", "v")
			requireHit(t, acme, users, "1", "v")
			require.Equal(t, "not ours", client.Get(acme, foreign).Val())

			sweeping := newRedisOn(t, client, tenantcache.RedisConfig{SweepAfterInvalidate: true})
			require.NoError(t, sweeping.InvalidateTenant(acme))
			require.NoError(t, sweeping.InvalidateTenant(acme2))
			require.Eventually(t, func() bool {
				return len(names(t, client, prefix)) == 5 // the tombstone, the note, and three generations of namespaces
			}, slow, 5*time.Millisecond, "left: %v", names(t, client, prefix))
		})
	}
}

func TestASweepThatFailsIsSaid(t *testing.T) {
	t.Parallel()
	server, client := startRedis(t)
	store := newRedisOn(t, client, tenantcache.RedisConfig{})
	_, err := store.Sweep(t.Context())
	require.Error(t, err)
	ctx, cancel := context.WithCancel(as(t, "acme"))
	cancel()
	_, err = store.Sweep(ctx)
	require.ErrorIs(t, err, context.Canceled)
	server.Kill()
	_, err = store.Sweep(as(t, "acme"))
	require.ErrorIs(t, err, tenantcache.ErrUnavailable)
}

// A Redis that is full refuses writes: loads go on, and what removes is refused as well, which must be said.
func TestARedisThatIsFull(t *testing.T) {
	t.Parallel()
	_, client := startRedis(t, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
	store := newRedisOn(t, client, tenantcache.RedisConfig{BreakerFailures: -1})
	cache := newCache(t, store, tenantcache.Config[string]{})
	ctx := as(t, "acme")
	var err error
	for i := 0; err == nil; i++ {
		err = cache.Set(ctx, fmt.Sprint(i), strings.Repeat("x", 100_000), time.Hour)
	}
	require.ErrorIs(t, err, tenantcache.ErrUnavailable)
	require.ErrorContains(t, err, "OOM")
	value, err := cache.GetOrLoad(ctx, "more", 0, returns("v"))
	require.NoError(t, err)
	require.Equal(t, "v", value)
	require.NoError(t, store.InvalidateTenant(ctx))
	requireMiss(t, ctx, cache, "0")
	require.False(t, errors.Is(err, tenantcache.ErrUnavailable))
}
