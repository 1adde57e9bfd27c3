package tenantcache_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
)

func TestATenantHasTheBytesOfItsPlan(t *testing.T) {
	t.Parallel()
	store := newMemory(t, tenantcache.MemoryConfig{TenantBytes: func(t pgxtenant.Tenant) int64 {
		return map[string]int64{"pro": 20_000, "free": 10_000, "none": -1}[t.Plan]
	}})
	cache := newCache(t, store, tenantcache.Config[string]{})
	kept := map[string]int{}
	for _, plan := range []string{"pro", "free", "none", "unknown"} {
		ctx := pgxtenant.WithTenant(t.Context(), pgxtenant.Tenant{ID: plan, Plan: plan})
		for i := range 100 {
			require.NoError(t, cache.Set(ctx, fmt.Sprint(i), strings.Repeat("x", 700), time.Hour))
			_, _, err := cache.Get(ctx, "0") // used all the time, so never the one that goes
			require.NoError(t, err)
		}
		for i := range 100 {
			_, ok, err := cache.Get(ctx, fmt.Sprint(i))
			require.NoError(t, err)
			require.True(t, ok || i != 0 || plan == "none")
			if ok {
				kept[plan]++
			}
		}
	}
	require.Equal(t, map[string]int{"pro": 19, "free": 9, "unknown": 100}, kept)
	free := pgxtenant.WithTenant(t.Context(), pgxtenant.Tenant{ID: "free", Plan: "free"})
	require.ErrorIs(t, cache.Set(free, "0", strings.Repeat("x", 10_000), 0), tenantcache.ErrTooLarge)
	requireMiss(t, free, cache, "0")
}

func TestAllTenantsTogetherHaveMaxBytes(t *testing.T) {
	t.Parallel()
	const most = 100_000
	store := newMemory(t, tenantcache.MemoryConfig{MaxBytes: most})
	cache := newCache(t, store, tenantcache.Config[string]{})
	busy := as(t, "busy")
	require.NoError(t, cache.Set(busy, "k", "v", 0))
	for i := range 1000 {
		require.NoError(t, cache.Set(as(t, fmt.Sprint("t", i)), "k", strings.Repeat("x", i), 0))
		require.LessOrEqual(t, store.Stats().Bytes, int64(most))
		requireHit(t, busy, cache, "k", "v") // the tenant that was asked for last loses last
	}
	requireMiss(t, as(t, "t0"), cache, "k")
	requireHit(t, as(t, "t999"), cache, "k", strings.Repeat("x", 999))
	require.NotZero(t, store.Stats().Evictions)
	// One tenant may have all, and no more.
	for i := range 200 {
		require.NoError(t, cache.Set(busy, fmt.Sprint(i), strings.Repeat("x", 1000), 0))
	}
	require.LessOrEqual(t, store.Stats().Bytes, int64(most))
	require.ErrorIs(t, cache.Set(busy, "k", strings.Repeat("x", most), 0), tenantcache.ErrTooLarge)
}

func TestNothingIsCountedOfATenantThatIsGone(t *testing.T) {
	t.Parallel()
	store := newMemory(t, tenantcache.MemoryConfig{})
	cache := newCache(t, store, tenantcache.Config[string]{})
	for _, tenant := range []string{"a", "b"} {
		ctx := as(t, tenant)
		for i := range 50 {
			require.NoError(t, cache.Set(ctx, fmt.Sprint(i), "v", time.Hour))
			require.NoError(t, cache.Set(ctx, fmt.Sprint(i), "longer", time.Hour))
		}
		require.NoError(t, cache.Delete(ctx, "1", "2", "none"))
		require.NoError(t, cache.Invalidate(ctx))
		require.NoError(t, cache.Set(ctx, "1", "v", time.Nanosecond))
	}
	stats := store.Stats()
	require.Equal(t, 2, stats.Tenants)
	require.Equal(t, 102, stats.Entries)
	require.NoError(t, store.InvalidateTenant(as(t, "a")))
	require.NoError(t, store.InvalidateTenant(as(t, "b")))
	stats = store.Stats()
	require.Zero(t, stats.Tenants)
	require.Zero(t, stats.Entries)
	require.Zero(t, stats.Bytes)
}

// A function of the configuration that panics in a load harms those who wait for it, and not the process.
func TestASizeThatPanicsHarmsNobodyElse(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	store := newMemory(t, tenantcache.MemoryConfig{TenantBytes: func(pgxtenant.Tenant) int64 {
		if asked.Add(1) == 2 { // the first is the caller's, the second the load's
			panic("no size")
		}
		return 0
	}})
	cache := newCache(t, store, tenantcache.Config[string]{})
	_, err := cache.GetOrLoad(as(t, "acme"), "k", 0, returns("v"))
	var p *tenantcache.PanicError
	require.ErrorAs(t, err, &p)
	require.Equal(t, "no size", p.Value)
	value, err := cache.GetOrLoad(as(t, "acme"), "k", 0, returns("v"))
	require.NoError(t, err)
	require.Equal(t, "v", value)
}
