package bench

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// Read reads one row by its primary key, each as another tenant than the last.
var Read = Job{
	Name: "Read", Unit: "primary-key read", Warm: 2 * tenants,
	Rows: []Row{
		{What: "row tenant", Base: "pool", Way: "tenant", Limit: 1.25, Allocs: 4},
		{What: "row tenant against the batch recipe", Base: "batch", Way: "tenant", Limit: 1, Allocs: 4, AllocBase: "pool"},
		{What: "row tenant, WithTenant anew each time", Base: "pool", Way: "fresh", Allocs: noLimit},
		{What: "row tenant, against Config.DisableLoad", Base: "uncounted", Way: "tenant", Allocs: 0},
		{What: "row tenant, context.Background in both", Base: "poolbackground", Way: "background", Allocs: noLimit},
		{What: "recipe: one batch of set_config and the query", Base: "pool", Way: "batch", Allocs: noLimit},
		{What: "recipe: set_config in a PrepareConn hook", Base: "pool", Way: "hook", Allocs: noLimit},
		{What: "recipe: the hook, and a reset in AfterRelease", Base: "pool", Way: "hookreset", Allocs: noLimit},
		{What: "recipe: a transaction around the query", Base: "pool", Way: "transaction", Allocs: noLimit},
		{What: "policies alone: one tenant for ever on the session", Base: "pool", Way: "session", Allocs: noLimit},
		{What: "row tenant with one of Settings", Base: "pool", Way: "settings", Allocs: noLimit},
		{What: "row tenant, strict", Base: "pool", Way: "strict", Allocs: noLimit},
		{What: "row tenant, sealed", Base: "pool", Way: "sealed", Allocs: noLimit},
		{What: "row tenant, sealed against not", Base: "tenant", Way: "sealed", Allocs: noLimit},
		{What: "row tenant, WithTenantID and a Directory", Base: "pool", Way: "directory", Allocs: noLimit},
		{What: "row tenant, WithTenantID and a Peeker", Base: "pool", Way: "peeker", Allocs: noLimit},
		{What: "row tenant, QueryExecModeExec", Base: "poolexec", Way: "exec", Allocs: noLimit},
		{What: "schema tenant, against names with the schema", Base: "poolschema", Way: "schema", Allocs: noLimit},
	},
	open: func(ctx context.Context, l *Lab) ([]Way, error) { return openRead(ctx, l, l.near()) },
}

// ReadDelayed is Read with a round trip that takes 1 ms longer.
var ReadDelayed = Job{
	Name: "ReadDelayed", Unit: "primary-key read, 1 ms away", Warm: 2 * tenants,
	Rows: []Row{
		{What: "row tenant", Base: "pool", Way: "tenant", Limit: 1.02, Allocs: noLimit},
		{What: "row tenant against the batch recipe", Base: "batch", Way: "tenant", Allocs: noLimit},
		{What: "recipe: one batch of set_config and the query", Base: "pool", Way: "batch", Allocs: noLimit},
		{What: "recipe: set_config in a PrepareConn hook", Base: "pool", Way: "hook", Allocs: noLimit},
		{What: "recipe: the hook, and a reset in AfterRelease", Base: "pool", Way: "hookreset", Allocs: noLimit},
		{What: "recipe: a transaction around the query", Base: "pool", Way: "transaction", Allocs: noLimit},
		{What: "row tenant, strict", Base: "pool", Way: "strict", Allocs: noLimit},
		{What: "schema tenant, against names with the schema", Base: "poolschema", Way: "schema", Allocs: noLimit},
	},
	open: func(ctx context.Context, l *Lab) ([]Way, error) { return openRead(ctx, l, l.far()) },
}

// ReadParallel is Read by 16 goroutines on 8 connections.
var ReadParallel = Job{
	Name: "ReadParallel", Unit: "primary-key read, 16 goroutines on 8 connections", Workers: 16, Warm: 40 * tenants, Touch: 256,
	Rows: []Row{
		{What: "row tenant", Base: "pool", Way: "tenant", Limit: 0.82, Rate: true, Allocs: 4},
		{What: "row tenant against the batch recipe", Base: "batch", Way: "tenant", Limit: 1, Rate: true, Allocs: 4, AllocBase: "pool"},
		{What: "recipe: one batch of set_config and the query", Base: "pool", Way: "batch", Rate: true, Allocs: noLimit},
		{What: "recipe: set_config in a PrepareConn hook", Base: "pool", Way: "hook", Rate: true, Allocs: noLimit},
		{What: "recipe: the hook, and a reset in AfterRelease", Base: "pool", Way: "hookreset", Rate: true, Allocs: noLimit},
		{What: "recipe: a transaction around the query", Base: "pool", Way: "transaction", Rate: true, Allocs: noLimit},
		{What: "policies alone: one tenant for ever on the session", Base: "pool", Way: "session", Rate: true, Allocs: noLimit},
		{What: "row tenant, with Config.ArrivalOrder", Base: "pool", Way: "arrival", Rate: true, Allocs: noLimit},
		{What: "row tenant, strict", Base: "pool", Way: "strict", Rate: true, Allocs: noLimit},
		{What: "row tenant, sealed", Base: "pool", Way: "sealed", Rate: true, Allocs: noLimit},
		{What: "schema tenant, against names with the schema", Base: "poolschema", Way: "schema", Rate: true, Allocs: noLimit},
	},
	open: func(ctx context.Context, l *Lab) ([]Way, error) { return openRead(ctx, l, l.near()) },
}

// Write changes one row by its primary key, each as another tenant than the last.
var Write = Job{
	Name: "Write", Unit: "primary-key update",
	Rows: []Row{
		{What: "row tenant", Base: "pool", Way: "tenant", Allocs: noLimit},
		{What: "recipe: one batch of set_config and the query", Base: "pool", Way: "batch", Allocs: noLimit},
	},
	open: func(ctx context.Context, l *Lab) ([]Way, error) { return openWrite(ctx, l, l.near()) },
}

const (
	readByHand = "select body from note where tenant_id = $1 and id = $2"
	readBound  = "select body from note where id = $1"
	readSealed = "select body from note_sealed where id = $1"
	bindByHand = "select set_config('app.current_tenant_id', $1, true)"
)

var errNoRow = errors.New("bench: the row has no body")

func read(row pgx.Row) error {
	var body string
	if err := row.Scan(&body); err != nil {
		return err
	}
	if body == "" {
		return errNoRow
	}
	return nil
}

func rowID(n int) int { return spread(n, rowsPerTenant) }

func openRead(ctx context.Context, l *Lab, at place) (ways []Way, err error) {
	if err := l.fill(ctx); err != nil {
		return nil, err
	}
	add := func(name string, closer func(), do func(n int) error) {
		ways = append(ways, Way{Name: name, Do: do, Close: closer})
	}
	ids := tenantIDs(tenants)

	// Without binding: the predicate written by hand, and nothing else in its way.
	plain, err := pool(ctx, at.bypass, nil)
	if err != nil {
		return ways, err
	}
	add("pool", plain.Close, func(n int) error {
		return read(plain.QueryRow(ctx, readByHand, ids[n%tenants], rowID(n)))
	})
	plainExec, err := pool(ctx, at.bypass+"&default_query_exec_mode=exec", nil)
	if err != nil {
		return ways, err
	}
	add("poolexec", plainExec.Close, func(n int) error {
		return read(plainExec.QueryRow(ctx, readByHand, ids[n%tenants], rowID(n)))
	})
	var qualified [schemas]string
	for i := range qualified {
		qualified[i] = fmt.Sprintf("select body from %s.note where id = $1", ident(pgxtenant.SchemaName(ids[i])))
	}
	add("poolschema", nil, func(n int) error {
		return read(plain.QueryRow(ctx, qualified[n%schemas], rowID(n)))
	})
	session, err := pool(ctx, at.app, func(c *pgxpool.Config) {
		c.ConnConfig.RuntimeParams["app.current_tenant_id"] = ids[0]
	})
	if err != nil {
		return ways, err
	}
	add("session", session.Close, func(n int) error {
		return read(session.QueryRow(ctx, readBound, rowID(n)))
	})

	// Bound.
	bound := func(name string, contexts []context.Context, adjust func(*pgxtenant.Config)) (*pgxtenant.TenantDB, error) {
		db, err := tenantDB(ctx, at.app, adjust)
		if err == nil {
			add(name, db.Close, func(n int) error {
				return read(db.QueryRow(contexts[n%len(contexts)], readBound, rowID(n)))
			})
		}
		return db, err
	}
	// Each TenantDB has contexts of its own: one used with two would be encoded anew at each change.
	rows := func() []context.Context { return contexts(ctx, tenants, rowTenant) }
	db, err := bound("tenant", rows(), nil)
	if err != nil {
		return ways, err
	}
	add("poolbackground", nil, func(n int) error {
		return read(plain.QueryRow(context.Background(), readByHand, ids[n%tenants], rowID(n)))
	})
	background := contexts(context.Background(), tenants, rowTenant)
	add("background", nil, func(n int) error {
		return read(db.QueryRow(background[n%tenants], readBound, rowID(n)))
	})
	add("fresh", nil, func(n int) error {
		c := pgxtenant.WithTenant(ctx, pgxtenant.Tenant{ID: ids[n%tenants]})
		return read(db.QueryRow(c, readBound, rowID(n)))
	})
	withSettings := contexts(ctx, tenants, func(i int) pgxtenant.Tenant {
		return pgxtenant.Tenant{ID: ids[i], Settings: map[string]string{"app.user_id": ids[i]}}
	})
	if _, err = bound("settings", withSettings, nil); err != nil {
		return ways, err
	}
	withSchema := contexts(ctx, tenants, func(i int) pgxtenant.Tenant {
		return pgxtenant.Tenant{ID: ids[i], Isolation: pgxtenant.IsolationSchema}
	})
	if _, err = bound("schema", withSchema, nil); err != nil {
		return ways, err
	}
	if _, err = bound("uncounted", rows(), func(c *pgxtenant.Config) { c.DisableLoad = true }); err != nil {
		return ways, err
	}
	if _, err = bound("arrival", rows(), func(c *pgxtenant.Config) { c.ArrivalOrder = true }); err != nil {
		return ways, err
	}
	if _, err = bound("strict", rows(), func(c *pgxtenant.Config) { c.Strict = true }); err != nil {
		return ways, err
	}
	sealed, err := tenantDB(ctx, at.app, func(c *pgxtenant.Config) { c.Seal = &seal })
	if err != nil {
		return ways, err
	}
	sealedRows := rows()
	add("sealed", sealed.Close, func(n int) error {
		return read(sealed.QueryRow(sealedRows[n%tenants], readSealed, rowID(n)))
	})
	if _, err = bound("exec", rows(), func(c *pgxtenant.Config) {
		c.Shared.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	}); err != nil {
		return ways, err
	}
	known := directory{}
	for _, id := range ids {
		known[id] = pgxtenant.Tenant{ID: id}
	}
	if _, err = bound("directory", contextsByID(ctx, tenants), func(c *pgxtenant.Config) { c.Directory = known }); err != nil {
		return ways, err
	}
	if _, err = bound("peeker", contextsByID(ctx, tenants), func(c *pgxtenant.Config) { c.Directory = cache{known} }); err != nil {
		return ways, err
	}

	recipes, err := openRecipes(ctx, at, ids)
	return append(ways, recipes...), err
}

// openRecipes sets up what applications write by hand.
func openRecipes(ctx context.Context, at place, ids []string) (ways []Way, err error) {
	add := func(name string, closer func(), do func(n int) error) {
		ways = append(ways, Way{Name: name, Do: do, Close: closer})
	}
	app, err := pool(ctx, at.app, nil)
	if err != nil {
		return ways, err
	}
	add("batch", app.Close, func(n int) error {
		var b pgx.Batch
		b.Queue(bindByHand, ids[n%tenants])
		b.Queue(readBound, rowID(n))
		results := app.SendBatch(ctx, &b)
		_, err := results.Exec()
		if err == nil {
			err = read(results.QueryRow())
		}
		return errors.Join(err, results.Close())
	})
	add("transaction", nil, func(n int) error {
		tx, err := app.Begin(ctx)
		if err != nil {
			return err
		}
		if _, err = tx.Exec(ctx, bindByHand, ids[n%tenants]); err == nil {
			err = read(tx.QueryRow(ctx, readBound, rowID(n)))
		}
		if err != nil {
			return errors.Join(err, tx.Rollback(ctx))
		}
		return tx.Commit(ctx)
	})

	byHand := make([]context.Context, len(ids))
	for i, id := range ids {
		byHand[i] = context.WithValue(ctx, idKey{}, id)
	}
	hooked, err := pool(ctx, at.app, bindInHook)
	if err != nil {
		return ways, err
	}
	add("hook", hooked.Close, func(n int) error {
		return read(hooked.QueryRow(byHand[n%tenants], readBound, rowID(n)))
	})
	reset, err := pool(ctx, at.app, func(c *pgxpool.Config) {
		bindInHook(c)
		c.AfterRelease = func(conn *pgx.Conn) bool {
			_, err := conn.Exec(ctx, "reset app.current_tenant_id")
			return err == nil
		}
	})
	if err != nil {
		return ways, err
	}
	add("hookreset", reset.Close, func(n int) error {
		return read(reset.QueryRow(byHand[n%tenants], readBound, rowID(n)))
	})
	return ways, nil
}

type idKey struct{}

func bindInHook(c *pgxpool.Config) {
	c.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		id, _ := ctx.Value(idKey{}).(string)
		_, err := conn.Exec(ctx, "select set_config('app.current_tenant_id', $1, false)", id)
		return err == nil, err
	}
}

func openWrite(ctx context.Context, l *Lab, at place) (ways []Way, err error) {
	if err := l.fill(ctx); err != nil {
		return nil, err
	}
	const byHand = "update note set body = body where tenant_id = $1 and id = $2"
	const bound = "update note set body = body where id = $1"
	ids := tenantIDs(tenants)
	plain, err := pool(ctx, at.bypass, nil)
	if err != nil {
		return nil, err
	}
	ways = append(ways, Way{Name: "pool", Close: plain.Close, Do: func(n int) error {
		_, err := plain.Exec(ctx, byHand, ids[n%tenants], rowID(n))
		return err
	}})
	db, err := tenantDB(ctx, at.app, nil)
	if err != nil {
		return ways, err
	}
	rows := contexts(ctx, tenants, rowTenant)
	ways = append(ways, Way{Name: "tenant", Close: db.Close, Do: func(n int) error {
		_, err := db.Exec(rows[n%tenants], bound, rowID(n))
		return err
	}})
	app, err := pool(ctx, at.app, nil)
	if err != nil {
		return ways, err
	}
	ways = append(ways, Way{Name: "batch", Close: app.Close, Do: func(n int) error {
		var b pgx.Batch
		b.Queue(bindByHand, ids[n%tenants])
		b.Queue(bound, rowID(n))
		return app.SendBatch(ctx, &b).Close()
	}})
	return ways, nil
}
