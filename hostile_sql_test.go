package pgxtenant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// hostile is SQL that tenant a gets an application to run, to see rows of tenant b or to leave something on the
// connection for whoever comes next. SETTING stands for the tenant setting.
type hostile struct {
	name  string
	steps []string // sent one after the other; the last returns rows only if it sees b's

	// sees are the ways in, of hostileWays, by which a policy on the bare setting lets it see b's rows:
	// those that docs/what-row-level-security-does-not-stop.md tells of.
	sees string
}

const (
	hostileSecret = "secret of b " // and a number: not what the statements themselves say
	hostileLook   = "select body from docs where body like 'secret of b%'"

	everyWay   = "args batch copy exec query row simple stacked tx"
	manyInOne  = "batch stacked tx" // where later steps share a transaction with earlier ones
	alsoCopied = "batch copy exec query row simple stacked tx"
)

var hostileSQL = []hostile{
	// In one statement.
	{"set_config in a CTE", []string{"with x as materialized (select set_config('SETTING', 'b', true)) select body from x, docs where body like 'secret of b%'"}, everyWay},
	{"set_config between two scans", []string{"select other.body from docs mine, docs other where mine.id = 1 and set_config('SETTING', case mine.id when 1 then 'b' end, true) = 'b' and other.body like 'secret of b%'"}, everyWay},
	{"set_config in WHERE", []string{"select body from docs where set_config('SETTING', 'b', true) = 'b' and body like 'secret of b%'"}, ""},
	{"set_config row by row", []string{"select body from docs where set_config('SETTING', case id when 1 then 'b' else 'a' end, true) is not null and body like 'secret of b%'"}, ""},
	{"set_config in RETURNING", []string{"with x as (update docs set body = body where id = 1 returning set_config('SETTING', 'b', true)) select body from x, docs where body like 'secret of b%'"}, alsoCopied},
	{"query_to_xml", []string{"select x::text from query_to_xml('with x as materialized (select set_' || 'config(''SETTING'', ''b'', true)) select body from x, docs', true, false, '') x where x::text like '%secret of b%'"}, everyWay},
	{"DO that reports by an error", []string{"do $$ begin perform set_config('SETTING', 'b', false); raise exception '%', (select string_agg(body, ',') from docs); end $$"}, "batch exec query row simple stacked tx"},
	{"DO that reports by a notice", []string{"do $$ begin set local SETTING = 'b'; raise notice '%', (select string_agg(body, ',') from docs); end $$"}, "batch exec query row simple stacked tx"},
	{"a function of its own", []string{"create function pg_temp.flip() returns setof text language plpgsql as $$ begin perform set_config('SETTING', 'b', true); return query select body from docs where body like 'secret of b%'; end $$", "select pg_temp.flip()"}, "copy exec query row simple stacked tx"},
	{"a function with a SET clause", []string{"create function pg_temp.as_b() returns setof text language sql set SETTING = 'b' as $$ select body from docs where body like 'secret of b%' $$", "select pg_temp.as_b()"}, ""},

	// In several.
	{"SET", []string{"set SETTING = 'b'", hostileLook}, manyInOne},
	{"SET LOCAL", []string{"set local SETTING = 'b'", hostileLook}, manyInOne},
	{"set_config for the session", []string{"select set_config('SETTING', 'b', false)", hostileLook}, manyInOne},
	{"upper-case setting", []string{"set APP.CURRENT_TENANT_ID = 'b'", hostileLook}, manyInOne},
	{"a cursor that is held", []string{"set SETTING = 'b'", "declare c cursor with hold for " + hostileLook, "fetch all from c"}, "batch tx"},
	{"UPDATE of pg_settings", []string{"update pg_settings set setting = 'b' where name = 'SETTING'", hostileLook}, ""},
	{"RESET", []string{"reset SETTING", hostileLook}, ""},
	{"RESET ALL", []string{"reset all", hostileLook}, ""},
	{"DISCARD ALL", []string{"discard all", hostileLook}, ""},
	{"SET ROLE", []string{"set role OWNER", hostileLook}, ""},
	{"SET SESSION AUTHORIZATION", []string{"set session authorization OWNER", hostileLook}, ""},
	{"row_security off", []string{"set row_security = off", hostileLook}, ""},
	{"session_replication_role", []string{"set session_replication_role = replica", hostileLook}, ""},
	{"ALTER ROLE SET the tenant", []string{"alter role current_user set SETTING = 'b'", hostileLook}, ""},
	{"ALTER TABLE", []string{"alter table docs disable row level security", hostileLook}, ""},
	{"DROP POLICY", []string{"drop policy tenant on docs", hostileLook}, ""},
	{"TRUNCATE", []string{"truncate docs", hostileLook}, ""},
	{"a table without policies", []string{"create table copied as select * from docs", hostileLook}, ""},
	{"COPY to a program", []string{"copy docs to program 'cat'", hostileLook}, ""},

	// By ending the transaction, or the text.
	{"COMMIT", []string{"commit", hostileLook}, ""},
	{"COMMIT AND CHAIN", []string{"commit and chain", hostileLook}, ""},
	{"ROLLBACK, then SET", []string{"rollback", "set SETTING = 'b'", hostileLook}, "batch stacked"},
	{"BEGIN that stays open", []string{"begin", "set local SETTING = 'b'", hostileLook}, "batch copy stacked tx"},
	{"ROLLBACK TO SAVEPOINT", []string{"savepoint s", "set local SETTING = 'b'", "rollback to savepoint s", hostileLook}, ""},
	{"a comment at the end", []string{"select 1 --", hostileLook}, ""},
	{"a comment that stays open", []string{"select 1 /*", hostileLook}, ""},
	{"backslashes that escape", []string{"set standard_conforming_strings = off", hostileLook}, ""},

	// What the next borrower would find.
	{"a temporary table in front of the real one", []string{"create temp table docs as select 'b'::text tenant_id, 1::bigint id, 'planted' body", hostileLook}, ""},
	{"a temporary table made by DO", []string{"do $$ begin create temp table docs as select 'b'::text tenant_id, 1::bigint id, 'planted' body; end $$", hostileLook}, ""},
	{"a temporary view", []string{"create temp view docs as select 'b'::text tenant_id, 1::bigint id, 'planted' body", hostileLook}, ""},
	{"a search_path", []string{"set search_path = pg_temp, pg_catalog", hostileLook}, ""},
	{"a search_path by Unicode", []string{`select U&"set\005fconfig"('search_path', 'pg_catalog', false)`, hostileLook}, ""},
	{"a search_path by query_to_xml", []string{"select query_to_xml('select set_' || 'config(''search_path'', ''pg_catalog'', false)', true, false, '')::text", hostileLook}, ""},
	{"a search_path by ts_stat", []string{"select word from ts_stat('select set_' || 'config(''search_path'', ''pg_catalog'', false)::tsvector')", hostileLook}, ""},
	{"a search_path by EXPLAIN", []string{`explain analyze select U&"set\005fconfig"('search_path', 'pg_catalog', false)`, hostileLook}, ""},
	{"a search_path by COPY", []string{`copy (select U&"set\005fconfig"('search_path', 'pg_catalog', false)) to stdout`, hostileLook}, ""},
	{"a time-out", []string{"set statement_timeout = '1s'", hostileLook}, ""},
	{"a transaction mode", []string{"set session characteristics as transaction read only", hostileLook}, ""},
	{"an advisory lock", []string{"select pg_advisory_lock(4711)", hostileLook}, ""},
	{"LISTEN", []string{"listen news", hostileLook}, ""},
	{"PREPARE", []string{"prepare docs as select 'planted'", hostileLook}, ""},
	{"a seed for random()", []string{"select setseed(0.5)", hostileLook}, ""},
	{"a sequence's last value", []string{"select nextval('numbers')", hostileLook}, ""},
}

// hearing is all that a reached in one try.
type hearing struct {
	mu   sync.Mutex
	text strings.Builder
}

func (h *hearing) add(values ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fmt.Fprintln(&h.text, values...)
}

func (h *hearing) err(err error) {
	h.add(err)
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		h.add(pgErr.Detail, pgErr.Hint, pgErr.Where)
	}
}

// rows takes in a result to its end.
func (h *hearing) rows(rows pgx.Rows, err error) {
	if err != nil {
		h.err(err)
		return
	}
	for rows.Next() {
		values, err := rows.Values()
		h.add(values, err)
	}
	h.err(rows.Err())
}

// tag takes in what Exec tells of the last statement.
func (h *hearing) tag(tag pgconn.CommandTag, err error, last bool) {
	h.err(err)
	if err == nil && last && tag.Select() && tag.RowsAffected() > 0 {
		h.add(hostileSecret)
	}
}

// heardSecret reports whether a saw b's rows, and forgets what it heard.
func (h *hearing) heardSecret() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer h.text.Reset()
	return strings.Contains(h.text.String(), hostileSecret)
}

// hostileWays are the ways for SQL to reach the server through a TenantDB.
var hostileWays = map[string]func(ctx context.Context, db *TenantDB, steps []string, h *hearing){
	"exec": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		for i, sql := range steps {
			tag, err := db.Exec(ctx, sql)
			h.tag(tag, err, i == len(steps)-1)
		}
	},
	"stacked": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		tag, err := db.Exec(ctx, strings.Join(steps, ";\n"))
		h.tag(tag, err, true)
	},
	"args": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		for i, sql := range steps {
			if !isSelect(sql) {
				continue // takes no parameters
			}
			tag, err := db.Exec(ctx, "select * from ("+sql+") x where $1", true)
			h.tag(tag, err, i == len(steps)-1)
		}
	},
	"query": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		for _, sql := range steps {
			h.rows(db.Query(ctx, sql))
		}
	},
	"simple": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		for _, sql := range steps {
			h.rows(db.Query(ctx, sql, pgx.QueryExecModeSimpleProtocol))
		}
	},
	"row": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		for _, sql := range steps {
			var value any
			h.err(db.QueryRow(ctx, sql).Scan(&value))
			h.add(value)
		}
	},
	"batch": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		var batch pgx.Batch
		for _, sql := range steps {
			batch.Queue(sql)
		}
		results := db.SendBatch(ctx, &batch)
		for range steps {
			h.rows(results.Query())
		}
		h.err(results.Close())
	},
	"tx": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		tx, err := db.Begin(ctx)
		h.err(err)
		if err != nil {
			return
		}
		for _, sql := range steps {
			h.rows(tx.Query(ctx, sql))
		}
		h.err(tx.Commit(ctx))
	},
	"copy": func(ctx context.Context, db *TenantDB, steps []string, h *hearing) {
		conn, err := db.Acquire(ctx)
		h.err(err)
		if err != nil {
			return
		}
		defer conn.Release()
		last := len(steps) - 1
		for _, sql := range steps[:last] {
			_, err := conn.Exec(ctx, sql)
			h.err(err)
		}
		if isSelect(steps[last]) {
			var out bytes.Buffer
			_, err := conn.Conn().PgConn().CopyTo(ctx, &out, "copy ("+steps[last]+") to stdout")
			h.err(err)
			h.add(out.String())
		}
	},
}

func isSelect(sql string) bool {
	return (strings.HasPrefix(sql, "select ") || strings.HasPrefix(sql, "with ")) && !strings.Contains(sql, "--") && !strings.Contains(sql, "/*")
}

// hostileDB is a database for hostileSQL. Its docs are as RLSTable makes them.
func hostileDB(t *testing.T) *pgtest.DB {
	d := pgtest.New(t)
	d.RLSTable("docs")
	d.SuperExec(`insert into docs values ('a', 1, 'a1'), ('a', 2, 'a2'), ('b', 1, 'secret of b 1'), ('b', 2, 'secret of b 2')`)
	d.Exec("create sequence numbers", "grant usage on sequence numbers to "+ident(d.App))
	return d
}

// tryHostileSQL tries all of hostileSQL by every way in, and returns by which ways each of it saw rows of b's.
// After each it requires that b, nobody and a, whoever is next on the only connection, find it as new. open opens
// a TenantDB on d with Config adjusted.
func tryHostileSQL(t *testing.T, d *pgtest.DB, open func(adjust func(*Config)) *TenantDB) (seen map[string]string) {
	h := &hearing{}
	db := open(func(c *Config) {
		c.Shared.MaxConns = 1
		c.Shared.ConnConfig.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { h.add(n.Message) }
	})
	none := WithoutTenant(context.Background())
	fresh := hostileState(t, db, as("b"))
	seen = make(map[string]string)
	for _, attack := range hostileSQL {
		var ways []string
		for i, way := range slices.Sorted(maps.Keys(hostileWays)) {
			name := attack.name + ", " + way
			steps := make([]string, len(attack.steps))
			for i, sql := range attack.steps {
				steps[i] = strings.NewReplacer("SETTING", db.config.Setting, "OWNER", ident(d.Owner)).Replace(sql)
			}
			h.heardSecret()
			hostileWays[way](as("a"), db, steps, h)
			if h.heardSecret() {
				ways = append(ways, way)
			}
			if i%2 == 0 { // nobody is next, and then b
				require.Empty(t, strs(t, db, none, "select body from docs"), name)
				require.Equal(t, []string{""}, strs(t, db, none, readTenant), name)
			}
			require.Equal(t, fresh, hostileState(t, db, as("b")), name)
			require.Equal(t, []string{"secret of b 1", "secret of b 2"}, strs(t, db, as("b"), "select body from docs order by id"), name)
			require.Empty(t, strs(t, db, none, "select body from docs"), name)
			require.Equal(t, []string{"a1", "a2"}, strs(t, db, as("a"), "select body from docs order by id"), name)
		}
		seen[attack.name] = strings.Join(ways, " ")
	}
	return seen
}

// hostileState is what a tenant finds on its connection, as text: nothing of it is another's.
func hostileState(t *testing.T, db *TenantDB, ctx context.Context) []string {
	t.Helper()
	return strs(t, db, ctx, `select concat_ws(' | ', current_setting('app.current_tenant_id', true), current_setting('search_path'), current_user, session_user,
		(select string_agg(name || '=' || setting, ',' order by name) from pg_settings where source = 'session'),
		(select string_agg(relname, ',') from pg_class where relnamespace = pg_my_temp_schema()),
		(select string_agg(proname, ',') from pg_proc where pronamespace = pg_my_temp_schema()),
		(select string_agg(name, ',') from pg_prepared_statements where from_sql),
		(select string_agg(name, ',') from pg_cursors where is_holdable),
		(select string_agg(objid::text, ',') from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
		(select string_agg(c, ',') from pg_listening_channels() c))`)
}

// A policy on the bare setting is no boundary to SQL of a tenant's own: what it then sees is what the
// documentation says, and no more. In no case does anything of it reach the next borrower of the connection.
func TestHostileSQL(t *testing.T) {
	t.Parallel()
	for _, strict := range []bool{false, true} {
		t.Run(fmt.Sprintf("strict=%v", strict), func(t *testing.T) {
			t.Parallel()
			d := hostileDB(t)
			seen := tryHostileSQL(t, d, func(adjust func(*Config)) *TenantDB {
				return openDB(t, d.AppURL(), adjust, func(c *Config) { c.Strict = strict })
			})
			for _, attack := range hostileSQL {
				require.Equal(t, attack.sees, seen[attack.name], attack.name)
			}
		})
	}
}

// A signed setting is a boundary for all of it.
func TestHostileSQLSeesNothingOfASealedTenant(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := hostileDB(t)
	d.Exec("drop policy tenant on docs")
	seal := func(c *Config) { c.Seal = &SealConfig{Key: sealKeyOf(1)} }
	admin := adminDB(t, d, seal)
	require.NoError(t, admin.InstallSeal(ctx))
	require.NoError(t, admin.EnableRLS(ctx, Tables("docs")...))
	for attack, ways := range tryHostileSQL(t, d, func(adjust func(*Config)) *TenantDB { return openDB(t, d.AppURL(), seal, adjust) }) {
		require.Empty(t, ways, attack)
	}
}

// Where SQL of a tenant's own can name another, it can write as that one too. The next borrower is clean, and
// rows under their owner's name are the owner's.
func TestHostileSQLWritesWhereItReads(t *testing.T) {
	t.Parallel()
	d := hostileDB(t)
	db := openDB(t, d.AppURL("pool_max_conns=1"))
	_, err := db.Exec(as("a"), "with x as materialized (select set_config('app.current_tenant_id', 'b', true)) insert into docs select 'b', 9, 'planted' from x")
	require.NoError(t, err, "the documentation says that this is not stopped")
	require.Equal(t, 3, count(t, db, as("b"), "select count(*) from docs"))

	_, err = db.CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"tenant_id", "id", "body"}, pgx.CopyFromRows([][]any{{"b", 10, "planted"}}))
	require.Equal(t, "42501", pgCode(err), "values are no SQL")
	_, err = db.Exec(as("a"), "insert into docs values ($1, 11, 'planted')", "b")
	require.Equal(t, "42501", pgCode(err))
	for _, id := range []string{"a'; set app.current_tenant_id = 'b", "a', true); select set_config('app.current_tenant_id', 'b", "$1", "b\x00", "$user", `a", "b`, "a,b", ""} {
		_, err := db.Exec(WithTenantID(context.Background(), id), "select 1")
		require.Error(t, err, id)
		_, err = db.Exec(WithTenant(context.Background(), Tenant{ID: id}), "select 1")
		require.ErrorIs(t, err, ErrInvalidTenantID, id)
	}
	require.Equal(t, 3, count(t, db, as("b"), "select count(*) from docs"))
	require.Equal(t, 2, count(t, db, as("a"), "select count(*) from docs"))
}

// Schema tenants share a login, which may read every tenant's schema: SQL that names one reads it. What does not
// name one stays in its own schema, and nothing reaches the next borrower.
func TestHostileSQLOfSchemaTenants(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for _, id := range []string{"a", "b"} {
		schema := ident(SchemaName(id))
		d.Exec("create schema "+schema, "create table "+schema+".docs (body text)", "insert into "+schema+".docs values ('of "+id+"')",
			"grant usage on schema "+schema+" to "+ident(d.App), "grant select, insert on "+schema+".docs to "+ident(d.App))
	}
	for _, strict := range []bool{false, true} {
		db := openDB(t, d.AppURL("pool_max_conns=1"), func(c *Config) { c.Strict = strict })
		in := func(id string) context.Context {
			return WithTenant(context.Background(), Tenant{ID: id, Isolation: IsolationSchema})
		}
		const look = "select body from docs"
		for _, attack := range []struct {
			steps []string
			sees  bool // as one text
		}{
			{[]string{"select body from " + ident(SchemaName("b")) + ".docs"}, true},
			{[]string{"set search_path = " + ident(SchemaName("b")), look}, true},
			{[]string{"with x as materialized (select set_config('search_path', '" + SchemaName("b") + "', true)) select body from x, docs"}, false}, // names were looked up before
			{[]string{"set search_path = 'public, " + SchemaName("b") + "'", look}, false},                                                           // one name
			{[]string{`set search_path = "$user", public`, look}, false},
			{[]string{`select U&"set\005fconfig"('search_path', '` + SchemaName("b") + `', false)`, look}, true},
			{[]string{"select query_to_xml('select set_' || 'config(''search_path'', ''" + SchemaName("b") + "'', false)', true, false, '')", look}, true},
			{[]string{"create temp table docs as select 'planted'::text as body", look}, false},
		} {
			for i, text := range append(slices.Clone(attack.steps), strings.Join(attack.steps, ";\n")) {
				got := everyResult(t, db, in("a"), text)
				if i == len(attack.steps) {
					require.Equal(t, attack.sees, strings.Contains(got, "of b"), text)
				}
				require.Equal(t, []string{"of b"}, strs(t, db, in("b"), look), text)
				require.Equal(t, []string{"of a"}, strs(t, db, in("a"), look), text)
				require.Equal(t, []string{`"$user", public`}, strs(t, db, as("c"), "show search_path"), text)
				_, err := db.Exec(as("c"), look)
				require.Equal(t, "42P01", pgCode(err), text)
			}
		}
	}
}

// everyResult is what all statements of a text return, and the error of one that fails.
func everyResult(t *testing.T, db *TenantDB, ctx context.Context, text string) string {
	conn, err := db.Acquire(ctx)
	require.NoError(t, err)
	defer conn.Release()
	results, err := conn.Conn().PgConn().Exec(ctx, text).ReadAll()
	out := fmt.Sprint(err)
	for _, result := range results {
		for _, row := range result.Rows {
			out += "\n" + string(bytes.Join(row, []byte("|")))
		}
	}
	return out
}

// In the simple protocol pgx sends a batch as one text. A statement of it that ends in a comment does not
// swallow the next one, nor does the binding's own end in one.
func TestACommentInABatchSwallowsNothing(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	for _, m := range modes {
		pool := boundPool(t, d.AppURL(), mode(m))
		for _, first := range []string{"select 'x' --", "select 'x' -- ; rollback", "select 'x' /* ; */", "-- c\nselect 'x'"} {
			batch := &pgx.Batch{}
			batch.Queue(first)
			batch.Queue("select body from docs where $1 order by id", true)
			results := pool.SendBatch(as("b"), batch)
			require.Equal(t, []string{"x"}, strs(t, batchQuerier{results}, as("b"), ""), "%v: %s", m, first)
			require.Equal(t, []string{"b1", "b2"}, strs(t, batchQuerier{results}, as("b"), ""), "%v: %s", m, first)
			require.NoError(t, results.Close())
		}
	}
}
