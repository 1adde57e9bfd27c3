package tenantlimit

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// sortedSet is the recipe that this package is compared with: one entry per request of the last minute.
func sortedSet(b *testing.B, client *redis.Client, key string, limit int64) bool {
	now := time.Now().UnixNano()
	pipe := client.Pipeline()
	pipe.ZRemRangeByScore(b.Context(), key, "0", fmt.Sprint(now-time.Minute.Nanoseconds()))
	pipe.ZAdd(b.Context(), key, redis.Z{Score: float64(now), Member: now})
	count := pipe.ZCard(b.Context(), key)
	pipe.Expire(b.Context(), key, time.Minute)
	_, err := pipe.Exec(b.Context())
	require.NoError(b, err)
	return count.Val() <= limit
}

// BenchmarkDecisions compares decisions per second with those of the sorted set, round by round in one run, and prints
// the median of the rounds' ratios. Run it by hand:
//
//	go test -run '^$' -bench Decisions -benchtime 20x
//
// One op is a round: 2,000 decisions of each.
func BenchmarkDecisions(b *testing.B) {
	const decisions, tenants, perMinute = 2000, 20, 600
	for _, clients := range []int{1, 16, 64} {
		for _, concurrency := range []int{0, 1000} {
			b.Run(fmt.Sprintf("clients=%d/concurrency=%d", clients, concurrency), func(b *testing.B) {
				p := rated(PerMinute(perMinute, 50))
				p.Concurrency = concurrency
				l := shared(b, plan(p))
				client := clientOf(b, server(b), redis.Options{})
				var contexts [tenants]context.Context
				var keys [tenants]string
				for i := range tenants {
					contexts[i] = as(fmt.Sprintf("tenant-%d", i))
					keys[i] = fmt.Sprintf("%sset:%d", prefix(b), i)
				}
				ours := func(i int) {
					g, _ := l.Take(contexts[i%tenants], Call{})
					g.Release()
				}
				theirs := func(i int) { sortedSet(b, client, keys[i%tenants], perMinute) }
				var ratios, rates []float64
				spread(clients, decisions, ours)
				spread(clients, decisions, theirs)
				for b.Loop() {
					t := spread(clients, decisions, theirs)
					o := spread(clients, decisions, ours)
					ratios = append(ratios, t.Seconds()/o.Seconds())
					rates = append(rates, decisions/o.Seconds())
				}
				b.ReportMetric(median(ratios), "x_sorted_set")
				b.ReportMetric(median(rates), "decisions/s")
				require.Zero(b, l.Stats().Failed)
			})
		}
	}
}

// BenchmarkLocal is a decision within the process.
func BenchmarkLocal(b *testing.B) {
	l := open(b, plan(rated(PerMinute(600, 50))))
	ctx := as("acme")
	b.ReportAllocs()
	for b.Loop() {
		g, _ := l.Take(ctx, Call{})
		g.Release()
	}
}

// BenchmarkMemory prints what one tenant's limits take in Redis after 600 requests, by MEMORY USAGE.
func BenchmarkMemory(b *testing.B) {
	p := rated(PerMinute(600, 600))
	l := shared(b, plan(p))
	set := prefix(b) + "set"
	for range 600 {
		pass(b, l, "acme", Call{})
		sortedSet(b, l.config.Redis.(*redis.Client), set, 600)
	}
	usage := func(key string) float64 {
		n, err := l.config.Redis.MemoryUsage(b.Context(), key, 0).Result() // 0: look at all entries
		require.NoError(b, err)
		return float64(n)
	}
	for b.Loop() {
	}
	ours, theirs := usage(l.config.Prefix+"{acme}r"), usage(set)
	b.ReportMetric(ours, "bytes")
	b.ReportMetric(theirs, "bytes_sorted_set")
	b.ReportMetric(theirs/ours, "x_less")
}

// spread makes n calls from several goroutines and says how long that took.
func spread(clients, n int, call func(int)) time.Duration {
	var all sync.WaitGroup
	begin := time.Now()
	for c := range clients {
		all.Go(func() {
			for i := c; i < n; i += clients {
				call(i)
			}
		})
	}
	all.Wait()
	return time.Since(begin)
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
