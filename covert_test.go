package pgxtenant

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// What a correct policy leaves open: facts that PostgreSQL shows across tenants of one database. Each is a line
// of docs/what-row-level-security-does-not-stop.md: if one of these tests fails, that page is to be changed.
func TestWhatPostgresShowsAcrossTenants(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for name, channel := range map[string]func(t *testing.T, d *pgtest.DB, db *TenantDB){
		"a unique key tells that another has the value": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			d.Exec("create unique index on docs (body)")
			_, err := db.Exec(as("a"), "insert into docs values ('a', 9, 'b1')")
			require.Equal(t, "23505", pgCode(err))
			require.NotContains(t, err.Error(), "b1")
			tag, err := db.Exec(as("a"), "insert into docs values ('a', 9, 'b1') on conflict do nothing")
			require.NoError(t, err)
			require.Zero(t, tag.RowsAffected())
			d.Exec("drop index docs_body_idx", "create unique index on docs (tenant_id, body)")
			_, err = db.Exec(as("a"), "insert into docs values ('a', 9, 'b1')")
			require.NoError(t, err, "with the tenant in the key it does not")
		},
		"a foreign key finds another's row, and its cascade deletes one": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			d.RLSTable("parent")
			d.RLSTable("child")
			d.Exec("create unique index on parent (id)", "alter table child add foreign key (id) references parent (id) on delete cascade")
			_, err := db.Exec(as("a"), "insert into parent values ('a', 1, '')")
			require.NoError(t, err)
			_, err = db.Exec(as("b"), "insert into child values ('b', 2, '')")
			require.Equal(t, "23503", pgCode(err))
			_, err = db.Exec(as("b"), "insert into child values ('b', 1, '')")
			require.NoError(t, err, "a's row is there")
			_, err = db.Exec(as("a"), "delete from parent")
			require.NoError(t, err)
			require.Zero(t, count(t, db, as("b"), "select count(*) from child"), "a's delete took b's row")
			d.Exec("alter table child drop constraint child_id_fkey, add foreign key (tenant_id, id) references parent (tenant_id, id) on delete cascade")
			_, err = db.Exec(as("a"), "insert into parent values ('a', 1, '')")
			require.NoError(t, err)
			_, err = db.Exec(as("b"), "insert into child values ('b', 1, '')")
			require.Equal(t, "23503", pgCode(err), "with the tenant in the key it is not")
		},
		"EXPLAIN counts rows that a policy hides": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			d.SuperExec("alter table docs drop constraint docs_pkey", "insert into docs select 'b', 1, 'common' from generate_series(1, 500)", "analyze docs")
			plan := strings.Join(strs(t, db, as("a"), "explain (analyze, timing off) select from docs"), "\n")
			require.Contains(t, plan, "Rows Removed by Filter: 502")
			plan = strings.Join(strs(t, db, as("a"), "explain select from docs where body = 'common'"), "\n")
			require.Contains(t, plan, "rows=250 ", "a half of 500 rows that are b's")
		},
		"statistics of a table are hidden, its size is not": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			d.SuperExec("analyze docs")
			require.Zero(t, count(t, db, as("a"), "select count(*) from pg_stats where tablename = 'docs'"))
			require.Equal(t, 4, count(t, db, as("a"), "select reltuples::int from pg_class where relname = 'docs'"))
			require.NotZero(t, count(t, db, as("a"), "select pg_relation_size('docs')::int"))
		},
		"a function in WHERE sees own rows only": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			_, err := db.Exec(as("a"), "do $$ begin create function pg_temp.tell(x text) returns bool language plpgsql cost 0.0001 as 'begin if x like ''b%'' then raise exception ''%'', x; end if; return true; end'; perform count(*) from docs where pg_temp.tell(body); end $$")
			require.NoError(t, err)
		},
		"a sequence is drawn from by all": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			d.Exec("create sequence ids", "grant usage on sequence ids to "+ident(d.App))
			require.Equal(t, 1, count(t, db, as("a"), "select nextval('ids')::int"))
			require.Equal(t, 2, count(t, db, as("b"), "select nextval('ids')::int"))
			require.Equal(t, 3, count(t, db, as("a"), "select nextval('ids')::int"))
		},
		"pg_stat_activity shows and ends others' statements": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			conn, err := db.Acquire(as("b"))
			require.NoError(t, err)
			defer conn.Release()
			require.Len(t, strs(t, conn, as("b"), "select 'literal of b'"), 1)
			require.Equal(t, 1, count(t, db, as("a"), "select count(*) from pg_stat_activity where query like '%literal of ' || 'b%' and pid <> pg_backend_pid()"))
			require.Len(t, strs(t, conn, as("b"), "select body from docs where body = $1", "value of b"), 0)
			require.Zero(t, count(t, db, as("a"), "select count(*) from pg_stat_activity where query like '%value of ' || 'b%' and pid <> pg_backend_pid()"), "a bound value is not shown")
			require.Equal(t, 1, count(t, db, as("a"), "select count(*) from (select pg_terminate_backend(pid) from pg_stat_activity where usename = current_user and pid <> pg_backend_pid()) x"))
			_, err = conn.Exec(as("b"), "select 1")
			require.Error(t, err)
		},
		"NOTIFY reaches every listener": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			conn, err := db.Acquire(as("a"))
			require.NoError(t, err)
			defer conn.Release()
			_, err = conn.Exec(as("a"), "listen news_of_b")
			require.NoError(t, err)
			_, err = db.Exec(as("b"), "select pg_notify('news_of_b', 'secret')")
			require.NoError(t, err)
			n, err := conn.Conn().WaitForNotification(ctx)
			require.NoError(t, err)
			require.Equal(t, "secret", n.Payload)
		},
		"an advisory lock holds up all": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			conn, err := db.Acquire(as("a"))
			require.NoError(t, err)
			defer conn.Release()
			_, err = conn.Exec(as("a"), "select pg_advisory_lock(4711)")
			require.NoError(t, err)
			require.Equal(t, []string{"false"}, strs(t, db, as("b"), "select pg_try_advisory_xact_lock(4711)::text"))
		},
		"LOCK TABLE holds up all": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			tx, err := db.Begin(as("a"))
			require.NoError(t, err)
			defer func() { require.NoError(t, tx.Rollback(ctx)) }()
			_, err = tx.Exec(as("a"), "lock table docs in access exclusive mode")
			require.NoError(t, err)
			other, err := db.Begin(as("b"))
			require.NoError(t, err)
			defer func() { require.NoError(t, other.Rollback(ctx)) }()
			_, err = other.Exec(as("b"), "set local lock_timeout = '50ms'")
			require.NoError(t, err)
			_, err = other.Exec(as("b"), "select from docs")
			require.Equal(t, "55P03", pgCode(err))
		},
		"the role can change its own defaults, for all": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			_, err := db.Exec(as("a"), "alter role current_user set search_path = pg_catalog")
			require.NoError(t, err)
			db.Reset()
			_, err = db.Exec(as("b"), "select from docs")
			require.Equal(t, "42P01", pgCode(err), "new connections find no table, and no other tenant's")
			pinned := openDB(t, d.AppURL("search_path=public"))
			require.Equal(t, 2, count(t, pinned, as("b"), "select count(*) from docs"), "a connection string says more than a role's default")
			_, err = db.Exec(as("a"), "alter role current_user password 'x'")
			require.NoError(t, err)
			db.Reset()
			require.Equal(t, "28P01", pgCode(db.Ping(as("b"))))
		},
		"the catalogue names all schemas and roles": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			d.Exec("create schema tenant_b")
			require.Equal(t, 1, count(t, db, as("a"), "select count(*) from pg_namespace where nspname = 'tenant_b'"))
		},
		"large objects are the role's, not a tenant's": func(t *testing.T, d *pgtest.DB, db *TenantDB) {
			oid := count(t, db, as("b"), "select lo_from_bytea(0, 'secret of b')::int")
			require.Equal(t, []string{"secret of b"}, strs(t, db, as("a"), "select convert_from(lo_get($1::int::oid), 'UTF8')", oid))
			_, err := d.Connect(d.SuperURL()).Exec(ctx, "revoke execute on function lo_get(oid) from public")
			require.NoError(t, err)
			_, err = db.Exec(as("a"), "select lo_get($1::int::oid)", oid)
			require.Equal(t, "42501", pgCode(err))
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			d := docsDB(t)
			channel(t, d, openDB(t, d.AppURL("pool_max_conns=3")))
		})
	}
}
