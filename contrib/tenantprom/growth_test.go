package tenantprom

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

// A hundred thousand tenants have as many series as a thousand.
func TestSeriesDoNotGrowWithTenants(t *testing.T) {
	t.Parallel()
	db := openDB(t)
	collectors := []prometheus.Collector{
		NewCollector(db), NewCollector(db, TopK(pgxtenant.LoadTenants), ConstLabels(prometheus.Labels{"top": "all"})),
	}
	count := func() (n []int) {
		for _, c := range collectors {
			n = append(n, scrape(t, c).count())
		}
		return n
	}
	query(t, db, 0, 1000)
	want := count()
	require.InDelta(t, 1000, scrape(t, collectors[0]).value(t, "pgxtenant_active_tenants", "window=1h"), 100)
	seen := map[string]bool{}
	for from := 1000; from < 100_000; from += 33_000 {
		touch(t, db, from, from+33_000)
		query(t, db, from, from+100)
		require.Equal(t, want, count())
		for labels := range scrape(t, collectors[0])["pgxtenant_tenant_busy_connections"] {
			seen[labels] = true
		}
	}
	require.InDelta(t, 100_000, scrape(t, collectors[0]).value(t, "pgxtenant_active_tenants", "window=1h"), 10_000)
	require.Len(t, scrape(t, collectors[0])["pgxtenant_tenant_busy_connections"], DefaultTopK+1)
	t.Logf("%d and %d series; %d tenants were among the first %d", want[0], want[1], len(seen)-1, DefaultTopK)
}

// query has tenants from…to-1 run a statement each.
func query(t testing.TB, db *pgxtenant.TenantDB, from, to int) {
	each(t, db, from, to, func(conn *pgx.Conn) error {
		_, err := conn.Exec(context.Background(), "select 1")
		return err
	})
}

// touch has them check a connection out and send a statement whose context has ended, which is counted, and costs the
// server nothing: at one round trip each a hundred thousand take long.
func touch(t testing.TB, db *pgxtenant.TenantDB, from, to int) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	each(t, db, from, to, func(conn *pgx.Conn) error {
		if _, err := conn.Exec(ended, "select 1"); !errors.Is(err, context.Canceled) {
			return fmt.Errorf("a statement under an ended context: %w", err)
		}
		return nil
	})
}

func each(t testing.TB, db *pgxtenant.TenantDB, from, to int, f func(*pgx.Conn) error) {
	t.Helper()
	const workers = 4
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		wg.Go(func() {
			for i := from + w; i < to; i += workers {
				conn, err := db.Acquire(pgxtenant.WithTenantID(t.Context(), fmt.Sprint("t", i)))
				if err == nil {
					err = f(conn.Conn())
					conn.Release()
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	require.NoError(t, <-errs)
}

// BenchmarkCollect is what a scrape costs, without writing it down.
func BenchmarkCollect(b *testing.B) {
	for _, tenants := range []int{10, 1000, 100_000} {
		b.Run(fmt.Sprint("tenants=", tenants), func(b *testing.B) {
			db := openDB(b)
			touch(b, db, 0, tenants)
			c := NewCollector(db)
			b.ReportAllocs()
			for b.Loop() {
				ch := make(chan prometheus.Metric, 1024)
				c.Collect(ch)
			}
		})
	}
}
