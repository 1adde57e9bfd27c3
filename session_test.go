package pgxtenant

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// leftBehind is one kind of session state: how tenant a leaves it, and what tenant b would find.
type leftBehind struct {
	name  string
	leave []string // as a, outside a transaction
	look  string   // as b: one text, the same as on a fresh connection unless it leaked
	// hidden is set if only a function's inside tells, so that the strict setting is needed.
	hidden bool
}

// Each item of it is left behind as tenant a, and looked for as tenant b on the same server connection,
// or on the one that took its place.
func leftovers() []leftBehind {
	return []leftBehind{
		{name: "temporary table", leave: []string{"create temp table docs as select 'planted' as body, 1 as id"}, look: "select coalesce(string_agg(body, ','), '') from docs"},
		{name: "temporary table by select into", leave: []string{"select 'planted' as body, 1 as id into temp docs"}, look: "select coalesce(string_agg(body, ','), '') from docs"},
		{name: "empty temporary table", leave: []string{"create temp table docs (body text, id int)"}, look: "select coalesce(string_agg(body, ','), '') from docs"},
		{name: "empty temporary table as", leave: []string{"create temp table docs as select body, id from docs where false"}, look: "select coalesce(string_agg(body, ','), '') from docs"},
		{name: "temporary table by do", leave: []string{"do $$ begin create temp table docs as select 'planted' as body; end $$"}, look: "select coalesce(string_agg(body, ','), '') from docs"},
		{name: "temporary view", leave: []string{"create temp view docs as select 'planted'::text as body"}, look: "select coalesce(string_agg(body, ','), '') from docs"},
		{name: "temporary table by a function", leave: []string{"select plant_table()"}, look: "select coalesce(string_agg(body, ','), '') from docs", hidden: true},
		{name: "cursor with hold", leave: []string{"begin; declare c cursor with hold for select body from docs; commit"}, look: "select count(*)::text from pg_cursors where name = 'c'"},
		{name: "cursor with hold by a function", leave: []string{"select plant('declare c cursor with hold for select body from docs')"}, look: "select count(*)::text from pg_cursors where name = 'c'", hidden: true},
		{name: "listen", leave: []string{"listen news"}, look: "select coalesce(string_agg(c, ','), '') from pg_listening_channels() c"},
		{name: "listen by a function", leave: []string{"select plant('listen news')"}, look: "select coalesce(string_agg(c, ','), '') from pg_listening_channels() c", hidden: true},
		{name: "advisory lock", leave: []string{"select pg_advisory_lock(pg_backend_pid())"}, look: "select count(*)::text from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"},
		{name: "advisory lock tried", leave: []string{"select PG_TRY_ADVISORY_LOCK_SHARED(pg_backend_pid())"}, look: "select count(*)::text from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"},
		{name: "advisory lock by a function", leave: []string{"select plant('select pg_advisory_lock(pg_backend_pid())')"}, look: "select count(*)::text from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()", hidden: true},
		{name: "prepared statement", leave: []string{"prepare p as select body from docs"}, look: "select count(*)::text from pg_prepared_statements where from_sql"},
		{name: "binding replaced", leave: []string{plantStatement("pgxtenant_row", "(text) as select set_config('app.current_tenant_id', 'a', true)")}, look: readTenant},
		{name: "cleanings replaced", leave: plantCleanings(), look: "show work_mem"},
		{name: "setting", leave: []string{"set work_mem = '1234kB'"}, look: "show work_mem"},
		{name: "setting after rollback and more", leave: []string{"begin; set work_mem = '1234kB'; commit", "begin; set work_mem = '1235kB'; rollback"}, look: "show work_mem"},
		{name: "setting by set_config", leave: []string{"select set_config('work_mem', '1234kB', false)"}, look: "show work_mem"},
		{name: "setting by update of pg_settings", leave: []string{"update pg_settings set setting = '1234' where name = 'work_mem'"}, look: "show work_mem"},
		{name: "setting by a function", leave: []string{"select plant('set work_mem = ''1234kB''')"}, look: "show work_mem", hidden: true},
		{name: "search path", leave: []string{"set search_path = pg_catalog"}, look: "show search_path"},
		{name: "row security", leave: []string{"set row_security = off"}, look: "show row_security"},
		{name: "read-only", leave: []string{"set session characteristics as transaction read only"}, look: "show default_transaction_read_only"},
		{name: "timeout", leave: []string{"set statement_timeout = '1h'"}, look: "show statement_timeout"},
		{name: "setting of the application's", leave: []string{"set app.other = 'x'"}, look: "select coalesce(current_setting('app.other', true), '')"},
		{name: "role", leave: []string{"set role OTHER"}, look: "select (current_user = session_user)::text"},
		{name: "role by set_config", leave: []string{"select set_config('role', 'OTHER', false)"}, look: "select (current_user = session_user)::text"},
		{name: "sequence", leave: []string{"select nextval('numbers')"}, look: "select currval_or_none()"},
		{name: "sequence by default", leave: []string{"insert into numbered (body) values ('x')"}, look: "select currval_or_none()"},
		{name: "sequence by a function", leave: []string{"select plant('select nextval(''numbers'')')"}, look: "select currval_or_none()", hidden: true},
	}
}

// plantStatement puts a statement in the place of another.
func plantStatement(name, as string) string {
	return fmt.Sprintf("do $$ begin begin deallocate %[1]s; exception when others then end; execute %[2]s; end $$", name, literal("prepare "+name+as))
}

func plantCleanings() (leave []string) {
	for i := range cleanings {
		leave = append(leave, plantStatement("pgxtenant_clean_"+strconv.Itoa(i), " as select 1"))
	}
	return append(leave, "set work_mem = '1234kB'")
}

func leftoversDB(t testing.TB) *pgtest.DB {
	db := docsDB(t)
	db.SuperExec("grant temp on database " + pgx.Identifier{db.Name}.Sanitize() + " to " + db.App)
	db.Exec(`create function plant(sql text) returns void language plpgsql as $$ begin execute sql; end $$`,
		`create function plant_table() returns void language plpgsql as $$ begin create temp table docs as select 'planted'::text as body; end $$`,
		`create sequence numbers`, `create table numbered (id int default nextval('numbers'), body text)`,
		`grant usage on sequence numbers to public`, `grant insert on numbered to public`,
		`create function currval_or_none() returns text language plpgsql as $$
		begin return lastval()::text; exception when object_not_in_prerequisite_state then return 'none'; end $$`)
	return db
}

// Nothing that one tenant leaves on a session reaches another: in every mode, whether b comes with a
// statement of the extended protocol, a simple query or a transaction, and whether or not b's first
// statement fails.
func TestSessionStateNeverReachesAnotherTenant(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	other := "other_" + db.Name
	db.SuperExec("create role "+other, "grant "+other+" to "+db.App, "grant select on docs to "+other)
	t.Cleanup(func() { db.SuperExec("drop owned by "+other, "drop role "+other) })

	looks := map[string]func(pool *pgxpool.Pool, ctx context.Context, sql string) []string{
		"extended": func(pool *pgxpool.Pool, ctx context.Context, sql string) []string { return strs(t, pool, ctx, sql) },
		"simple": func(pool *pgxpool.Pool, ctx context.Context, sql string) []string {
			return strs(t, pool, ctx, sql, pgx.QueryExecModeSimpleProtocol)
		},
		"transaction": func(pool *pgxpool.Pool, ctx context.Context, sql string) (got []string) {
			require.NoError(t, pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.Serializable}, func(tx pgx.Tx) error {
				got = strs(t, tx, ctx, sql)
				return nil
			}))
			return got
		},
		"after a failure": func(pool *pgxpool.Pool, ctx context.Context, sql string) []string {
			_, err := pool.Exec(ctx, "select 1/$1::int", 0) // its rollback brings back what was cleaned
			require.Equal(t, "22012", pgCode(err))
			_, err = pool.Exec(ctx, "select 1/0")
			require.Equal(t, "22012", pgCode(err))
			return strs(t, pool, ctx, sql)
		},
		"after a rollback": func(pool *pgxpool.Pool, ctx context.Context, sql string) []string {
			tx, err := pool.Begin(ctx)
			require.NoError(t, err)
			require.Equal(t, []string{"b"}, strs(t, tx, ctx, readTenant))
			require.NoError(t, tx.Rollback(ctx))
			return strs(t, pool, ctx, sql)
		},
		"after a rollback and chain": func(pool *pgxpool.Pool, ctx context.Context, sql string) []string {
			conn, err := pool.Acquire(ctx)
			require.NoError(t, err)
			defer conn.Release()
			for _, s := range []string{"begin", "select 1", "rollback and chain", "commit"} {
				leave(t, conn, s, pgx.QueryExecModeExec)
			}
			return strs(t, conn, ctx, sql)
		},
		"after a third tenant": func(pool *pgxpool.Pool, ctx context.Context, sql string) []string {
			require.NoError(t, pool.Ping(as("c")))
			return strs(t, pool, ctx, sql)
		},
	}
	for _, strict := range []bool{false, true} {
		for _, m := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
			t.Run(fmt.Sprintf("strict=%v/%v", strict, m), func(t *testing.T) {
				t.Parallel()
				pool := poolWith(t, db.AppURL(), binderOptions{strict: strict}, mode(m))
				for _, l := range leftovers() {
					if l.hidden && !strict {
						continue // what a function hides takes the strict setting: see TestHiddenStateNeedsStrict
					}
					fresh := strs(t, pool, as("b"), l.look)
					for how, look := range looks {
						if l.name == "row security" && how != "simple" {
							continue // one look is enough: with it off the table cannot be read at all
						}
						conn, err := pool.Acquire(as("a"))
						require.NoError(t, err)
						for _, sql := range l.leave {
							leave(t, conn, strings.ReplaceAll(sql, "OTHER", other), m)
						}
						if how == "extended" {
							require.NotEqual(t, fresh, strs(t, conn, as("a"), l.look), "%s is there for a", l.name)
						}
						conn.Release()
						if strings.HasPrefix(l.name, "listen by") {
							// UNLISTEN takes effect at commit: only then is the channel off the list.
							_, err := pool.Exec(as("b"), "select 1")
							require.NoError(t, err)
						}
						require.Equal(t, fresh, look(pool, as("b"), l.look), "%s, %s", l.name, how)
						require.Equal(t, []string{"b"}, strs(t, pool, as("b"), readTenant))
					}
				}
			})
		}
	}
}

// leave runs sql as the connection's tenant, in the extended protocol where the mode and the text allow it.
func leave(t *testing.T, conn *pgxpool.Conn, sql string, m pgx.QueryExecMode) {
	t.Helper()
	if strings.Contains(sql, ";") {
		_, err := conn.Exec(context.Background(), sql)
		require.NoError(t, err, sql)
		return
	}
	rows, err := conn.Query(context.Background(), sql, m)
	require.NoError(t, err, sql)
	rows.Close()
	require.NoError(t, rows.Err(), sql)
}

// What a function hides from the tags does leak without the strict setting, as documented: if this test
// fails, the documentation of Config.Strict is to be changed.
func TestHiddenStateNeedsStrict(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	pool := boundPool(t, db.AppURL())
	_, err := pool.Exec(as("a"), "select plant('set work_mem = ''1234kB''')")
	require.NoError(t, err)
	require.Equal(t, []string{"1234kB"}, strs(t, pool, as("b"), "show work_mem"))
}

// Under the strict setting also where a function did it out of sight: the next tenant's statement fails at
// worst, and the connection goes.
func TestABindingReplacedOutOfSightIsNotRun(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	pool := poolWith(t, db.AppURL(), binderOptions{strict: true})
	require.Equal(t, []string{"a"}, strs(t, pool, as("a"), readTenant))
	db.Exec(`create function out_of_sight() returns void language plpgsql as $f$ begin
		deallocate pgxtenant_row; execute 'prepare pgxtenant_row(text) as select set_config(''app.current_tenant_id'', ''a'', true)'; end $f$`)
	_, err := pool.Exec(as("a"), "select out_of_sight()")
	require.NoError(t, err)
	_, err = pool.Exec(as("b"), "update docs set body = $1", "of b")
	require.Equal(t, "26000", pgCode(err))
	require.Equal(t, []string{"a1", "a2"}, strs(t, pool, as("a"), "select body from docs order by id"))
	require.Equal(t, []string{"b1", "b2"}, strs(t, pool, as("b"), "select body from docs order by id"))
}

// A statement of pgx's own that a tenant replaced is not run by another: it is gone, as pgx finds out.
func TestAReplacedStatementOfPgxIsNotRun(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	pool := boundPool(t, db.AppURL())
	const read = "select body from docs where $1 order by id"
	require.Equal(t, []string{"a1", "a2"}, strs(t, pool, as("a"), read, true))
	names := strs(t, pool, as("a"), "select name from pg_prepared_statements where statement = $1", read)
	require.Len(t, names, 1)
	_, err := pool.Exec(as("a"), plantStatement(names[0], "(bool) as select 'planted'::text"))
	require.NoError(t, err)
	require.Equal(t, []string{"planted"}, strs(t, pool, as("a"), read, true))

	rows, err := pool.Query(as("b"), read, true)
	require.NoError(t, err)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.Empty(t, got)
	require.Equal(t, "26000", pgCode(err))
	require.Equal(t, []string{"b1", "b2"}, strs(t, pool, as("b"), read, true))
}

// The same tenant finds its own session again, in the default setting: nothing is cleaned for it.
func TestSessionStateOfTheSameTenantStays(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	pool := boundPool(t, db.AppURL())
	_, err := pool.Exec(as("a"), "set work_mem = '1234kB'")
	require.NoError(t, err)
	require.Equal(t, []string{"1234kB"}, strs(t, pool, as("a"), "show work_mem"))
	require.EqualValues(t, 1, pool.Stat().NewConnsCount())
}

// What a tenant makes in a transaction is not taken for an earlier tenant's by what follows in it: a
// savepoint rolled back to, in a failed transaction or a sound one, or a chained transaction.
func TestATransactionKeepsItsOwnState(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	for _, strict := range []bool{false, true} {
		inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
			pool := poolWith(t, db.AppURL(), binderOptions{strict: strict}, mode(m))
			for _, then := range [][]string{
				{"savepoint s", "rollback to s"},
				{"savepoint s", "select nope", "ROLLBACK WORK TO SAVEPOINT s"},
				{"commit and chain"},
			} {
				_, err := pool.Exec(as("a"), "set work_mem = '1234kB'")
				require.NoError(t, err)
				conn, err := pool.Acquire(as("b"))
				require.NoError(t, err)
				leave(t, conn, "begin; create temp table own as select 'own' as body; declare c cursor with hold for table own; set work_mem = '4321kB'", m)
				for _, sql := range then {
					rows, err := conn.Query(as("b"), sql, m)
					if err == nil {
						rows.Close()
						err = rows.Err()
					}
					require.Equal(t, strings.Contains(sql, "nope"), err != nil, "%s: %v", sql, err)
				}
				require.Equal(t, []string{"own"}, strs(t, conn, as("b"), "table own"))
				require.Equal(t, []string{"own"}, strs(t, conn, as("b"), "fetch c"))
				require.Equal(t, []string{"4321kB"}, strs(t, conn, as("b"), "show work_mem"))
				leave(t, conn, "commit", m)
				require.Equal(t, []string{"own"}, strs(t, conn, as("b"), "table own"), "nor by the next one")
				conn.Release()
				require.Equal(t, []string{"4MB"}, strs(t, pool, as("c"), "show work_mem"))
			}
			require.EqualValues(t, 1, pool.Stat().NewConnsCount())
		})
	}
}

// A connection that only ran plain statements is neither cleaned nor dropped, and one that ran SET is
// cleaned, not dropped.
func TestCleaningKeepsTheConnection(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	for _, o := range []binderOptions{{}, {strict: true}} {
		pool := poolWith(t, db.AppURL(), o)
		for i := range 20 {
			ctx := as(string(rune('a' + i%2)))
			_, err := pool.Exec(ctx, "set local work_mem = '1MB'")
			require.NoError(t, err)
			_ = strs(t, pool, ctx, "select body from docs where id = $1", 1)
		}
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	}
}

// Notifications that arrived for one tenant, read or not, are not another's.
func TestNotificationsStayWithTheirTenant(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	for _, listen := range []string{"listen news", "select plant('listen news')"} {
		pool := poolWith(t, db.AppURL(), binderOptions{strict: true})
		conn, err := pool.Acquire(as("a"))
		require.NoError(t, err)
		_, err = conn.Exec(as("a"), listen)
		require.NoError(t, err)
		db.Exec("notify news, 'for a'")
		n, err := conn.Conn().WaitForNotification(context.Background())
		require.NoError(t, err)
		require.Equal(t, "for a", n.Payload)
		db.Exec("notify news, 'kept in the connection'")
		_ = strs(t, conn, as("a"), "select body from docs") // reads it on the way
		conn.Release()
		db.Exec("notify news, 'kept in the socket'")

		conn, err = pool.Acquire(as("b"))
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		n, err = conn.Conn().WaitForNotification(ctx)
		require.Nil(t, n)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		conn.Release()
	}
}

// What the caller's own hook set up on a connection serves all tenants, and is not cleaned away: a
// tenant's leavings then cost the connection.
func TestHookStateIsKept(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	hook := func(c *pgxpool.Config) {
		c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, "set work_mem = '2MB'")
			return err
		}
	}
	pool := boundPool(t, db.AppURL(), hook)
	require.Equal(t, []string{"2MB"}, strs(t, pool, as("a"), "show work_mem"))
	_, err := pool.Exec(as("a"), "set work_mem = '3MB'")
	require.NoError(t, err)
	require.Equal(t, []string{"2MB"}, strs(t, pool, as("b"), "show work_mem"))
	require.EqualValues(t, 2, pool.Stat().NewConnsCount())

	strict := poolWith(t, db.AppURL(), binderOptions{strict: true}, hook)
	require.ErrorContains(t, strict.Ping(as("a")), "AfterConnect hook left state on the session")
}

// A session that cannot be cleaned, here for a timeout that its tenant set, is closed.
func TestUncleanableSessionIsClosed(t *testing.T) {
	t.Parallel()
	db := leftoversDB(t)
	pool := boundPool(t, db.AppURL())
	conn, err := pool.Acquire(as("a"))
	require.NoError(t, err)
	w := conn.Conn().PgConn().Conn().(*wireConn)
	_, err = conn.Exec(as("a"), "set work_mem = '1234kB'")
	require.NoError(t, err)
	conn.Release()
	conn, err = pool.Acquire(as("b"))
	require.NoError(t, err)
	// Stands for any failure of a cleaning on the server.
	w.mu.Lock()
	saved := cleanings[0].bit
	w.prepared |= saved // not true: executing it fails
	w.mu.Unlock()
	_, err = conn.Exec(as("b"), "select $1::int", 1)
	require.Equal(t, "26000", pgCode(err))
	conn.Release()
	require.Equal(t, []string{"4MB"}, strs(t, pool, as("b"), "show work_mem"))
	require.EqualValues(t, 2, pool.Stat().NewConnsCount())
}

// A connection that is given back in the middle of something is closed, and not the next tenant's. That is
// pgxpool's doing, which the binding must not undo.
func TestAConnectionGivenBackUnfinishedIsClosed(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	pool := boundPool(t, d.AppURL())
	for name, leave := range map[string]func(conn *pgxpool.Conn){
		"an open transaction": func(conn *pgxpool.Conn) {
			_, err := conn.Exec(as("a"), "begin; update docs set body = 'unfinished'")
			require.NoError(t, err)
		},
		"a failed transaction": func(conn *pgxpool.Conn) {
			_, err := conn.Exec(as("a"), "begin; update docs set body = 'unfinished'; select 1/0")
			require.Equal(t, "22012", pgCode(err))
		},
		"unread rows": func(conn *pgxpool.Conn) {
			rows, err := conn.Query(as("a"), "select body from docs, generate_series(1, 100000)")
			require.NoError(t, err)
			require.True(t, rows.Next())
		},
	} {
		conn, err := pool.Acquire(as("a"))
		require.NoError(t, err)
		pid := conn.Conn().PgConn().PID()
		leave(conn)
		conn.Release()
		require.Equal(t, []string{"b1", "b2"}, strs(t, pool, as("b"), "select body from docs order by id"), name)
		require.Equal(t, []string{"a1", "a2"}, strs(t, pool, as("a"), "select body from docs order by id"), name)
		require.Zero(t, count(t, pool, as("b"), "select count(*) from pg_stat_activity where pid = $1 and pid = pg_backend_pid()", pid), name)
	}
}
