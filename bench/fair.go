package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// Flood is what one tenant's reads come to, alone and beside a flood of another's: 64 goroutines of 20 ms queries
// on the same pool of 8.
type Flood struct {
	Alone, Beside []time.Duration // of each read
	Flooded       int             // queries of the flood
	Elapsed       time.Duration   // of it
}

const (
	floodWorkers = 64
	floodQuery   = "select pg_sleep(0.02)"
	// A read of all the tenant's rows, at random moments 10 ms apart on average.
	floodRead       = "select sum(length(body)) from note"
	floodReadByHand = floodRead + " where tenant_id = $1"
	floodPause      = 10 * time.Millisecond
)

// PerSecond is the throughput of the flood.
func (f *Flood) PerSecond() float64 { return float64(f.Flooded) / f.Elapsed.Seconds() }

// Quantile of durations.
func Quantile(of []time.Duration, q float64) time.Duration {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// Floods measures pgxpool alone and a TenantDB by turns, in so many rounds of slices of d.
func Floods(ctx context.Context, l *Lab, rounds int, d time.Duration) (plain, tenant Flood, err error) {
	if err = l.fill(ctx); err != nil {
		return
	}
	bare, err := pool(ctx, l.near().bypass, nil)
	if err != nil {
		return
	}
	defer bare.Close()
	db, err := tenantDB(ctx, l.near().app, nil)
	if err != nil {
		return
	}
	defer db.Close()
	a, b := pgxtenant.WithTenant(ctx, rowTenant(0)), pgxtenant.WithTenant(ctx, rowTenant(1))
	var sum int64
	sides := []struct {
		into        *Flood
		read, query func() error
	}{
		{&plain,
			func() error { return bare.QueryRow(ctx, floodReadByHand, tenantID(1)).Scan(&sum) },
			func() error { _, err := bare.Exec(ctx, floodQuery); return err }},
		{&tenant,
			func() error { return db.QueryRow(b, floodRead).Scan(&sum) },
			func() error { _, err := db.Exec(a, floodQuery); return err }},
	}
	for range rounds {
		for _, s := range sides {
			if err = reads(d/4, nil, s.read); err == nil { // warms up
				err = reads(d, &s.into.Alone, s.read)
			}
			if err == nil {
				err = s.into.flood(d, s.read, s.query)
			}
			if err != nil {
				return
			}
		}
	}
	return
}

// reads reads for d, and notes how long each took.
func reads(d time.Duration, took *[]time.Duration, read func() error) error {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(time.Duration(rand.ExpFloat64() * float64(floodPause)))
		start := time.Now()
		if err := read(); err != nil {
			return err
		}
		if took != nil {
			*took = append(*took, time.Since(start))
		}
	}
	return nil
}

// flood reads beside the flood, once that is in full swing.
func (f *Flood) flood(d time.Duration, read, query func() error) error {
	var stop atomic.Bool
	var done atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range floodWorkers {
		wg.Go(func() {
			for !stop.Load() {
				if err := query(); err != nil {
					failed.Store(&err)
					return
				}
				done.Add(1)
			}
		})
	}
	err := reads(d/4, nil, read)
	start, before := time.Now(), done.Load()
	if err == nil {
		err = reads(d, &f.Beside, read)
	}
	f.Elapsed += time.Since(start)
	f.Flooded += int(done.Load() - before)
	stop.Store(true)
	wg.Wait()
	if p := failed.Load(); p != nil && err == nil {
		err = *p
	}
	return err
}

// Backlog is the connection time that each of some tenants got in d, all of whom wanted more.
type Backlog struct{ Plain, Tenant []time.Duration }

// Jain is Jain's index of fairness: 1 if all have the same, 1/n if one has all.
func Jain(used []time.Duration) float64 {
	var sum, squares float64
	for _, u := range used {
		sum += u.Seconds()
		squares += u.Seconds() * u.Seconds()
	}
	return sum * sum / (float64(len(used)) * squares)
}

// Backlogs measures len(weights) tenants of so many workers each, tenant i of which holds a connection for
// hold(i). pgxpool alone knows no weights.
func Backlogs(ctx context.Context, l *Lab, d time.Duration, weights []float64, workers int, hold func(i int) time.Duration) (b Backlog, err error) {
	if err = l.fill(ctx); err != nil {
		return
	}
	bare, err := pool(ctx, l.near().bypass, nil)
	if err != nil {
		return
	}
	defer bare.Close()
	db, err := tenantDB(ctx, l.near().app, func(c *pgxtenant.Config) {
		c.Limits = func(t pgxtenant.Tenant) pgxtenant.Limits {
			var i int
			_, _ = fmt.Sscanf(t.ID, "t%d", &i)
			return pgxtenant.Limits{Weight: weights[i]}
		}
	})
	if err != nil {
		return
	}
	defer db.Close()
	contexts := contexts(ctx, len(weights), rowTenant)
	if b.Plain, err = backlog(d, len(weights), workers, hold, func(int) (*pgxpool.Conn, error) { return bare.Acquire(ctx) }); err != nil {
		return
	}
	b.Tenant, err = backlog(d, len(weights), workers, hold, func(i int) (*pgxpool.Conn, error) { return db.Acquire(contexts[i]) })
	return
}

func backlog(d time.Duration, tenants, workers int, hold func(i int) time.Duration, acquire func(i int) (*pgxpool.Conn, error)) ([]time.Duration, error) {
	used := make([]atomic.Int64, tenants)
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for i := range tenants {
		for range workers {
			wg.Go(func() {
				for time.Now().Before(end) {
					conn, err := acquire(i)
					if err != nil {
						failed.Store(&err)
						return
					}
					start := time.Now()
					time.Sleep(hold(i))
					if held := time.Since(start); time.Now().Before(end) {
						used[i].Add(int64(held))
					}
					conn.Release()
				}
			})
		}
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return nil, *err
	}
	out := make([]time.Duration, tenants)
	for i := range out {
		out[i] = time.Duration(used[i].Load())
	}
	return out, nil
}
