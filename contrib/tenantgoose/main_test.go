package tenantgoose_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// site is a database with a registry and a template schema.
type site struct {
	*testing.T
	ctx context.Context
	d   *pgtest.DB
	db  *pgxtenant.TenantDB
}

func newSite(t *testing.T, adjust ...func(*pgxtenant.Config)) *site {
	t.Helper()
	t.Parallel()
	s := &site{T: t, ctx: context.Background(), d: pgtest.New(t)}
	s.d.Exec("create schema template", "create table template.note (id bigint generated always as identity primary key)")
	s.db = s.open(adjust...)
	require.NoError(t, s.db.Registry().Install(s.ctx))
	return s
}

// open is another process each time.
func (s *site) open(adjust ...func(*pgxtenant.Config)) *pgxtenant.TenantDB {
	s.Helper()
	c, err := pgxtenant.ParseConfig(s.d.AppURL())
	require.NoError(s, err)
	c.Admin, err = pgxpool.ParseConfig(s.d.OwnerURL("pool_max_conns=4"))
	require.NoError(s, err)
	c.Registry = &pgxtenant.RegistryConfig{}
	c.Template, c.TemplateReference = "template", []string{"goose_db_version"}
	for _, set := range adjust {
		set(c)
	}
	db, err := pgxtenant.NewWithConfig(s.ctx, c)
	require.NoError(s, err)
	s.Cleanup(db.Close)
	return db
}

func (s *site) migrator(files fstest.MapFS, options ...tenantgoose.Option) *tenantgoose.Migrator {
	s.Helper()
	m, err := tenantgoose.New(s.db, files, options...)
	require.NoError(s, err)
	return m
}

// tenants makes schema tenants t0 and up as copies of the template, without the copying: with the table that the template has before
// its first migration.
func (s *site) tenants(n int) {
	s.Helper()
	s.d.Exec(fmt.Sprintf(`do $$ begin for i in 0..%d loop
			execute format('create schema tenant_t%%s create table note (id bigint generated always as identity primary key)', i);
		end loop; end $$`, n-1),
		fmt.Sprintf(`insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings)
			select 't' || i, '', 'schema', '', 'tenant_t' || i, '', '', 'active', '{}' from generate_series(0, %d) i`, n-1))
}

// one is what a query returns on the role of the owner.
func one[T any](s *site, sql string, args ...any) (v T) {
	s.Helper()
	require.NoError(s, s.db.Admin().QueryRow(s.ctx, sql, args...).Scan(&v))
	return v
}

// columns are the columns of a table, in every schema but the template that has it, as schema.column.
func (s *site) columns(table string) []string {
	s.Helper()
	return one[[]string](s, `select coalesce(array_agg(table_schema || '.' || column_name order by 1), '{}') from information_schema.columns
		where table_name = $1 and table_schema <> 'template' and table_schema not like 'pgxtenant%' and column_name <> 'id'`, table)
}

// ledger is what goose has noted in a schema.
func (s *site) ledger(schema string) []int64 {
	s.Helper()
	return one[[]int64](s, "select array_agg(version_id order by id) from "+schema+".goose_db_version")
}

// statuses are those of a Migrator, as text: place, version, and what is pending, missing and unknown.
func (s *site) statuses(m *tenantgoose.Migrator, o pgxtenant.ForEachOptions) (list []string) {
	s.Helper()
	for st, err := range m.Status(s.ctx, o) {
		require.NoError(s, err)
		text := fmt.Sprintf("%s at %d", st.Place, st.Version)
		for _, p := range []struct {
			word string
			list []tenantgoose.Migration
		}{{"pending", st.Pending}, {"missing", st.Missing}} {
			for _, m := range p.list {
				text += fmt.Sprintf(" %s %s", p.word, m.Name)
			}
		}
		for _, v := range st.Unknown {
			text += fmt.Sprintf(" unknown %d", v)
		}
		if st.Err != nil {
			text += " " + st.Err.Error()
		}
		list = append(list, text)
	}
	return list
}

// files makes a file system of names and what they contain, both of which may repeat.
func files(namesAndContents ...string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for pair := range slices.Chunk(namesAndContents, 2) {
		fsys[pair[0]] = &fstest.MapFile{Data: []byte(pair[1])}
	}
	return fsys
}

// updown is a migration that goes up by one statement, and down by another.
func updown(up, down string) string {
	return "-- +goose Up\n" + up + ";\n-- +goose Down\n" + down + ";\n"
}

// addColumn is one that adds a column to the table that every site has.
func addColumn(name string) string {
	return updown("alter table note add "+name+" text", "alter table note drop "+name)
}

// with is a file system with more in it.
func with(base fstest.MapFS, namesAndContents ...string) fstest.MapFS {
	more := files(namesAndContents...)
	for name, f := range base {
		if more[name] == nil {
			more[name] = f
		}
	}
	return more
}

func text(lines []string) string { return strings.Join(lines, "\n") }
