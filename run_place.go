package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// runPlace is a database that a run has connections to: that of schema tenants and the shared schemas for as long as
// the run lasts, that of a database tenant until it is done. Its connections are the run's own, and not those of the
// admin pool: they carry session state, and must not be closed by TenantDB.Close before what was done is written down.
// It may be used by any number of goroutines.
type runPlace struct {
	run  *tenantRun
	pool *pgxpool.Pool

	// pooled is set behind a pooler, where a session may be another in each transaction: what else is set for the
	// session goes with the first statement of each transaction then, as it does for tenants' checkouts, and the
	// lock with it. So nothing runs there that must not be in a transaction.
	pooled *binder

	// kept is set if a connection may serve one target after another. It may not if a hook has set up the
	// session, which would be erased.
	kept bool
}

// openPlace opens the database that config leads to for up to n connections.
func (r *tenantRun) openPlace(ctx context.Context, config *pgxpool.Config, n int) (*runPlace, error) {
	c := config.Copy()
	c.MaxConns, c.MinConns, c.MinIdleConns = int32(n), 0, 0
	//lint:ignore SA1019 pgxpool still calls it
	c.BeforeAcquire = nil
	c.AfterRelease, c.BeforeClose, c.ShouldPing = nil, nil, nil
	c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { return true, nil }
	p := &runPlace{run: r, kept: c.AfterConnect == nil && c.ConnConfig.AfterConnect == nil}
	if err := p.open(ctx, c.Copy()); err != nil {
		return nil, err
	}
	var pooler bool
	err := r.patiently(ctx, func() error {
		return p.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
			// A pooler gives its clients keys of its own, by which it knows whom to cancel.
			var pid uint32
			err := conn.QueryRow(ctx, "select pg_catalog.pg_backend_pid()", pgx.QueryExecModeExec).Scan(&pid)
			pooler = pid != conn.Conn().PgConn().PID()
			return err
		})
	})
	if err == nil && !pooler {
		return p, nil
	}
	p.close()
	if err != nil {
		return nil, err
	}
	b, err := newBinder(binderOptions{setting: r.db.config.Setting, sharedSchemas: r.db.config.SharedSchemas})
	if err != nil {
		return nil, err
	}
	b.fenced = true // from here on: what is bound to no target takes no lock
	b.install(c, nil, func(ctx context.Context) (*binding, error) {
		bd, ok := ctx.Value(runBindingKey{}).(*binding)
		if !ok {
			bd = b.none
		}
		return bd, nil
	})
	p.pooled, p.kept = b, false
	return p, p.open(ctx, c)
}

type runBindingKey struct{}

func (p *runPlace) open(ctx context.Context, c *pgxpool.Config) (err error) {
	p.pool, _, err = p.run.db.budget.open(ctx, c, func() float64 { return 1 })
	return err
}

func (p *runPlace) close() {
	p.pool.Close()
	p.run.db.budget.remove(p.pool)
}

// acquire returns a connection that is placed in no target, unless a pooler is between.
func (p *runPlace) acquire(ctx context.Context, t *runTarget) (conn *pgxpool.Conn, err error) {
	if p.pooled != nil {
		ctx = context.WithValue(ctx, runBindingKey{}, p.pooled.encode(p.run.pooledTenant(t), Limits{}.withDefaults()))
	}
	err = p.run.patiently(ctx, func() error {
		conn, err = p.pool.Acquire(ctx)
		return err
	})
	return conn, err
}

// pooledTenant is a target as it is bound behind a pooler.
func (r *tenantRun) pooledTenant(t *runTarget) Tenant {
	bound := Tenant{ID: t.tenant.ID, Isolation: t.tenant.Isolation, Schema: t.tenant.Schema, Settings: map[string]string{
		"lock_timeout": milliseconds(r.o.LockTimeout), "statement_timeout": milliseconds(r.o.StatementTimeout),
	}}
	if t.kind == targetShared {
		bound.Settings["search_path"] = searchPath(r.db.config.SharedSchemas...)
	}
	return bound
}

// errTargetBusy means that another session is at work on a target.
var errTargetBusy = errors.New("pgxtenant: another session is at work on it")

// enter places a connection in the target, takes its lock for as long as the session lasts, and checks that the
// place is the tenant's.
func (p *runPlace) enter(ctx context.Context, conn *pgx.Conn, t *runTarget) error {
	o := &p.run.o
	if t.tenant.Isolation == IsolationSchema {
		// The registry's row may have been written by hand, and no checkout been asked.
		if err := validSchema(t.tenant.Schema); err != nil {
			return fmt.Errorf("%w: schema %q: %w", ErrInvalidTenant, clip(t.tenant.Schema), err)
		}
	}
	// The database's own mark, as ALTER DATABASE … SET left it: what the session has may have been bound.
	mark := `coalesce((select pg_catalog.substr(c, pg_catalog.strpos(c, '=') + 1) from pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) c
		where s.setdatabase = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) and s.setrole = 0
		and pg_catalog.lower(pg_catalog.split_part(c, '=', 1)) = ` + literal(strings.ToLower(p.run.db.config.Setting)) + "), '')"
	var marked, database string
	locked, usable := true, true
	if p.pooled != nil {
		// The first transaction places it, so all that can be wrong is known before the function is called.
		err := conn.QueryRow(ctx, "select "+mark+", pg_catalog.current_database()", pgx.QueryExecModeExec).Scan(&marked, &database)
		if err != nil {
			return p.explain(err, t)
		}
	} else {
		sql := "select " + mark + `, pg_catalog.current_database(), pg_catalog.set_config('lock_timeout', $1, false),
			pg_catalog.set_config('statement_timeout', $2, false), `
		if t.kind == targetSchema {
			// Those who copy it share the lock; without a place in the queue one might never find it free.
			sql += "(select true from pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended($3, 0)))"
		} else {
			sql += "pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended($3, 0))"
		}
		args := []any{pgx.QueryExecModeExec, milliseconds(o.LockTimeout), milliseconds(o.StatementTimeout), t.fence()}
		into := []any{&marked, &database, new(string), new(string), &locked}
		schemas := p.run.db.config.SharedSchemas
		if t.tenant.Isolation == IsolationSchema {
			sql += ", pg_catalog.has_schema_privilege($4, 'usage')" // raises 3F000 if there is none
			args, into = append(args, t.tenant.Schema), append(into, &usable)
			schemas = append([]string{t.tenant.Schema}, schemas...)
		}
		if t.tenant.Isolation != IsolationDatabase {
			sql += ", pg_catalog.set_config('search_path', $" + strconv.Itoa(len(args)) + ", false)"
			args, into = append(args, searchPath(schemas...)), append(into, new(string))
		}
		if err := conn.QueryRow(ctx, sql, args...).Scan(into...); err != nil {
			return p.explain(err, t)
		}
	}
	switch {
	case !locked:
		return errTargetBusy
	case !usable:
		return fmt.Errorf("pgxtenant: role %q may not use schema %q, which it should own", conn.Config().User, t.tenant.Schema)
	case t.kind == targetTenant && t.tenant.Isolation == IsolationDatabase && marked != t.name && (marked != "" || t.server != ""):
		return fmt.Errorf("%w: database %q carries the mark of tenant %q", ErrWrongTenant, database, clip(marked))
	}
	return nil
}

// explain adds to an error of placing a connection what it means.
func (p *runPlace) explain(err error, t *runTarget) error {
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(err, &pgErr):
		return err
	case pgErr.Code == "3F000" && t.kind == targetSchema:
		return fmt.Errorf("pgxtenant: the template, schema %q, is missing: %w", t.tenant.Schema, err)
	case pgErr.Code == "3F000":
		return fmt.Errorf("pgxtenant: schema %q is missing; Provision makes it, or Deprovision removes the tenant: %w", t.tenant.Schema, err)
	case pgErr.Code == "55P03" && (p.pooled != nil || t.kind == targetSchema):
		return errTargetBusy
	}
	return err
}

// reset makes the session as it was when it was new, which gives up the lock too.
func (p *runPlace) reset(ctx context.Context, conn *pgx.Conn) error {
	if conn.PgConn().TxStatus() != 'I' {
		if _, err := conn.PgConn().Exec(ctx, "rollback").ReadAll(); err != nil {
			return err
		}
	}
	if p.pooled != nil {
		return nil
	}
	if err := conn.DeallocateAll(ctx); err != nil { // which tells pgx's caches too
		return err
	}
	_, err := conn.PgConn().Exec(ctx, "discard all").ReadAll()
	return err
}

// release gives back a connection. It is closed unless it was reset.
func (p *runPlace) release(conn *pgxpool.Conn, clean bool) {
	if !clean || !p.kept {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Conn().Close(ctx)
	}
	conn.Release()
}

// connectionLost reports whether err is the end of a connection and not the server's answer.
func connectionLost(err error) bool {
	var netErr net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || errors.As(err, &netErr) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, pgconn.ErrConnClosed)
}

// milliseconds writes a timeout as the server wants it; one without limit is zero.
func milliseconds(d time.Duration) string {
	if d <= 0 {
		return "0"
	}
	return strconv.FormatInt(max(d.Milliseconds(), 1), 10)
}

// poolConfig returns the configuration that leads to a target's database, as AdjustConn leaves it.
func (r *tenantRun) poolConfig(ctx context.Context, t *runTarget) (*pgxpool.Config, error) {
	var c *pgxpool.Config
	switch {
	case t.tenant.Isolation != IsolationDatabase:
		c = r.db.config.Admin.Copy()
	case t.server != "":
		s, ok := r.db.config.Servers[t.server]
		if !ok {
			_, err := r.db.Databases(t.server)
			return nil, err
		}
		c = s.Admin.Copy()
		c.ConnConfig.Database = t.database()
	default:
		text := t.tenant.ConnString
		if resolve := r.db.registry.config.Resolve; resolve != nil {
			var err error
			if text, err = resolve(ctx, text, t.tenant); err != nil {
				return nil, fmt.Errorf("pgxtenant: resolve the reference to tenant %q's database: %w", t.name, err)
			}
		}
		if text == "" {
			return nil, fmt.Errorf("%w: it has neither a ConnString nor a server", ErrInvalidTenant)
		}
		var err error
		if c, err = parsePoolConfig(text); err != nil {
			return nil, err
		}
	}
	if r.o.AdjustConn == nil {
		return c, nil
	}
	asked := t.tenant
	if t.tenant.Isolation != IsolationDatabase {
		asked = Tenant{}
	}
	host, port := c.ConnConfig.Host, c.ConnConfig.Port
	if err := r.o.AdjustConn(asked, c.ConnConfig); err != nil {
		return nil, fmt.Errorf("pgxtenant: ForEachOptions.AdjustConn: %w", err)
	}
	for _, f := range c.ConnConfig.Fallbacks { // without TLS to the same server, for one
		if f.Host == host && f.Port == port {
			f.Host, f.Port = c.ConnConfig.Host, c.ConnConfig.Port
		}
	}
	return c, nil
}
