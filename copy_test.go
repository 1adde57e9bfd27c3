package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// openDB opens a TenantDB on url, which is closed after the test.
func openDB(t testing.TB, url string, adjust ...func(*Config)) *TenantDB {
	t.Helper()
	config, err := ParseConfig(url)
	require.NoError(t, err)
	for _, f := range adjust {
		f(config)
	}
	db, err := NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := db.Shutdown(ctx); err != nil && !t.Failed() { // a failed test may well hold a connection
			t.Error(err)
		}
	})
	return db
}

// rowsOf is a source of n rows.
func rowsOf(n int, row func(i int) []any) pgx.CopyFromSource {
	return pgx.CopyFromSlice(n, func(i int) ([]any, error) { return row(i), nil })
}

func count(t testing.TB, q querier, ctx context.Context, sql string, args ...any) (n int) {
	t.Helper()
	rows, err := q.Query(ctx, sql, args...)
	require.NoError(t, err)
	n, err = pgx.CollectExactlyOneRow(rows, pgx.RowTo[int])
	require.NoError(t, err)
	return n
}

// PostgreSQL refuses COPY into a table with policies; CopyFrom does not.
func TestCopyFromUnderPolicies(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("docs")
	db := openDB(t, d.AppURL())

	_, err := db.Shared().CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"id"}, rowsOf(1, func(i int) []any { return []any{i} }))
	require.Equal(t, "0A000", pgCode(err), "the server's own COPY: %v", err)

	for _, n := range []int{0, 1, 2, batchRows - 1, batchRows, batchRows + 1, 5*batchRows + 7} {
		id := fmt.Sprintf("t%d", n)
		got, err := db.CopyFrom(as(id), pgx.Identifier{"docs"}, []string{"id", "body"},
			rowsOf(n, func(i int) []any { return []any{i, fmt.Sprint("body ", i)} }))
		require.NoError(t, err)
		require.EqualValues(t, n, got)
		require.Equal(t, n, count(t, db, as(id), "select count(*) from docs"))
		require.Equal(t, n, count(t, db, as(id), "select count(*) from docs where body = 'body ' || id and tenant_id = $1", id))
	}
	require.Equal(t, 0, count(t, db, as("other"), "select count(*) from docs"))
}

func TestCopyFromRefusesARowOfAnotherTenant(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("docs")
	db := openDB(t, d.AppURL())
	for _, at := range []int{0, 10, 3 * batchRows} { // in the first statement, and in a later one
		n, err := db.CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"tenant_id", "id"}, rowsOf(at+2*batchRows, func(i int) []any {
			if i == at {
				return []any{"b", i}
			}
			return []any{"a", i}
		}))
		require.Equal(t, "42501", pgCode(err), "%v", err)
		require.ErrorContains(t, err, "row-level security policy")
		require.Zero(t, n)
	}
	conn := d.Connect(d.SuperURL())
	require.Equal(t, 0, count(t, conn, context.Background(), "select count(*) from docs"), "nothing may stay")
}

func TestCopyFromIsAllOrNothing(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for _, table := range []string{"docs", "plain", "rowwise"} {
		d.RLSTable(table)
	}
	d.Exec("alter table plain disable row level security",
		"create domain required as text not null", "alter table rowwise add extra required default 'x'") // see valuesBatch
	db := openDB(t, d.AppURL(), func(c *Config) { c.Shared.MaxConns = 1 })
	boom := errors.New("boom")
	const many = 4 * batchRows

	for _, table := range []string{"docs", "plain", "rowwise"} {
		for _, n := range []int{3, many} {
			copyFrom := func(ctx context.Context, src pgx.CopyFromSource) error {
				_, err := db.CopyFrom(ctx, pgx.Identifier{table}, []string{"tenant_id", "id"}, src)
				return err
			}
			fails := func(what string, do func() error) {
				t.Helper()
				require.Error(t, do(), what)
				require.Equal(t, 0, count(t, db, as("a"), "select count(*) from "+table), "%s: %s, %d rows", table, what, n)
			}
			row := func(i int) []any { return []any{"a", i} }
			failing := func(do func(i int) ([]any, error)) pgx.CopyFromSource {
				return pgx.CopyFromSlice(2*n, func(i int) ([]any, error) {
					if i == n-1 {
						return do(i)
					}
					return row(i), nil
				})
			}
			fails("source's error", func() error {
				err := copyFrom(as("a"), failing(func(int) ([]any, error) { return nil, boom }))
				require.ErrorContains(t, err, "boom")
				return err
			})
			fails("source's last error", func() error {
				i := -1
				return copyFrom(as("a"), pgx.CopyFromFunc(func() ([]any, error) {
					if i++; i == n {
						return nil, boom
					}
					return row(i), nil
				}))
			})
			fails("source's panic", func() (err error) {
				defer func() { err = fmt.Errorf("panic: %v", recover()) }()
				_ = copyFrom(as("a"), failing(func(int) ([]any, error) { panic("boom") }))
				return nil
			})
			fails("too few values", func() error {
				return copyFrom(as("a"), failing(func(int) ([]any, error) { return []any{"a"}, nil }))
			})
			fails("value of another type", func() error {
				return copyFrom(as("a"), failing(func(int) ([]any, error) { return []any{"a", "seven"}, nil }))
			})
			fails("constraint", func() error {
				err := copyFrom(as("a"), failing(func(int) ([]any, error) { return row(0), nil }))
				require.Equal(t, "23505", pgCode(err))
				return err
			})
			fails("cancelled", func() error {
				ctx, cancel := context.WithCancel(as("a"))
				defer cancel()
				return copyFrom(ctx, failing(func(i int) ([]any, error) { cancel(); return row(i), nil }))
			})
			fails("cancelled before", func() error {
				ctx, cancel := context.WithCancel(as("a"))
				cancel()
				return copyFrom(ctx, rowsOf(n, row))
			})
		}
	}
}

// The server may report a deferred constraint only when the transaction ends.
func TestCopyFromReportsDeferredConstraints(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("docs")
	d.RLSTable("parent")
	d.Exec("alter table docs add foreign key (tenant_id, id) references parent deferrable initially deferred")
	db := openDB(t, d.AppURL())
	for _, n := range []int{1, 3 * batchRows} {
		_, err := db.CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"id"}, rowsOf(n, func(i int) []any { return []any{i} }))
		require.Equal(t, "23503", pgCode(err), "%v", err)
		require.Equal(t, 0, count(t, db, as("a"), "select count(*) from docs"))
	}
}

// Each type arrives as it would by COPY: the same rows go into a table with policies and into one without.
func TestCopyFromCarriesEveryType(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.SuperExec("create extension hstore", "create extension citext")
	d.Exec(`create type mood as enum ('sad', 'ok', 'happy')`,
		`create type point3 as (x float8, y float8, tags text[])`,
		`create domain posint as int check (value > 0)`,
		`create domain tiny as posint check (value < 100)`,
		`create domain names as text[]`)
	columns := []struct{ name, typ string }{
		{"a_bool", "bool"}, {"a_int2", "int2"}, {"a_int4", "int4"}, {"a_int8", "int8"}, {"a_float4", "float4"}, {"a_float8", "float8"},
		{"a_numeric", "numeric(10,2)"}, {"a_text", "text"}, {"a_varchar", "varchar(20)"}, {"a_char", "char(5)"}, {`a "name`, "name"},
		{"a_bytea", "bytea"}, {"a_date", "date"}, {"a_time", "time(3)"}, {"a_ts", "timestamp"}, {"a_tstz", "timestamptz"}, {"a_interval", "interval"},
		{"a_uuid", "uuid"}, {"a_json", "json"}, {"a_jsonb", "jsonb"}, {"a_inet", "inet"}, {"a_cidr", "cidr"}, {"a_macaddr", "macaddr"},
		{"a_bit", "bit(3)"}, {"a_varbit", "varbit"}, {"a_point", "point"}, {"a_box", "box"}, {"a_path", "path"}, {"a_circle", "circle"},
		{"a_range", "int4range"}, {"a_multirange", "int4multirange"}, {"a_tsrange", "tstzrange"}, {"a_tsvector", "tsvector"},
		{"a_ints", "int4[]"}, {"a_matrix", "int4[]"}, {"a_texts", "text[]"}, {"a_jsons", "jsonb[]"}, {"a_empty", "text[]"}, {"a_ranges", "int4range[]"},
		{"a_mood", "mood"}, {"a_moods", "mood[]"}, {"a_point3", "point3"}, {"a_point3s", "point3[]"},
		{"a_tiny", "tiny"}, {"a_names", "names"}, {"a_hstore", "hstore"}, {"a_citext", "citext"}, {"a_null", "text"},
	}
	var defs, names []string
	for _, c := range columns {
		defs = append(defs, pgx.Identifier{c.name}.Sanitize()+" "+c.typ)
		names = append(names, c.name)
	}
	for _, table := range []string{"plain", "docs", "rowwise"} {
		d.RLSTable(table)
		d.Exec("alter table " + table + " add " + strings.Join(defs, ", add "))
	}
	d.Exec("alter table plain disable row level security",
		"create domain required as text not null", "alter table rowwise add extra required default 'x'")

	db := openDB(t, d.AppURL(), func(c *Config) {
		c.Shared.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			types, err := conn.LoadTypes(ctx, []string{"mood", "_mood", "point3", "_point3"})
			conn.TypeMap().RegisterTypes(types)
			for name, codec := range map[string]pgtype.Codec{"hstore": pgtype.HstoreCodec{}, "citext": pgtype.TextCodec{}} {
				var oid uint32
				err = errors.Join(err, conn.QueryRow(ctx, "select $1::text::regtype::oid", name).Scan(&oid))
				conn.TypeMap().RegisterType(&pgtype.Type{Name: name, OID: oid, Codec: codec})
			}
			return err
		}
	})
	type point3 struct {
		X, Y float64
		Tags []string
	}
	now := time.Date(2024, 2, 29, 13, 14, 15, 678901000, time.UTC)
	value := "v"
	span := func(lower, upper int32) pgtype.Range[pgtype.Int4] {
		return pgtype.Range[pgtype.Int4]{Lower: pgtype.Int4{Int32: lower, Valid: true}, LowerType: pgtype.Inclusive,
			Upper: pgtype.Int4{Int32: upper, Valid: true}, UpperType: pgtype.Exclusive, Valid: true}
	}
	first := []any{
		true, int16(-2), 42, int64(math.MinInt64), float32(1.5), math.Inf(-1),
		"1234.565", "täxt ' \" \\ \t\n", "varchar", "ab", "nämé",
		[]byte{0, 1, 255}, now, pgtype.Time{Microseconds: 12345678901, Valid: true}, now, now, pgtype.Interval{Months: 1, Days: -2, Microseconds: 3, Valid: true},
		"6ba7b810-9dad-11d1-80b4-00c04fd430c8", `{"a": [1, null]}`, map[string]any{"k": "v"}, netip.MustParsePrefix("10.1.2.3/8"), netip.MustParsePrefix("10.0.0.0/8"), "08:00:2b:01:02:03",
		pgtype.Bits{Bytes: []byte{0xa0}, Len: 3, Valid: true}, "10101", pgtype.Point{P: pgtype.Vec2{X: 1, Y: 2}, Valid: true}, "(1,2),(3,4)", "[(1,2),(3,4)]", "<(1,2),3>",
		span(1, 10), pgtype.Multirange[pgtype.Range[pgtype.Int4]]{span(1, 2), span(5, 7)},
		pgtype.Range[pgtype.Timestamptz]{Lower: pgtype.Timestamptz{Time: now, Valid: true}, LowerType: pgtype.Inclusive, UpperType: pgtype.Unbounded, Valid: true}, pgtype.TSVector{Lexemes: []pgtype.TSVectorLexeme{{Word: "cat"}}, Valid: true},
		[]int32{1, 2, 3}, [][]int32{{1, 2}, {3, 4}}, []*string{&value, nil}, []map[string]any{{"x": 1.5}}, []string{}, []pgtype.Range[pgtype.Int4]{span(1, 2)},
		"happy", []string{"sad", "ok"}, point3{1, 2, []string{"p", "q"}}, []point3{{3, 4, nil}, {5, 6, []string{}}},
		7, []string{"n1", "n2"}, map[string]*string{"h": nil}, "CiText", nil,
	}
	second := make([]any, len(first)) // all null
	var tables []string
	for _, table := range []string{"plain", "docs", "rowwise"} {
		n, err := db.CopyFrom(as("a"), pgx.Identifier{"public", table}, append([]string{"id"}, names...),
			pgx.CopyFromRows([][]any{append([]any{1}, first...), append([]any{2}, second...)}))
		require.NoError(t, err, table)
		require.EqualValues(t, 2, n)
		text := strs(t, db, as("a"), "select (to_jsonb(x) - 'extra')::text from "+table+" x order by id")
		require.Len(t, text, 2)
		tables = append(tables, strings.Join(text, "\n"))
	}
	require.Equal(t, tables[0], tables[1])
	require.Equal(t, tables[0], tables[2])

	// A domain's check holds, in whichever column order.
	_, err := db.CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"a_tiny", "id"}, pgx.CopyFromRows([][]any{{200, 3}}))
	require.Equal(t, "23514", pgCode(err), "%v", err)
	_, err = db.CopyFrom(as("a"), pgx.Identifier{"rowwise"}, []string{"a_tiny", "id"}, pgx.CopyFromRows([][]any{{200, 3}}))
	require.Equal(t, "23514", pgCode(err), "%v", err)
}

// What is not copied gets its default; what is copied is taken, for identity columns too.
func TestCopyFromLeavesDefaultsToTheTable(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for _, table := range []string{"plain", "docs"} {
		d.RLSTable(table)
		d.Exec("alter table "+table+" add gone int, add n int generated always as identity, add doubled int generated always as (n * 2) stored,"+
			" add at date default '2024-01-01', add lseg lseg", "alter table "+table+" drop column gone")
	}
	d.Exec("alter table plain disable row level security", "alter table docs add unsendable aclitem")
	db := openDB(t, d.AppURL())
	for _, table := range []string{"plain", "docs"} {
		for _, columns := range [][]string{{"id"}, {"id", "n"}, {"n", "id"}} {
			id := strings.Join(columns, "-")
			_, err := db.CopyFrom(as(id), pgx.Identifier{table}, columns, rowsOf(3, func(i int) []any { return []any{100 + i, 200 + i}[:len(columns)] }))
			require.NoError(t, err)
		}
		require.Equal(t, []string{"id:100:1:2:2024-01-01", "id:101:2:4:2024-01-01", "id:102:3:6:2024-01-01"},
			strs(t, db, as("id"), "select tenant_id||':'||id||':'||n||':'||doubled||':'||at from "+table+" where tenant_id = 'id' order by id"), table)
		require.Equal(t, []string{"100:200", "101:201", "102:202"}, strs(t, db, as("id-n"), "select id||':'||n from "+table+" where tenant_id = 'id-n' order by id"))
		require.Equal(t, []string{"200:100", "201:101", "202:102"}, strs(t, db, as("n-id"), "select id||':'||n from "+table+" where tenant_id = 'n-id' order by id"))
		_, err := db.CopyFrom(as("x"), pgx.Identifier{table}, []string{"id", "doubled"}, rowsOf(1, func(i int) []any { return []any{1, 2} }))
		require.Contains(t, []string{"428C9", "42P10"}, pgCode(err), "%v", err)
	}
}

func TestCopyFromBadNames(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("docs")
	d.Exec("create table closed (id int)", "alter table closed enable row level security", "create table bare (id int)")
	db := openDB(t, d.AppURL())
	one := func(table string, columns ...string) error {
		_, err := db.CopyFrom(as("a"), pgx.Identifier{table}, columns, rowsOf(0, nil))
		return err
	}
	require.Equal(t, "42P01", pgCode(one("nope", "id")))
	require.Equal(t, "42703", pgCode(one("docs", "id", "nope")))
	require.Equal(t, "42701", pgCode(one("docs", "id", "id")))
	require.Error(t, one("docs"))
	require.Error(t, one("docs", "ctid"))
	require.Equal(t, "42501", pgCode(one("closed", "id")), "no privilege, with policies")
	require.Equal(t, "42501", pgCode(one("bare", "id")), "no privilege, without policies")
	require.NoError(t, one("docs", "id"))
}

func TestCopyFromInASchemaTenantsSchema(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for _, schema := range []string{"tenant_a", "tenant_b"} {
		d.Exec("create schema "+schema, "grant usage on schema "+schema+" to "+pgx.Identifier{d.App}.Sanitize())
		d.RLSTable(schema + ".docs")
	}
	d.RLSTable("docs")
	db := openDB(t, d.AppURL())
	for _, id := range []string{"a", "b"} {
		ctx := WithTenant(context.Background(), Tenant{ID: id, Isolation: IsolationSchema})
		for i, name := range []pgx.Identifier{{"docs"}, {"tenant_" + id, "docs"}} {
			n, err := db.CopyFrom(ctx, name, []string{"id"}, rowsOf(2, func(j int) []any { return []any{2*i + j} }))
			require.NoError(t, err)
			require.EqualValues(t, 2, n)
		}
	}
	conn := d.Connect(d.SuperURL())
	require.Equal(t, 0, count(t, conn, context.Background(), "select count(*) from public.docs"))
	for _, id := range []string{"a", "b"} {
		require.Equal(t, 4, count(t, conn, context.Background(), "select count(*) from tenant_"+id+".docs where tenant_id = $1", id))
	}
}

// The source is streamed: a long one needs no more memory than a short one.
func TestCopyFromStreams(t *testing.T) { // not beside others, whose memory would count
	d := pgtest.New(t)
	d.RLSTable("docs")
	d.Exec("alter table docs drop constraint docs_pkey")
	db := openDB(t, d.AppURL())
	body := strings.Repeat("x", 1000)
	var most uint64
	const n = 80_000 // 80 MB
	_, err := db.CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"id", "body"}, rowsOf(n, func(i int) []any {
		if i%10_000 == 0 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapAlloc)
		}
		return []any{i, body}
	}))
	require.NoError(t, err)
	require.Less(t, most, uint64(40<<20), "live heap")

	// Values larger than a batch go too.
	big := strings.Repeat("y", 8<<20)
	_, err = db.CopyFrom(as("b"), pgx.Identifier{"docs"}, []string{"id", "body"}, rowsOf(3, func(i int) []any { return []any{i, big} }))
	require.NoError(t, err)
	require.Equal(t, 3, count(t, db, as("b"), "select count(*) from docs where length(body) = $1", len(big)))
}

func TestCopyFromInEveryMode(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("docs")
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		db := openDB(t, d.AppURL(), func(c *Config) { mode(m)(c.Shared) })
		id := fmt.Sprint("m", int(m))
		for i := range 2 {
			n, err := db.CopyFrom(as(id), pgx.Identifier{"docs"}, []string{"id"}, rowsOf(3*batchRows, func(j int) []any { return []any{i*10000 + j} }))
			require.NoError(t, err)
			require.EqualValues(t, 3*batchRows, n)
		}
		require.Equal(t, 6*batchRows, count(t, db, as(id), "select count(*) from docs"))
	})
}

type copyTracer struct {
	pgx.QueryTracer
	events []string
}

func (t *copyTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (t *copyTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (t *copyTracer) TraceCopyFromStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceCopyFromStartData) context.Context {
	t.events = append(t.events, fmt.Sprint("start ", d.TableName, d.ColumnNames))
	return ctx
}
func (t *copyTracer) TraceCopyFromEnd(_ context.Context, _ *pgx.Conn, d pgx.TraceCopyFromEndData) {
	t.events = append(t.events, fmt.Sprint("end ", d.CommandTag.RowsAffected(), " ", d.Err != nil))
}

func TestCopyFromIsTraced(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("docs")
	tracer := &copyTracer{}
	db := openDB(t, d.AppURL(), func(c *Config) { c.Shared.ConnConfig.Tracer = tracer })
	for range 2 {
		_, _ = db.CopyFrom(as("a"), pgx.Identifier{"docs"}, []string{"id"}, rowsOf(2, func(i int) []any { return []any{i} }))
	}
	require.Equal(t, []string{"start [docs] [id]", "end 2 false", "start [docs] [id]", "end 0 true"}, tracer.events)
}

// BenchmarkCopyFrom compares with COPY into the same table without policies. Read it as a ratio.
func BenchmarkCopyFrom(b *testing.B) {
	d := pgtest.New(b)
	const columns = `tenant_id text default current_setting('app.current_tenant_id'), id bigint primary key, name text, f float8, at timestamptz, tags text[]`
	d.Exec("create table plain ("+columns+")", "create table docs ("+columns+")",
		"alter table docs enable row level security",
		"create policy p on docs using (tenant_id = current_setting('app.current_tenant_id', true))",
		"grant all on plain, docs to "+pgx.Identifier{d.App}.Sanitize())
	db := openDB(b, d.AppURL())
	now := time.Now()
	for _, with := range []struct {
		name    string
		columns []string
	}{
		{"scalars", []string{"id", "name", "f", "at"}},
		{"array", []string{"id", "name", "f", "at", "tags"}},
	} {
		for _, table := range []string{"plain", "docs"} {
			b.Run(with.name+"/"+table, func(b *testing.B) {
				rows := 200_000
				if s := os.Getenv("COPY_ROWS"); s != "" {
					fmt.Sscan(s, &rows)
				}
				for b.Loop() {
					b.StopTimer()
					d.SuperExec("truncate "+table, "checkpoint")
					b.StartTimer()
					_, err := db.CopyFrom(as("a"), pgx.Identifier{table}, with.columns, rowsOf(rows, func(i int) []any {
						return []any{i, "name of a row", float64(i) / 3, now, []string{"a", "b"}}[:len(with.columns)]
					}))
					if err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(rows*b.N)/b.Elapsed().Seconds(), "rows/s")
			})
		}
	}
}
