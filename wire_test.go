package pgxtenant

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// modes are all ways in which pgx can send a statement.
var modes = []pgx.QueryExecMode{
	pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
	pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
}

const readTenant = "select coalesce(current_setting('app.current_tenant_id', true), '')"

// as is the context of the row tenant id.
func as(id string) context.Context { return WithTenant(context.Background(), Tenant{ID: id}) }

// docsDB is a database with the table docs, of which each of the tenants a and b has two rows.
func docsDB(t testing.TB) *pgtest.DB {
	db := pgtest.New(t)
	db.RLSTable("docs")
	db.SuperExec(`insert into docs values ('a', 1, 'a1'), ('a', 2, 'a2'), ('b', 1, 'b1'), ('b', 2, 'b2')`)
	return db
}

// boundPool is a plain pgxpool under Bind, of one connection unless adjusted.
func boundPool(t testing.TB, url string, adjust ...func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	return poolWith(t, url, binderOptions{}, adjust...)
}

func poolWith(t testing.TB, url string, o binderOptions, adjust ...func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	config.MaxConns = 1
	for _, f := range adjust {
		f(config)
	}
	b, err := newBinder(o)
	require.NoError(t, err)
	b.install(config, nil, b.resolve)
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	t.Cleanup(func() { closeSoon(t, pool.Close) })
	return pool
}

// closeSoon calls close, which waits for borrowed connections, but not for those a failed test has kept.
func closeSoon(t testing.TB, close func()) {
	done := make(chan struct{}, 1)
	go func() {
		close()
		done <- struct{}{}
	}()
	if t.Failed() {
		return
	}
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("connections were not given back")
	}
}

func mode(m pgx.QueryExecMode) func(*pgxpool.Config) {
	return func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = m }
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// strs returns the first column of all rows.
func strs(t testing.TB, q querier, ctx context.Context, sql string, args ...any) []string {
	t.Helper()
	rows, err := q.Query(ctx, sql, args...)
	require.NoError(t, err)
	out, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return out
}

func pgCode(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

func inEveryMode(t *testing.T, f func(t *testing.T, m pgx.QueryExecMode)) {
	for _, m := range modes {
		t.Run(strings.ReplaceAll(m.String(), " ", "_"), func(t *testing.T) {
			t.Parallel()
			f(t, m)
		})
	}
}

// bindings are the ways to bind: those of sealed tenants send simple queries as extended messages.
var bindings = map[string]binderOptions{"plain": {}, "strict": {strict: true}, "sealed": {seal: &SealConfig{Key: make([]byte, MinSealKeyLen)}}}

func inEveryBinding(t *testing.T, f func(t *testing.T, o binderOptions)) {
	for name, o := range bindings {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, o)
		})
	}
}

// Each tenant sees its own rows, through every way to send a statement, on one connection in turn.
func TestEveryWayInIsBound(t *testing.T) {
	t.Parallel()
	inEveryBinding(t, testEveryWayInIsBound)
}

func testEveryWayInIsBound(t *testing.T, o binderOptions) {
	db := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := poolWith(t, db.AppURL(), o, mode(m))
		for i := range 3 {
			for _, id := range []string{"a", "b"} {
				ctx := as(id)
				want := []string{id + "1", id + "2"}
				require.Equal(t, want, strs(t, pool, ctx, "select body from docs order by id"))
				require.Equal(t, want[1:], strs(t, pool, ctx, "select body from docs where id = $1", 2))
				require.Equal(t, []string{id}, strs(t, pool, ctx, readTenant))

				var got string
				require.NoError(t, pool.QueryRow(ctx, "select string_agg(body, ',' order by id) from docs").Scan(&got))
				require.Equal(t, strings.Join(want, ","), got)

				tag, err := pool.Exec(ctx, "update docs set id = id")
				require.NoError(t, err)
				require.EqualValues(t, 2, tag.RowsAffected())
				tag, err = pool.Exec(ctx, "update docs set id = id where id > $1", 1)
				require.NoError(t, err)
				require.EqualValues(t, 1, tag.RowsAffected())

				batch := &pgx.Batch{}
				batch.Queue("select body from docs order by id")
				batch.Queue("select body from docs where id = $1", 1)
				batch.Queue(readTenant)
				br := pool.SendBatch(ctx, batch)
				require.Equal(t, want, strs(t, batchQuerier{br}, ctx, ""))
				require.Equal(t, want[:1], strs(t, batchQuerier{br}, ctx, ""))
				require.Equal(t, []string{id}, strs(t, batchQuerier{br}, ctx, ""))
				require.NoError(t, br.Close())

				require.NoError(t, pool.Ping(ctx))

				err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					require.Equal(t, want, strs(t, tx, ctx, "select body from docs order by id"))
					nested, err := tx.Begin(ctx)
					require.NoError(t, err)
					_, err = nested.Exec(ctx, "delete from docs")
					require.NoError(t, err)
					require.Empty(t, strs(t, nested, ctx, "select body from docs"))
					require.NoError(t, nested.Rollback(ctx))
					require.Equal(t, want, strs(t, tx, ctx, "select body from docs order by id"))
					_, err = tx.Prepare(ctx, fmt.Sprintf("p%d%s", i, id), "select body from docs where id >= $1 order by id")
					require.NoError(t, err)
					require.Equal(t, want, strs(t, tx, ctx, fmt.Sprintf("p%d%s", i, id), 1))
					return nil
				})
				require.NoError(t, err)
				// A statement that a tenant prepared on the connection runs as whoever is bound to it.
				require.Equal(t, want, strs(t, pool, ctx, fmt.Sprintf("p%da", i), 1))
			}
		}
		require.EqualValues(t, 1, pool.Stat().NewConnsCount(), "the connection was never given up")
		require.Equal(t, []string{""}, strs(t, pool, WithoutTenant(context.Background()), readTenant))
		require.Empty(t, strs(t, pool, WithoutTenant(context.Background()), "select body from docs"))
	})
	t.Cleanup(func() { // after all modes, which run in parallel
		require.Equal(t, []string{"a1", "a2", "b1", "b2"},
			strs(t, db.Connect(db.SuperURL()), context.Background(), "select body from docs order by 1"))
	})
}

type batchQuerier struct{ pgx.BatchResults }

func (b batchQuerier) Query(context.Context, string, ...any) (pgx.Rows, error) {
	return b.BatchResults.Query()
}

var isolationLevels = []pgx.TxIsoLevel{"", pgx.ReadUncommitted, pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable}

// A transaction's isolation level is set before the binding takes a snapshot, however it is begun.
func TestTransactionsKeepTheirIsolationLevel(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		db := docsDB(t) // of its own: updates of the same rows would not be serializable
		pool := boundPool(t, db.AppURL(), mode(m))
		for _, level := range isolationLevels {
			want := string(level)
			if level == "" {
				want = "read committed"
			}
			ctx := as("a")
			options := pgx.TxOptions{IsoLevel: level, AccessMode: pgx.ReadOnly}
			check := func(tx pgx.Tx) {
				require.Equal(t, []string{want}, strs(t, tx, ctx, "show transaction_isolation"))
				require.Equal(t, []string{"a1", "a2"}, strs(t, tx, ctx, "select body from docs order by id"))
				require.Equal(t, []string{"a1", "a2"}, strs(t, tx, ctx, "select body from docs where id < $1 order by id", 9))
				_, err := tx.Exec(ctx, "delete from docs")
				require.Equal(t, "25006", pgCode(err), "the transaction is read-only")
				require.NoError(t, tx.Rollback(ctx))
			}

			tx, err := pool.BeginTx(ctx, options)
			require.NoError(t, err)
			check(tx)

			batch := &pgx.Batch{}
			batch.BeginTx(options)
			batch.Queue("select body from docs order by id")
			br := pool.SendBatch(ctx, batch)
			_, err = br.Exec() // of the BEGIN
			require.NoError(t, err)
			require.Equal(t, []string{"a1", "a2"}, strs(t, batchQuerier{br}, ctx, ""))
			require.NoError(t, br.Close())
			check(br.Tx())

			// By hand, the level set in a statement of its own, with a savepoint.
			conn, err := pool.Acquire(ctx)
			require.NoError(t, err)
			exec := func(sql string) {
				_, err := conn.Exec(ctx, sql)
				require.NoError(t, err, sql)
			}
			exec("start transaction")
			exec("set transaction isolation level " + want)
			exec("savepoint s")
			require.Equal(t, []string{want}, strs(t, conn, ctx, "show transaction_isolation"))
			exec("rollback to s")
			require.Equal(t, []string{"a1", "a2"}, strs(t, conn, ctx, "select body from docs order by id"))
			exec("commit and chain")
			require.Equal(t, []string{"a1", "a2"}, strs(t, conn, ctx, "select body from docs order by id"))
			exec("end")

			// All in one text, and more of it than one transaction.
			exec("/* a */ begin isolation level " + want + "; -- b\n set local transaction_deferrable = off; update docs set id = id; commit; update docs set id = id")
			exec("select 'begin;'; begin; rollback; ")
			require.Equal(t, []string{"a1", "a2"}, strs(t, conn, ctx, "select body from docs order by id"))
			conn.Release()
		}
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	})
}

// Each statement of a text that ends or begins transactions runs as the tenant.
func TestTextsOfSeveralTransactions(t *testing.T) {
	t.Parallel()
	inEveryBinding(t, testTextsOfSeveralTransactions)
}

func testTextsOfSeveralTransactions(t *testing.T, o binderOptions) {
	db := docsDB(t)
	pool := poolWith(t, db.AppURL(), o)
	read := "select string_agg(body, ',' order by id) from docs"
	conn, err := pool.Acquire(as("b"))
	require.NoError(t, err)
	defer conn.Release()
	for _, text := range []string{
		read,
		"; ;" + read + ";;",
		read + ";" + read,
		"begin;" + read + ";" + read + ";commit;" + read,
		read + ";commit;" + read + ";rollback;" + read,
		"begin; savepoint x;" + read + "; rollback to x;" + read + "; release x; end;" + read,
		"begin; prepare transaction 'never'; " + read, // refused while disabled: ends the transaction with an error
		"begin isolation level serializable; set transaction read write;" + read + "; commit and chain; " + read + "; abort",
		`select 1 as "a;begin;"; ` + read,
		"select $$;commit;$$, $x$ $$;begin $x$, 'it''s;', e'\\';commit;', U&'\\0061;'; " + read,
		"/* ; /* begin; */ commit; */ " + read + " -- ; begin;",
		"select (1); commit; select case when true then ';' end; " + read,
		"do $$ begin perform 1; end $$; " + read,
	} {
		results, err := conn.Conn().PgConn().Exec(context.Background(), text).ReadAll()
		if strings.Contains(text, "never") {
			require.Equal(t, "55000", pgCode(err), text)
			_, err = conn.Exec(context.Background(), "rollback")
			require.NoError(t, err)
			continue
		}
		require.NoError(t, err, text)
		reads := 0
		for _, r := range results {
			if len(r.Rows) == 1 && len(r.Rows[0]) == 1 && strings.Contains(string(r.Rows[0][0]), ",") {
				require.Equal(t, "b1,b2", string(r.Rows[0][0]), text)
				reads++
			}
			require.NotContains(t, fmt.Sprint(r.Rows), "a1", text)
		}
		require.Equal(t, strings.Count(text, read), reads, text)
	}
	require.EqualValues(t, 1, pool.Stat().NewConnsCount())
}

// The position in a server's error points into the caller's text, not into what was sent.
func TestErrorPositions(t *testing.T) {
	t.Parallel()
	inEveryBinding(t, testErrorPositions)
}

func testErrorPositions(t *testing.T, o binderOptions) {
	db := docsDB(t)
	plain := db.Connect(db.AppURL())
	ctx := as("a")
	for _, m := range modes {
		pool := poolWith(t, db.AppURL(), o, mode(m))
		for _, sql := range []string{
			"selec 1", "select nope", "select * from nope", "select 'ü€', nope", "select 1; select 'ü', nope",
			"begin; select 'é'; select nope", "commit; select 'é'; commit; select nope", "  \n select nope", "select 1/0",
			"select body from docs where id = 'x'",
		} {
			// Without arguments Exec is a simple query in every mode, with one it is not.
			_, want := plain.Exec(context.Background(), sql)
			_, got := pool.Exec(ctx, sql)
			requireSameError(t, want, got, sql)
			if m != pgx.QueryExecModeSimpleProtocol && !strings.Contains(sql, ";") {
				_, want = plain.Exec(context.Background(), sql+" where $1::int is null or true", 1)
				_, got = pool.Exec(ctx, sql+" where $1::int is null or true", 1)
				requireSameError(t, want, got, sql)
			}
			_, err := plain.Exec(context.Background(), "rollback")
			require.NoError(t, err)
		}
	}
	// The same for notices.
	var notices []int32
	pool := poolWith(t, db.AppURL(), o, func(c *pgxpool.Config) {
		c.ConnConfig.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notices = append(notices, n.Position) }
	})
	_, err := pool.Exec(ctx, "commit")
	require.NoError(t, err)
	_, err = pool.Exec(ctx, "select 1; commit; rollback")
	require.NoError(t, err)
	require.Len(t, notices, 3, "of the binding's own there is none")
}

func requireSameError(t *testing.T, want, got error, sql string) {
	t.Helper()
	var w, g *pgconn.PgError
	require.ErrorAs(t, want, &w, sql)
	require.ErrorAs(t, got, &g, sql)
	require.Equal(t, w.Message, g.Message, sql)
	require.Equal(t, w.Code, g.Code, sql)
	require.Equal(t, w.Position, g.Position, sql)
}

// A failing statement costs nothing but itself, inside a transaction and out.
func TestFailingStatements(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		for range 3 {
			for _, id := range []string{"a", "b"} {
				ctx := as(id)
				_, err := pool.Exec(ctx, "select 1/0")
				require.Equal(t, "22012", pgCode(err))
				_, err = pool.Exec(ctx, "select 1/$1::int", 0)
				require.Equal(t, "22012", pgCode(err))
				_, err = pool.Exec(ctx, "insert into docs (tenant_id, id) values ($1, 99)", "c")
				require.Equal(t, "42501", pgCode(err))
				batch := &pgx.Batch{}
				batch.Queue("update docs set body = 'gone'")
				batch.Queue("select 1/$1::int", 0)
				require.Equal(t, "22012", pgCode(pool.SendBatch(ctx, batch).Close()))

				tx, err := pool.Begin(ctx)
				require.NoError(t, err)
				_, err = tx.Exec(ctx, "select nope")
				require.Equal(t, "42703", pgCode(err))
				_, err = tx.Exec(ctx, "select $1::int", 1)
				require.Equal(t, "25P02", pgCode(err))
				require.NoError(t, tx.Rollback(ctx))

				tx, err = pool.Begin(ctx)
				require.NoError(t, err)
				nested, err := tx.Begin(ctx)
				require.NoError(t, err)
				_, err = nested.Exec(ctx, "select nope")
				require.Equal(t, "42703", pgCode(err))
				require.NoError(t, nested.Rollback(ctx))
				require.Equal(t, []string{id + "1", id + "2"}, strs(t, tx, ctx, "select body from docs order by id"))
				require.NoError(t, tx.Commit(ctx))
			}
		}
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	})
}

// Texts that hold no statement are answered as the server answers them.
func TestEmptyStatements(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		ctx := as("a")
		for _, sql := range []string{"", " ", ";", "-- ping", "/* ping */", ";; -- x\n ; /* ; /* */ */"} {
			tag, err := pool.Exec(ctx, sql)
			require.NoError(t, err)
			require.Empty(t, tag.String())
			rows, err := pool.Query(ctx, sql)
			require.NoError(t, err)
			require.False(t, rows.Next())
			require.NoError(t, rows.Err())
		}
		batch := &pgx.Batch{}
		batch.Queue(";") // pgx refuses to cache ""
		batch.Queue("select body from docs where id = $1", 1)
		br := pool.SendBatch(ctx, batch)
		if m != pgx.QueryExecModeSimpleProtocol { // there the server answers one empty text among others by nothing
			_, err := br.Exec()
			require.NoError(t, err)
			require.Equal(t, []string{"a1"}, strs(t, batchQuerier{br}, ctx, ""))
		}
		require.NoError(t, br.Close())
	})
}

// Large results and large values pass, in pieces of any size.
func TestLargeResultsAndValues(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		ctx := as("a")
		rows, err := pool.Query(ctx, "select n, repeat('x', n % 200), "+readTenant[len("select "):]+" from generate_series(1, 100000) n")
		require.NoError(t, err)
		count := 0
		var n int
		var pad, tenant string
		_, err = pgx.ForEachRow(rows, []any{&n, &pad, &tenant}, func() error {
			count++
			if n != count || len(pad) != n%200 || tenant != "a" {
				return fmt.Errorf("row %d is %d, %d, %q", count, n, len(pad), tenant)
			}
			return nil
		})
		require.NoError(t, err)
		require.Equal(t, 100000, count)

		value := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
		var back []byte
		require.NoError(t, pool.QueryRow(ctx, "select $1::bytea", value).Scan(&back))
		require.True(t, bytes.Equal(value, back))
		tx, err := pool.Begin(ctx)
		require.NoError(t, err)
		_, err = tx.Exec(ctx, "insert into docs (id, body) values (3, $1)", string(value))
		require.NoError(t, err)
		var text string
		require.NoError(t, tx.QueryRow(ctx, "select body from docs where id = $1", 3).Scan(&text))
		require.True(t, text == string(value))
		require.NoError(t, tx.Rollback(ctx))
		require.Equal(t, []string{"a1", "a2"}, strs(t, pool, ctx, "select body from docs order by id"))
	})
}

// COPY in both directions carries the tenant, from which a default fills the tenant column; on a table
// with row-level security the server refuses COPY FROM.
func TestCopyIsBound(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	db.Exec(`create table plain (tenant_id text not null default current_setting('app.current_tenant_id', true), n int)`,
		"grant select, insert on plain to public")
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		for _, id := range []string{"a", "b"} {
			conn, err := pool.Acquire(as(id))
			require.NoError(t, err)
			tx, err := conn.Begin(as(id))
			require.NoError(t, err)
			n, err := tx.CopyFrom(as(id), pgx.Identifier{"plain"}, []string{"n"},
				pgx.CopyFromSlice(5000, func(i int) ([]any, error) { return []any{i}, nil }))
			require.NoError(t, err)
			require.EqualValues(t, 5000, n)
			require.Equal(t, []string{id}, strs(t, tx, as(id), "select distinct tenant_id from plain"))
			require.NoError(t, tx.Rollback(as(id)))

			var out bytes.Buffer
			_, err = conn.Conn().PgConn().CopyTo(context.Background(), &out, "copy docs (body) to stdout")
			require.NoError(t, err)
			require.Equal(t, id+"1\n"+id+"2\n", out.String())

			_, err = conn.CopyFrom(as(id), pgx.Identifier{"docs"}, []string{"id"}, pgx.CopyFromRows([][]any{{7}}))
			require.Equal(t, "0A000", pgCode(err))
			_, err = conn.CopyFrom(as(id), pgx.Identifier{"plain"}, []string{"n"},
				pgx.CopyFromFunc(func() ([]any, error) { return nil, errors.New("source failed") }))
			require.ErrorContains(t, err, "source failed")
			require.Equal(t, []string{id + "1", id + "2"}, strs(t, conn, as(id), "select body from docs order by id"))
			conn.Release()
		}
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	})
}

// Pipelines may have several Syncs before any reply is read, and transactions across them.
func TestPipelinesOfSeveralSyncs(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	read := "select string_agg(body, ',' order by id) from docs"
	for _, script := range [][]string{
		{read, "", read, "", read, ""},
		{"", "", read, read, "", ""},
		{"begin", read, "", read, "", "commit", read, ""},
		{"begin", "", read, "", "savepoint s", "", "select 1/0", "", "rollback to s", "", read, "", "commit", "", read, ""},
		{"begin isolation level serializable", "", "set transaction read only", "", read, "", "rollback", "", read, ""},
		{"select 1/0", read, "", read, ""},
		{"begin", "select 1/0", "", "rollback", read, "", read, ""},
		{read, "commit", read, "rollback", "begin", read, "end", read, ""},
	} {
		pool := boundPool(t, db.AppURL())
		conn, err := pool.Acquire(as("b"))
		require.NoError(t, err)
		p := conn.Conn().PgConn().StartPipeline(context.Background())
		reads := 0
		for _, sql := range script {
			if sql == "" {
				require.NoError(t, p.Sync())
				continue
			}
			p.SendQueryParams(sql, nil, nil, nil, nil)
		}
		var got []string
		for {
			r, err := p.GetResults()
			if err != nil {
				require.Equal(t, "22012", pgCode(err), script)
				continue
			}
			if r == nil {
				break
			}
			if rr, ok := r.(*pgconn.ResultReader); ok {
				for _, row := range rr.Read().Rows {
					got = append(got, string(row[0]))
				}
			}
		}
		require.NoError(t, p.Close())
		for _, s := range got {
			require.Equal(t, "b1,b2", s, script)
			reads++
		}
		want := strings.Count(strings.Join(script, ";"), read)
		if strings.Contains(script[0], "1/0") {
			want-- // skipped with the rest of its segment
		}
		require.Equal(t, want, reads, script)
		require.Equal(t, byte('I'), conn.Conn().PgConn().TxStatus())
		require.Equal(t, []string{"b1,b2"}, strs(t, conn, as("b"), read))
		conn.Release()
		require.EqualValues(t, 1, pool.Stat().NewConnsCount())
	}
}

// Messages in an order that pgx never sends them in. The binding needs the unnamed portal, so what is
// bound there and runs unbound must have been executed before, or is refused: it would be lost.
func TestPortals(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	pool := boundPool(t, db.AppURL())
	read := "select body from docs order by id"
	parse := func(name, sql string) pgproto3.FrontendMessage { return &pgproto3.Parse{Name: name, Query: sql} }
	bind := func(portal, name string) pgproto3.FrontendMessage {
		return &pgproto3.Bind{DestinationPortal: portal, PreparedStatement: name}
	}
	execute := func(portal string, rows uint32) pgproto3.FrontendMessage {
		return &pgproto3.Execute{Portal: portal, MaxRows: rows}
	}
	sync, flush := &pgproto3.Sync{}, &pgproto3.Flush{}
	for name, c := range map[string]struct {
		messages []pgproto3.FrontendMessage
		want     string // the replies, rows with their value
	}{
		"rows in portions": {[]pgproto3.FrontendMessage{
			parse("", read), bind("p", ""), execute("p", 1), flush, execute("p", 1), execute("p", 1), sync,
		}, "12 b1 s b2 s C Z"},
		"across segments": {[]pgproto3.FrontendMessage{
			parse("", "begin"), bind("", ""), execute("", 0), sync, parse("", read), bind("p", ""), execute("p", 1), sync,
			execute("p", 9), &pgproto3.Close{ObjectType: 'P', Name: "p"}, sync, parse("", "commit"), bind("", ""), execute("", 0), sync,
		}, "12C Z 12 b1 s Z b2 C3 Z 12C Z"},
		"two transactions in a segment": {[]pgproto3.FrontendMessage{
			parse("e", "end"), parse("r", read), bind("e", "e"), bind("r", "r"), execute("r", 1), execute("e", 0), bind("r", "r"), execute("r", 0),
			&pgproto3.Close{ObjectType: 'S', Name: "e"}, &pgproto3.Close{ObjectType: 'S', Name: "r"}, sync,
		}, "1122 b1 s N C2 b1 b2 C33 Z"},
		"bound and left": {[]pgproto3.FrontendMessage{
			parse("", "commit"), bind("", ""), &pgproto3.Describe{ObjectType: 'P'}, sync, parse("", read), bind("", ""), execute("", 0), sync,
		}, "12nZ 12 b1 b2 C Z"},
		"bound and closed": {[]pgproto3.FrontendMessage{
			parse("", "commit"), bind("", ""), &pgproto3.Close{ObjectType: 'P'}, parse("", read), bind("", ""), execute("", 0), sync,
		}, "12312 b1 b2 C Z"},
		"bound and not yet executed": {[]pgproto3.FrontendMessage{
			parse("", "commit"), bind("", ""), parse("r", read), execute("", 0), sync,
		}, ""},
	} {
		conn, err := pool.Acquire(as("b"))
		require.NoError(t, err)
		frontend := conn.Conn().PgConn().Frontend()
		for _, m := range c.messages {
			frontend.Send(m)
		}
		err = frontend.Flush()
		if c.want == "" {
			require.ErrorIs(t, err, ErrUnbound, name)
			require.NoError(t, conn.Conn().Close(context.Background()))
			conn.Release()
			continue
		}
		require.NoError(t, err, name)
		got := ""
		for syncs := strings.Count(c.want, "Z"); syncs > 0; {
			m, err := frontend.Receive()
			require.NoError(t, err, name)
			b, err := m.Encode(nil)
			require.NoError(t, err)
			got += string(b[0])
			switch m := m.(type) {
			case *pgproto3.DataRow:
				got = got[:len(got)-1] + string(m.Values[0])
			case *pgproto3.ErrorResponse:
				got += m.Message
			case *pgproto3.ReadyForQuery:
				syncs--
			}
		}
		require.Equal(t, strings.ReplaceAll(c.want, " ", ""), got, name)
		conn.Release()
	}
}

// A hijacked connection stays its tenant's.
func TestHijackedConnectionStaysBound(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	pool := boundPool(t, db.AppURL())
	c, err := pool.Acquire(as("a"))
	require.NoError(t, err)
	conn := c.Hijack()
	defer conn.Close(context.Background())
	require.Equal(t, []string{"a1", "a2"}, strs(t, conn, context.Background(), "select body from docs order by id"))

	hc, err := conn.PgConn().Hijack()
	require.NoError(t, err)
	raw, err := pgconn.Construct(hc)
	require.NoError(t, err)
	defer raw.Close(context.Background())
	r := raw.ExecParams(context.Background(), "select body from docs order by id", nil, nil, nil, nil).Read()
	require.NoError(t, r.Err)
	require.Len(t, r.Rows, 2)
	require.Equal(t, "a1", string(r.Rows[0][0]))

	fn := &pgproto3.FunctionCall{Function: 1598}
	raw.Frontend().Send(fn)
	require.ErrorIs(t, raw.Frontend().Flush(), ErrUnbound, "a function call cannot be bound")
}

// database/sql over the pool, as other libraries use it.
func TestDatabaseSQL(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	sqlDB := stdlib.OpenDBFromPool(boundPool(t, db.AppURL()))
	defer sqlDB.Close()
	for _, id := range []string{"a", "b", "a"} {
		var got string
		require.NoError(t, sqlDB.QueryRowContext(as(id), "select string_agg(body, ',' order by id) from docs").Scan(&got))
		require.Equal(t, id+"1,"+id+"2", got)
		tx, err := sqlDB.BeginTx(as(id), &sql.TxOptions{Isolation: sql.LevelSerializable, ReadOnly: true})
		require.NoError(t, err)
		require.NoError(t, tx.QueryRow("select string_agg(body, ',' order by id) from docs where id > $1", 0).Scan(&got))
		require.Equal(t, id+"1,"+id+"2", got)
		require.NoError(t, tx.Commit())
		stmt, err := sqlDB.PrepareContext(as(id), "select count(*) from docs where id > $1")
		require.NoError(t, err)
		require.NoError(t, stmt.QueryRowContext(as(id), 0).Scan(&got))
		require.Equal(t, "2", got)
		require.NoError(t, stmt.Close())
	}
	require.ErrorIs(t, sqlDB.PingContext(context.Background()), ErrNoTenant)
}

// The binding's prepared statement is made anew after it was deallocated. pgx's own are not: another tenant is
// given another connection.
func TestDeallocateAll(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	pool := boundPool(t, db.AppURL(), mode(pgx.QueryExecModeDescribeExec))
	for _, sql := range []string{"deallocate all", "deallocate pgxtenant_row"} {
		require.Equal(t, []string{"a1"}, strs(t, pool, as("a"), "select body from docs where id = $1", 1))
		_, err := pool.Exec(as("a"), sql)
		require.NoError(t, err)
		require.Equal(t, []string{"a1"}, strs(t, pool, as("a"), "select body from docs where id = $1", 1))
		require.Equal(t, []string{"b1"}, strs(t, pool, as("b"), "select body from docs where id = $1", 1))
		require.EqualValues(t, 2, pool.Stat().NewConnsCount(), sql)
	}
	_, err := pool.Exec(as("a"), "discard all")
	require.Equal(t, "25001", pgCode(err), "refused by the server inside a bound segment")
	var pgErr *pgconn.PgError
	require.ErrorAs(t, err, &pgErr)
	require.Contains(t, pgErr.Hint, "admin pool")
	_, err = pool.Exec(as("a"), "do $$ begin commit; end $$")
	require.ErrorAs(t, err, &pgErr)
	require.Equal(t, "2D000", pgErr.Code)
	require.Contains(t, pgErr.Hint, "admin pool")

	// Deallocated out of sight, by a function: one statement fails, the next one is right.
	db.Exec("create function forget() returns void language plpgsql as $$ begin execute 'deallocate all'; end $$")
	_, err = pool.Exec(as("a"), "select forget()")
	require.NoError(t, err)
	_, err = pool.Exec(as("b"), "select body from docs where id = $1", 1)
	require.Equal(t, "26000", pgCode(err))
	require.ErrorContains(t, err, `pgxtenant: binding tenant "b"`)
	require.Equal(t, []string{"b1"}, strs(t, pool, as("b"), "select body from docs where id = $1", 1))
	require.EqualValues(t, 2, pool.Stat().NewConnsCount())

	// In the mode that caches, the next tenant's statements would fail one after another.
	pool = boundPool(t, db.AppURL())
	for _, id := range []string{"a", "b", "a"} {
		require.Equal(t, []string{id + "1"}, strs(t, pool, as(id), "select body from docs where id = $1", 1))
		_, err := pool.Exec(as(id), "deallocate all")
		require.NoError(t, err)
	}
}

// A connection that the server kills fails its statement alone, with nothing of it seen by others.
func TestConnectionKilled(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, db.AppURL(), mode(m))
		for range 3 {
			conn, err := pool.Acquire(as("a"))
			require.NoError(t, err)
			pid := conn.Conn().PgConn().PID()
			done := make(chan error, 1)
			go func() {
				_, err := conn.Exec(as("a"), "select pg_sleep($1::float8)", 60)
				done <- err
			}()
			admin := db.Connect(db.SuperURL())
			for {
				var active bool
				require.NoError(t, admin.QueryRow(context.Background(),
					"select exists (select from pg_stat_activity where pid = $1 and wait_event = 'PgSleep')", pid).Scan(&active))
				if active {
					break
				}
			}
			_, err = admin.Exec(context.Background(), "select pg_terminate_backend($1)", pid)
			require.NoError(t, err)
			require.Equal(t, "57P01", pgCode(<-done))
			conn.Release()
			require.Equal(t, []string{"b1", "b2"}, strs(t, pool, as("b"), "select body from docs order by id"))
		}
	})
}

// TLS ends below the binding.
func TestTLS(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	pool := boundPool(t, db.AppURL("sslmode=require"))
	for _, id := range []string{"a", "b"} {
		require.Equal(t, []string{"true"}, strs(t, pool, as(id), "select ssl::text from pg_stat_ssl where pid = pg_backend_pid()"))
		require.Equal(t, []string{id + "1"}, strs(t, pool, as(id), "select body from docs where id = $1", 1))
	}
	ctx, cancel := context.WithTimeout(as("a"), 50*time.Millisecond)
	defer cancel()
	_, err := pool.Exec(ctx, "select pg_sleep(60)")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Equal(t, []string{"b1"}, strs(t, pool, as("b"), "select body from docs where id = $1", 1))
}

// What the server counts statements by does not grow with the number of tenants.
func TestStatementsDoNotVaryByTenant(t *testing.T) {
	t.Parallel()
	entries := func(tenants int) []string {
		db := docsDB(t)
		db.TrackStatements()
		for _, m := range modes {
			pool := boundPool(t, db.AppURL(), mode(m))
			for i := range tenants {
				ctx := WithTenant(context.Background(), Tenant{
					ID: fmt.Sprintf("t%d", i), Settings: map[string]string{"app.user_id": fmt.Sprint(i)},
				})
				_ = strs(t, pool, ctx, "select body from docs")
				_, err := pool.Exec(ctx, "select count(*) from docs")
				require.NoError(t, err)
				_, err = pool.Exec(ctx, "begin; select count(*) from docs; commit")
				require.NoError(t, err)
				require.NoError(t, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, "update docs set body = $1", "x")
					return err
				}))
			}
		}
		return strs(t, db.Connect(db.SuperURL()), context.Background(),
			`select query from pg_stat_statements s join pg_roles r on r.oid = userid where rolname = $1 order by 1`, db.App)
	}
	few, many := entries(3), entries(300)
	require.NotEmpty(t, few)
	require.Equal(t, few, many)
}

// After a cancellation at any moment the next tenant is served as itself.
func TestCancellation(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	for name, handler := range map[string]func(*pgxpool.Config){
		"deadline": func(*pgxpool.Config) {},
		"cancel request": func(c *pgxpool.Config) {
			c.ConnConfig.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
				return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, DeadlineDelay: 5 * time.Second}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := boundPool(t, db.AppURL(), handler, func(c *pgxpool.Config) { c.MaxConns = 4 })
			var wg sync.WaitGroup
			for g := range 8 {
				wg.Go(func() {
					for i := range 60 {
						id := string(rune('a' + (g+i)%2))
						ctx, cancel := context.WithTimeout(as(id), time.Duration(rand.IntN(2000))*time.Microsecond)
						switch i % 3 {
						case 0:
							_, _ = pool.Exec(ctx, "select pg_sleep(0.001)")
						case 1:
							_, _ = pool.Exec(ctx, "update docs set body = body where id = $1", 1)
						default:
							_ = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
								_, err := tx.Exec(ctx, "select count(*) from docs")
								return err
							})
						}
						cancel()
						rows, _ := pool.Query(as(id), "select body from docs where $1 order by id", true) // they carry its error
						got, err := pgx.CollectRows(rows, pgx.RowTo[string])
						// A cancel request may reach the server late, and hit the next statement, or its preparation: pgx's own hazard.
						if pgCode(err) != "57014" && (err != nil || strings.Join(got, ",") != id+"1,"+id+"2") {
							t.Errorf("tenant %s reads %q, %v", id, got, err)
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// Many goroutines, many tenants, few connections, every kind of operation: no row of another tenant.
func TestRandomOperations(t *testing.T) {
	t.Parallel()
	const tenants, goroutines = 100, 16
	operations := 200
	if testing.Short() {
		operations = 50
	}
	db := pgtest.New(t)
	db.RLSTable("docs")
	db.SuperExec(fmt.Sprintf(`insert into docs select 't'||t, n, 't'||t||':'||n from generate_series(0, %d) t, generate_series(1, 20) n`, tenants-1))
	for name, o := range bindings {
		for _, m := range modes {
			t.Run(fmt.Sprintf("%v/%s", m, name), func(t *testing.T) {
				t.Parallel()
				pool := poolWith(t, db.AppURL(), o, mode(m), func(c *pgxpool.Config) { c.MaxConns = 4 })
				var wg sync.WaitGroup
				for range goroutines {
					wg.Go(func() {
						for range operations {
							if err := randomOperation(pool, fmt.Sprintf("t%d", rand.IntN(tenants))); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}

func randomOperation(pool *pgxpool.Pool, id string) error {
	ctx := as(id)
	own := func(rows pgx.Rows, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		bodies, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		if len(bodies) == 0 {
			return fmt.Errorf("%s: no rows", id)
		}
		for _, b := range bodies {
			if !strings.HasPrefix(b, id+":") {
				return fmt.Errorf("%s: reads %q", id, b)
			}
		}
		return nil
	}
	failing := func(err error, code string) error {
		if pgCode(err) != code {
			return fmt.Errorf("%s: got %v; want %s", id, err, code)
		}
		return nil
	}
	const all = "select body from docs"
	switch rand.IntN(13) {
	case 0:
		return own(pool.Query(ctx, all))
	case 1:
		return own(pool.Query(ctx, all+" where id > $1", 3))
	case 2:
		return own(pool.Query(ctx, all+" where id > $1", pgx.QueryExecModeSimpleProtocol, 3))
	case 3: // 1,000 rows
		return own(pool.Query(ctx, "select d.body from docs d, generate_series(1, 50)"))
	case 4:
		tag, err := pool.Exec(ctx, "update docs set body = body where id = $1", rand.IntN(20)+1)
		if err == nil && tag.RowsAffected() != 1 {
			err = fmt.Errorf("%s: updated %d rows", id, tag.RowsAffected())
		}
		return err
	case 5:
		return pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
			if err := own(tx.Query(ctx, all)); err != nil {
				return err
			}
			if err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return own(tx.Query(ctx, all+" where id < $1", 9)) }); err != nil {
				return err
			}
			return own(tx.Query(ctx, all))
		})
	case 6:
		batch := &pgx.Batch{}
		for range 3 {
			batch.Queue(all + " where id = 1").Query(func(rows pgx.Rows) error { return own(rows, nil) })
		}
		return pool.SendBatch(ctx, batch).Close()
	case 7:
		_, err := pool.Exec(ctx, "insert into docs (tenant_id, id, body) values ($1, 1000, 'x')", id+"x")
		return failing(err, "42501")
	case 8:
		_, err := pool.Exec(ctx, "select 1/0 from docs")
		return failing(err, "22012")
	case 9: // leaves state behind
		_, err := pool.Exec(ctx, "set statement_timeout = '1h'; set local app.current_tenant_id = 't0'")
		return err
	case 10:
		_, err := pool.Exec(ctx, "select set_config('app.current_tenant_id', 't0', false)")
		return err
	case 11: // abandon a result in the middle
		rows, err := pool.Query(ctx, all)
		if err != nil {
			return err
		}
		rows.Next()
		rows.Close()
		return rows.Err()
	default:
		batch := &pgx.Batch{}
		batch.BeginTx(pgx.TxOptions{IsoLevel: pgx.Serializable, AccessMode: pgx.ReadOnly})
		batch.Queue(all).Query(func(rows pgx.Rows) error { return own(rows, nil) })
		br := pool.SendBatch(ctx, batch)
		if err := br.Close(); err != nil {
			_ = br.Tx().Rollback(ctx)
			return err
		}
		if err := own(br.Tx().Query(ctx, all)); err != nil {
			return err
		}
		return br.Tx().Commit(ctx)
	}
}
