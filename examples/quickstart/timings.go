package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

const (
	timedRows = 500             // of each row tenant
	warmUp    = 50              // rounds that do not count
	maxRounds = 3000            // each reads one row in every way
	maxTime   = 4 * time.Second // for the rounds on one network
)

// compare times the reading of one row by its primary key, on loopback and over a network where a round
// trip takes 1 ms more.
func compare(ctx context.Context, s *shop) error {
	proxy, err := pgtest.StartProxy(s.server.Addr())
	if err != nil {
		return err
	}
	defer proxy.Close()
	proxy.SetDelay(time.Millisecond / 2) // each way

	near, err := openWays(ctx, s, s.server.Addr())
	if err != nil {
		return err
	}
	defer near.close()
	far, err := openWays(ctx, s, proxy.Addr())
	if err != nil {
		return err
	}
	defer far.close()

	if err := near.fill(ctx); err != nil {
		return err
	}
	fmt.Printf("\n4. WHAT IT COSTS to read one row by its primary key, acme and globex in turn\n\n")
	loopback, rounds, err := near.measure(ctx)
	if err != nil {
		return err
	}
	delayed, delayedRounds, err := far.measure(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%-40s%-19s%s\n", "", "loopback", "1 ms away")
	for i, way := range near.all() {
		fmt.Printf("%-38s%7.3f ms %5.2f x%10.3f ms %5.2f x\n", way.name,
			loopback[i].Seconds()*1000, float64(loopback[i])/float64(loopback[0]),
			delayed[i].Seconds()*1000, float64(delayed[i])/float64(delayed[0]))
	}
	fmt.Printf("\nMedians of %d and %d reads each, taken by turns.\n", rounds, delayedRounds)
	return nil
}

// ways are the pools of four ways to read as a tenant.
type ways struct {
	plain       *pgxpool.Pool       // as a role that no policy holds
	bound       *pgxtenant.TenantDB // binds the tenant to the statement
	hooked      *pgxpool.Pool       // sets the tenant on the session at each checkout
	transaction *pgxpool.Pool       // sets the tenant in a transaction
}

// openWays opens the pools, to the server at a host and port.
func openWays(ctx context.Context, s *shop, at string) (w *ways, err error) {
	app, reader := withHost(s.app("shop"), at), withHost(s.reader(), at)
	w = new(ways)
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.plain, err = pgxpool.New(ctx, reader); err != nil {
		return nil, err
	}
	if w.bound, err = pgxtenant.New(ctx, app); err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(app)
	if err != nil {
		return nil, err
	}
	if w.transaction, err = pgxpool.NewWithConfig(ctx, config); err != nil {
		return nil, err
	}
	config = config.Copy()
	config.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		_, err := conn.Exec(ctx, "select set_config('app.current_tenant_id', $1, false)", ctx.Value(tenantKey{}))
		return err == nil, err
	}
	w.hooked, err = pgxpool.NewWithConfig(ctx, config)
	return w, err
}

func (w *ways) close() {
	for _, pool := range []*pgxpool.Pool{w.plain, w.hooked, w.transaction} {
		if pool != nil {
			pool.Close()
		}
	}
	if w.bound != nil {
		w.bound.Close()
	}
}

// fill writes the rows to read. PostgreSQL refuses COPY on a table under row-level security;
// TenantDB.CopyFrom finds another way.
func (w *ways) fill(ctx context.Context) error {
	for _, tenant := range timedTenants {
		rows := pgx.CopyFromSlice(timedRows, func(i int) ([]any, error) {
			return []any{timedID(i), timedItem(tenant, timedID(i))}, nil
		})
		ctx := pgxtenant.WithTenantID(ctx, tenant)
		if _, err := w.bound.CopyFrom(ctx, pgx.Identifier{"invoice"}, []string{"id", "item"}, rows); err != nil {
			return err
		}
	}
	return nil
}

var timedTenants = []string{"acme", "globex"}

func timedID(n int) int { return 1000 + n*211%timedRows } // far from the last one's

func timedItem(tenant string, id int) string { return fmt.Sprintf("%s's timed item %d", tenant, id) }

// way reads the item of one invoice of a tenant.
type way struct {
	name string
	read func(ctx context.Context, tenant string, id int, item *string) error
}

func (w *ways) all() []way {
	const sql = "select item from invoice where id = $1"
	return []way{
		{"pgxpool alone, tenant_id = $1 by hand", func(ctx context.Context, tenant string, id int, item *string) error {
			return w.plain.QueryRow(ctx, "select item from invoice where tenant_id = $1 and id = $2", tenant, id).Scan(item)
		}},
		{"pgxtenant", func(ctx context.Context, tenant string, id int, item *string) error {
			return w.bound.QueryRow(pgxtenant.WithTenantID(ctx, tenant), sql, id).Scan(item)
		}},
		{"pgxpool, set_config in a checkout hook", func(ctx context.Context, tenant string, id int, item *string) error {
			return w.hooked.QueryRow(context.WithValue(ctx, tenantKey{}, tenant), sql, id).Scan(item)
		}},
		{"pgxpool, set_config in a transaction", func(ctx context.Context, tenant string, id int, item *string) error {
			return pgx.BeginFunc(ctx, w.transaction, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, "select set_config('app.current_tenant_id', $1, true)", tenant); err != nil {
					return err
				}
				return tx.QueryRow(ctx, sql, id).Scan(item)
			})
		}},
	}
}

type tenantKey struct{}

// measure reads in every way by turns, so that what else the machine does falls on all of them alike. It
// returns the median of each.
func (w *ways) measure(ctx context.Context) (medians []time.Duration, rounds int, err error) {
	all := w.all()
	took := make([][]time.Duration, len(all))
	for start := time.Now(); rounds < warmUp+maxRounds && time.Since(start) < maxTime; rounds++ {
		tenant, id := timedTenants[rounds%len(timedTenants)], timedID(rounds)
		for i := range all {
			i = (i + rounds) % len(all) // each has its turn to be first
			var item string
			begin := time.Now()
			if err := all[i].read(ctx, tenant, id, &item); err != nil {
				return nil, 0, fmt.Errorf("%s: %w", all[i].name, err)
			}
			d := time.Since(begin)
			if item != timedItem(tenant, id) {
				return nil, 0, fmt.Errorf("%s: tenant %s, row %d: read %q", all[i].name, tenant, id, item)
			}
			if rounds >= warmUp {
				took[i] = append(took[i], d)
			}
		}
	}
	if rounds <= warmUp {
		return nil, 0, fmt.Errorf("only %d rounds in %v: the machine is too busy to measure anything", rounds, maxTime)
	}
	for _, t := range took {
		slices.Sort(t)
		medians = append(medians, t[len(t)/2])
	}
	return medians, rounds - warmUp, nil
}
