package tenanttern_test

import (
	"context"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/tern/v2/migrate"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenanttern"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const (
	first  = "create table note (a text);\n---- create above / drop below ----\ndrop table note;\n"
	second = "alter table note add b text;\n---- create above / drop below ----\nalter table note drop b;\n"
	index  = "---- tern: disable-tx ----\ncreate index concurrently note_b on note (b);\n---- create above / drop below ----\n---- tern: disable-tx ----\ndrop index concurrently note_b;\n"
)

func files(contents ...string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for i, c := range contents {
		fsys[string("123456"[i])+"_x.sql"] = &fstest.MapFile{Data: []byte(c)}
	}
	return fsys
}

// open makes a database with an empty template and a registry.
func open(t *testing.T) (*pgtest.DB, *pgxtenant.TenantDB) {
	t.Parallel()
	d := pgtest.New(t)
	d.Exec("create schema template")
	c, err := pgxtenant.ParseConfig(d.AppURL())
	require.NoError(t, err)
	c.Admin, err = pgxpool.ParseConfig(d.OwnerURL("pool_max_conns=4"))
	require.NoError(t, err)
	c.Registry = &pgxtenant.RegistryConfig{}
	c.Template, c.TemplateReference = "template", []string{tenanttern.VersionTable}
	db, err := pgxtenant.NewWithConfig(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	require.NoError(t, db.Registry().Install(context.Background()))
	return d, db
}

func schemaTenant(id string) pgxtenant.Tenant {
	return pgxtenant.Tenant{ID: id, Isolation: pgxtenant.IsolationSchema}
}

func columns(t *testing.T, db *pgxtenant.TenantDB) (n int) {
	t.Helper()
	require.NoError(t, db.Admin().QueryRow(context.Background(),
		"select count(*) from information_schema.columns where table_name = 'note'").Scan(&n))
	return n
}

// The template is first, what is provisioned is at its version, and all go up and down together.
func TestMigrate(t *testing.T) {
	_, db := open(t)
	ctx := context.Background()
	report, err := tenanttern.Migrate(ctx, db, files(first), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	for _, id := range []string{"a", "b"} {
		require.NoError(t, db.Provision(ctx, schemaTenant(id)))
	}
	report, err = tenanttern.Migrate(ctx, db, files(first, second, index), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Done)
	require.Equal(t, 6, columns(t, db))
	for res, err := range report.Results(ctx) {
		require.NoError(t, err)
		require.Equal(t, []string{"1", "3"}, []string{res.Before, res.After})
	}
	report, err = tenanttern.Migrate(ctx, db, files(first, second, index), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Current)

	_, err = tenanttern.MigrateTo(ctx, db, files(first, second, index), 1, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, columns(t, db))
	_, err = tenanttern.MigrateTo(ctx, db, files(first, second, index), 4, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "they are 0 to 3")
	_, err = tenanttern.MigrateTo(ctx, db, files("create table note ()"), 0, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "1_x.sql has no way back")
	_, err = tenanttern.MigrateTo(ctx, db, files(first), 0, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Zero(t, columns(t, db))
}

// The shared schemas are a call of their own, and their version is not taken for a tenant's.
func TestMigrateShared(t *testing.T) {
	d, db := open(t)
	ctx := context.Background()
	rows := pgxtenant.ForEachOptions{Isolations: []pgxtenant.Isolation{pgxtenant.IsolationRow}}
	report, err := tenanttern.Migrate(ctx, db, files(first), rows)
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	_, err = tenanttern.Migrate(ctx, db, files(first), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 2, columns(t, db), "of public.note and template.note")
	// tern itself finds what was done.
	m, err := migrate.NewMigrator(ctx, d.Connect(d.OwnerURL()), "template.schema_version")
	require.NoError(t, err)
	version, err := m.GetCurrentVersion(ctx)
	require.NoError(t, err)
	require.Equal(t, int32(1), version)
}

// What fails is rolled back for that tenant, and done by a call under the same name. A search_path that a migration sets does not
// lead the next one elsewhere.
func TestMigrateFails(t *testing.T) {
	d, db := open(t)
	ctx := context.Background()
	_, err := tenanttern.Migrate(ctx, db, files(first), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	for _, id := range []string{"a", "b", "c"} {
		require.NoError(t, db.Provision(ctx, schemaTenant(id)))
	}
	d.Exec("alter table tenant_b.note add c text")
	fsys := files(first, "set search_path = public; select 1", "create table made (); alter table note add c text")
	report, err := tenanttern.Migrate(ctx, db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.ErrorContains(t, err, `column "c" of relation "note" already exists`)
	require.Equal(t, 3, report.Done)
	require.Equal(t, "b", report.Failures[0].Tenant)
	require.Equal(t, "2", report.Failures[0].After)
	var made []string
	require.NoError(t, db.Admin().QueryRow(ctx, "select array_agg(relnamespace::regnamespace::text order by 1) from pg_class where relname = 'made'").Scan(&made))
	require.Equal(t, []string{"template", "tenant_a", "tenant_c"}, made)
	d.Exec("alter table tenant_b.note drop c")
	report, err = tenanttern.Migrate(ctx, db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)

	// Without a transaction: one statement in a file, and no second attempt.
	_, err = tenanttern.Migrate(ctx, db, files(first, second, "---- tern: disable-tx ----\nselect 1; create index concurrently on note (a)"), pgxtenant.ForEachOptions{Name: "y"})
	require.NoError(t, err, "they are at version 3 already")
	_, err = tenanttern.Migrate(ctx, db, files(first, second, second, "---- tern: disable-tx ----\nselect 1; create index concurrently on note (a)"), pgxtenant.ForEachOptions{Name: "z"})
	require.ErrorContains(t, err, "must have nothing else")
	_, err = tenanttern.Migrate(ctx, db, files(first), pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "older than what was applied")
	require.ErrorIs(t, err, pgxtenant.ErrRunStopped)

	_, err = tenanttern.Migrate(ctx, db, files(first), pgxtenant.ForEachOptions{Target: "1"})
	require.ErrorContains(t, err, "leave them unset")
	_, err = tenanttern.Migrate(ctx, db, fstest.MapFS{}, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "migrations not found")
}

// A connection that dies in a migration takes it back; a schema of any name is its tenant's; a file that tern would pass over is told;
// and who may not make tables is told so.
func TestMigrateOddities(t *testing.T) {
	d, db := open(t)
	ctx := context.Background()
	_, err := tenanttern.Migrate(ctx, db, files(first), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.NoError(t, db.Provision(ctx, schemaTenant("a")))
	require.NoError(t, db.Provision(ctx, pgxtenant.Tenant{ID: "odd", Isolation: pgxtenant.IsolationSchema, Schema: `Odd "Name`}))
	died := "alter table note add b text; do $$ begin if current_schema = 'tenant_a' then perform pg_terminate_backend(pg_backend_pid()); end if; end $$"
	report, err := tenanttern.Migrate(ctx, db, files(first, died), pgxtenant.ForEachOptions{Name: "x"})
	require.Error(t, err)
	require.Equal(t, []int{2, 1}, []int{report.Done, report.Unknown})
	require.Equal(t, 5, columns(t, db), "of three tables, and two times b")
	report, err = tenanttern.Migrate(ctx, db, files(first, second), pgxtenant.ForEachOptions{Name: "x"})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	require.Equal(t, 6, columns(t, db))

	fsys := files(first, second)
	fsys["3_x.SQL"] = fsys["2_x.sql"]
	_, err = tenanttern.Migrate(ctx, db, fsys, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "3_x.SQL: its name must end in .sql")

	d.Exec("drop table tenant_a.schema_version")
	d.SuperExec("alter schema tenant_a owner to "+d.App, "grant usage on schema tenant_a to "+d.Owner)
	_, err = tenanttern.Migrate(ctx, db, files(first, second), pgxtenant.ForEachOptions{IDs: []string{"a"}})
	require.ErrorContains(t, err, `make table "tenant_a"."schema_version": ERROR: permission denied for schema tenant_a`)
	require.ErrorContains(t, err, `(as role "`+d.Owner+`")`)
}
