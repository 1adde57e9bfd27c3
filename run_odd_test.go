package pgxtenant

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// resultOf reads what the run table has of a tenant.
func resultOf(t testing.TB, report *RunReport, id string) RunResult {
	t.Helper()
	for res, err := range report.Results(context.Background()) {
		require.NoError(t, err)
		if res.Tenant == id && res.Place != "shared" {
			return res
		}
	}
	t.Fatalf("no result of %q", id)
	return RunResult{}
}

// Whatever one tenant's function does, it is that tenant's failure, and the others are done.
func TestForEachOneGoesWrong(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 12)
	ctx := context.Background()
	fl.d.Exec("drop schema tenant_t0002 cascade")
	fl.d.SuperExec("create role "+ident(fl.d.Name+"_other"), "alter schema tenant_t0003 owner to "+ident(fl.d.Name+"_other"))
	t.Cleanup(func() {
		fl.d.SuperExec("drop owned by "+ident(fl.d.Name+"_other")+" cascade", "drop role "+ident(fl.d.Name+"_other"))
	})
	_, err := fl.db.Registry().Update(ctx, "t0004", func(r *Record) error { r.Status = StatusDeleting; return nil })
	require.NoError(t, err)
	require.NoError(t, fl.db.Registry().Suspend(ctx, "t0010"))
	require.NoError(t, fl.db.Registry().MakeReadOnly(ctx, "t0011"))
	fl.d.Exec(`update pgxtenant.tenant set settings = '{"a": 1}' where id = 't0009'`)

	report, err := fl.db.ForEach(ctx, ForEachOptions{SkipShared: true, StatementTimeout: 2 * time.Second}, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		switch tn.ID {
		case "t0000":
			panic("at the disco")
		case "t0001":
			runtime.Goexit()
		case "t0005":
			_, err := conn.Exec(ctx, "select pg_sleep(600)")
			return fmt.Errorf("wrapped: %w", err)
		case "t0006": // after which nobody knows what was done
			_, err := conn.Exec(ctx, "select pg_terminate_backend(pg_backend_pid())")
			return err
		case "t0007": // deleted while it is worked on
			require.NoError(t, fl.db.Registry().Delete(ctx, tn.ID))
			fl.d.Exec("drop schema tenant_t0007 cascade")
		case "t0008":
			_, err := conn.Exec(ctx, "create table server.more ()")
			return err
		}
		return upgrade(ctx, conn, tn)
	})
	require.Equal(t, []int{2, 7, 1, 2}, []int{report.Done, report.Failed, report.Unknown, report.Skipped}, "%v", err)
	require.Equal(t, 8, report.LeftOver)
	for id, want := range map[string]struct {
		state RunState
		text  string
	}{
		"t0000": {RunFailed, "panic: at the disco\ngoroutine "},
		"t0001": {RunFailed, "the function ended its goroutine"},
		"t0002": {RunFailed, `schema "tenant_t0002" is missing; Provision makes it, or Deprovision removes the tenant`},
		"t0003": {RunFailed, `role "` + fl.d.Owner + `" may not use schema "tenant_t0003", which it should own`},
		"t0004": {RunSkipped, "it was deleted, or is being deleted"},
		"t0005": {RunFailed, "wrapped: ERROR: canceling statement due to statement timeout"},
		"t0006": {RunUnknown, "57P01"},
		"t0007": {RunSkipped, "it was deleted, or is being deleted while it was worked on"},
		"t0008": {RunFailed, `schema "server" does not exist`},
		"t0009": {RunFailed, `settings are not all text`},
		"t0010": {RunDone, ""},
		"t0011": {RunDone, ""},
	} {
		res := resultOf(t, report, id)
		require.Equal(t, want.state, res.State, "%s: %v", id, res.Err)
		if want.text != "" {
			require.ErrorContains(t, res.Err, want.text)
			require.ErrorContains(t, res.Err, `tenant "`+id+`"`)
		}
	}
	fl.quiet()
}

// A lock that live traffic holds is waited for as long as LockTimeout says, again and again, and no longer.
func TestForEachLockTimeout(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 2)
	ctx := context.Background()
	live := fl.d.Connect(fl.d.OwnerURL())
	tx, err := live.Begin(ctx)
	require.NoError(t, err)
	_, err = tx.Exec(ctx, "select from tenant_t0000.item")
	require.NoError(t, err)
	var calls atomic.Int32
	o := ForEachOptions{Name: "locks", SkipShared: true, LockTimeout: 30 * time.Millisecond, Attempts: 2}
	f := func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		if tn.ID == "t0000" {
			calls.Add(1)
		}
		return upgrade(ctx, conn, tn)
	}
	// Who reads the table meanwhile waits behind the migration, as long as that waits, and not until it can be done.
	reads := 0
	end, readers := make(chan struct{}), sync.WaitGroup{}
	reader := fl.d.Connect(fl.d.OwnerURL())
	readers.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
			}
			if _, err := reader.Exec(ctx, "select from tenant_t0000.item"); err != nil {
				t.Error(err)
				return
			}
			reads++
		}
	})
	report, err := fl.db.ForEach(ctx, o, f)
	close(end)
	readers.Wait()
	require.Positive(t, reads)
	require.Equal(t, "55P03", pgCode(err))
	require.Equal(t, []int{1, 1, 2}, []int{report.Done, report.Failed, int(calls.Load())})
	require.Equal(t, 2, resultOf(t, report, "t0000").Attempts)

	calls.Store(0)
	o.Attempts = 100
	report, err = fl.db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		err := f(ctx, conn, tn)
		if calls.Load() == 2 {
			require.Error(t, err)
			require.NoError(t, tx.Rollback(ctx))
		}
		return err
	})
	require.NoError(t, err)
	require.Equal(t, []int{1, 3, 3}, []int{report.Done, int(calls.Load()), resultOf(t, report, "t0000").Attempts})
	require.Equal(t, 2, fl.upgraded())
	fl.quiet()
}

// Some statements run in no transaction, and what they leave when they fail is found by the next attempt.
func TestForEachOutsideOfATransaction(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 3)
	report, err := fl.db.ForEach(context.Background(), ForEachOptions{SkipShared: true}, func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
		_, err := conn.Exec(ctx, "create index concurrently if not exists item_id on item (id)")
		if err == nil {
			_, err = conn.Exec(ctx, "vacuum item")
		}
		return err
	})
	require.NoError(t, err)
	require.Equal(t, 3, report.Done)
	require.Equal(t, 3, count(t, fl.db.Admin(), context.Background(), "select count(*) from pg_indexes where indexname = 'item_id' and schemaname like 'tenant\\_t%'"))
}

// When the run is cancelled, or the TenantDB closed, what runs is cancelled, and what became of it written down.
func TestForEachEndsEarly(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(db *TenantDB, cancel func()){
		"cancelled": func(_ *TenantDB, cancel func()) { cancel() },
		"closed":    func(db *TenantDB, _ func()) { db.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fl := newFleet(t, 10)
			db := fl.open()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			super := fl.d.Connect(fl.d.SuperURL())
			go func() { // once both have come to the server: a request to cancel that comes before its statement is lost
				for asleep := 0; asleep < 2; time.Sleep(5 * time.Millisecond) {
					if err := super.QueryRow(context.Background(), `select count(*) from pg_stat_activity where datname = current_database()
						and query like '%pg_sleep(600)%' and pid <> pg_backend_pid() and state = 'active'`).Scan(&asleep); err != nil {
						t.Error(err)
						break
					}
				}
				end(db, cancel)
			}()
			begun := time.Now()
			report, err := db.ForEach(ctx, ForEachOptions{SkipShared: true, Concurrency: 2}, func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
				_, err := conn.Exec(ctx, "select pg_sleep(600)")
				return err
			})
			require.Less(t, time.Since(begun), 5*time.Minute)
			require.ErrorIs(t, err, map[string]error{"cancelled": context.Canceled, "closed": ErrClosed}[name])
			require.Equal(t, []int{0, 2, 0, 10}, []int{report.Done, report.Unknown, report.Failed, report.LeftOver}, "%v", err)
			require.ErrorContains(t, err, "goes on with what is left")
			runs, err := fl.db.Runs(context.Background(), 1)
			require.NoError(t, err)
			require.Equal(t, map[RunState]int{RunUnknown: 2}, runs[0].Counts)
			require.False(t, runs[0].Ended.IsZero())
		})
	}
}

// The server is restarted in the middle: what was under way has an unknown outcome, the rest waits for the server, and a
// second call completes the run.
func TestForEachServerRestarts(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t)
	fl := newFleetOn(t, server.New(t), 40)
	ctx := context.Background()
	fl.d.Exec("create table ledger (version text)", "insert into ledger values ('2')")
	var calls atomic.Int32
	restarted := make(chan error, 1)
	o := ForEachOptions{Name: "v2", Versions: versionsOf(nil), Target: "2", Concurrency: 3, Patience: patience}
	report, err := fl.db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		if calls.Add(1) == 10 {
			go func() { restarted <- server.Restart() }()
			_, err := conn.Exec(ctx, "select pg_sleep(30)")
			return err
		}
		return upgrade(ctx, conn, tn)
	})
	require.NoError(t, <-restarted)
	require.GreaterOrEqual(t, report.Unknown, 1, "%+v %v", report, err)
	require.LessOrEqual(t, report.Unknown+report.Failed, 4, "%v", err)
	require.Equal(t, 40, report.Done+report.Unknown+report.Failed)
	left := report.LeftOver
	report, err = fl.db.ForEach(ctx, o, upgrade)
	require.NoError(t, err)
	require.Equal(t, left, report.Done+report.Current)
	fl.db.Admin().Reset() // of connections from before
	require.Equal(t, 40, fl.upgraded())
}

// Config.MaxConns counts a run's connections too, and PerServer bounds them.
func TestForEachBudget(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 30, func(c *Config) { c.MaxConns = 3 })
	ctx := context.Background()
	var running, most atomic.Int32
	f := func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		_, err := conn.Exec(ctx, "select pg_sleep(0.005)")
		return err
	}
	held, err := fl.db.Acquire(WithoutTenant(ctx)) // the service's own
	require.NoError(t, err)
	_, err = fl.db.ForEach(ctx, ForEachOptions{Concurrency: 8}, f)
	require.NoError(t, err)
	require.LessOrEqual(t, most.Load(), int32(2))
	held.Release()
	most.Store(0)
	_, err = fl.db.ForEach(ctx, ForEachOptions{Concurrency: 8, PerServer: 1}, f)
	require.NoError(t, err)
	require.Equal(t, int32(1), most.Load())
	require.NoError(t, fl.db.Ping(WithoutTenant(ctx)))
}

// A role without rights is told so, and what for.
func TestForEachNoRights(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 1)
	app, err := pgxpool.ParseConfig(fl.d.AppURL())
	require.NoError(t, err)
	db := fl.open(func(c *Config) { c.Admin = app })
	_, err = db.ForEach(context.Background(), ForEachOptions{}, upgrade)
	require.ErrorContains(t, err, "pgxtenant: run tables: the role of Config.Admin lacks a right: ERROR: permission denied")
	app, err = pgxpool.ParseConfig(fl.d.AppURL("password=wrong"))
	require.NoError(t, err)
	db = fl.open(func(c *Config) { c.Admin = app })
	_, err = db.ForEach(context.Background(), ForEachOptions{}, upgrade)
	require.Equal(t, "28P01", pgCode(err))
}
