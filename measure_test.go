//go:build !race

package pgxtenant

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// What is measured here is not so under the race detector, which keeps memory of its own and has sync.Pool forget
// on purpose.

// A checkout allocates nothing beyond what pgxpool does, which is nothing on most.
func TestCheckoutAllocations(t *testing.T) { // not beside others, whose allocations would count
	d := pgtest.New(t)
	plain := openDB(t, d.AppURL())
	limited := openDB(t, d.AppURL("tenant_max_conns=9"))
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, c := range []struct {
		name string
		db   *TenantDB
		ctx  context.Context
		want float64
	}{
		{"row", plain, WithTenant(cancellable, Tenant{ID: "a"}), 0},
		{"row by ID", plain, WithTenantID(cancellable, "a"), 0},
		{"none", plain, WithoutTenant(cancellable), 0},
		{"schema", plain, WithTenant(cancellable, Tenant{ID: "a", Isolation: IsolationSchema}), 0},
		{"database", plain, isolatedFrom(cancellable, "a", d.AppURL()), 0},
		{"row in a budget", limited, WithTenant(cancellable, Tenant{ID: "a"}), 1},
		{"database in a budget", limited, isolatedFrom(cancellable, "a", d.AppURL()), 1},
	} {
		got := testing.AllocsPerRun(1000, func() {
			conn, err := c.db.Acquire(c.ctx)
			if err != nil {
				t.Fatal(err)
			}
			conn.Release()
		})
		require.Equal(t, c.want, got, c.name)
	}
}

// Nor does it cost a statement an allocation to be counted.
func TestStatementAllocations(t *testing.T) { // not beside others either
	d := docsDB(t)
	allocations := func(params ...string) map[string]float64 {
		db := openDB(t, d.AppURL(params...))
		ctx := as("a")
		got := make(map[string]float64)
		for name, do := range map[string]func() error{
			"query": func() error { return db.QueryRow(ctx, "select id from docs where id = $1", 1).Scan(new(int)) },
			"exec":  func() error { _, err := db.Exec(ctx, "update docs set body = body"); return err },
			"batch": func() error {
				b := &pgx.Batch{}
				b.Queue("select 1")
				b.Queue("select 2")
				return db.SendBatch(ctx, b).Close()
			},
			"shared": func() error {
				conn, err := db.Shared().Acquire(ctx)
				if err == nil {
					conn.Release()
				}
				return err
			},
		} {
			got[name] = testing.AllocsPerRun(200, func() {
				if err := do(); err != nil {
					t.Fatal(err)
				}
			})
		}
		return got
	}
	require.Equal(t, allocations("tenant_disable_load=true"), allocations())
	require.Zero(t, allocations()["shared"])
}

// An open, idle pool without connections costs one goroutine and at most 12 KB.
func TestAnIdlePoolIsSmall(t *testing.T) { // nor beside others
	d := pgtest.New(t)
	const n = 200
	db := openDB(t, d.AppURL(), func(c *Config) { c.MaxPools = n + 1 })
	open := func(id string) {
		require.NoError(t, db.Ping(isolated(id, d.AppURL())))
		db.isolated.mu.Lock()
		p := db.isolated.open[id]
		db.isolated.mu.Unlock()
		p.pool.Reset()
	}
	measure := func() (bytes uint64, goroutines int) {
		eventually(t, "connections are closed", func() bool { return db.Stat().TotalConns() == 0 })
		settled := 0
		eventually(t, "connections' goroutines have ended", func() bool {
			n := runtime.NumGoroutine()
			time.Sleep(10 * time.Millisecond)
			if settled++; n != runtime.NumGoroutine() {
				settled = 0
			}
			return settled == 10
		})
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse, runtime.NumGoroutine()
	}
	open("warm-up")
	before, goroutines := measure()
	for i := range n {
		open(fmt.Sprint("t", i))
	}
	after, more := measure()
	t.Logf("%d bytes and %.2f goroutines a pool", int64(after-before)/n, float64(more-goroutines)/n)
	require.LessOrEqual(t, int64(after-before)/n, int64(12<<10))
	require.LessOrEqual(t, more-goroutines, n+5)
}
