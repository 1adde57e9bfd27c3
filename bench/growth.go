package bench

import (
	"context"
	"fmt"

	"github.com/pgxtenant/pgxtenant"
)

// growth is how many tenants take their turns.
var growth = []int{10, 1_000, manyTenants}

// CheckoutGrowth and ReadGrowth show what more tenants cost: nothing but cold caches, which the baseline
// has too where the rows are concerned.
var (
	CheckoutGrowth = growthJob("CheckoutGrowth", "checkout + release", 256, openCheckoutGrowth)
	ReadGrowth     = growthJob("ReadGrowth", "primary-key read", 1, openReadGrowth)
)

func growthJob(name, unit string, stride int, open func(context.Context, *Lab) ([]Way, error)) Job {
	job := Job{Name: name, Unit: unit, Stride: stride, open: open}
	for _, n := range growth {
		job.Rows = append(job.Rows, Row{What: fmt.Sprintf("row tenant, %d in turn", n),
			Base: fmt.Sprintf("pool%d", n), Way: fmt.Sprintf("tenant%d", n), Allocs: noLimit})
	}
	return job
}

func openCheckoutGrowth(ctx context.Context, l *Lab) (ways []Way, err error) {
	plain, err := pool(ctx, l.near().bypass, nil)
	if err != nil {
		return nil, err
	}
	ways = append(ways, Way{Name: "close", Close: plain.Close})
	db, err := tenantDB(ctx, l.near().app, nil)
	if err != nil {
		return ways, err
	}
	ways = append(ways, Way{Name: "close", Close: db.Close})
	rows := contexts(ctx, manyTenants, rowTenant)
	if err := bindAll(db, rows); err != nil {
		return ways, err
	}
	for _, n := range growth {
		ways = append(ways,
			Way{Name: fmt.Sprintf("pool%d", n), Do: checkout(plain, []context.Context{ctx})},
			Way{Name: fmt.Sprintf("tenant%d", n), Do: checkout(db, rows[:n])})
	}
	return ways, nil
}

func openReadGrowth(ctx context.Context, l *Lab) (ways []Way, err error) {
	if err := l.fill(ctx); err != nil {
		return nil, err
	}
	plain, err := pool(ctx, l.near().bypass, nil)
	if err != nil {
		return nil, err
	}
	ways = append(ways, Way{Name: "close", Close: plain.Close})
	db, err := tenantDB(ctx, l.near().app, nil)
	if err != nil {
		return ways, err
	}
	ways = append(ways, Way{Name: "close", Close: db.Close})
	ids := tenantIDs(manyTenants)
	rows := contexts(ctx, manyTenants, func(i int) pgxtenant.Tenant { return pgxtenant.Tenant{ID: ids[i]} })
	if err := bindAll(db, rows); err != nil {
		return ways, err
	}
	for _, count := range growth {
		turn := func(n int) int { return spread(n, count) }
		ways = append(ways,
			Way{Name: fmt.Sprintf("pool%d", count), Do: func(n int) error {
				return read(plain.QueryRow(ctx, "select body from note_many where tenant_id = $1 and id = $2", ids[turn(n)], 0))
			}},
			Way{Name: fmt.Sprintf("tenant%d", count), Do: func(n int) error {
				return read(db.QueryRow(rows[turn(n)], "select body from note_many where id = $1", 0))
			}})
	}
	return ways, nil
}

// bindAll has each context's binding encoded, which its first checkout does.
func bindAll(db *pgxtenant.TenantDB, contexts []context.Context) error {
	do := checkout(db, contexts)
	for n := range contexts {
		if err := do(n); err != nil {
			return err
		}
	}
	return nil
}
