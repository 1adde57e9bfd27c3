package bench

import (
	"context"
	"fmt"
	"runtime"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/puddle/v2"

	"github.com/pgxtenant/pgxtenant"
)

// Checkout acquires a connection and releases it. Nothing is sent.
var Checkout = Job{
	Name: "Checkout", Unit: "checkout + release", Stride: 256, Touch: 2 * warmPools,
	Rows: []Row{
		{What: "puddle alone (the floor)", Base: "pool", Way: "puddle", Allocs: noLimit},
		{What: "row tenant", Base: "pool", Way: "tenant", Limit: 1.5},
		{What: "isolated tenant, 1 warm pool", Base: "pool", Way: "isolated1", Limit: 1.6},
		{What: "isolated tenant, 128 warm pools in turn", Base: "pool", Way: "isolated128", Limit: 1.6},
		{What: "row tenant, beside one with Config.ArrivalOrder", Base: "arrival", Way: "tenant", Limit: 1.2},
		{What: "the same against 128 plain pools in turn", Base: "pool128", Way: "isolated128", Allocs: noLimit},
		{What: "row tenant, by the bound *pgxpool.Pool", Base: "pool", Way: "shared", Allocs: noLimit},
		{What: "row tenant, WithTenant anew each time", Base: "pool", Way: "fresh", Allocs: noLimit},
		{What: "row tenant, strict", Base: "pool", Way: "strict", Allocs: noLimit},
		{What: "row tenant, WithTenantID and a Directory", Base: "pool", Way: "directory", Allocs: noLimit},
		{What: "row tenant, WithTenantID and a Peeker", Base: "pool", Way: "peeker", Allocs: noLimit},
		{What: "row tenant, with Config.MaxConns", Base: "pool", Way: "budget", Allocs: noLimit},
		{What: "row tenant, with Config.AdjustPool", Base: "pool", Way: "adjusted", Allocs: noLimit},
	},
	open: openCheckout,
}

// CheckoutParallel is Checkout by two goroutines for each CPU.
var CheckoutParallel = Job{
	Name: "CheckoutParallel", Unit: "checkout + release", Stride: 256, Touch: 2 * warmPools, Workers: min(2*runtime.NumCPU(), poolConns),
	Rows: []Row{
		{What: "puddle alone (the floor)", Base: "pool", Way: "puddle", Allocs: noLimit},
		{What: "row tenant", Base: "pool", Way: "tenant", Allocs: noLimit},
		{What: "isolated tenant, 1 warm pool", Base: "pool", Way: "isolated1", Allocs: noLimit},
		{What: "isolated tenant, 128 warm pools in turn", Base: "pool", Way: "isolated128", Allocs: noLimit},
		{What: "row tenant, WithTenantID and a Directory", Base: "pool", Way: "directory", Allocs: noLimit},
		{What: "row tenant, WithTenantID and a Peeker", Base: "pool", Way: "peeker", Allocs: noLimit},
	},
	open: openCheckout,
}

const warmPools = pgxtenant.DefaultMaxPools

func openCheckout(ctx context.Context, l *Lab) (ways []Way, err error) {
	at := l.near()
	add := func(name string, closer func(), do func(n int) error) {
		ways = append(ways, Way{Name: name, Do: do, Close: closer})
	}

	floor, err := puddle.NewPool(&puddle.Config[int]{
		Constructor: func(context.Context) (int, error) { return 0, nil },
		Destructor:  func(int) {},
		MaxSize:     poolConns,
	})
	if err != nil {
		return ways, err
	}
	add("puddle", floor.Close, func(int) error {
		r, err := floor.Acquire(ctx)
		if err != nil {
			return err
		}
		r.Release()
		return nil
	})

	plain, err := pool(ctx, at.bypass, nil)
	if err != nil {
		return ways, err
	}
	add("pool", plain.Close, checkout(plain, []context.Context{ctx}))

	var pools [warmPools]*pgxpool.Pool
	for i := range pools {
		if pools[i], err = pool(ctx, at.bypass, nil); err != nil {
			return ways, err
		}
	}
	add("pool128", func() {
		for _, p := range pools {
			p.Close()
		}
	}, func(n int) error {
		c, err := pools[n%warmPools].Acquire(ctx)
		if err != nil {
			return err
		}
		c.Release()
		return nil
	})

	// Each TenantDB has contexts of its own: one used with two would be encoded anew at each change.
	rows := func() []context.Context { return contexts(ctx, tenants, rowTenant) }
	db, err := tenantDB(ctx, at.app, nil)
	if err != nil {
		return ways, err
	}
	add("tenant", db.Close, checkout(db, rows()))
	add("shared", nil, checkout(db.Shared(), rows()))
	ids := tenantIDs(tenants)
	add("fresh", nil, func(n int) error {
		c, err := db.Acquire(pgxtenant.WithTenant(ctx, pgxtenant.Tenant{ID: ids[n%tenants]}))
		if err != nil {
			return err
		}
		c.Release()
		return nil
	})

	arrival, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) { c.ArrivalOrder = true })
	if err != nil {
		return ways, err
	}
	add("arrival", arrival.Close, checkout(arrival, rows()))

	own := func(i int) pgxtenant.Tenant {
		// All in one database: only the strings differ.
		return pgxtenant.Tenant{ID: tenantID(i), Isolation: pgxtenant.IsolationDatabase, ConnString: l.isolatedURL(i)}
	}
	one, err := tenantDB(ctx, at.app, nil)
	if err != nil {
		return ways, err
	}
	add("isolated1", one.Close, checkout(one, contexts(ctx, 1, own)))
	all, err := tenantDB(ctx, at.app, nil)
	if err != nil {
		return ways, err
	}
	add("isolated128", all.Close, checkout(all, contexts(ctx, warmPools, own)))

	strict, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) { c.Strict = true })
	if err != nil {
		return ways, err
	}
	add("strict", strict.Close, checkout(strict, rows()))

	known := directory{}
	for i := range tenants {
		known[tenantID(i)] = rowTenant(i)
	}
	byID := func() []context.Context { return contextsByID(ctx, tenants) }
	directed, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) { c.Directory = known })
	if err != nil {
		return ways, err
	}
	add("directory", directed.Close, checkout(directed, byID()))
	peeked, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) { c.Directory = cache{known} })
	if err != nil {
		return ways, err
	}
	add("peeker", peeked.Close, checkout(peeked, byID()))

	limited, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) { c.MaxConns = poolConns })
	if err != nil {
		return ways, err
	}
	add("budget", limited.Close, checkout(limited, rows()))
	adjusted, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) {
		c.AdjustPool = func(pgxtenant.Tenant, *pgxpool.Config) error { return nil }
	})
	if err != nil {
		return ways, err
	}
	add("adjusted", adjusted.Close, checkout(adjusted, rows()))
	return ways, nil
}

// acquirer is what a *pgxpool.Pool and a TenantDB have in common here.
type acquirer interface {
	Acquire(ctx context.Context) (*pgxpool.Conn, error)
}

func checkout(db acquirer, contexts []context.Context) func(n int) error {
	return func(n int) error {
		c, err := db.Acquire(contexts[n%len(contexts)])
		if err != nil {
			return err
		}
		c.Release()
		return nil
	}
}

func tenantIDs(n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = tenantID(i)
	}
	return ids
}

// directory answers from memory, but does not say so.
type directory map[string]pgxtenant.Tenant

func (d directory) Lookup(_ context.Context, id string) (pgxtenant.Tenant, error) {
	t, ok := d[id]
	if !ok {
		return t, fmt.Errorf("bench: %w", pgxtenant.ErrTenantNotFound)
	}
	return t, nil
}

// cache is a directory that says so.
type cache struct{ directory }

func (c cache) Peek(id string) (pgxtenant.Tenant, bool) {
	t, ok := c.directory[id]
	return t, ok
}
