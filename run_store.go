package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// runTables keep what TenantDB.ForEach does: the runs, what became of each target in each run, and what is
// worked on at the moment, by whichever run.
//
// A claim is a row with a time by which it ends unless its process renews it, and no advisory lock, since a lock that
// outlives a transaction is lost, or worse, left behind, where a pooler gives each transaction another session; and to
// hold a transaction open for it would take a second connection for each tenant. A claim alone would not do either: the
// statement of a process that has died may go on for hours on its server. That is what the lock is for that is
// taken beside it, on the connection that the function gets; see runPlace.
const runTables = `
	create table pgxtenant.run (
		id bigint generated always as identity primary key,
		name text not null,
		started_by text not null,
		options text not null,
		state text not null default 'open' check (state in ('open', 'complete', 'abandoned')),
		started timestamptz not null default clock_timestamp(),
		ended timestamptz -- of the latest call that came to its end
	);
	create unique index run_open on pgxtenant.run (name) where state = 'open';
	create table pgxtenant.run_result (
		run bigint not null references pgxtenant.run on delete cascade,
		kind text not null check (kind in ('tenant', 'shared', 'schema', 'database')), -- the last two are templates
		target text collate "C" not null,
		isolation text not null,
		place text not null,
		state text not null,
		runner text not null, -- the call that did it
		attempts integer not null default 0,
		before text not null default '',
		after text not null default '',
		started timestamptz not null default clock_timestamp(),
		ended timestamptz,
		error text not null default '',
		primary key (run, kind, target)
	);
	create table pgxtenant.run_claim (
		kind text not null,
		target text collate "C" not null,
		runner text not null,
		run bigint not null,
		expires timestamptz not null,
		primary key (kind, target)
	);`

// maxErrorText is how much of an error the run table keeps.
const maxErrorText = 4000

// enter finds the run to go on with, or makes one.
func (r *tenantRun) enter(ctx context.Context) error {
	o := &r.o
	return r.book(ctx, func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, r.books, func(tx pgx.Tx) error {
			// Two that begin a run of the same name at the same moment begin one.
			if _, err := tx.Exec(ctx, "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1, 0))", "pgxtenant run named "+o.Name); err != nil {
				return err
			}
			var options string
			err := tx.QueryRow(ctx, "select id, options, clock_timestamp() from pgxtenant.run where name = $1 and state = 'open'", o.Name).
				Scan(&r.id, &options, &r.began)
			switch {
			case errors.Is(err, pgx.ErrNoRows) && o.FailedOnly:
				return fmt.Errorf("pgxtenant: there is no run %q that was not completed, and FailedOnly goes on with one", o.Name)
			case errors.Is(err, pgx.ErrNoRows):
				return r.insert(ctx, tx)
			case err != nil:
				return err
			case o.Fresh:
				return r.replace(ctx, tx)
			case options != o.fingerprint():
				return fmt.Errorf("pgxtenant: run %q was begun with other options, %s, not %s; finish it with those, take another Name, or set Fresh",
					o.Name, options, o.fingerprint())
			}
			r.resumed = true
			if err = r.canaries(ctx, tx); err != nil {
				return err
			}
			if _, err = tx.Exec(ctx, "update pgxtenant.run set ended = null where id = $1", r.id); err != nil {
				return err
			}
			return r.attend(ctx, tx)
		})
	})
}

func (r *tenantRun) insert(ctx context.Context, tx pgx.Tx) error {
	r.resumed = false
	if err := errors.Join(r.known(ctx, tx), r.canaries(ctx, tx)); err != nil {
		return err
	}
	err := tx.QueryRow(ctx, "insert into pgxtenant.run (name, started_by, options) values ($1, $2, $3) returning id, clock_timestamp()",
		r.o.Name, r.o.By, r.o.fingerprint()).Scan(&r.id, &r.began)
	if err != nil {
		return err
	}
	return r.attend(ctx, tx)
}

// attend claims the run itself, by the name of this call, so that PurgeRuns and Fresh see that somebody is at work in it
// between two tenants too.
func (r *tenantRun) attend(ctx context.Context, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `insert into pgxtenant.run_claim (kind, target, runner, run, expires)
		values ('run', $1, $1, $2, clock_timestamp() + $3::bigint * interval '1 microsecond')
		on conflict (kind, target) do update set run = excluded.run, expires = excluded.expires`, r.runner, r.id, r.o.Lease.Microseconds())
	return err
}

func (r *tenantRun) replace(ctx context.Context, tx pgx.Tx) error {
	var busy bool
	if err := tx.QueryRow(ctx, "select exists (select from pgxtenant.run_claim where run = $1 and expires > clock_timestamp())", r.id).Scan(&busy); err != nil {
		return err
	}
	if busy {
		return fmt.Errorf("pgxtenant: a process is at work in run %q; Fresh must wait until it has ended", r.o.Name)
	}
	if _, err := tx.Exec(ctx, "update pgxtenant.run set state = 'abandoned' where id = $1", r.id); err != nil {
		return err
	}
	return r.insert(ctx, tx)
}

// known checks that the registry has all of the IDs that the options select.
func (r *tenantRun) known(ctx context.Context, tx pgx.Tx) error {
	if len(r.o.IDs) == 0 {
		return nil
	}
	rows, err := tx.Query(ctx, "select i.id from unnest($1::text[]) i(id) where not exists (select from pgxtenant.tenant t where t.id = i.id) limit 10", r.o.IDs)
	if err != nil {
		return err
	}
	unknown, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range unknown {
		errs = append(errs, &TenantError{id, "select", ErrTenantNotFound})
	}
	return errors.Join(errs...)
}

// canaries checks that the run comes to each of its canaries.
func (r *tenantRun) canaries(ctx context.Context, tx pgx.Tx) error {
	var errs []error
	for _, id := range r.o.Canaries {
		row, err := tx.Query(ctx, recordSQL+"t.id = $1", id)
		if err != nil {
			return err
		}
		rec, err := pgx.CollectExactlyOneRow(row, r.db.registry.decode)
		t := &runTarget{status: rec.Status}
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			err = ErrTenantNotFound
		case err != nil && rec.ID == "":
			return err
		case err == nil && t.notLookedAt() != nil:
			err = t.notLookedAt()
		case err == nil && !r.o.chooses(rec.Tenant):
			err = errors.New("pgxtenant: ForEachOptions.Canaries has it, and it is not among the tenants that are selected")
		}
		if err != nil {
			errs = append(errs, &TenantError{id, "canary", err})
		}
	}
	return errors.Join(errs...)
}

// claimed is the answer to a claim.
type claimed struct {
	ok       bool   // the target is ours
	finished bool   // it is done in this run already, by another process; not a tenant of the same ID before it
	gone     bool   // the tenant is not in the registry
	status   string // of the tenant, as of now
}

// claim takes a target, unless a process that lives has it.
func (r *tenantRun) claim(ctx context.Context, t *runTarget) (c claimed, err error) {
	var found, written int
	err = r.book(ctx, func(ctx context.Context) error {
		// The time is compared in the row itself, which is the latest once it is locked: a row of another table
		// would be seen as it was when the statement began.
		return r.books.QueryRow(ctx, `with claimed as (
				insert into pgxtenant.run_claim as c (kind, target, runner, run, expires) values ($2, $3, $4, $1, clock_timestamp() + $5::bigint * interval '1 microsecond')
				on conflict (kind, target) do update set runner = excluded.runner, run = excluded.run, expires = excluded.expires
					where c.runner = excluded.runner or c.expires < clock_timestamp()
				returning 1),
			noted as (
				insert into pgxtenant.run_result as r (run, kind, target, isolation, place, state, runner)
				select $1, $2, $3, $6, $7, 'running', $4 from claimed
				on conflict (run, kind, target) do update set state = 'running', runner = excluded.runner, place = excluded.place,
					isolation = excluded.isolation, started = clock_timestamp(), ended = null, error = '', attempts = 0
					where r.state not in ('done', 'current') or r.started < (select created from pgxtenant.tenant where id = $3 and $2 = 'tenant')
				returning 1)
			select (select count(*) from claimed), (select count(*) from noted),
				(select count(*) from pgxtenant.tenant where id = $3), coalesce((select status from pgxtenant.tenant where id = $3), '')`,
			r.id, t.kind, t.name, r.runner, r.o.Lease.Microseconds(), t.tenant.Isolation.String(), t.place).
			Scan(&found, &written, new(int), &c.status)
	})
	c.ok, c.finished = found == 1 && written == 1, found == 1 && written == 0
	c.gone = t.kind == targetTenant && c.status == ""
	if err == nil && c.finished {
		err = r.unclaim(ctx, t)
	}
	return c, err
}

// unclaim gives a target back of which nothing was done, or nothing that is known.
func (r *tenantRun) unclaim(ctx context.Context, t *runTarget) error {
	return r.book(ctx, func(ctx context.Context) error {
		_, err := r.books.Exec(ctx, `with released as (delete from pgxtenant.run_claim where kind = $2 and target = $3 and runner = $4)
			update pgxtenant.run_result set state = 'interrupted', ended = clock_timestamp()
			where run = $1 and kind = $2 and target = $3 and runner = $4 and state = 'running'`, r.id, t.kind, t.name, r.runner)
		return err
	})
}

// finish writes what became of a target that was claimed, and gives it back.
func (r *tenantRun) finish(ctx context.Context, t *runTarget, res *RunResult) error {
	return r.book(ctx, func(ctx context.Context) error {
		// One that took it over meanwhile, and found it locked, has left it interrupted.
		_, err := r.books.Exec(ctx, `with released as (delete from pgxtenant.run_claim where kind = $2 and target = $3 and runner = $4)
			update pgxtenant.run_result set state = $5, attempts = $6, before = $7, after = $8, error = $9, ended = clock_timestamp()
			where run = $1 and kind = $2 and target = $3 and (runner = $4 or state = 'interrupted')`,
			r.id, t.kind, t.name, r.runner, string(res.State), res.Attempts, storable(res.Before), storable(res.After), errorText(res.Err))
		return err
	})
}

// note writes what became of targets that nobody had to claim, and returns the names of those it has written: not of
// those that another process is at work on.
func (r *tenantRun) note(ctx context.Context, state RunState, targets []*runTarget, why error) (noted map[string]bool, err error) {
	if len(targets) == 0 {
		return nil, nil
	}
	var kinds, names, isolations, places, versions, texts []string
	for _, t := range targets {
		kinds, names = append(kinds, t.kind), append(names, t.name)
		isolations, places, versions = append(isolations, t.tenant.Isolation.String()), append(places, t.place), append(versions, storable(t.version))
		text := ""
		if why != nil {
			text = errorText(t.wrap(why))
		}
		texts = append(texts, text)
	}
	after := "version"
	if state != RunCurrent {
		after = "''"
	}
	err = r.book(ctx, func(ctx context.Context) error {
		rows, err := r.books.Query(ctx, `insert into pgxtenant.run_result as r (run, kind, target, isolation, place, state, runner, before, after, error, ended)
			select $1, kind, target, isolation, place, $2, $3, version, `+after+`, error, clock_timestamp()
			from unnest($4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[]) x(kind, target, isolation, place, version, error)
			on conflict (run, kind, target) do update set state = excluded.state, runner = excluded.runner, place = excluded.place, isolation = excluded.isolation,
				before = excluded.before, after = excluded.after, error = excluded.error, attempts = 0, started = clock_timestamp(), ended = clock_timestamp()
				where r.state not in ('done', 'current') and not exists (select from pgxtenant.run_claim c
					where c.kind = r.kind and c.target = r.target and c.expires > clock_timestamp())
			returning target`, r.id, string(state), r.runner, kinds, names, isolations, places, versions, texts)
		if err != nil {
			return err
		}
		noted = make(map[string]bool, len(targets))
		var name string
		_, err = pgx.ForEachRow(rows, []any{&name}, func() error {
			noted[name] = true
			return nil
		})
		return err
	})
	return noted, err
}

// beat renews the claims of this call.
func (r *tenantRun) beat(ctx context.Context) error {
	_, err := r.books.Exec(ctx, "update pgxtenant.run_claim set expires = clock_timestamp() + $2::bigint * interval '1 microsecond' where runner = $1",
		r.runner, r.o.Lease.Microseconds())
	return err
}

// leave ends this call's part in the run. Calls that have died left nobody to take over what attend claimed.
func (r *tenantRun) leave(ctx context.Context, complete bool) error {
	return r.book(ctx, func(ctx context.Context) error {
		_, err := r.books.Exec(ctx, `with left_alone as (delete from pgxtenant.run_claim where kind = 'run' and (target = $3 or expires < clock_timestamp()))
			update pgxtenant.run set ended = clock_timestamp(), state = case when $2 and state = 'open' then 'complete' else state end
			where id = $1`, r.id, complete, r.runner)
		return err
	})
}

// book runs f, which reads or writes the run tables and may be repeated, until it does not fail for want of the
// server, or Patience is at its end.
func (r *tenantRun) book(ctx context.Context, f func(ctx context.Context) error) error {
	err := r.patiently(ctx, func() error {
		// A call that hangs must not keep others waiting for its connection.
		ctx, cancel := context.WithTimeout(ctx, bookTimeout)
		defer cancel()
		return f(ctx)
	})
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000"):
		return fmt.Errorf("pgxtenant: run tables: they are not in the registry's database; call Registry.Install: %w", err)
	case pgErr != nil:
		return fmt.Errorf("pgxtenant: run tables: %w", adminError(err))
	}
	return err
}

const bookTimeout = 10 * time.Second

// patiently repeats f while the server cannot be reached.
func (r *tenantRun) patiently(ctx context.Context, f func() error) error {
	pause := 50 * time.Millisecond
	for begun := time.Now(); ; pause = min(2*pause, time.Second) {
		err := f()
		if err == nil || ctx.Err() != nil || !notReachable(err) {
			return err
		}
		if time.Since(begun)+pause > r.o.Patience {
			return fmt.Errorf("pgxtenant: the server could not be reached for %v: %w", max(r.o.Patience, 0), err)
		}
		if sleep(ctx, pause) != nil {
			return err
		}
	}
}

// notReachable reports whether an error means that a server cannot be reached at the moment, or is full.
func notReachable(err error) bool {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.Code {
		case "57P01", "57P02", "57P03", "53300":
			return true
		}
		return strings.HasPrefix(pgErr.Code, "08") // of a pooler too
	}
	var connect *pgconn.ConnectError
	return errors.As(err, &connect) || connectionLost(err)
}

// sleep waits, or ends with ctx.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errorText is what the run table keeps of an error.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	text := storable(err.Error())
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "…"
	}
	return text
}

// storable is text without what the server cannot store.
func storable(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}
