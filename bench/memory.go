package bench

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// Limits of an open, idle isolated pool without connections.
const (
	MaxPoolBytes      = 12 << 10
	MaxPoolGoroutines = 1
)

// Footprint is what one idle pool takes.
type Footprint struct {
	Heap, Stack, Goroutines float64
}

// Bytes is heap and stack together.
func (f Footprint) Bytes() float64 { return f.Heap + f.Stack }

func (f Footprint) String() string {
	return fmt.Sprintf("%.1f KB (heap %.1f, stack %.1f), %.2f goroutines", f.Bytes()/1024, f.Heap/1024, f.Stack/1024, f.Goroutines)
}

// IdlePools measures an idle pool of pgxpool's and an isolated pool of a TenantDB's, neither with a
// connection, as the mean over so many of each.
func IdlePools(ctx context.Context, l *Lab, count int) (plain, isolated Footprint, err error) {
	pools := make([]*pgxpool.Pool, count)
	defer func() {
		for _, p := range pools {
			if p != nil {
				p.Close()
			}
		}
	}()
	plain, err = footprint(count, func() error {
		for i := range pools {
			var err error
			if pools[i], err = pool(ctx, l.isolatedURL(i), nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return plain, isolated, err
	}

	db, err := tenantDB(ctx, l.near().app, func(c *pgxtenant.Config) { c.MaxPools = count })
	if err != nil {
		return plain, isolated, err
	}
	defer db.Close()
	isolated, err = footprint(count, func() error {
		for i := range count {
			c := pgxtenant.WithTenant(ctx, pgxtenant.Tenant{ID: tenantID(i), Isolation: pgxtenant.IsolationDatabase, ConnString: l.isolatedURL(i)})
			if err := db.Ping(c); err != nil {
				return err
			}
			if i%100 == 99 {
				db.Reset() // closes the connections and keeps the pools
			}
		}
		db.Reset()
		for db.Stat().TotalConns() > 0 {
			time.Sleep(time.Millisecond)
		}
		return nil
	})
	if err == nil && len(db.Stat().Pools()) != count {
		err = fmt.Errorf("bench: %d of %d pools are open", len(db.Stat().Pools()), count)
	}
	return plain, isolated, err
}

func (l *Lab) isolatedURL(i int) string { return l.db.AppURL("application_name=" + tenantID(i)) }

// footprint measures what open leaves behind, divided by count.
func footprint(count int, open func() error) (Footprint, error) {
	before := inUse()
	if err := open(); err != nil {
		return Footprint{}, err
	}
	after := inUse()
	per := func(a, b float64) float64 { return (a - b) / float64(count) }
	return Footprint{per(after.Heap, before.Heap), per(after.Stack, before.Stack), per(after.Goroutines, before.Goroutines)}, nil
}

func inUse() Footprint {
	// Goroutines that have ended, and what finalizers held, go in two rounds; a stack is shrunk in one.
	for range 4 {
		runtime.GC()
		time.Sleep(50 * time.Millisecond)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return Footprint{float64(m.HeapAlloc), float64(m.StackInuse), float64(runtime.NumGoroutine())}
}
