package pgxtenant

import (
	"context"
	"database/sql"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/require"
)

// database/sql keeps idle connections unless told not to, and gives the one of the last tenant to the next: it
// is given up or refused, never used.
func TestDatabaseSQLWithIdleConnections(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		pool := boundPool(t, d.AppURL(), mode(m), func(c *pgxpool.Config) { c.MaxConns = 4 })
		db := sql.OpenDB(stdlib.GetPoolConnector(pool))
		defer db.Close()
		served := 0
		for i := range 20 {
			id := string(rune('a' + i%2))
			var got string
			switch err := db.QueryRowContext(as(id), "select string_agg(body, ',' order by id) from docs").Scan(&got); {
			case err == nil:
				require.Equal(t, id+"1,"+id+"2", got)
				served++
			default:
				require.ErrorIs(t, err, ErrWrongTenant)
				require.ErrorContains(t, err, "SetMaxIdleConns(0)")
			}
			_, err := db.ExecContext(as(id), "update docs set body = body where id = $1 and tenant_id <> $2", 1, id)
			require.NoError(t, err)
		}
		require.Positive(t, served)
	})
}

// Whoever has a connection may use it under its own tenant's context and under one without a tenant, but not
// under another tenant's, unless a transaction is open.
func TestAConnectionIsNotUsedForAnotherTenant(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	pool := boundPool(t, d.AppURL())
	for name, use := range map[string]func(ctx context.Context, conn *pgx.Conn) error{
		"query": func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, "select 'x'").Scan(new(string))
		},
		"exec": func(ctx context.Context, conn *pgx.Conn) error { _, err := conn.Exec(ctx, "select 1"); return err },
		"prepare": func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Prepare(ctx, "", "select 1")
			return err
		},
		"batch": func(ctx context.Context, conn *pgx.Conn) error {
			b := &pgx.Batch{}
			b.Queue("select 1")
			return conn.SendBatch(ctx, b).Close()
		},
		"begin": func(ctx context.Context, conn *pgx.Conn) error { return endTx(conn.Begin(ctx)) },
		"copy": func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.CopyFrom(ctx, pgx.Identifier{"docs"}, []string{"id"}, rowsOf(0, nil))
			if pgCode(err) == "0A000" {
				err = nil // it was sent
			}
			return err
		},
	} {
		for _, other := range []context.Context{as("b"), WithTenantID(context.Background(), "b"), WithoutTenant(context.Background())} {
			conn, err := pool.Acquire(as("a"))
			require.NoError(t, err)
			require.NoError(t, use(context.Background(), conn.Conn()), name)
			require.NoError(t, use(as("a"), conn.Conn()), name)
			require.ErrorIs(t, use(other, conn.Conn()), ErrWrongTenant, name)
			conn.Release()
		}
	}
}

// allTracer counts what it is told of, as every kind of tracer that pgx knows.
type allTracer struct{ calls map[string]int }

type traced struct{}

func (a *allTracer) start(ctx context.Context, name string) context.Context {
	a.calls[name]++
	return context.WithValue(ctx, traced{}, name)
}

func (a *allTracer) end(ctx context.Context, name string) {
	if ctx.Value(traced{}) == name {
		a.calls[name+" ended"]++
	}
}

func (a *allTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return a.start(ctx, "query")
}
func (a *allTracer) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	a.end(ctx, "query")
}
func (a *allTracer) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return a.start(ctx, "batch")
}
func (a *allTracer) TraceBatchQuery(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchQueryData) {
	a.calls["batched"]++
}
func (a *allTracer) TraceBatchEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchEndData) {
	a.end(ctx, "batch")
}
func (a *allTracer) TraceCopyFromStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceCopyFromStartData) context.Context {
	return a.start(ctx, "copy")
}
func (a *allTracer) TraceCopyFromEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceCopyFromEndData) {
	a.end(ctx, "copy")
}
func (a *allTracer) TracePrepareStart(ctx context.Context, _ *pgx.Conn, _ pgx.TracePrepareStartData) context.Context {
	return a.start(ctx, "prepare")
}
func (a *allTracer) TracePrepareEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TracePrepareEndData) {
	a.end(ctx, "prepare")
}
func (a *allTracer) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	return a.start(ctx, "connect")
}
func (a *allTracer) TraceConnectEnd(ctx context.Context, _ pgx.TraceConnectEndData) {
	a.end(ctx, "connect")
}

// The config's own tracer is told what it would be told without the binding.
func TestTracersAreKept(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	told := func(bind bool) map[string]int {
		a := &allTracer{calls: make(map[string]int)}
		config, err := pgxpool.ParseConfig(d.AppURL("pool_max_conns=1"))
		require.NoError(t, err)
		config.ConnConfig.Tracer = a
		if bind {
			require.NoError(t, Bind(config, ""))
		}
		pool, err := pgxpool.NewWithConfig(context.Background(), config)
		require.NoError(t, err)
		defer pool.Close()
		ctx := as("a")
		_ = strs(t, pool, ctx, "select body from docs where id > $1", 0)
		b := &pgx.Batch{}
		b.Queue("select 1")
		b.Queue("select $1::int", 2)
		require.NoError(t, pool.SendBatch(ctx, b).Close())
		_, err = pool.CopyFrom(ctx, pgx.Identifier{"docs"}, []string{"id"}, pgx.CopyFromFunc(func() ([]any, error) { return nil, errors.New("no") }))
		require.Error(t, err)
		return a.calls
	}
	want := told(false)
	require.Len(t, want, 11)
	require.Equal(t, want, told(true))
}
