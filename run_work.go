package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// outcome is how the work on a target has ended.
type outcome struct {
	target    *runTarget
	result    RunResult
	busy      bool  // another session is at work on it: try again later
	elsewhere bool  // another process has done it in this run
	undone    bool  // the run ended before anything was done
	fatal     error // the run tables cannot be written
}

// work does all that is to be done for a target, and writes it down.
func (r *tenantRun) work(t *runTarget) (out outcome) {
	out.target = t
	out.result = RunResult{Tenant: t.tenant.ID, Isolation: t.tenant.Isolation, Place: t.place, Before: t.version, Started: time.Now()}
	c, err := r.claim(r.ctx, t)
	switch {
	case err != nil && r.ctx.Err() != nil:
		out.undone = true
		return out
	case err != nil:
		out.fatal = err
		return out
	case c.finished:
		out.elsewhere = true
		return out
	case !c.ok:
		out.busy = true
		return out
	}
	res := &out.result
	switch {
	case c.gone, c.status == StatusDeleting.String():
		res.State, res.Err = RunSkipped, errDeleted
	case t.err != nil:
		res.State, res.Err = RunFailed, t.err
	default:
		r.attempt(r.ctx, t, c.status == StatusProvisioning.String(), res)
	}
	// What was done is written down even if the run has been cancelled since.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), bookTimeout+max(r.o.Patience, 0))
	defer cancel()
	if res.State == "" { // nothing was done
		out.busy = errors.Is(res.Err, errTargetBusy)
		out.undone = !out.busy
		out.fatal = r.unclaim(ctx, t)
		return out
	}
	if res.State == RunFailed && t.kind == targetTenant {
		if rec, err := r.stillThere(ctx, t); err == nil && !rec {
			res.State, res.Err = RunSkipped, fmt.Errorf("%w while it was worked on: %w", errDeleted, res.Err)
		}
	}
	if te := (*TenantError)(nil); res.Err != nil && !errors.As(res.Err, &te) {
		res.Err = t.wrap(res.Err)
	}
	res.Took = time.Since(res.Started)
	out.fatal = r.finish(ctx, t, res)
	return out
}

// wrap names the target in an error.
func (t *runTarget) wrap(err error) error {
	if t.kind == targetTenant {
		return &TenantError{t.name, "run", err}
	}
	return fmt.Errorf("%s: run: %w", t.what(), err)
}

// stillThere reports whether a tenant is in the registry and not being deleted.
func (r *tenantRun) stillThere(ctx context.Context, t *runTarget) (there bool, err error) {
	err = r.book(ctx, func(ctx context.Context) error {
		return r.books.QueryRow(ctx, "select exists (select from pgxtenant.tenant where id = $1 and status <> 'deleting')", t.name).Scan(&there)
	})
	return there, err
}

// attempt connects to a target that is claimed and calls the function, as often as it takes. It leaves the state empty
// if nothing was done: the run is over, or another session holds the target.
func (r *tenantRun) attempt(ctx context.Context, t *runTarget, provisioning bool, res *RunResult) {
	fail := func(err error) {
		res.Err = err
		if ctx.Err() == nil && !errors.Is(err, errTargetBusy) {
			res.State = RunFailed
		}
	}
	if provisioning {
		switch there, err := r.settled(ctx, t); {
		case err != nil:
			fail(err)
			return
		case !there && r.templated[t.templateKind()]:
			res.State, res.Err = RunSkipped, fmt.Errorf("%w: it is being provisioned, and will be made from the template, which is done", ErrTenantUnavailable)
			return
		case !there:
			fail(errNotThere)
			return
		}
	}
	reopen := func() {}
	if t.kind == targetDatabase {
		var err error
		if reopen, err = r.openTemplate(ctx, t); err != nil {
			fail(err)
			return
		}
	}
	defer reopen()
	place := r.home
	if t.tenant.Isolation == IsolationDatabase {
		var config *pgxpool.Config
		err := callSafely(func() (err error) {
			config, err = r.poolConfig(ctx, t)
			return err
		})
		if err == nil {
			place, err = r.openPlace(ctx, config, 1)
		}
		if err != nil {
			fail(err)
			return
		}
		defer place.close()
	}
	conn, err := place.acquire(ctx, t)
	if err != nil {
		fail(err)
		return
	}
	clean := false
	defer func() { place.release(conn, clean) }()
	clean = r.on(ctx, place, conn, t, res, fail)
}

// on is attempt with a connection. It reports whether the connection is as it was.
func (r *tenantRun) on(ctx context.Context, p *runPlace, pooled *pgxpool.Conn, t *runTarget, res *RunResult, fail func(error)) (clean bool) {
	conn := pooled.Conn()
	if err := p.enter(ctx, conn, t); err != nil {
		fail(err)
		return !conn.IsClosed() && p.reset(ctx, conn) == nil
	}
	if r.o.Versions != nil {
		// Under the lock: another process may have done it since all were asked for.
		version, err := r.versionOf(ctx, conn, t)
		if err != nil {
			fail(p.explain(err, t))
			return false
		}
		res.Before = version
		if r.o.Target != "" && version == r.o.Target {
			res.State, res.After = RunCurrent, version
			return p.reset(ctx, conn) == nil
		}
	}
	fctx, cancel := r.fenced(ctx, p)
	defer cancel()
	var err error
	for {
		res.Attempts++
		res.State, err = r.call(fctx, conn, t)
		if res.State == RunDone || !retryable(err) || res.Attempts >= r.o.Attempts || conn.IsClosed() {
			break
		}
		if sleep(fctx, backoff(res.Attempts)) != nil || p.reset(fctx, conn) != nil || p.enter(fctx, conn, t) != nil {
			break // with the error that there is
		}
	}
	res.Err = err
	if conn.IsClosed() {
		if res.State == RunDone && r.o.Versions != nil {
			fail(errors.New("pgxtenant: the function closed the connection, so that the version cannot be asked for"))
		}
		return false
	}
	if res.State == RunUnknown || p.reset(ctx, conn) != nil {
		return false
	}
	if r.o.Versions == nil {
		return true
	}
	r.after(ctx, conn, t, res)
	return !conn.IsClosed() && p.reset(ctx, conn) == nil
}

// after completes a result with the version that was reached.
func (r *tenantRun) after(ctx context.Context, conn *pgx.Conn, t *runTarget, res *RunResult) {
	version, err := r.versionOf(ctx, conn, t)
	switch {
	case err != nil && res.State == RunDone:
		res.State, res.Err = RunFailed, fmt.Errorf("pgxtenant: the function returned nil, and the version cannot be read: %w", err)
	case err != nil:
		return
	case res.State == RunDone && r.o.Target != "" && version != r.o.Target:
		res.State, res.Err = RunFailed, fmt.Errorf("pgxtenant: the function returned nil, and the version is %q, not %q", clip(version), clip(r.o.Target))
	}
	res.After = version
}

func (r *tenantRun) versionOf(ctx context.Context, conn *pgx.Conn, t *runTarget) (string, error) {
	versions, err := r.askVersions(ctx, conn, []Tenant{t.tenant})
	return versions[t.tenant.ID], err
}

// call calls the function once and says what has become of the target.
func (r *tenantRun) call(ctx context.Context, conn *pgx.Conn, t *runTarget) (RunState, error) {
	if r.o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, r.o.Timeout, fmt.Errorf("pgxtenant: it took longer than %v (ForEachOptions.Timeout)", r.o.Timeout))
		defer cancel()
	}
	fctx := WithoutTenant(ctx)
	if t.kind == targetTenant {
		fctx = WithTenantID(ctx, t.name)
	}
	err := callSafely(func() error { return r.f(fctx, conn, t.tenant) })
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	switch {
	case conn.PgConn().IsBusy():
		// The connection is closed with the rest of the answer unread, which may be an error.
		return RunUnknown, errors.Join(err, errors.New("pgxtenant: the function returned before it had read, or closed, the rows of a query; whether the query has succeeded is not known"))
	case err != nil && conn.IsClosed() && !pgconn.SafeToRetry(err):
		// The server may have done it all, and the answer been lost.
		return RunUnknown, err
	case err != nil:
		return RunFailed, r.explain(err, conn, t)
	case !conn.IsClosed() && conn.PgConn().TxStatus() != 'I':
		return RunFailed, errors.New("pgxtenant: the function returned nil in the middle of a transaction, which was rolled back")
	}
	return RunDone, nil
}

// explain adds to an error of the function what it means.
func (r *tenantRun) explain(err error, conn *pgx.Conn, t *runTarget) error {
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(err, &pgErr):
		return err
	case pgErr.Code == "25001" && r.home.pooled != nil:
		return fmt.Errorf("%w (a pooler is between, so each statement is in a transaction; ForEachOptions.AdjustConn may lead past it)", err)
	case pgErr.Code == "42501":
		return fmt.Errorf("%w (as role %q)", err, conn.Config().User)
	}
	return err
}

// callSafely runs a function of the user's on a goroutine of its own, which it may end, and makes a panic in it an error.
func callSafely(f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("pgxtenant: the function ended its goroutine") // unless it returns
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("pgxtenant: panic: %v\n%s", v, strings.TrimSpace(string(debug.Stack())))
			}
			done <- err
		}()
		err = f()
	}()
	return <-done
}

// retryable reports whether an error means that a transaction was rolled back for the sake of others.
func retryable(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && (pgErr.Code == "55P03" || pgErr.Code == "40P01" || pgErr.Code == "40001")
}

// backoff is the pause after so many attempts: growing, and not the same for all that wait for one thing.
func backoff(attempts int) time.Duration {
	pause := min(firstPause<<min(attempts-1, 16), longestPause)
	return pause/2 + rand.N(pause+1)
}

// templateKind is the kind of the template that the tenant would be made from, with its server.
func (t *runTarget) templateKind() string {
	if t.tenant.Isolation == IsolationSchema {
		return targetSchema
	}
	return targetDatabase + " " + t.server
}

// openTemplate lets connections into a template database for as long as it is worked on; what it returns closes it
// again. A tenant whose database is to be copied from it meanwhile is refused by the server, as in use.
func (r *tenantRun) openTemplate(ctx context.Context, t *runTarget) (func(), error) {
	databases, err := r.db.Databases(t.server)
	if err != nil {
		return nil, err
	}
	found, err := databases.find(ctx, databases.admin, t.place)
	if err == nil && !found.exists {
		err = fmt.Errorf("pgxtenant: the template database %q is missing; create it, with what each tenant is to have before the first migration", t.place)
	}
	if err != nil || found.open {
		return func() {}, err
	}
	if _, err := databases.admin.Exec(ctx, "alter database "+ident(t.place)+" allow_connections true"); err != nil {
		return nil, databases.explain(err)
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), bookTimeout)
		defer cancel()
		if _, err := databases.admin.Exec(ctx, "alter database "+ident(t.place)+" allow_connections false"); err != nil {
			r.db.config.Logger.Error("template database left open to connections", "database", t.place, "error", err)
		}
	}, nil
}
