package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// open makes the pool and its first connection. If that fails it returns the pool as well, if there is one.
func (p *isolatedPool) open(ctx context.Context) (pool *pgxpool.Pool, err error) {
	db := p.set.db
	defer func() {
		// A panic here would end the process, since no caller's recover sees this goroutine.
		if v := recover(); v != nil {
			err = fmt.Errorf("pgxtenant: panic while opening the pool: %v", v)
			db.config.Logger.Error("panic while opening a pool", "tenant", p.tenant.ID, "panic", v, "stack", string(debug.Stack()))
		}
	}()
	config, err := p.configure()
	if err != nil {
		return nil, err
	}
	var share *share
	weight := db.binder.limitsOf(p.tenant).Weight
	if pool, share, err = db.budget.open(ctx, config, func() float64 { return weight }); err != nil {
		return nil, err
	}
	if ctx, err = p.waitForRoom(ctx, share); err != nil {
		return pool, err
	}
	ctx, cancel := context.WithTimeout(ctx, db.config.OpenTimeout)
	defer cancel()
	conn, err := pool.Acquire(ctx)
	if err != nil {
		if ctx.Err() == context.DeadlineExceeded {
			err = fmt.Errorf("no connection within %v (Config.OpenTimeout): %w", db.config.OpenTimeout, err)
		}
		return pool, err
	}
	if share != nil {
		if first := share.keep(budgetConnOf(conn.Conn())); first != nil {
			p.first.Store(first)
		}
	}
	conn.Release()
	return pool, nil
}

// waitForRoom takes the opening's place under Config.MaxConns, for as long as anyone waits for it.
func (p *isolatedPool) waitForRoom(ctx context.Context, share *share) (context.Context, error) {
	if share == nil {
		return ctx, nil
	}
	set := func(waiting bool) {
		p.set.mu.Lock()
		defer p.set.mu.Unlock()
		if p.waiting = waiting; waiting && p.refs.Load() == 0 { // they left before
			p.set.dropLocked(p, reasonEvicted)
			p.cancel()
		}
	}
	set(true)
	defer set(false)
	return share.admit(ctx)
}

// configure makes the configuration of the pool.
func (p *isolatedPool) configure() (*pgxpool.Config, error) {
	db, text := p.set.db, p.tenant.ConnString
	c, err := parsePoolConfig(text)
	if err != nil {
		return nil, err
	}
	for name := range c.ConnConfig.RuntimeParams {
		if ownParam(name) {
			return nil, fmt.Errorf("%w: parameter %q has no meaning in a tenant's connection string", ErrInvalidTenant, clip(name))
		}
	}
	// Whether a value was given can no longer be seen in c. That a password holds the name is harmless.
	given := func(name string) bool { return strings.Contains(text, name) }
	if !given("pool_max_conns") {
		c.MaxConns = DefaultPoolMaxConns
	}
	if !given("pool_max_conn_lifetime_jitter") {
		c.MaxConnLifetimeJitter = DefaultPoolMaxConnLifetimeJitter
	}
	shared := db.config.Shared
	c.AfterConnect = shared.AfterConnect
	c.ConnConfig.Tracer = shared.ConnConfig.Tracer
	if !given("default_query_exec_mode") {
		c.ConnConfig.DefaultQueryExecMode = shared.ConnConfig.DefaultQueryExecMode
	}
	if !given("statement_cache_capacity") {
		c.ConnConfig.StatementCacheCapacity = shared.ConnConfig.StatementCacheCapacity
	}
	if !given("description_cache_capacity") {
		c.ConnConfig.DescriptionCacheCapacity = shared.ConnConfig.DescriptionCacheCapacity
	}
	if db.config.AdjustPool != nil {
		if err := db.config.AdjustPool(p.tenant, c); err != nil {
			return nil, fmt.Errorf("pgxtenant: Config.AdjustPool: %w", err)
		}
		if problems := poolProblems(c); problems != nil {
			return nil, fmt.Errorf("pgxtenant: after Config.AdjustPool, the pool's config%w", errors.Join(problems...))
		}
	}

	then := c.ConnConfig.AfterConnect
	c.ConnConfig.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		// First of all that is sent, since a later statement could change what this one reads.
		if err := p.identify(ctx, conn); err != nil || then == nil {
			return err
		}
		return then(ctx, conn)
	}
	db.binder.install(c, db.load, p.resolve)
	p.gate = newTurnstile(db.config, c.MaxConns, db.closing, p.resolve)
	db.checkouts.hook(c, p.gate)
	return c, nil
}

// identify checks that a new connection is in the database meant for the tenant. It reads the tenant
// setting as the server left it, before anything is bound.
func (p *isolatedPool) identify(ctx context.Context, conn *pgconn.PgConn) error {
	config := p.set.db.config
	results, err := conn.Exec(ctx, "select pg_catalog.current_setting("+literal(config.Setting)+", true), pg_catalog.current_database()").ReadAll()
	if err != nil {
		return fmt.Errorf("check whose database it is: %w", err)
	}
	mark, database := string(results[0].Rows[0][0]), string(results[0].Rows[0][1])
	switch {
	case mark == p.tenant.ID, mark == "" && !config.RequireIdentity:
		return nil
	case mark == "":
		return fmt.Errorf("%w: database %q does not say that it is tenant %q's, which Config.RequireIdentity asks for; alter database … set %s = …",
			ErrWrongTenant, database, p.tenant.ID, config.Setting)
	}
	return fmt.Errorf("%w: database %q is tenant %q's, not tenant %q's", ErrWrongTenant, database, clip(mark), p.tenant.ID)
}

// resolve names the binding for a checkout from this pool, which serves one tenant only, whoever has it.
func (p *isolatedPool) resolve(ctx context.Context) (*binding, error) {
	c, bd, err := p.set.db.resolve(ctx)
	switch {
	case err != nil:
		return nil, err
	case bd.pool.Load() == p: // as get has found it
		return bd, nil
	case c.kind == kindWithout:
		err = fmt.Errorf("%w: the context is WithoutTenant", ErrWrongTenant)
	case c.tenant.ID != p.tenant.ID:
		err = fmt.Errorf("%w: the context is tenant %q's", ErrWrongTenant, c.tenant.ID)
	case c.tenant.Isolation != IsolationDatabase:
		err = fmt.Errorf("%w: the context's tenant has %v isolation and no pool of its own", ErrInvalidTenant, c.tenant.Isolation)
	default:
		return bd, nil
	}
	return nil, &TenantError{p.tenant.ID, "acquire", err}
}
