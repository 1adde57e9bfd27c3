package pgxtenant

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func inSchema(id string) context.Context {
	return WithTenant(context.Background(), Tenant{ID: id, Isolation: IsolationSchema})
}

// schemasDB has tenants a and b in schemas of their own, and a table of the same name in public.
func schemasDB(t testing.TB) *pgtest.DB {
	db := pgtest.New(t)
	for _, s := range []string{"tenant_a", "tenant_b", "public"} {
		db.Exec("create schema if not exists "+s, "create table "+s+".items (body text)",
			"insert into "+s+".items values ('"+s+"')", "grant usage on schema "+s+" to public",
			"grant select, insert, update, delete on "+s+".items to public")
	}
	db.Exec("create table public.shared_only (body text)", "insert into shared_only values ('shared')", "grant select on shared_only to public")
	return db
}

// Schema tenants share a connection and its prepared statements, with each other and with row tenants.
func TestSchemaTenants(t *testing.T) {
	t.Parallel()
	db := schemasDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		for range 3 {
			for _, id := range []string{"a", "b"} {
				ctx, want := inSchema(id), []string{"tenant_" + id}
				require.Equal(t, want, strs(t, pool, ctx, "select body from items"))
				require.Equal(t, want, strs(t, pool, ctx, "select body from items where $1", true))
				require.Equal(t, []string{"shared"}, strs(t, pool, ctx, "select body from shared_only"))
				require.Equal(t, []string{id}, strs(t, pool, ctx, readTenant))
				require.Equal(t, []string{`tenant_` + id + `, public, pg_temp`}, unquoted(strs(t, pool, ctx, "show search_path")))
				tag, err := pool.Exec(ctx, "update items set body = body")
				require.NoError(t, err)
				require.EqualValues(t, 1, tag.RowsAffected())
				require.NoError(t, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					require.Equal(t, want, strs(t, tx, ctx, "select body from items"))
					return nil
				}))
				require.Equal(t, []string{"public"}, strs(t, pool, as("r"), "select body from items"), "a row tenant")
			}
		}
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	})
}

func unquoted(s []string) []string {
	out := make([]string, len(s))
	for i := range s {
		for _, c := range s[i] {
			if c != '"' {
				out[i] += string(c)
			}
		}
	}
	return out
}

// A schema that is missing, or that the role may not use, is an error: names never fall through to
// public, not even those of statements prepared while it was there.
func TestSchemaNeverFallsThrough(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			db := schemasDB(t)
			pool := boundPool(t, db.AppURL(), mode(m))
			require.Equal(t, []string{"tenant_a"}, strs(t, pool, inSchema("a"), "select body from items where $1", true))
			fails := func(id, code, text string) {
				t.Helper()
				for _, args := range [][]any{{true}, nil} {
					sql := "select body from items where $1"
					if args == nil {
						sql = "insert into items values ('lost')"
					}
					_, err := pool.Exec(inSchema(id), sql, args...)
					require.Equal(t, code, pgCode(err))
					require.ErrorContains(t, err, text)
				}
				err := pgx.BeginFunc(inSchema(id), pool, func(tx pgx.Tx) error {
					_, err := tx.Exec(inSchema(id), "select body from items where $1", true)
					return err
				})
				require.Equal(t, code, pgCode(err))
			}
			fails("nope", "3F000", `pgxtenant: binding tenant "nope": schema "tenant_nope" does not exist`)
			db.Exec("drop schema tenant_a cascade")
			fails("a", "3F000", `schema "tenant_a" does not exist`)
			db.Exec("revoke usage on schema tenant_b from public")
			fails("b", "22023", "the role may not use schema tenant_b")
			require.Equal(t, []string{"public"}, strs(t, db.Connect(db.SuperURL()), context.Background(), "select body from public.items"))
			require.EqualValues(t, 1, pool.Stat().NewConnsCount(), "a failed binding costs no connection")
		})
	}
}

// The role that may have to use the schema is the one that the tenant's settings say.
func TestSchemaOfATenantsOwnRole(t *testing.T) {
	t.Parallel()
	db := schemasDB(t)
	role := "role_" + db.Name
	db.SuperExec("create role "+role, "grant "+role+" to "+db.App, "revoke usage on schema tenant_b from public", "grant usage on schema tenant_b to "+db.App)
	t.Cleanup(func() { db.SuperExec("drop owned by "+role, "drop role "+role) })
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		ctx := func(id string) context.Context {
			return WithTenant(context.Background(), Tenant{ID: id, Isolation: IsolationSchema, Status: StatusReadOnly, Settings: map[string]string{"role": role, "work_mem": "1MB"}})
		}
		require.Equal(t, []string{"tenant_a"}, strs(t, pool, ctx("a"), "select body from items where $1", true))
		require.Equal(t, []string{role}, strs(t, pool, ctx("a"), "select current_user::text"))
		_, err := pool.Exec(ctx("b"), "select body from items where $1", true)
		require.Equal(t, "22023", pgCode(err))
		require.ErrorContains(t, err, "the role may not use schema tenant_b")
		require.Equal(t, []string{"tenant_b"}, strs(t, pool, inSchema("b"), "select body from items"))
	})
}

// A temporary table cannot stand in for a schema tenant's own, even for that tenant.
func TestSchemaTenantsOwnTablesComeFirst(t *testing.T) {
	t.Parallel()
	db := schemasDB(t)
	db.SuperExec("grant temp on database " + pgx.Identifier{db.Name}.Sanitize() + " to public")
	pool := boundPool(t, db.AppURL())
	_, err := pool.Exec(inSchema("a"), "create temp table items as select 'planted' as body")
	require.NoError(t, err)
	require.Equal(t, []string{"tenant_a"}, strs(t, pool, inSchema("a"), "select body from items"))
}

// Schema names are quoted as one name, whatever is in them.
func TestSchemaNamesAreQuoted(t *testing.T) {
	t.Parallel()
	db := schemasDB(t)
	for _, schema := range []string{`a, tenant_b`, `Tenant_B`, `a"b`, `a'b\`, `ü €`, `a;b`, `"`} {
		quoted := pgx.Identifier{schema}.Sanitize()
		db.Exec("create schema "+quoted, "create table "+quoted+".items (body text)", "grant usage on schema "+quoted+" to public",
			"grant select on "+quoted+".items to public")
		for _, m := range modes {
			pool := boundPool(t, db.AppURL(), mode(m))
			ctx := WithTenant(context.Background(), Tenant{ID: "x", Isolation: IsolationSchema, Schema: schema})
			require.Equal(t, []string{schema}, strs(t, pool, ctx, "select current_schema()::text"))
			require.Empty(t, strs(t, pool, ctx, "select body from items"))
		}
	}
}

// Settings live as long as the binding, in every mode, and their values may be any text.
func TestSettings(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		for _, value := range []string{"", "u1", `it's "quoted" \ $1 %s`, "ü€\n;begin;", `\'; set role postgres; --`} {
			ctx := WithTenant(context.Background(), Tenant{ID: "a", Settings: map[string]string{"app.user_id": value, "statement_timeout": "1234ms"}})
			require.Equal(t, []string{value}, strs(t, pool, ctx, "select current_setting('app.user_id')"))
			require.Equal(t, []string{"1234ms"}, strs(t, pool, ctx, "show statement_timeout"))
			require.Equal(t, []string{"a1", "a2"}, strs(t, pool, ctx, "select body from docs order by id"))
			_, err := pool.Exec(ctx, "select nope")
			require.Equal(t, "42703", pgCode(err))
			require.Equal(t, []string{"0"}, strs(t, pool, as("b"), "show statement_timeout"))
			require.Equal(t, []string{""}, strs(t, pool, as("b"), "select current_setting('app.user_id', true)"))
		}
		many := map[string]string{}
		for i := range 20 { // more than are kept prepared
			many["app.s"+string(rune('a'+i))] = "v"
		}
		ctx := WithTenant(context.Background(), Tenant{ID: "a", Settings: many})
		require.Equal(t, []string{"v"}, strs(t, pool, ctx, "select current_setting('app.st')"))
		require.Equal(t, []string{"v"}, strs(t, pool, ctx, "select current_setting($1)", "app.sa"))
		bad := WithTenant(context.Background(), Tenant{ID: "a", Settings: map[string]string{"statement_timeout": "soon"}})
		_, err := pool.Exec(bad, "update docs set body = 'changed'")
		require.Equal(t, "22023", pgCode(err))
		require.ErrorContains(t, err, `pgxtenant: binding tenant "a": invalid value for parameter "statement_timeout"`)
		require.Equal(t, []string{"a1", "a2"}, strs(t, pool, as("a"), "select body from docs order by id"))
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	})
}

// Bind keeps the hooks it finds, and refuses what it cannot serve before anything is sent.
func TestBind(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	var prepared, connected int
	config, err := pgxpool.ParseConfig(db.AppURL())
	require.NoError(t, err)
	config.MaxConns = 1
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		connected++
		var n int
		return conn.QueryRow(ctx, "select count(*) from docs").Scan(&n) // as no tenant
	}
	//lint:ignore SA1019 pgxpool still honours it
	config.BeforeAcquire = func(ctx context.Context, conn *pgx.Conn) bool {
		prepared++
		var n int
		return conn.QueryRow(ctx, "select count(*) from docs").Scan(&n) == nil && n == 2 // as the tenant
	}
	require.NoError(t, Bind(config, ""))
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	defer pool.Close()
	require.Equal(t, []string{"a1", "a2"}, strs(t, pool, as("a"), "select body from docs order by id"))
	require.Equal(t, 1, connected)
	require.Equal(t, 1, prepared)

	for ctx, want := range map[context.Context]error{
		context.Background(): ErrNoTenant,
		as("a'b"):            ErrInvalidTenantID,
		WithTenant(context.Background(), Tenant{ID: "a", Status: StatusSuspended}):                              ErrTenantSuspended,
		WithTenant(context.Background(), Tenant{ID: "a", Isolation: IsolationDatabase, ConnString: "dbname=x"}): ErrInvalidTenant,
	} {
		_, err := pool.Exec(ctx, "delete from docs")
		require.ErrorIs(t, err, want)
	}
	require.Equal(t, 1, prepared, "refused before any other hook")
	require.EqualValues(t, 1, pool.Stat().NewConnsCount(), "a refusal costs no connection")
}

func TestBindTwiceIsRefused(t *testing.T) {
	t.Parallel()
	config, err := pgxpool.ParseConfig(pgtest.New(t).AppURL())
	require.NoError(t, err)
	require.NoError(t, Bind(config, ""))
	require.NoError(t, Bind(config, ""))
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	defer pool.Close()
	require.ErrorContains(t, pool.Ping(as("a")), "Bind was called twice")
}

// Where two schema tenants' tables differ, a statement that pgx keeps has the one's columns or the other's: the
// server refuses it and returns no row, and the next try is right. A statement that names columns of the same
// types is not touched.
func TestSchemaTenantsWhoseTablesDiffer(t *testing.T) {
	t.Parallel()
	d := schemasDB(t)
	d.Exec("alter table tenant_b.items add n int")
	refused := map[pgx.QueryExecMode]string{
		pgx.QueryExecModeCacheStatement: "0A000", // cached plan must not change result type
		pgx.QueryExecModeCacheDescribe:  "08P01", // the result formats are those of other columns
	}
	for _, m := range modes {
		for _, order := range []string{"ab", "ba"} {
			pool := boundPool(t, d.AppURL(), mode(m))
			first, second := order[:1], order[1:]
			read := func(id, columns string) error {
				rows, err := pool.Query(inSchema(id), "select "+columns+" from items where $1", true)
				require.NoError(t, err)
				got, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
					values, err := row.Values()
					if err != nil {
						return "", err
					}
					return values[0].(string), nil
				})
				if err == nil {
					require.Equal(t, []string{"tenant_" + id}, got, m)
				}
				return err
			}
			for _, id := range []string{first, second, first} {
				require.NoError(t, read(id, "body"), m)
			}
			require.NoError(t, read(first, "*"), m)
			if err := read(second, "*"); err != nil {
				require.Equal(t, refused[m], pgCode(err), "%v, %s: README's Limits say so", m, order)
				require.NoError(t, read(second, "*"), m)
			} else {
				require.NotEqual(t, pgx.QueryExecModeCacheStatement, m, "README's Limits say otherwise")
			}
		}
	}
}

// A schema tenant's role may not make anything in its own schema, so nothing there can stand in for a function
// that others, or the server, have made.
func TestSchemaTenantsMakeNothingInTheirSchema(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	db := p.open(nil)
	ctx := context.Background()
	require.NoError(t, db.Registry().Install(ctx))
	tenant := Tenant{ID: uniqueID(p.d, "schema"), Isolation: IsolationSchema}
	require.NoError(t, db.Provision(ctx, tenant))
	for _, sql := range []string{"create function lower(text) returns text language sql as 'select $1'", "create table planted ()", "create view planted as select 1",
		"alter table note add planted int", "drop table note"} {
		_, err := db.Exec(WithTenantID(ctx, tenant.ID), sql)
		require.Equal(t, "42501", pgCode(err), sql)
	}
	require.Equal(t, []string{"a"}, strs(t, db, WithTenantID(ctx, tenant.ID), "select lower('A')"))
}
