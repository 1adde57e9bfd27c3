package tenantmigrate_test

import (
	"context"
	"testing"
	"testing/fstest"
	"time"

	"github.com/golang-migrate/migrate/v4"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantmigrate"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// files makes migrations 1 and up of ways up and down in turn. An empty one has no file.
func files(ways ...string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for i, sql := range ways {
		if sql != "" {
			fsys["00"+string("123456"[i/2])+"_x."+[]string{"up", "down"}[i%2]+".sql"] = &fstest.MapFile{Data: []byte(sql)}
		}
	}
	return fsys
}

var base = []string{"create table note (a text)", "drop table note"}

// site is a database whose template and tenants are at version 1.
type site struct {
	*testing.T
	ctx context.Context
	d   *pgtest.DB
	db  *pgxtenant.TenantDB
}

func open(t *testing.T, tenants ...string) *site {
	t.Helper()
	t.Parallel()
	s := &site{T: t, ctx: context.Background(), d: pgtest.New(t)}
	s.d.Exec("create schema template")
	c, err := pgxtenant.ParseConfig(s.d.AppURL())
	require.NoError(t, err)
	c.Admin, err = pgxpool.ParseConfig(s.d.OwnerURL("pool_max_conns=4"))
	require.NoError(t, err)
	c.Registry = &pgxtenant.RegistryConfig{}
	c.Template, c.TemplateReference = "template", []string{tenantmigrate.VersionTable}
	s.db, err = pgxtenant.NewWithConfig(s.ctx, c)
	require.NoError(t, err)
	t.Cleanup(s.db.Close)
	require.NoError(t, s.db.Registry().Install(s.ctx))
	_, err = tenantmigrate.Migrate(s.ctx, s.db, files(base...), pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	for _, id := range tenants {
		require.NoError(t, s.db.Provision(s.ctx, pgxtenant.Tenant{ID: id, Isolation: pgxtenant.IsolationSchema}))
	}
	return s
}

func (s *site) schemasWith(column string) (list []string) {
	s.Helper()
	require.NoError(s, s.db.Admin().QueryRow(s.ctx, `select coalesce(array_agg(table_schema::text order by 1), '{}') from information_schema.columns
		where table_name = 'note' and column_name = $1`, column).Scan(&list))
	return list
}

// Template and tenants go up and down together, the shared schemas by a call of their own.
func TestMigrate(t *testing.T) {
	s := open(t, "a", "b")
	fsys := files(append(base, "alter table note add b text", "alter table note drop b", "create index concurrently note_b on note (b)", "drop index concurrently note_b")...)
	report, err := tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Done)
	require.Equal(t, []string{"template", "tenant_a", "tenant_b"}, s.schemasWith("b"))
	for res, err := range report.Results(s.ctx) {
		require.NoError(t, err)
		require.Equal(t, []string{"1", "3"}, []string{res.Before, res.After})
	}
	report, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Isolations: []pgxtenant.Isolation{pgxtenant.IsolationRow}})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	require.Equal(t, []string{"public", "template", "tenant_a", "tenant_b"}, s.schemasWith("b"))
	report, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, report.Current)

	_, err = tenantmigrate.MigrateTo(s.ctx, s.db, fsys, 1, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, []string{"public"}, s.schemasWith("b"))
	_, err = tenantmigrate.MigrateTo(s.ctx, s.db, fsys, 0, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Equal(t, []string{"public"}, s.schemasWith("a"))
}

// A version that did not succeed is dirty, for that tenant, and stays so until somebody says how things are.
func TestDirty(t *testing.T) {
	s := open(t, "a", "b", "c")
	s.d.Exec("alter table tenant_b.note add b text")
	fsys := files(append(base, "create table made (); alter table note add b text", "")...)
	report, err := tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.ErrorContains(t, err, `column "b" of relation "note" already exists`)
	require.Equal(t, 3, report.Done)
	require.Equal(t, 1, report.Failed)
	require.Equal(t, "b", report.Failures[0].Tenant)
	require.Equal(t, "2 dirty", report.Failures[0].After)

	s.d.Exec("alter table tenant_b.note drop b")
	report, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	var dirty migrate.ErrDirty
	require.ErrorAs(t, err, &dirty)
	require.Equal(t, 2, dirty.Version)
	require.ErrorContains(t, err, `tenant "b"`)
	require.ErrorContains(t, err, "call Force")
	require.Equal(t, 1, report.Failed)

	require.NoError(t, tenantmigrate.Force(s.ctx, s.db, "b", 1))
	report, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
	require.Equal(t, []string{"template", "tenant_a", "tenant_b", "tenant_c"}, s.schemasWith("b"))
	require.ErrorIs(t, tenantmigrate.Force(s.ctx, s.db, "nobody", 1), pgxtenant.ErrTenantNotFound)
}

// A call that is cancelled in a statement leaves no goroutine behind, which TestMain checks, with migrations still to come.
func TestCancelled(t *testing.T) {
	s := open(t, "a")
	ctx, cancel := context.WithCancel(s.ctx)
	fsys := files(append(base, "select pg_sleep(600)", "", "select 1", "", "select 2", "")...)
	go func() {
		defer cancel()
		assert.Eventually(t, func() bool { // when the server is at it: it takes no notice of what comes before
			var running bool
			err := s.db.Admin().QueryRow(s.ctx, "select exists (select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep')").Scan(&running)
			return err == nil && running
		}, 2*time.Minute, 10*time.Millisecond)
	}()
	_, err := tenantmigrate.Migrate(ctx, s.db, fsys, pgxtenant.ForEachOptions{IDs: []string{"a"}})
	require.ErrorIs(t, err, context.Canceled)
}

func TestMigrateRefuses(t *testing.T) {
	s := open(t)
	_, err := tenantmigrate.Migrate(s.ctx, s.db, files(), pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "there must be some")
	_, err = tenantmigrate.MigrateTo(s.ctx, s.db, files(base...), 7, pgxtenant.ForEachOptions{})
	require.ErrorContains(t, err, "no file has version 7; they are [1]")
	_, err = tenantmigrate.Migrate(s.ctx, s.db, files(base...), pgxtenant.ForEachOptions{Attempts: 3})
	require.ErrorContains(t, err, "leave them unset")
	require.ErrorIs(t, tenantmigrate.Force(s.ctx, s.db, "", 1), pgxtenant.ErrInvalidTenant)
}

// The template comes first, so it is the first that is dirty, and it is said how things are there as for a tenant.
func TestDirtyTemplate(t *testing.T) {
	s := open(t, "a")
	fsys := files(append(base, "alter table nothing add b text", "")...)
	report, err := tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.ErrorIs(t, err, pgxtenant.ErrRunStopped)
	require.Equal(t, 1, report.Failed)
	_, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.ErrorContains(t, err, "ForceTemplate")
	require.NoError(t, tenantmigrate.ForceTemplate(s.ctx, s.db, 1))
	require.Equal(t, "1 false", s.version("template"))
	fsys = files(append(base, "alter table note add b text", "")...)
	report, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.NoError(t, err)
	require.Equal(t, []int{2, 0}, []int{report.Done, report.Failed})
	require.NoError(t, tenantmigrate.ForceTemplate(s.ctx, s.db, 1))
	require.Equal(t, "1 false", s.version("template"))
	require.Equal(t, "2 false", s.version("tenant_a"), "it is left alone")

	// The shared schemas by one who lives there.
	_, err = s.db.Registry().Create(s.ctx, pgxtenant.Record{Tenant: pgxtenant.Tenant{ID: "row"}})
	require.NoError(t, err)
	_, err = tenantmigrate.Migrate(s.ctx, s.db, files("select 1/0", ""), pgxtenant.ForEachOptions{Isolations: []pgxtenant.Isolation{pgxtenant.IsolationRow}})
	require.ErrorContains(t, err, "division by zero")
	require.Equal(t, "1 true", s.version("public"))
	require.NoError(t, tenantmigrate.Force(s.ctx, s.db, "row", 1))
	require.Equal(t, "1 false", s.version("public"))
}

func (s *site) version(schema string) (text string) {
	s.Helper()
	require.NoError(s, s.db.Admin().QueryRow(s.ctx, "select version || ' ' || dirty from "+schema+".schema_migrations").Scan(&text))
	return text
}

// A process that dies in a migration leaves that tenant dirty; files that are older than what was applied take nothing back.
func TestDiedInAMigration(t *testing.T) {
	s := open(t, "a")
	require.NoError(t, s.db.Provision(s.ctx, pgxtenant.Tenant{ID: "odd", Isolation: pgxtenant.IsolationSchema, Schema: `Odd "Name`}))
	fsys := files(append(base, `alter table note add b text; do $$ begin if current_schema = 'tenant_a' then perform pg_terminate_backend(pg_backend_pid()); end if; end $$`, "alter table note drop b")...)
	report, err := tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	require.Error(t, err)
	require.Equal(t, []int{2, 1}, []int{report.Done, report.Unknown})
	require.ElementsMatch(t, []string{`Odd "Name`, "template"}, s.schemasWith("b"))
	_, err = tenantmigrate.Migrate(s.ctx, s.db, fsys, pgxtenant.ForEachOptions{Name: "x"})
	var dirty migrate.ErrDirty
	require.ErrorAs(t, err, &dirty)
	require.NoError(t, tenantmigrate.Force(s.ctx, s.db, "a", 1))

	report, err = tenantmigrate.Migrate(s.ctx, s.db, files(base...), pgxtenant.ForEachOptions{Isolations: []pgxtenant.Isolation{pgxtenant.IsolationSchema}, SkipTemplates: true})
	require.ErrorContains(t, err, "it is at version 2, which no file has; they are [1]: they are older than what was applied, or others")
	require.Equal(t, []int{1, 1}, []int{report.Current, report.Failed})
	_, err = tenantmigrate.MigrateTo(s.ctx, s.db, fsys, 1, pgxtenant.ForEachOptions{})
	require.NoError(t, err)
	require.Empty(t, s.schemasWith("b"))
}
