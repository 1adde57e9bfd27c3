package tenantgoose_test

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A migration that fails for one tenant in the middle is rolled back there, is done for all others, and is done for that
// one by a call under the same name.
func TestOneTenantFails(t *testing.T) {
	s := newSite(t)
	s.tenants(60)
	s.d.Exec("alter table tenant_t30.note add b text") // somebody did by hand
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a"),
		"tenant/00002_b.sql", "-- +goose Up\ncreate table made (id int);\nalter table note add b text;\n-- +goose Down\ndrop table made;"))
	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{Name: "release 2"})
	var runErr *pgxtenant.RunError
	require.ErrorAs(t, err, &runErr)
	require.Equal(t, 60, report.Done, "the template and 59 tenants")
	require.Equal(t, 1, report.Failed)
	require.Len(t, report.Failures, 1)
	failed := report.Failures[0]
	require.Equal(t, "t30", failed.Tenant)
	require.Equal(t, "1", failed.After, "what came before it is kept")
	require.ErrorContains(t, failed.Err, `tenant/00002_b.sql: ERROR: column "b" of relation "note" already exists`)
	require.Equal(t, []int64{0, 1}, s.ledger("tenant_t30"))
	require.Equal(t, 60, one[int](s, "select count(*) from pg_class where relname = 'made'"), "not in its schema")
	require.Equal(t, []string{"tenant_t30 at 1 pending tenant/00002_b.sql"}, s.statuses(m, pgxtenant.ForEachOptions{IDs: []string{"t30"}}))

	s.d.Exec("alter table tenant_t30.note drop b")
	report, err = m.Up(s.ctx, pgxtenant.ForEachOptions{Name: "release 2"})
	require.NoError(t, err)
	require.True(t, report.Resumed)
	require.Equal(t, 1, report.Done)
	require.Zero(t, report.Current, "the others were not looked at")
	require.Equal(t, 61, one[int](s, "select count(*) from pg_class where relname = 'made'"))
}

// Ledgers that somebody has written to: nothing is done where it is in doubt what was applied, and what is noted twice is
// taken back once.
func TestLedgersWrittenToByHand(t *testing.T) {
	s := newSite(t)
	s.tenants(3)
	base := files("tenant/00001_a.sql", addColumn("a"), "tenant/00002_b.sql", addColumn("b"))
	_, err := s.migrator(base).Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	s.d.Exec("insert into tenant_t0.goose_db_version (version_id, is_applied) values (2, true)",
		"insert into tenant_t1.goose_db_version (version_id, is_applied) values (2, false)")
	m := s.migrator(with(base, "tenant/00003_c.sql", addColumn("c")))
	o := pgxtenant.ForEachOptions{SkipTemplates: true}
	report, err := m.Up(s.ctx, o)
	require.ErrorContains(t, err, "goose_db_version has versions 2 as not applied, from before goose 3; delete those rows")
	require.Equal(t, []int{2, 1}, []int{report.Done, report.Failed})
	require.Equal(t, []string{"tenant_t0.a", "tenant_t0.b", "tenant_t0.c", "tenant_t1.a", "tenant_t1.b", "tenant_t2.a", "tenant_t2.b", "tenant_t2.c"}, s.columns("note"))
	report, err = m.DownTo(s.ctx, 1, o)
	require.ErrorContains(t, err, "goose_db_version has versions 2 as not applied")
	require.Equal(t, []int{2, 1}, []int{report.Done, report.Failed})
	require.Equal(t, []string{"tenant_t0.a", "tenant_t1.a", "tenant_t1.b", "tenant_t2.a"}, s.columns("note"))
}

// What goose takes in any case does mean the same here: a way down, and that there is no transaction, so that it is not
// tried again.
func TestAnnotationsInLowerCase(t *testing.T) {
	s := newSite(t)
	m := s.migrator(files("tenant/00001_a.sql", strings.ToLower(addColumn("a"))))
	o := pgxtenant.ForEachOptions{LockTimeout: 50 * time.Millisecond}
	_, err := m.Up(s.ctx, o)
	require.NoError(t, err)
	_, err = m.DownTo(s.ctx, 0, o)
	require.NoError(t, err)

	m = s.migrator(files("tenant/00001_a.sql", "-- +goose no transaction\n-- +goose up\ncreate table made (id int);\nalter table note add a text;\n"), tenantgoose.AcceptEdits(1))
	tx, err := s.db.Admin().Begin(s.ctx)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(s.ctx) }()
	_, err = tx.Exec(s.ctx, "lock template.note")
	require.NoError(t, err)
	_, err = m.Up(s.ctx, o)
	require.ErrorContains(t, err, "runs outside of a transaction")
	require.ErrorContains(t, err, "lock timeout")
}

// A tenant whose schema is gone fails alone.
func TestSchemaIsMissing(t *testing.T) {
	s := newSite(t)
	s.tenants(3)
	s.d.Exec("drop schema tenant_t1 cascade")
	report, err := s.migrator(files("tenant/00001_a.sql", addColumn("a"))).Up(s.ctx, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, `schema "tenant_t1" is missing`)
	require.Equal(t, 3, report.Done)
	require.Equal(t, 1, report.Failed)
}

const concurrently = "-- +goose NO TRANSACTION\n-- +goose Up\ncreate unique index concurrently note_a on note (a);\n-- +goose Down\ndrop index concurrently note_a;\n"

// CREATE INDEX CONCURRENTLY works where it is marked. Where it fails, what it leaves is told, is not noted as applied, and stands in
// the way until somebody has removed it.
func TestWithoutTransaction(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	base := files("tenant/00001_a.sql", addColumn("a"))
	_, err := s.migrator(base).Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	s.d.Exec("insert into tenant_t1.note (a) values ('x'), ('x')")
	m := s.migrator(with(base, "tenant/00002_index.sql", concurrently))
	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{Name: "index"})
	require.ErrorContains(t, err, "tenant/00002_index.sql runs outside of a transaction, so what it did before it failed is there")
	require.Equal(t, 2, report.Done)
	require.Equal(t, []int64{0, 1}, s.ledger("tenant_t1"))
	invalid := "select count(*) from pg_index i join pg_class c on c.oid = i.indexrelid where relname = 'note_a' and indisvalid = $1"
	require.Equal(t, 1, one[int](s, invalid, false))

	s.d.Exec("delete from tenant_t1.note")
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{Name: "index"})
	require.ErrorContains(t, err, `relation "note_a" already exists`)
	s.d.Exec("drop index tenant_t1.note_a")
	report, err = m.Up(s.ctx, pgxtenant.ForEachOptions{Name: "index"})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	require.Equal(t, 3, one[int](s, invalid, true))
	_, err = m.Down(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Zero(t, one[int](s, invalid, true))
}

// A migration that cannot have its lock in time is tried again, unless it runs without a transaction.
func TestLockTimeout(t *testing.T) {
	s := newSite(t)
	s.tenants(1)
	tx, err := s.db.Admin().Begin(s.ctx)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(s.ctx) }()
	_, err = tx.Exec(s.ctx, "lock table tenant_t0.note")
	require.NoError(t, err)
	o := pgxtenant.ForEachOptions{IDs: []string{"t0"}, LockTimeout: 20 * time.Millisecond, Attempts: 2}
	for mark, attempts := range map[string]int{"": 2, "-- +goose NO TRANSACTION\n": 1} {
		report, err := s.migrator(files("tenant/00001_a.sql", mark+addColumn("a"))).Up(s.ctx, o)
		require.ErrorContains(t, err, "lock timeout", mark)
		require.Equal(t, attempts, report.Failures[0].Attempts, mark)
	}
}

// A migration that comes late, below what is applied, is not passed over: it fails, or is applied on request.
func TestOutOfOrder(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	base := files("tenant/00001_a.sql", addColumn("a"), "tenant/00003_c.sql", addColumn("c"))
	_, err := s.migrator(base).Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	late := with(base, "tenant/00002_b.sql", addColumn("b"))
	m := s.migrator(late)
	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.ErrorIs(t, err, pgxtenant.ErrRunStopped)
	require.ErrorContains(t, err, "out-of-order")
	require.ErrorContains(t, err, "WithOutOfOrder")
	require.Equal(t, "3 without 2", report.Failures[0].Before)
	require.Equal(t, "tenant_t0 at 3 pending tenant/00002_b.sql missing tenant/00002_b.sql", s.statuses(m, pgxtenant.ForEachOptions{})[1])
	plan, err := m.Plan(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, plan.Pending)
	require.Len(t, plan.Failed, 3)

	m = s.migrator(late, tenantgoose.WithOutOfOrder())
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, []int64{0, 1, 3, 2}, s.ledger("tenant_t1"))
	report, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Current)
	// All above the version go back, although the last one that was applied is not the highest.
	_, err = m.DownTo(s.ctx, 2, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, []int64{0, 1, 2}, s.ledger("tenant_t1"))
}

// A file that was applied anywhere must stay as it is.
func TestEditedMigration(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	ctx, o := s.ctx, pgxtenant.ForEachOptions{}
	// One that was applied nowhere may be mended.
	_, err := s.migrator(files("tenant/00001_a.sql", updown("alter table nothing add a text", "select 1"))).Up(ctx, o)
	require.ErrorContains(t, err, "tenant/00001_a.sql")
	first := files("tenant/00001_a.sql", addColumn("a"))
	_, err = s.migrator(first).Up(ctx, pgxtenant.ForEachOptions{IDs: []string{"t1"}})
	require.NoError(t, err)

	edited := files("tenant/00001_a.sql", addColumn("a")+"-- a word\n", "tenant/00002_b.sql", addColumn("b"))
	m := s.migrator(edited)
	for name, call := range map[string]func(context.Context, pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error){"Up": m.Up, "Down": m.Down, "Redo": m.Redo} {
		report, err := call(ctx, o)
		require.ErrorIs(t, err, tenantgoose.ErrEdited, name)
		require.ErrorContains(t, err, "tenant/00001_a.sql; undo the edit and write another migration or, if it has no effect, take it by AcceptEdits(1)", name)
		require.Nil(t, report)
	}
	_, err = m.Plan(ctx, o)
	require.ErrorIs(t, err, tenantgoose.ErrEdited, "a plan is of what Up does")
	_, err = s.migrator(edited, tenantgoose.AcceptEdits(1)).Plan(ctx, o)
	require.NoError(t, err)
	require.Equal(t, []string{"tenant_t1.a"}, s.columns("note"), "nothing was done")
	// In another process, too.
	other, err := tenantgoose.New(s.open(), edited)
	require.NoError(t, err)
	_, err = other.UpTo(ctx, 1, o)
	require.ErrorIs(t, err, tenantgoose.ErrEdited)

	_, err = s.migrator(edited, tenantgoose.AcceptEdits(1)).Up(ctx, o)
	require.NoError(t, err)
	_, err = m.Up(ctx, o)
	require.NoError(t, err, "it was accepted once and for all")
	windows := files("tenant/00001_a.sql", strings.ReplaceAll(addColumn("a")+"-- a word\n", "\n", "\r\n"))
	_, err = s.migrator(windows).UpTo(ctx, 1, o)
	require.NoError(t, err, "line ends of another system are no edit")

	// What is taken back everywhere may be written anew.
	_, err = m.DownTo(ctx, 1, o)
	require.NoError(t, err)
	_, err = s.migrator(with(edited, "tenant/00002_b.sql", addColumn("bb"))).Up(ctx, o)
	require.NoError(t, err)
	require.Contains(t, s.columns("note"), "tenant_t0.bb")
}

// A tenant that is being provisioned has no version yet, and no plan fails for it.
func TestProvisioningIsSkipped(t *testing.T) {
	s := newSite(t)
	s.tenants(1)
	_, err := s.db.Registry().Create(s.ctx, pgxtenant.Record{Tenant: pgxtenant.Tenant{ID: "t1", Isolation: pgxtenant.IsolationSchema, Status: pgxtenant.StatusProvisioning}})
	require.NoError(t, err)
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a")))
	plan, err := m.Plan(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{0, 2, 1}, []int{plan.Current, plan.Pending, plan.Skipped})
	require.Empty(t, plan.Failed)
	require.Contains(t, s.statuses(m, pgxtenant.ForEachOptions{})[2], "it is being provisioned")
	for d, err := range m.Drift(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"t1"}}) {
		t.Error(d, err)
	}
}

// Ledgers that are not what the files make them.
func TestOddLedgers(t *testing.T) {
	s := newSite(t)
	s.tenants(3)
	fsys := files("tenant/00001_a.sql", addColumn("a"), "tenant/00002_b.sql", "-- +goose Up\nalter table note add b text;\n")
	m := s.migrator(fsys)
	_, err := m.UpTo(s.ctx, 1, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	s.d.Exec("insert into tenant_t0.goose_db_version (version_id, is_applied) values (9, true)", // by a newer process
		"insert into tenant_t1.goose_db_version (version_id, is_applied) values (2, false)", // by an old goose
		"drop table tenant_t2.goose_db_version")
	require.Equal(t, "tenant_t0 at 9 pending tenant/00002_b.sql missing tenant/00002_b.sql unknown 9", s.statuses(m, pgxtenant.ForEachOptions{})[1])
	report, err := m.UpTo(s.ctx, 1, pgxtenant.ForEachOptions{Isolations: schemaOnly})
	require.Error(t, err)
	require.Equal(t, 2, report.Current, "what has more than was asked for is left alone: %+v", report)
	failures := make(map[string]string)
	for _, f := range report.Failures {
		failures[f.Tenant] = f.Err.Error()
	}
	require.Len(t, failures, 2)
	require.Contains(t, failures["t1"], "versions 2 as not applied, from before goose 3")
	require.Contains(t, failures["t2"], `column "a" of relation "note" already exists`, "without its ledger it counts as new")

	_, err = m.DownTo(s.ctx, 0, pgxtenant.ForEachOptions{IDs: []string{"t0"}})
	require.ErrorContains(t, err, "version 9 was applied, and no file of folder tenant has it")
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"t2"}})
	require.Error(t, err)
	s.d.Exec("alter table tenant_t2.note drop a")
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"t2"}})
	require.NoError(t, err)
	_, err = m.Down(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"t2"}})
	require.ErrorContains(t, err, "tenant/00002_b.sql has no way back")
}

// A schema that goose itself has migrated is where goose left it, and goose finds what the Migrator did.
func TestGooseItself(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	fsys := files("00001_a.sql", addColumn("a"), "00002_b.sql", addColumn("b"))
	pc, err := pgxpool.ParseConfig(s.d.OwnerURL("search_path=tenant_t0"))
	require.NoError(t, err)
	db := stdlib.OpenDB(*pc.ConnConfig)
	defer db.Close()
	p, err := goose.NewProvider(goose.DialectPostgres, db, fsys, goose.WithLogger(goose.NopLogger()))
	require.NoError(t, err)
	_, err = p.UpTo(s.ctx, 1)
	require.NoError(t, err)

	m := s.migrator(files("tenant/00001_a.sql", addColumn("a"), "tenant/00002_b.sql", addColumn("b")))
	version, err := m.Version(s.ctx, "t0")
	require.NoError(t, err)
	require.Equal(t, int64(1), version)
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	pending, err := p.HasPending(s.ctx)
	require.NoError(t, err)
	require.False(t, pending)
}

// Tenants of one database do not wait for each other: two are in the same migration at the same time.
func TestNoLockForTheWholeDatabase(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	var both sync.WaitGroup
	both.Add(2)
	met := make(chan struct{})
	go func() { both.Wait(); close(met) }()
	meet := goose.NewGoMigration(1, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
		var schema string
		if err := tx.QueryRowContext(ctx, "select current_schema()").Scan(&schema); err != nil || schema == "template" {
			return err
		}
		both.Done()
		select {
		case <-met:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}, nil)
	report, err := s.migrator(files(), tenantgoose.WithGoMigrations(meet)).Up(s.ctx, pgxtenant.ForEachOptions{Timeout: 2 * time.Minute})
	require.NoError(t, err)
	require.Equal(t, 3, report.Done)
}

// A call that is cancelled in the middle of a statement leaves the tenant where it was, and a next one does it.
func TestCancelled(t *testing.T) {
	s := newSite(t)
	s.tenants(1)
	ctx, cancel := context.WithCancel(s.ctx)
	var once sync.Once
	waiting := goose.NewGoMigration(2, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "create table made (id int)"); err != nil {
			return err
		}
		sleep := "0"
		once.Do(func() { sleep = "600" })
		_, err := tx.ExecContext(ctx, fmt.Sprintf("select pg_sleep(%s)", sleep))
		return err
	}}, nil)
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a")), tenantgoose.WithGoMigrations(waiting))
	go func() {
		defer cancel()
		// When the server is at it: it takes no notice of one that comes before.
		assert.Eventually(t, func() bool {
			var running bool
			err := s.db.Admin().QueryRow(ctx, "select exists (select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep')").Scan(&running)
			return err == nil && running
		}, 2*time.Minute, 10*time.Millisecond)
	}()
	_, err := m.Up(ctx, pgxtenant.ForEachOptions{Name: "x", IDs: []string{"t0"}})
	require.ErrorIs(t, err, context.Canceled)
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{Name: "x", IDs: []string{"t0"}})
	require.NoError(t, err)
	require.Equal(t, []int64{0, 1, 2}, s.ledger("tenant_t0"))
}

// Behind a pooler in transaction mode what runs in a transaction works, and each tenant's lands in its schema.
func TestBehindPooler(t *testing.T) {
	s := newSite(t)
	s.tenants(4)
	pooled := pgtest.PgBouncer(t, s.d, "default_pool_size=2")
	db := s.open(func(c *pgxtenant.Config) {
		admin, err := pgxpool.ParseConfig(pooled.OwnerURL("pool_max_conns=4", "default_query_exec_mode=exec"))
		require.NoError(t, err)
		c.Admin = admin
	})
	m, err := tenantgoose.New(db, files("tenant/00001_a.sql", addColumn("a"), "tenant/00002_b.sql", addColumn("b")))
	require.NoError(t, err)
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Len(t, s.columns("note"), 8)
	require.Equal(t, []int64{0, 1, 2}, s.ledger("tenant_t3"))
}
