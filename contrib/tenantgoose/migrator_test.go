package tenantgoose_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/pressly/goose/v3"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
)

var (
	schemaOnly = []pgxtenant.Isolation{pgxtenant.IsolationSchema}
	rowOnly    = []pgxtenant.Isolation{pgxtenant.IsolationRow}
)

// Shared schemas, template and tenants of all three kinds are brought to what their folder has, once.
func TestUpReachesEveryKindOfTenant(t *testing.T) {
	s := newSite(t, func(c *pgxtenant.Config) { c.Registry.Key = make([]byte, 32) })
	own := s.d.Database()
	s.tenants(2)
	for _, tenant := range []pgxtenant.Tenant{{ID: "row"}, {ID: "db", Isolation: pgxtenant.IsolationDatabase, ConnString: own.OwnerURL()}} {
		_, err := s.db.Registry().Create(s.ctx, pgxtenant.Record{Tenant: tenant})
		require.NoError(t, err)
	}
	own.Exec("create table note (id int)")
	m := s.migrator(files(
		"shared/00001_country.sql", updown("create table country (code text)", "drop table country"),
		"tenant/00001_body.sql", addColumn("body"),
		"tenant/00002_tag.sql", addColumn("tag"),
	))
	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 5, report.Done, "the shared schemas, the template and three tenants")
	require.True(t, report.Complete)
	require.Equal(t, []string{"public.code"}, s.columns("country"))
	require.Equal(t, []string{"tenant_t0.body", "tenant_t0.tag", "tenant_t1.body", "tenant_t1.tag"}, s.columns("note"))
	require.Equal(t, []int64{0, 1, 2}, s.ledger("tenant_t1"))
	require.Equal(t, []int64{0, 1}, s.ledger("public"))
	var there int
	require.NoError(t, own.Connect(own.OwnerURL()).QueryRow(s.ctx, "select count(tag) + max(version_id) from goose_db_version left join note on true").Scan(&there))
	require.Equal(t, 2, there)
	for res, err := range report.Results(s.ctx) {
		require.NoError(t, err)
		require.Equal(t, "2", res.After, "%+v", res)
	}

	report, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 5, report.Current)
	require.Zero(t, report.Done)
	for tenant, want := range map[string]int64{"t0": 2, "row": 1, "db": 2} {
		version, err := m.Version(s.ctx, tenant)
		require.NoError(t, err)
		require.Equal(t, want, version, tenant)
	}
	_, err = m.Version(s.ctx, "nobody")
	require.ErrorIs(t, err, pgxtenant.ErrTenantNotFound)
}

// A template database is migrated before the databases that are copied from it, and closed again.
func TestTemplateDatabase(t *testing.T) {
	s := newSite(t)
	s.d.SuperExec(fmt.Sprintf(`alter role "%[1]s" createdb; grant pg_signal_backend to "%[1]s"; grant set on parameter app.current_tenant_id to "%[1]s"`, s.d.Owner))
	t.Cleanup(func() {
		s.d.SuperExec(fmt.Sprintf(`revoke set on parameter app.current_tenant_id from "%s"`, s.d.Owner))
	})
	template := s.d.Database()
	template.Exec("create table note (id int)")
	s.d.Exec(`alter database "` + template.Name + `" allow_connections false`)
	s.db = s.open(func(c *pgxtenant.Config) {
		c.Registry.TTL = time.Millisecond // Deprovision waits for it
		c.Servers = map[string]pgxtenant.DatabaseServer{"here": {Admin: c.Admin.Copy(), ConnString: s.d.AppURL(),
			DatabaseOptions: pgxtenant.DatabaseOptions{Template: template.Name, Grace: -1}}}
	})
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a")))
	_, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	id := s.d.Name // no other test's
	t.Cleanup(func() { _ = s.db.Deprovision(s.ctx, id) })
	require.NoError(t, s.db.Provision(s.ctx, pgxtenant.Tenant{ID: id, Isolation: pgxtenant.IsolationDatabase}))
	version, err := m.Version(s.ctx, id)
	require.NoError(t, err)
	require.Equal(t, int64(1), version)
	plan, err := m.Plan(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, &tenantgoose.Plan{Target: 1, Current: 2, Skipped: 1}, plan, "the template schema and the tenant; the template database takes no connections")
	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Current)
}

// What is provisioned after Up is a copy of the template at its version, ledger included; nothing is left to do for it.
func TestNewTenantIsAtHead(t *testing.T) {
	s := newSite(t)
	base := files("tenant/00001_body.sql", addColumn("body"))
	_, err := s.migrator(base).Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	schemas, err := s.db.Schemas()
	require.NoError(t, err)
	_, err = schemas.Stock(s.ctx, 1)
	require.NoError(t, err)

	// One that changes rows alone: the copy in stock must not be taken for one of the template as it is.
	m := s.migrator(with(base, "tenant/00002_rows.sql", updown("insert into note default values", "delete from note")))
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.NoError(t, s.db.Provision(s.ctx, pgxtenant.Tenant{ID: "new", Isolation: pgxtenant.IsolationSchema}))
	require.Equal(t, []int64{0, 1, 2}, s.ledger("tenant_new"))
	require.Equal(t, []string{"tenant_new.body"}, s.columns("note"))
	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 2, report.Current, "the template and the tenant")

	// And its ledger goes on where the template's ended.
	m = s.migrator(with(base, "tenant/00002_rows.sql", updown("insert into note default values", "delete from note"), "tenant/00003_tag.sql", addColumn("tag")))
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, []int64{0, 1, 2, 3}, s.ledger("tenant_new"))
}

// Tenants that are at different versions all end at the newest, each by what it lacks; and go back together.
func TestTenantsAtDifferentVersions(t *testing.T) {
	s := newSite(t)
	s.tenants(3)
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a"), "tenant/00002_b.sql", addColumn("b"), "tenant/00003_c.sql", addColumn("c")))
	_, err := m.UpTo(s.ctx, 1, pgxtenant.ForEachOptions{IDs: []string{"t1"}})
	require.NoError(t, err)
	_, err = m.UpTo(s.ctx, 2, pgxtenant.ForEachOptions{IDs: []string{"t2"}})
	require.NoError(t, err)
	require.Equal(t, []string{"tenant_t1.a", "tenant_t2.a", "tenant_t2.b"}, s.columns("note"))
	require.Equal(t, []string{
		"template at 0 pending tenant/00001_a.sql pending tenant/00002_b.sql pending tenant/00003_c.sql",
		"tenant_t0 at 0 pending tenant/00001_a.sql pending tenant/00002_b.sql pending tenant/00003_c.sql",
		"tenant_t1 at 1 pending tenant/00002_b.sql pending tenant/00003_c.sql",
		"tenant_t2 at 2 pending tenant/00003_c.sql",
	}, s.statuses(m, pgxtenant.ForEachOptions{}))
	plan, err := m.Plan(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	list := m.Migrations()
	require.Equal(t, &tenantgoose.Plan{Target: 3, Pending: 4, Steps: []tenantgoose.PlanStep{{list[0], 2}, {list[1], 3}, {list[2], 4}}}, plan)

	report, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 4, report.Done)
	for _, schema := range []string{"template", "tenant_t0", "tenant_t1", "tenant_t2"} {
		require.Equal(t, []int64{0, 1, 2, 3}, s.ledger(schema))
	}

	// A way back, to where one of them is already.
	_, err = m.DownTo(s.ctx, 1, pgxtenant.ForEachOptions{IDs: []string{"t1"}})
	require.NoError(t, err)
	report, err = m.DownTo(s.ctx, 1, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Done)
	require.Equal(t, 1, report.Current)
	require.Equal(t, []string{"tenant_t0.a", "tenant_t1.a", "tenant_t2.a"}, s.columns("note"))
	// Down is about the newest migration alone, which nobody has.
	report, err = m.Down(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 4, report.Current)
	_, err = m.DownTo(s.ctx, 0, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Empty(t, s.columns("note"))

	_, err = m.UpTo(s.ctx, 4, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "no migration has version 4; they are 1, 2, 3")
	_, err = m.DownTo(s.ctx, -1, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "no migration has version -1")
	_, err = m.Up(s.ctx, pgxtenant.ForEachOptions{Target: "3"})
	require.ErrorContains(t, err, "the Migrator's own")
}

// The shared schemas go back by a call of their own.
func TestDownLeavesSharedAlone(t *testing.T) {
	s := newSite(t)
	s.tenants(1)
	m := s.migrator(files("shared/00005_country.sql", updown("create table country (code text)", "drop table country"),
		"tenant/00001_item.sql", updown("create table item ()", "drop table item"), "tenant/00002_name.sql", updown("alter table item add name text", "alter table item drop name")))
	for _, isolations := range [][]pgxtenant.Isolation{nil, {pgxtenant.IsolationRow, pgxtenant.IsolationSchema}} {
		_, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
		require.NoError(t, err)
		_, err = m.DownTo(s.ctx, 0, pgxtenant.ForEachOptions{Isolations: isolations})
		require.NoError(t, err)
		require.Empty(t, s.columns("item"))
		require.NotEmpty(t, s.columns("country"))
	}
	report, err := m.Down(s.ctx, pgxtenant.ForEachOptions{Isolations: rowOnly})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	require.Empty(t, s.columns("country"))
}

// A folder may be missing, and then what it is for is not touched.
func TestOneFolder(t *testing.T) {
	s := newSite(t)
	s.tenants(1)
	shared := s.migrator(files("shared/00001_country.sql", updown("create table country (code text)", "drop table country")))
	report, err := shared.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 1, report.Total)
	_, err = shared.Up(s.ctx, pgxtenant.ForEachOptions{Isolations: schemaOnly})
	require.ErrorIs(t, err, goose.ErrNoMigrations)
	_, err = shared.Down(s.ctx, pgxtenant.ForEachOptions{})
	require.ErrorIs(t, err, goose.ErrNoMigrations, "the shared schemas go back where they are asked for")
	require.NotEmpty(t, s.columns("country"))
	_, err = shared.Down(s.ctx, pgxtenant.ForEachOptions{Isolations: rowOnly})
	require.NoError(t, err)
	require.Empty(t, s.columns("country"))

	tenant := s.migrator(files("tenant/00001_a.sql", addColumn("a")))
	report, err = tenant.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 2, report.Total)
	_, err = tenant.Up(s.ctx, pgxtenant.ForEachOptions{Isolations: rowOnly})
	require.ErrorContains(t, err, "the folder shared has none")
}

// Redo runs the newest migration again, and gives it to those that lack it.
func TestRedo(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	base := files("tenant/00001_a.sql", addColumn("a"))
	_, err := s.migrator(base).Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	first := with(base, "tenant/00002_b.sql", updown("alter table note add b int", "alter table note drop b"))
	_, err = s.migrator(first).Up(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"t0"}})
	require.NoError(t, err)
	// The file has been edited, which is what it is for.
	report, err := s.migrator(with(base, "tenant/00002_b.sql", addColumn("b"))).Redo(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Done)
	require.Equal(t, 2, one[int](s, "select count(*) from information_schema.columns where table_schema like 'tenant%' and column_name = 'b' and data_type = 'text'"))
	require.Equal(t, []int64{0, 1, 2}, s.ledger("tenant_t1"))
}

// Migrations in Go have the tenant's connection, in a transaction or without.
func TestGoMigrations(t *testing.T) {
	s := newSite(t)
	s.tenants(2)
	var wrong atomic.Value
	inTx := goose.NewGoMigration(2, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "insert into note (a) values ($1), ($2)", "one", "two"); err != nil {
			return err
		}
		stmt, err := tx.PrepareContext(ctx, "select a, id, id * 1.5, null::text, '{\"x\": 1}'::json, array[1, 2], now() from note where a = $1")
		if err != nil {
			return err
		}
		defer stmt.Close()
		var a, half, json, array string
		var id int64
		var none sql.NullString
		var at sql.NullTime
		if err := stmt.QueryRowContext(ctx, "two").Scan(&a, &id, &half, &none, &json, &array, &at); err != nil {
			return err
		}
		if got := fmt.Sprint(a, id, half, none.Valid, json, array, at.Valid); got != `two23.0false{"x": 1}{1,2}true` {
			wrong.Store(got)
		}
		// What would need a second connection fails, and does not hang.
		rows, err := tx.QueryContext(ctx, "select a from note")
		if err != nil {
			return err
		}
		defer rows.Close()
		if _, err := tx.ExecContext(ctx, "select 1"); err == nil {
			wrong.Store("a statement ran while another's rows were open")
		}
		return nil
	}}, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "delete from note")
		return err
	}})
	alone := goose.NewGoMigration(3, &goose.GoFunc{RunDB: func(ctx context.Context, db *sql.DB) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		if _, err := db.BeginTx(ctx, nil); err == nil {
			wrong.Store("two transactions on one connection")
		}
		if err := tx.Rollback(); err != nil {
			return err
		}
		_, err = db.ExecContext(ctx, "create index concurrently note_a on note (a)")
		return err
	}}, nil)
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a")), tenantgoose.WithGoMigrations(inTx, alone))
	_, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Nil(t, wrong.Load())
	require.Equal(t, 4, one[int](s, "select (select count(*) from tenant_t0.note) + (select count(*) from tenant_t1.note)"))
	require.Equal(t, 3, one[int](s, "select count(*) from pg_indexes where indexname = 'note_a'"))
	require.Equal(t, "tenant/00003 (Go)", m.Migrations()[2].Name)
	_, err = m.Down(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"t0"}})
	require.ErrorContains(t, err, "tenant/00003 (Go) has no way back")
}

// Two operators at once do each tenant once.
func TestTwoOperatorsAtOnce(t *testing.T) {
	s := newSite(t)
	s.tenants(20)
	fsys := files("tenant/00001_a.sql", addColumn("a"), "tenant/00002_b.sql", updown("create table b (id int)", "drop table b"))
	other, err := tenantgoose.New(s.open(), fsys)
	require.NoError(t, err)
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, m := range []*tenantgoose.Migrator{s.migrator(fsys), other} {
		wg.Go(func() { _, errs[i] = m.Up(s.ctx, pgxtenant.ForEachOptions{Concurrency: 2}) })
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	require.Len(t, s.columns("note"), 20)
	for _, schema := range []string{"template", "tenant_t0", "tenant_t19"} {
		require.Equal(t, []int64{0, 1, 2}, s.ledger(schema))
	}
}

// Drift names what somebody has changed by hand, and nothing else.
func TestDrift(t *testing.T) {
	s := newSite(t)
	m := s.migrator(files("tenant/00001_a.sql", addColumn("a")))
	_, err := m.Up(s.ctx, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	for _, id := range []string{"one", "two", "three"} {
		require.NoError(t, s.db.Provision(s.ctx, pgxtenant.Tenant{ID: id, Isolation: pgxtenant.IsolationSchema}))
	}
	s.d.Exec("create index by_hand on tenant_two.note (a)", "drop schema tenant_three cascade")
	got := make(map[string]tenantgoose.Drift)
	for d, err := range m.Drift(s.ctx, pgxtenant.ForEachOptions{}) {
		require.NoError(t, err)
		got[d.Tenant] = d
	}
	require.Len(t, got, 2)
	require.Equal(t, "tenant_two", got["two"].Schema)
	require.Contains(t, text(got["two"].Lines), "+ CREATE INDEX by_hand")
	require.NoError(t, got["two"].Err)
	require.ErrorContains(t, got["three"].Err, `there is no schema "tenant_three"`)
	for d, err := range m.Drift(s.ctx, pgxtenant.ForEachOptions{IDs: []string{"one"}}) {
		t.Errorf("%+v, %v", d, err)
	}
}

// New says what is wrong before anything is connected to.
func TestNewRefuses(t *testing.T) {
	s := newSite(t)
	good := files("tenant/00001_a.sql", addColumn("a"))
	inGo := goose.NewGoMigration(1, nil, nil)
	for _, tt := range []struct {
		name    string
		files   fstest.MapFS
		options []tenantgoose.Option
		want    string
	}{
		{"nothing", files(), nil, "no migrations found: there is none in the folders shared and tenant"},
		{"no number", with(good, "tenant/notes.sql", "x"), nil, "tenant/notes.sql: its name is not a number"},
		{"outside", with(good, "00002_b.sql", addColumn("b"), "schema.sql", "x"), nil, "00002_b.sql is in neither of the folders shared and tenant"},
		{"upper case", with(good, "tenant/00002_b.SQL", addColumn("b")), nil, "tenant/00002_b.SQL: its name must end in .sql, in lower case"},
		{"does not parse", with(good, "tenant/00002_b.sql", "create table b ()"), nil, "00002_b.sql"},
		{"does not parse on the way back", with(good, "shared/00002_b.sql", "-- +goose Up\nselect 1;\n-- +goose Down\n-- +goose StatementBegin\nselect 1"), nil, "00002_b.sql"},
		{"twice", with(good, "tenant/1_b.sql", addColumn("b")), nil, "have the same version"},
		{"twice in Go", good, []tenantgoose.Option{tenantgoose.WithGoMigrations(inGo)}, "have the same version"},
		{"Go file that nobody registered", with(good, "tenant/00002_b.go", "package b"), nil, "unregistered Go file"},
		{"in Go by hand", good, []tenantgoose.Option{tenantgoose.WithGoMigrations(&goose.Migration{Version: 2})}, "must use NewGoMigration"},
	} {
		_, err := tenantgoose.New(s.db, tt.files, tt.options...)
		require.ErrorContains(t, err, tt.want, tt.name)
	}
	_, err := tenantgoose.New(s.open(func(c *pgxtenant.Config) { c.TemplateReference = nil }), good)
	require.ErrorContains(t, err, `Config.TemplateReference lacks "goose_db_version"`)
	_, err = tenantgoose.New(s.open(func(c *pgxtenant.Config) { c.Registry = nil }), good)
	require.ErrorIs(t, err, pgxtenant.ErrNoRegistry)
	_, err = tenantgoose.New(nil, good)
	require.Error(t, err)
	_, err = tenantgoose.New(s.db, files("tenant/00001_a.sql", "-- +goose NO TRANSACTION\n-- +goose Up\n-- +goose Down\n", "schema.sql", "x"))
	require.NoError(t, err, "without a statement")
}
