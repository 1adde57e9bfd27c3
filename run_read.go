package pgxtenant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// runBooks is the pool that the run tables are read with.
func (db *TenantDB) runBooks() (*pgxpool.Pool, error) {
	if db.registry == nil {
		return nil, ErrNoRegistry
	}
	return db.adminPool()
}

// stateSQL is the state of a result r: of one that is running, whether it still is.
const stateSQL = `case when r.state = 'running' and not exists (select from pgxtenant.run_claim c
	where c.kind = r.kind and c.target = r.target and c.runner = r.runner and c.expires > clock_timestamp()) then 'interrupted' else r.state end`

// Runs returns up to limit runs of ForEach, or of those of the given names, the latest first. Zero or less means all.
func (db *TenantDB) Runs(ctx context.Context, limit int, names ...string) ([]Run, error) {
	books, err := db.runBooks()
	if err != nil {
		return nil, err
	}
	var most *int
	if limit > 0 {
		most = &limit
	}
	rows, err := books.Query(ctx, `select n.id, n.name, n.started_by, n.options, n.started, n.ended, n.state = 'complete',
			(select coalesce(jsonb_object_agg(state, count), '{}') from (select `+stateSQL+` as state, count(*) from pgxtenant.run_result r where r.run = n.id group by 1) x)
		from pgxtenant.run n where $2::text[] is null or n.name = any ($2) order by n.id desc limit $1`, most, names)
	if err != nil {
		return nil, db.registry.explain("read runs", err)
	}
	runs, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r Run, err error) {
		var ended *time.Time
		err = row.Scan(&r.ID, &r.Name, &r.By, &r.Options, &r.Started, &ended, &r.Complete, &r.Counts)
		if ended != nil {
			r.Ended = *ended
		}
		return r, err
	})
	return runs, db.registry.explain("read runs", err)
}

// RunResults returns what became of the targets of a run, or of those in the given states, tenants in the order of
// their IDs after what is no tenant's own. It reads them a page at a time, and ends after an error. A run that does
// not exist has none.
func (db *TenantDB) RunResults(ctx context.Context, run int64, states ...RunState) iter.Seq2[RunResult, error] {
	return func(yield func(RunResult, error) bool) {
		books, err := db.runBooks()
		if err != nil {
			yield(RunResult{}, err)
			return
		}
		kind, target := "", ""
		for {
			page, err := db.resultPage(ctx, books, run, states, &kind, &target)
			if err != nil {
				yield(RunResult{}, db.registry.explain("read results", err))
				return
			}
			for _, res := range page {
				if !yield(res, nil) {
					return
				}
			}
			if len(page) < maxPage {
				return
			}
		}
	}
}

func (db *TenantDB) resultPage(ctx context.Context, books *pgxpool.Pool, run int64, states []RunState, kind, target *string) ([]RunResult, error) {
	var wanted []string
	for _, s := range states {
		wanted = append(wanted, string(s))
	}
	rows, err := books.Query(ctx, `select kind, target, isolation, place, state, before, after, attempts, started, coalesce(ended - started, '0'), error
		from (select *, `+stateSQL+` as now from pgxtenant.run_result r where run = $1 and (kind, target) > ($2, $3)) x (run, kind, target, isolation, place,
			stored, runner, attempts, before, after, started, ended, error, state)
		where $4::text[] is null or state = any ($4) order by kind, target limit $5`, run, *kind, *target, wanted, maxPage)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (res RunResult, err error) {
		var isolation, state, text string
		err = row.Scan(kind, target, &isolation, &res.Place, &state, &res.Before, &res.After, &res.Attempts, &res.Started, &res.Took, &text)
		if *kind == targetTenant {
			res.Tenant = *target
		}
		for res.Isolation.String() != isolation && res.Isolation < IsolationDatabase {
			res.Isolation++
		}
		if res.State = RunState(state); text != "" {
			res.Err = errors.New(text)
		}
		return res, err
	})
}

// PurgeRuns removes from the registry what it keeps of runs that were begun longer than age ago, whether they were
// completed or not, and returns how many. One that a process is at work in stays. It also forgets the claims of
// processes that have died. An age of zero or less means all runs.
func (db *TenantDB) PurgeRuns(ctx context.Context, age time.Duration) (int, error) {
	books, err := db.runBooks()
	if err != nil {
		return 0, err
	}
	if _, err := books.Exec(ctx, "delete from pgxtenant.run_claim where expires < clock_timestamp()"); err != nil {
		return 0, db.registry.explain("purge runs", err)
	}
	tag, err := books.Exec(ctx, `delete from pgxtenant.run r where started < clock_timestamp() - $1::bigint * interval '1 microsecond'
		and not exists (select from pgxtenant.run_claim c where c.run = r.id and c.expires > clock_timestamp())`, age.Microseconds())
	return int(tag.RowsAffected()), db.registry.explain("purge runs", err)
}

// Pending tells for each target that the options select which version it is at, and whether it is current, without
// doing or writing anything. It takes no notice of what earlier runs have done. One that Versions fails for is
// RunFailed; without Versions all others are RunPending. RunSkipped are those that are not looked at, with an Err that
// says why: tenants that are being provisioned or deleted, and template databases that nobody may connect to. Database
// tenants are asked one after another. It ends after an error.
func (db *TenantDB) Pending(ctx context.Context, o ForEachOptions) iter.Seq2[RunResult, error] {
	return func(yield func(RunResult, error) bool) {
		o.FailedOnly = false
		r, err := db.openRun(ctx, o)
		if err != nil {
			yield(RunResult{}, err)
			return
		}
		defer r.close()
		if r.began, err = r.clock(r.ctx); err == nil {
			err = pgx.BeginFunc(r.ctx, r.books, func(tx pgx.Tx) error { return r.known(r.ctx, tx) })
		}
		if err == nil {
			err = r.eachPending(func(res RunResult) bool { return yield(res, nil) })
		}
		if err != nil {
			yield(RunResult{}, r.cause(err))
		}
	}
}

func (r *tenantRun) eachPending(yield func(RunResult) bool) error {
	shared, err := r.shared(r.ctx)
	if err != nil {
		return err
	}
	targets := r.templates()
	if shared != nil {
		targets = append([]*runTarget{shared}, targets...)
	}
	for after := ""; ; {
		page, err := r.page(r.ctx, after, false)
		if err != nil {
			return err
		}
		for _, row := range page {
			after = row.rec.ID
			if r.o.selects(row.rec.Tenant) {
				t := r.tenantTarget(row.rec)
				t.err = row.unreadable
				targets = append(targets, t)
			}
		}
		if goesOn, err := r.pendingOf(targets, yield); err != nil || !goesOn || len(page) < maxPage {
			return err
		}
		targets = nil
	}
}

// pendingOf yields the versions of some targets, and reports whether it is to go on.
func (r *tenantRun) pendingOf(targets []*runTarget, yield func(RunResult) bool) (bool, error) {
	var ask []*runTarget
	for _, t := range targets {
		if t.kind == targetTenant && t.err == nil && t.notLookedAt() == nil && t.tenant.Isolation == IsolationSchema {
			ask = append(ask, t)
		}
	}
	var versions map[string]string
	var err error
	if r.o.Versions != nil && len(ask) > 0 {
		if versions, err = r.versions(r.ctx, ask); err != nil && r.ctx.Err() != nil {
			return false, err
		}
	}
	for _, t := range targets {
		res := RunResult{Tenant: t.tenant.ID, Isolation: t.tenant.Isolation, Place: t.place, State: RunPending, Err: t.err}
		skipped := t.notLookedAt()
		switch {
		case skipped != nil:
			res.Err = skipped
		case t.err != nil || r.o.Versions == nil:
		case err == nil && t.kind == targetTenant && t.tenant.Isolation == IsolationSchema:
			res.Before = versions[t.name]
		default:
			res.Before, res.Err = r.versionThere(t)
		}
		switch {
		case res.Err != nil && r.ctx.Err() != nil:
			return false, res.Err
		case skipped != nil, errors.Is(res.Err, errTemplateClosed):
			res.State, res.Err = RunSkipped, t.wrap(res.Err)
		case res.Err != nil:
			res.State, res.Err = RunFailed, t.wrap(res.Err)
		case r.o.Target != "" && res.Before == r.o.Target:
			res.State = RunCurrent
		}
		if !yield(res) {
			return false, nil
		}
	}
	return true, nil
}

// notLookedAt is why a target has no version to ask for, or nil.
func (t *runTarget) notLookedAt() error {
	switch t.status {
	case StatusProvisioning:
		return errProvisioning
	case StatusDeleting:
		return errDeleted
	}
	return nil
}

var errProvisioning = fmt.Errorf("%w: it is being provisioned, or that was interrupted; Provision completes it", ErrTenantUnavailable)

var errTemplateClosed = errors.New("pgxtenant: nobody may connect to it (ALLOW_CONNECTIONS false), and it is not opened only to be looked at")

// versionThere connects to a target's database to ask for its version.
func (r *tenantRun) versionThere(t *runTarget) (version string, err error) {
	if t.tenant.Isolation != IsolationDatabase {
		versions, err := r.versions(r.ctx, []*runTarget{t})
		return versions[t.tenant.ID], err
	}
	if t.kind == targetDatabase {
		databases, err := r.db.Databases(t.server)
		if err != nil {
			return "", err
		}
		if found, err := databases.find(r.ctx, databases.admin, t.place); err != nil || found.exists && !found.open {
			return "", cmp.Or(err, errTemplateClosed)
		}
	}
	config, err := r.poolConfig(r.ctx, t)
	if err != nil {
		return "", err
	}
	place, err := r.openPlace(r.ctx, config, 1)
	if err != nil {
		return "", err
	}
	defer place.close()
	conn, err := place.acquire(r.ctx, t)
	if err != nil {
		return "", err
	}
	defer place.release(conn, false)
	return r.versionOf(r.ctx, conn.Conn(), t)
}
