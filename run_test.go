package pgxtenant

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// fleet is a database with a registry and many schema tenants, t0000 and up, each with a table and a ledger of one row.
type fleet struct {
	t  testing.TB
	d  *pgtest.DB
	db *TenantDB
}

func newFleet(t testing.TB, tenants int, adjust ...func(*Config)) *fleet {
	t.Helper()
	return newFleetOn(t, pgtest.New(t), tenants, adjust...)
}

func newFleetOn(t testing.TB, d *pgtest.DB, tenants int, adjust ...func(*Config)) *fleet {
	t.Helper()
	fl := &fleet{t: t, d: d}
	fl.db = fl.open(adjust...)
	require.NoError(t, fl.db.Registry().Install(context.Background()))
	fl.add(0, tenants)
	return fl
}

// open is another process each time.
func (fl *fleet) open(adjust ...func(*Config)) *TenantDB {
	fl.t.Helper()
	admin, err := pgxpool.ParseConfig(fl.d.OwnerURL("pool_max_conns=4"))
	require.NoError(fl.t, err)
	return openDB(fl.t, fl.d.AppURL(), append([]func(*Config){func(c *Config) {
		c.Admin = admin
		c.Registry = &RegistryConfig{}
	}}, adjust...)...)
}

// add makes tenants from the first to before the last, without the copying.
func (fl *fleet) add(first, last int) {
	fl.t.Helper()
	fl.d.Exec(fmt.Sprintf(`do $$ declare name text; begin for i in %d..%d loop
			name := 'tenant_t' || lpad(i::text, 4, '0');
			execute format('create schema %%s create table item (id int) create table ledger (version text)', name);
			execute format('insert into %%s.ledger values (''1'')', name);
		end loop; end $$`, first, last-1),
		fmt.Sprintf(`insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings)
			select 't' || lpad(i::text, 4, '0'), case when i %% 2 = 0 then 'free' else 'gold' end, 'schema', '', 'tenant_t' || lpad(i::text, 4, '0'), '', '', 'active', '{}'
			from generate_series(%d, %d) i`, first, last-1))
}

// upgrade is a migration as it should be: in one transaction with its mark.
func upgrade(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "alter table item add column note text; update ledger set version = '2'")
		return err
	})
}

// versionsOf reads the ledgers of all tenants of a database with one query.
func versionsOf(calls *atomic.Int32) func(context.Context, *pgx.Conn, []Tenant) (map[string]string, error) {
	return func(ctx context.Context, conn *pgx.Conn, tenants []Tenant) (map[string]string, error) {
		if calls != nil {
			calls.Add(1)
		}
		var union strings.Builder
		for i, t := range tenants {
			if i > 0 {
				union.WriteString(" union all ")
			}
			union.WriteString("select " + literal(t.ID) + ", version from " + ident(orDefault(t.Schema, "public"), "ledger"))
		}
		rows, err := conn.Query(ctx, union.String(), pgx.QueryExecModeSimpleProtocol)
		if err != nil {
			return nil, err
		}
		versions := make(map[string]string)
		var id, version string
		_, err = pgx.ForEachRow(rows, []any{&id, &version}, func() error {
			versions[id] = version
			return nil
		})
		return versions, err
	}
}

// upgraded is how many tenants have been brought to version 2.
func (fl *fleet) upgraded() int {
	fl.t.Helper()
	return count(fl.t, fl.db.Admin(), context.Background(), `select count(*) from pg_attribute a join pg_class c on c.oid = a.attrelid
		join pg_namespace n on n.oid = c.relnamespace where nspname like 'tenant\_t%' and relname = 'item' and attname = 'note'`)
}

// quiet checks that nothing is left behind: no claim and no lock.
func (fl *fleet) quiet() {
	fl.t.Helper()
	ctx := context.Background()
	require.Zero(fl.t, count(fl.t, fl.db.Admin(), ctx, "select count(*) from pgxtenant.run_claim"))
	// A session that was closed gives its locks back when the server has come to it.
	eventually(fl.t, "no lock is held", func() bool {
		return count(fl.t, fl.db.Admin(), ctx, `select count(*) from pg_locks l join pg_database d on d.oid = l.database
			where locktype = 'advisory' and datname = current_database()`) == 0
	})
}

// Each tenant once, in its own schema and as the owner, with the timeouts set, outside of a transaction.
func TestForEach(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 20)
	ctx := context.Background()
	var mu sync.Mutex
	seen := make(map[string]int)
	report, err := fl.db.ForEach(ctx, ForEachOptions{Name: "all", LockTimeout: 700 * time.Millisecond, StatementTimeout: -1},
		func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
			var path, schema, role, lock, statement string
			err := conn.QueryRow(ctx, "select current_setting('search_path'), current_schema(), current_user, current_setting('lock_timeout'), current_setting('statement_timeout')").
				Scan(&path, &schema, &role, &lock, &statement)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			seen[tn.ID]++
			want, in := `"public", pg_temp`, "public"
			if tn.ID != "" {
				want, in = `"tenant_`+tn.ID+`", "public", pg_temp`, "tenant_"+tn.ID
				if carried, _ := FromContext(ctx); carried.ID != tn.ID || tn.Schema != in {
					return fmt.Errorf("the tenant is %+v and the context has %q", tn, carried.ID)
				}
			}
			got := []string{path, schema, role, lock, statement, string(conn.PgConn().TxStatus())}
			if !slices.Equal(got, []string{want, in, fl.d.Owner, "700ms", "0", "I"}) {
				return fmt.Errorf("got %q", got)
			}
			return nil
		})
	require.NoError(t, err)
	require.Len(t, seen, 21) // the shared schemas too
	for id, n := range seen {
		require.Equal(t, 1, n, id)
	}
	require.True(t, report.Complete)
	require.Equal(t, []int{21, 0, 0, 0, 0, 0, 21, 0}, []int{report.Done, report.Current, report.Failed, report.Unknown, report.Skipped, report.Running, report.Total, report.LeftOver})
	var ids []string
	for res, err := range report.Results(ctx) {
		require.NoError(t, err)
		require.Equal(t, []any{RunDone, 1}, []any{res.State, res.Attempts})
		ids = append(ids, res.Tenant)
	}
	require.Len(t, ids, 21)
	require.True(t, slices.IsSorted(ids))
	runs, err := fl.db.Runs(ctx, 10)
	require.NoError(t, err)
	require.Len(t, runs, 1)
	require.True(t, runs[0].Complete)
	require.Equal(t, map[RunState]int{RunDone: 21}, runs[0].Counts)
	fl.quiet()
}

// What a function leaves on the session does not reach the next tenant, whatever it is.
func TestForEachSessionsAreClean(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 8)
	pids := make(map[uint32]bool) // of one at a time
	report, err := fl.db.ForEach(context.Background(), ForEachOptions{Concurrency: 1, SkipShared: true}, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		var role, temp, work, locks string
		err := conn.QueryRow(ctx, `select current_user, coalesce(to_regclass('pg_temp.left_over')::text, ''), current_setting('work_mem'),
			(select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())::text`).Scan(&role, &temp, &work, &locks)
		if err != nil {
			return err
		}
		if got := []string{role, temp, work, locks}; !slices.Equal(got, []string{fl.d.Owner, "", "4MB", "1"}) {
			return fmt.Errorf("of the tenant before: %q", got)
		}
		pids[conn.PgConn().PID()] = true
		_, err = conn.Exec(ctx, "create temp table left_over (); set work_mem = '1MB'; set search_path = pg_catalog; select pg_advisory_lock(1)")
		if err == nil {
			_, err = conn.Prepare(ctx, "q", "select '"+tn.ID+"'") // another text under the same name each time
		}
		if err == nil && tn.ID == "t0003" {
			_, err = conn.Exec(ctx, "begin; create temp table more ()")
		}
		return err
	})
	var re *RunError
	require.ErrorAs(t, err, &re)
	require.Equal(t, []int{7, 1}, []int{report.Done, report.Failed}, "%v", err)
	require.ErrorContains(t, err, `tenant "t0003": run: pgxtenant: the function returned nil in the middle of a transaction, which was rolled back`)
	require.Len(t, pids, 1, "one session served all, and was clean each time")
	fl.quiet()
}

// A migration that fails in the middle of many: its transaction is rolled back, the others are done, the report is
// exact, and a second call does what is left and no more.
func TestForEachFailureAndResume(t *testing.T) {
	t.Parallel()
	const n = 1000
	fl := newFleet(t, n)
	ctx := context.Background()
	fl.d.Exec("insert into tenant_t0500.item values (1)", "create table ledger (version text)", "insert into ledger values ('2')")
	var calls atomic.Int32
	migrate := func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		calls.Add(1)
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "alter table item add column note text; alter table item add check (id > 1); update ledger set version = '2'")
			return err
		})
	}
	var asked atomic.Int32
	o := ForEachOptions{Name: "v2", Versions: versionsOf(&asked), Target: "2"}
	begun := time.Now()
	report, err := fl.db.ForEach(ctx, o, migrate)
	t.Logf("%d tenants: %v", n, time.Since(begun))
	var re *RunError
	require.ErrorAs(t, err, &re)
	require.Equal(t, "23514", pgCode(err))
	require.Equal(t, []int{n - 1, 1, 1, 1, n + 1}, []int{report.Done, report.Current, report.Failed, report.LeftOver, report.Total}, "%+v", report)
	require.False(t, report.Complete)
	require.Len(t, report.Failures, 1)
	require.Equal(t, []any{"t0500", RunFailed, "1", "1"}, []any{report.Failures[0].Tenant, report.Failures[0].State, report.Failures[0].Before, report.Failures[0].After})
	require.ErrorContains(t, err, `999 done, 1 current, 1 failed, 0 unknown, 0 skipped, 1 left; a call under the same name goes on with what is left; the first failure: tenant "t0500"`)
	require.Equal(t, n-1, fl.upgraded())

	fl.d.Exec("update tenant_t0500.item set id = 2")
	calls.Store(0)
	report, err = fl.open().ForEach(ctx, o, migrate)
	require.NoError(t, err)
	require.True(t, report.Resumed)
	require.Equal(t, []int{1, 0, 1, 1}, []int{report.Done, report.Current, report.Total, int(calls.Load())})
	require.Equal(t, n, fl.upgraded())

	// A completed run is not gone on with: a new one finds that there is nothing to do, by one query for all.
	asked.Store(0)
	begun = time.Now()
	report, err = fl.db.ForEach(ctx, o, migrate)
	t.Logf("%d tenants with nothing to do: %v", n, time.Since(begun))
	require.NoError(t, err)
	require.False(t, report.Resumed)
	require.Equal(t, []int{0, n + 1, 1, 2}, []int{report.Done, report.Current, int(calls.Load()), int(asked.Load())})
	states := 0
	for res, err := range report.Results(ctx) {
		require.NoError(t, err)
		require.Equal(t, []any{RunCurrent, "2"}, []any{res.State, res.After})
		states++
	}
	require.Equal(t, n+1, states)
	fl.quiet()
}
