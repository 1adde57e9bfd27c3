//go:build !race

package pgxtenant

import (
	"context"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A run takes as much memory for ten thousand tenants as for one page of them, and looks at them in little time.
func TestForEachGrowth(t *testing.T) { // not beside others, whose memory would count
	ctx := context.Background()
	peaks := make(map[int]uint64)
	for _, n := range []int{10, 1000, 10_000} {
		d := pgtest.New(t)
		admin, err := pgxpool.ParseConfig(d.OwnerURL("pool_max_conns=4"))
		require.NoError(t, err)
		db := openDB(t, d.AppURL(), func(c *Config) { c.Admin, c.Registry = admin, &RegistryConfig{} })
		require.NoError(t, db.Registry().Install(ctx))
		_, err = db.Admin().Exec(ctx, `insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings)
			select 't' || i, '', 'schema', '', 'tenant_t' || i, '', '', 'active', '{}' from generate_series(1, $1) i`, n)
		require.NoError(t, err)
		heap := func() uint64 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		before, began := heap(), time.Now()
		var measured time.Duration
		report, err := db.ForEach(ctx, ForEachOptions{SkipShared: true, Target: "2", OnProgress: func(RunProgress) {
			began := time.Now()
			now := heap()
			peaks[n] = max(peaks[n], now-min(now, before)) // what tests before left may go meanwhile
			measured += time.Since(began)
		}, Versions: func(_ context.Context, _ *pgx.Conn, tenants []Tenant) (map[string]string, error) {
			versions := make(map[string]string)
			for _, t := range tenants {
				versions[t.ID] = "2"
			}
			return versions, nil
		}}, func(context.Context, *pgx.Conn, Tenant) error { return errTest })
		require.NoError(t, err)
		require.Equal(t, n, report.Current)
		t.Logf("%d tenants with nothing to do: %v, %d KiB", n, time.Since(began)-measured, peaks[n]>>10)
	}
	require.Less(t, peaks[10_000], 2*peaks[1000]+1<<20)
}

// sentConn counts what is sent, which for a run is its round trips: it waits for each answer.
type sentConn struct {
	net.Conn
	sent *atomic.Int64
}

func (c sentConn) Write(b []byte) (int, error) {
	c.sent.Add(1)
	return c.Conn.Write(b)
}

// What a run costs for each tenant beside the function itself.
func BenchmarkForEach(b *testing.B) {
	for _, versions := range []bool{false, true} {
		name := map[bool]string{false: "plain", true: "versions"}[versions]
		b.Run(name, func(b *testing.B) {
			const n = 500
			var sent atomic.Int64
			fl := newFleet(b, n, func(c *Config) {
				dial := c.Admin.ConnConfig.DialFunc
				c.Admin.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := dial(ctx, network, address)
					return sentConn{conn, &sent}, err
				}
			})
			o := ForEachOptions{SkipShared: true, Concurrency: 4}
			if versions {
				o.Versions = versionsOf(nil)
			}
			sent.Store(0)
			for b.Loop() {
				if _, err := fl.db.ForEach(context.Background(), o, func(context.Context, *pgx.Conn, Tenant) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/n, "µs/tenant")
			b.ReportMetric(float64(sent.Load())/float64(b.N)/n, "round-trips/tenant")
		})
	}
}
