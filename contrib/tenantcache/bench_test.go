package tenantcache_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
)

// BenchmarkHit compares a hit with a bare GET of the same bytes, by turns.
func BenchmarkHit(b *testing.B) {
	client := dial(b, standalone)
	ctx := pgxtenant.WithTenantID(b.Context(), "acme")
	store := newRedis(b, tenantcache.RedisConfig{})
	cache, err := tenantcache.New(store, tenantcache.Config[string]{Namespace: "bench"})
	require.NoError(b, err)
	load := func(context.Context) (string, error) { return "value", nil }
	_, err = cache.GetOrLoad(ctx, "k", time.Hour, load)
	require.NoError(b, err)
	require.NoError(b, client.Set(ctx, "bare", `"value"`, time.Hour).Err())
	var bare, ours time.Duration
	const slice = 500
	for b.Loop() {
		bare += timeOf(b, slice, func() error { return client.Get(ctx, "bare").Err() })
		ours += timeOf(b, slice, func() error { _, err := cache.GetOrLoad(ctx, "k", time.Hour, load); return err })
	}
	b.ReportMetric(float64(bare.Nanoseconds())/float64(b.N*slice), "ns/bare-GET")
	b.ReportMetric(float64(ours.Nanoseconds())/float64(b.N*slice), "ns/hit")
	b.ReportMetric(ours.Seconds()/bare.Seconds(), "ratio")
}

// BenchmarkInvalidateTenant compares InvalidateTenant with SCAN and DEL of the tenant's keys, 1,000 of them among
// 1,000,000 of other tenants.
func BenchmarkInvalidateTenant(b *testing.B) {
	client := dial(b, standalone)
	ctx := pgxtenant.WithTenantID(b.Context(), "acme")
	const foreign, own = 1_000_000, 1000
	fill := func(n int, name func(i int) string) {
		for from := 0; from < n; from += 10_000 {
			_, err := client.Pipelined(ctx, func(p redis.Pipeliner) error {
				for i := from; i < min(n, from+10_000); i++ {
					p.Set(ctx, name(i), "v", time.Hour)
				}
				return nil
			})
			require.NoError(b, err)
		}
	}
	fill(foreign, func(i int) string { return fmt.Sprintf("cache:t%d:invoice:%d", i%1000, i) })
	store := newRedis(b, tenantcache.RedisConfig{})
	cache, err := tenantcache.New(store, tenantcache.Config[string]{Namespace: "bench"})
	require.NoError(b, err)
	var scanned, ours time.Duration
	for b.Loop() {
		fill(own, func(i int) string { return fmt.Sprintf("cache:acme:invoice:%d", i) })
		require.NoError(b, cache.Set(ctx, "k", "v", time.Hour))
		scanned += timeOf(b, 1, func() error {
			for names := client.Scan(ctx, 0, "cache:acme:*", 1000).Iterator(); names.Next(ctx); {
				if err := client.Del(ctx, names.Val()).Err(); err != nil {
					return err
				}
			}
			return nil
		})
		ours += timeOf(b, 1, func() error { return store.InvalidateTenant(ctx) })
		_, ok, err := cache.Get(ctx, "k")
		require.NoError(b, err)
		require.False(b, ok)
	}
	b.ReportMetric(float64(scanned.Microseconds())/float64(b.N), "µs/SCAN+DEL")
	b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "µs/InvalidateTenant")
	b.ReportMetric(scanned.Seconds()/ours.Seconds(), "ratio")
}

func timeOf(b *testing.B, n int, f func() error) time.Duration {
	start := time.Now()
	for range n {
		require.NoError(b, f())
	}
	return time.Since(start)
}
