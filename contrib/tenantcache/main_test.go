package tenantcache_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

// Servers of the whole package; each test has its own prefix. Whoever kills or pauses one starts its own.
var (
	standalone = sync.OnceValues(func() ([]*redistest.Server, error) {
		s, err := redistest.Start(context.Background())
		return []*redistest.Server{s}, err
	})
	cluster     = sync.OnceValues(func() ([]*redistest.Server, error) { return redistest.StartCluster(context.Background()) })
	ringServers = sync.OnceValues(func() ([]*redistest.Server, error) {
		servers, err := standalone()
		if err != nil {
			return nil, err
		}
		second, err := redistest.Start(context.Background())
		return append(servers[:1:1], second), err
	})
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// slow is a time that no test comes to the end of.
const slow = 2 * time.Minute

// dial returns a client of its own for the test.
func dial(t testing.TB, servers func() ([]*redistest.Server, error)) redis.UniversalClient {
	t.Helper()
	all, err := servers()
	require.NoError(t, err)
	options := &redis.UniversalOptions{IsClusterMode: len(all) > 1}
	for _, s := range all {
		options.Addrs = append(options.Addrs, s.Addr)
	}
	client := redis.NewUniversalClient(options)
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	return client
}

// newRedis makes a store of its own on the package's server.
func newRedis(t testing.TB, config tenantcache.RedisConfig) *tenantcache.Redis {
	t.Helper()
	return newRedisOn(t, dial(t, standalone), config)
}

func newRedisOn(t testing.TB, client redis.UniversalClient, config tenantcache.RedisConfig) *tenantcache.Redis {
	t.Helper()
	config.Prefix = prefixOf(t)
	if config.Timeout == 0 {
		config.Timeout = slow
	}
	store, err := tenantcache.NewRedis(client, config)
	require.NoError(t, err)
	t.Cleanup(store.Close)
	return store
}

// prefixes holds the runs of tests that have one, so that no run finds what another has left.
var (
	prefixes sync.Map // of testing.TB
	runs     atomic.Int64
)

// prefixOf returns the prefix of all that this run of the test keeps in Redis.
func prefixOf(t testing.TB) string {
	run, ok := prefixes.Load(t)
	if !ok {
		run, _ = prefixes.LoadOrStore(t, fmt.Sprint("run", runs.Add(1)))
	}
	return run.(string)
}

func newMemory(t testing.TB, config tenantcache.MemoryConfig) *tenantcache.Memory {
	t.Helper()
	store, err := tenantcache.NewMemory(config)
	require.NoError(t, err)
	t.Cleanup(store.Close)
	return store
}

func newCache[V any](t testing.TB, store tenantcache.Store, config tenantcache.Config[V]) *tenantcache.Cache[V] {
	t.Helper()
	if config.Namespace == "" {
		config.Namespace = "test"
	}
	cache, err := tenantcache.New(store, config)
	require.NoError(t, err)
	return cache
}

// as is a test's context with a tenant.
func as(t testing.TB, tenant string) context.Context {
	return pgxtenant.WithTenantID(t.Context(), tenant)
}

// returns is a loader.
func returns[V any](value V) func(context.Context) (V, error) {
	return func(context.Context) (V, error) { return value, nil }
}

// noLoad is a loader that must not be called.
func noLoad(t testing.TB) func(context.Context) (string, error) {
	return func(context.Context) (string, error) {
		err := fmt.Errorf("%s: a load that should not be", t.Name())
		t.Error(err)
		return "", err
	}
}

func requireMiss[V any](t testing.TB, ctx context.Context, cache *tenantcache.Cache[V], key string) {
	t.Helper()
	value, ok, err := cache.Get(ctx, key)
	require.NoError(t, err)
	require.False(t, ok, "there is %v", value)
}

func requireHit[V any](t testing.TB, ctx context.Context, cache *tenantcache.Cache[V], key string, want V) {
	t.Helper()
	value, ok, err := cache.Get(ctx, key)
	require.NoError(t, err)
	require.True(t, ok, "there is nothing under %q", key)
	require.Equal(t, want, value)
}
