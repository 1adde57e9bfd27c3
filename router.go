package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// TenantDB stands in for a *pgxpool.Pool and runs every statement as the tenant that its context
// carries: in tables shared under row-level security, in the tenant's schema, or in its own database.
// It is safe for concurrent use.
//
// A context without a tenant gets no connection but ErrNoTenant. Any failure that has to do with one
// tenant is a *TenantError.
type TenantDB struct {
	given     *Config // as Config returns it
	config    *Config // with defaults
	binder    *binder
	lookups   lookups
	checkouts checkouts
	load      *loadMeter

	shared   *pgxpool.Pool
	gate     *turnstile    // before the shared pool; nil with Config.ArrivalOrder
	admin    *pgxpool.Pool // may be nil
	servers  servers
	budget   *budget // nil without Config.MaxConns
	isolated isolatedPools
	registry *Registry // may be nil

	lastAudit atomic.Pointer[auditRun]

	closed    atomic.Bool
	closing   chan struct{} // closed by the first Close
	closeOnce sync.Once
	done      chan struct{} // closed when nothing is left

	background sync.WaitGroup
}

// New makes a TenantDB from a connection string; see [ParseConfig] for its form and [NewWithConfig]
// for what is opened.
func New(ctx context.Context, connString string) (*TenantDB, error) {
	config, err := ParseConfig(connString)
	if err != nil {
		return nil, err
	}
	return NewWithConfig(ctx, config)
}

// NewWithConfig makes a TenantDB. Like pgxpool it connects in the background at most: errors of the
// connection appear at the first checkout, which Ping is. Every bad field of config is reported, and
// nothing opened then. With Config.RequireAudit it does connect, and fails if the audit does.
func NewWithConfig(ctx context.Context, config *Config) (*TenantDB, error) {
	if config == nil {
		return nil, errors.New("pgxtenant: the Config is nil; make one with ParseConfig")
	}
	c := config.withDefaults()
	if err := c.validate(); err != nil {
		return nil, err
	}
	b, err := newBinder(c.binderOptions())
	if err != nil {
		return nil, err
	}
	db := &TenantDB{
		given:   config.copy(),
		config:  c,
		binder:  b,
		lookups: lookups{directory: c.Directory, log: c.Logger},
		closing: make(chan struct{}),
		done:    make(chan struct{}),
	}
	if c.MaxConns > 0 {
		db.budget = newBudget(int(c.MaxConns), c.ArrivalOrder)
	}
	db.load = newLoadMeter(c)
	db.checkouts.load = db.load
	_, traced := c.Shared.ConnConfig.Tracer.(pgxpool.AcquireTracer)
	//lint:ignore SA1019 pgxpool still calls it
	before := c.Shared.BeforeAcquire
	db.checkouts.keep = traced || before != nil || c.Shared.PrepareConn != nil || c.Shared.ShouldPing != nil || c.AdjustPool != nil
	db.isolated.init(db)

	shared := c.Shared.Copy()
	b.install(shared, db.load, db.resolveShared)
	db.gate = newTurnstile(c, shared.MaxConns, db.closing, db.resolveShared)
	db.checkouts.hook(shared, db.gate)
	if db.shared, _, err = db.budget.open(ctx, shared, db.gate.weight); err != nil {
		return nil, fmt.Errorf("pgxtenant: shared pool: %w", err)
	}
	if c.Admin != nil {
		if db.admin, err = pgxpool.NewWithConfig(ctx, c.Admin.Copy()); err != nil {
			db.shared.Close()
			return nil, fmt.Errorf("pgxtenant: admin pool: %w", err)
		}
	}
	if db.servers, err = openServers(ctx, c); err == nil && c.Registry != nil {
		err = db.openRegistry(ctx)
	}
	if err == nil && c.RequireAudit {
		err = db.passAudit(ctx)
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	db.background.Go(func() { db.load.run(db.closing) })
	return db, nil
}

// Shared returns the pool of all row- and schema-isolated tenants, to hand to libraries that want a
// *pgxpool.Pool. It is bound like the TenantDB itself: each checkout runs as its context's tenant. The
// context of a database tenant is refused with ErrInvalidTenant, since the tenant's data are not
// there. It must not be closed.
func (db *TenantDB) Shared() *pgxpool.Pool { return db.shared }

// Admin returns the pool made from Config.Admin, which no tenant is bound on and Config.MaxConns does
// not count, or nil if that is not set. It must not be closed.
func (db *TenantDB) Admin() *pgxpool.Pool { return db.admin }

// Registry returns the registry made from Config.Registry, or nil if that is not set. It is closed with
// the TenantDB.
func (db *TenantDB) Registry() *Registry { return db.registry }

// Config returns a copy of the Config that the TenantDB was made from.
func (db *TenantDB) Config() *Config { return db.given.copy() }

// Acquire returns a connection that runs statements as ctx's tenant until it is released. Release it,
// like one of pgxpool.
func (db *TenantDB) Acquire(ctx context.Context) (*pgxpool.Conn, error) {
	ctx, bd, err := db.route(ctx)
	if err != nil {
		return nil, err
	}
	pool, enter := db.shared, ctx
	if bd.database {
		p, err := db.isolated.get(ctx, bd)
		if err != nil {
			return nil, err
		}
		// The reference only spans the checkout: pgxpool's Close waits for a connection that is out.
		defer p.unref()
		pool, enter = p.pool, p.enter(ctx)
	}
	conn, err := pool.Acquire(enter)
	if err != nil {
		return nil, db.failure(ctx, bd, err)
	}
	return conn, nil
}

// Lease returns the pool that serves ctx's tenant, for libraries that want a *pgxpool.Pool, and keeps
// it open until release is called: it is then not closed by eviction, and Close waits. For a database
// tenant that is the tenant's own pool, which refuses every other tenant's context with
// ErrWrongTenant; for others it is the shared pool, as from Shared. release may be called more than once.
func (db *TenantDB) Lease(ctx context.Context) (pool *pgxpool.Pool, release func(), err error) {
	ctx, bd, err := db.route(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, db.failure(ctx, bd, err)
	}
	if bd.tenant.Isolation != IsolationDatabase {
		return db.shared, func() {}, nil
	}
	p, err := db.isolated.get(ctx, bd)
	if err != nil {
		return nil, nil, err
	}
	p.dropFirst() // who has a lease may take long to make use of it
	p.leases.Add(1)
	return p.pool, sync.OnceFunc(func() {
		p.leases.Add(-1)
		p.unref()
	}), nil
}

// Evict closes the tenant's own pool, if one is open, and forgets a failure to open it. It returns at
// once and disturbs nobody: connections in use stay usable and leases stay valid, and the pool is gone
// when the last of them is. A checkout that comes later opens a new pool.
func (db *TenantDB) Evict(tenantID string) { db.isolated.evict(tenantID) }

// Reset closes all connections of all pools but Admin's, those in use when they are released, and
// leaves the pools open.
func (db *TenantDB) Reset() {
	if db.closed.Load() {
		return
	}
	db.shared.Reset()
	db.isolated.reset()
}

// AcquireAllIdle acquires all idle connections of the pool that serves ctx's tenant, bound to that
// tenant. It returns none if ctx carries no tenant that could be served; it opens no pool.
func (db *TenantDB) AcquireAllIdle(ctx context.Context) []*pgxpool.Conn {
	ctx, bd, err := db.route(ctx)
	if err != nil {
		return nil
	}
	pool, gate := db.shared, db.gate
	if bd.tenant.Isolation == IsolationDatabase {
		p := db.isolated.peek(&bd.tenant)
		if p == nil {
			return nil
		}
		defer p.unref()
		pool, gate = p.pool, p.gate
	}
	conns := pool.AcquireAllIdle(ctx)
	gate.borrowed(conns)
	db.budget.borrowed(conns)
	return conns
}

// Close closes all pools and rejects checkouts from then on with ErrClosed, those that wait included.
// It blocks until all connections are returned and all leases released.
func (db *TenantDB) Close() {
	db.startClosing()
	<-db.done
}

// Shutdown is Close with a limit: when ctx ends, it returns an error that wraps ctx's and names what
// is still in use. Closing goes on in the background.
func (db *TenantDB) Shutdown(ctx context.Context) error {
	db.startClosing()
	select {
	case <-db.done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-db.done:
		return nil
	default:
		return fmt.Errorf("pgxtenant: shutdown: %w; still in use: %s", ctx.Err(), db.inUse())
	}
}

func (db *TenantDB) startClosing() {
	db.closeOnce.Do(func() {
		db.closed.Store(true)
		close(db.closing)
		db.checkouts.close()
		db.budget.close()
		db.isolated.close()
		go func() {
			defer close(db.done)
			if db.registry != nil {
				db.registry.Close() // before the admin pool, which it may use
			}
			if db.admin != nil {
				var admin sync.WaitGroup
				admin.Go(db.admin.Close)
				defer admin.Wait()
			}
			var servers sync.WaitGroup
			servers.Go(db.servers.close)
			defer servers.Wait()

			db.shared.Close()
			db.isolated.wait()
			db.budget.wait()
			db.background.Wait()
		}()
	})
}

// inUse names the pools that still have connections or leases out.
func (db *TenantDB) inUse() string {
	var parts []string
	if n := db.shared.Stat().TotalConns(); n > 0 {
		parts = append(parts, fmt.Sprintf("shared pool (%d connections)", n))
	}
	if db.admin != nil {
		if n := db.admin.Stat().TotalConns(); n > 0 {
			parts = append(parts, fmt.Sprintf("admin pool (%d connections)", n))
		}
	}
	for _, p := range db.Stat().Pools() {
		parts = append(parts, fmt.Sprintf("pool of tenant %q (%d connections, %d leases)", p.TenantID, p.TotalConns, p.Leases))
	}
	if parts == nil {
		return "nothing; connections are being closed"
	}
	return strings.Join(parts, ", ")
}

// route finds ctx's tenant and checks that it may be served and can be bound. For a context made by
// WithoutTenant that is the zero Tenant. The context it returns carries the tenant as the directory gave it.
// Nothing is sent, and for a tenant put into the context whole, nothing allocated.
func (db *TenantDB) route(ctx context.Context) (context.Context, *binding, error) {
	if db.closed.Load() {
		return nil, nil, ErrClosed
	}
	c := carried(ctx)
	if c == nil {
		return nil, nil, ErrNoTenant
	}
	if c.kind == kindWithout {
		return ctx, db.binder.without(), nil
	}
	if c.kind == kindID && db.config.Directory != nil {
		return db.lookUp(ctx, c)
	}
	bd, err := db.admit(c, &c.tenant)
	if err != nil {
		return nil, nil, err
	}
	return ctx, bd, nil
}

// lookUp is route for a tenant that the directory must be asked about.
func (db *TenantDB) lookUp(ctx context.Context, c *tenantContext) (context.Context, *binding, error) {
	id := c.tenant.ID
	if err := ValidateID(id); err != nil {
		return nil, nil, &TenantError{clip(id), "check", err}
	}
	t, err := db.lookups.get(ctx, id)
	if err != nil {
		return nil, nil, &TenantError{id, "look up", err}
	}
	// The binding is kept in the context that the caller holds, for as long as the directory's answer
	// stays the same, and the tenant in one that lives as long as this checkout.
	resolved := &tenantContext{Context: ctx, tenant: t, kind: kindTenant}
	bd, err := db.admit(c, &resolved.tenant)
	if err != nil {
		return nil, nil, err
	}
	resolved.bound.Store(bd)
	return resolved, bd, nil
}

// admit checks that t can be bound, and may be served.
func (db *TenantDB) admit(c *tenantContext, t *Tenant) (*binding, error) {
	if bd := c.bound.Load(); bd != nil && bd.served && bd.binder == db.binder && t == &c.tenant {
		return bd, nil
	}
	err := check(t) // first: what is still being provisioned may lack what a binding needs
	if err == nil {
		var bd *binding
		if bd, err = db.binder.bind(c, t); err == nil {
			return bd, nil
		}
	}
	return nil, &TenantError{clip(t.ID), "check", err}
}

// check refuses every tenant whose status is not known to allow service.
func check(t *Tenant) error {
	switch t.Status {
	case StatusActive, StatusReadOnly:
		return nil
	case StatusSuspended:
		return ErrTenantSuspended
	case StatusProvisioning:
		return fmt.Errorf("%w: it is still being provisioned", ErrTenantUnavailable)
	case StatusDeleting:
		return fmt.Errorf("%w: it is being deleted", ErrTenantUnavailable)
	}
	return fmt.Errorf("%w: unknown status %v", ErrInvalidTenant, t.Status)
}

// resolve is what a pool asks at each checkout, its own users' included: which binding ctx stands for.
func (db *TenantDB) resolve(ctx context.Context) (*tenantContext, *binding, error) {
	c := carried(ctx)
	switch {
	case c == nil:
		return nil, nil, ErrNoTenant
	case c.kind == kindWithout:
		return c, db.binder.without(), nil
	case c.kind == kindID && db.config.Directory != nil:
		resolved, _, err := db.lookUp(ctx, c)
		if err != nil {
			return nil, nil, err
		}
		c = resolved.(*tenantContext)
	}
	bd, err := db.admit(c, &c.tenant)
	return c, bd, err
}

func (db *TenantDB) resolveShared(ctx context.Context) (*binding, error) {
	c, bd, err := db.resolve(ctx)
	if err == nil && c.tenant.Isolation == IsolationDatabase {
		err = &TenantError{c.tenant.ID, "acquire", fmt.Errorf(
			"%w: its data are in a database of its own, not in the shared pool; use the TenantDB itself, or Lease", ErrInvalidTenant)}
	}
	return bd, err
}

// failure dresses an error of pgxpool's Acquire.
func (db *TenantDB) failure(ctx context.Context, bd *binding, err error) error {
	if db.closed.Load() && ctx.Err() == nil {
		return ErrClosed // whatever its first sign was
	}
	if te := (*TenantError)(nil); bd.tenant.ID == "" || errors.As(err, &te) || errors.Is(err, ErrNoTenant) {
		return err
	}
	return &TenantError{bd.tenant.ID, "acquire", err}
}

// AcquireFunc acquires a connection and calls f with it, then releases it. ctx only affects Acquire.
// The error is either Acquire's or f's.
func (db *TenantDB) AcquireFunc(ctx context.Context, f func(*pgxpool.Conn) error) error {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return f(conn)
}

// Ping checks out a connection as ctx's tenant and sends an empty statement.
func (db *TenantDB) Ping(ctx context.Context) error {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return conn.Ping(ctx)
}

// Exec executes sql as ctx's tenant, as [pgxpool.Pool.Exec] does.
func (db *TenantDB) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	defer conn.Release()
	return conn.Exec(ctx, sql, arguments...)
}

// Query executes sql as ctx's tenant, as [pgxpool.Pool.Query] does. Close the rows, or read them to
// their end, to return the connection.
func (db *TenantDB) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return errRows{err}, err
	}
	rows, err := conn.Query(ctx, sql, args...)
	if err != nil {
		conn.Release()
		return errRows{err}, err
	}
	return &pooledRows{rows, conn}, nil
}

// QueryRow executes sql as ctx's tenant, as [pgxpool.Pool.QueryRow] does. Errors are Scan's, which
// must be called to return the connection.
func (db *TenantDB) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return errRows{err}
	}
	return &pooledRow{conn.QueryRow(ctx, sql, args...), conn}
}

// SendBatch sends b as ctx's tenant, as [pgxpool.Pool.SendBatch] does. Close the results to return the
// connection, or if b began a transaction, end that.
func (db *TenantDB) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	br := conn.SendBatch(ctx, b)
	if tx := br.Tx(); tx != nil {
		return &pooledBatch{BatchResults: br, tx: &pooledTx{tx, conn}}
	}
	return &pooledBatch{BatchResults: br, conn: conn}
}

// Begin starts a transaction as ctx's tenant. As in pgxpool, the end of ctx does not roll it back.
func (db *TenantDB) Begin(ctx context.Context) (pgx.Tx, error) {
	return db.BeginTx(ctx, pgx.TxOptions{})
}

// BeginTx starts a transaction with options as ctx's tenant. The whole transaction is the tenant's,
// whatever contexts its statements are given. As in pgxpool, the end of ctx does not roll it back.
func (db *TenantDB) BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	tx, err := conn.BeginTx(ctx, txOptions)
	if err != nil {
		conn.Release()
		return nil, err
	}
	return &pooledTx{tx, conn}, nil
}
