package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// fixture is a TenantDB whose spans are kept.
type fixture struct {
	*testing.T
	db    *pgxtenant.TenantDB
	trace trace.Tracer
	spans *tracetest.InMemoryExporter
	own   string // leads to the database of tenant "umbrella"
}

func setUp(t *testing.T) *fixture {
	t.Helper()
	d := pgtest.New(t)
	d.RLSTable("note")
	own := d.Database("app.current_tenant_id=umbrella")
	own.RLSTable("note")
	spans := tracetest.NewInMemoryExporter()
	provider := newProvider(spans)
	t.Cleanup(func() { require.NoError(t, provider.Shutdown(context.Background())) })
	db, err := open(t.Context(), d.AppURL("pool_max_conns=2"), provider)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	return &fixture{t, db, provider.Tracer("test"), spans, own.AppURL()}
}

// request runs f under a span of its own, and returns the span's trace.
func (f *fixture) request(ctx context.Context, run func(ctx context.Context)) trace.TraceID {
	ctx, span := f.trace.Start(ctx, "request")
	run(ctx)
	span.End()
	return span.SpanContext().TraceID()
}

// of returns the spans of a trace by name, each of which must be the tenant's.
func (f *fixture) of(id trace.TraceID, tenant string) map[string]int {
	f.Helper()
	names := map[string]int{}
	for _, s := range f.spans.GetSpans() {
		if s.SpanContext.TraceID() == id {
			require.Equal(f, tenant, tenantOf(s), "span %s", s.Name)
			names[strings.Join([]string{strings.TrimPrefix(s.InstrumentationScope.Name, "github.com/exaring/"), s.Name}, ": ")]++
		}
	}
	return names
}

func tenantOf(s tracetest.SpanStub) string {
	for _, a := range s.Attributes {
		if a.Key == tenantKey {
			return a.Value.AsString()
		}
	}
	return ""
}

// work does all that has a span.
func work(ctx context.Context, db *pgxtenant.TenantDB) error {
	if _, err := db.CopyFrom(ctx, pgx.Identifier{"note"}, []string{"id", "body"}, pgx.CopyFromRows([][]any{{1, "a"}, {2, "b"}})); err != nil {
		return err
	}
	var n int
	if err := db.QueryRow(ctx, "select count(*) from note").Scan(&n); err != nil || n != 2 {
		return fmt.Errorf("%d notes, and %w", n, err)
	}
	var batch pgx.Batch
	batch.Queue("update note set body = 'c' where id = 1")
	batch.Queue("delete from note where id = 2")
	if err := db.SendBatch(ctx, &batch).Close(); err != nil {
		return err
	}
	conn, err := db.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	if _, err := conn.Conn().Prepare(ctx, "", "select body from note"); err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "insert into note (id, body) values (3, 'd')")
		return err
	})
}

// Each span of each kind has its tenant, with several tenants at once on the same connections.
func TestEverySpanHasItsTenant(t *testing.T) {
	t.Parallel()
	f := setUp(t)
	tenants := []pgxtenant.Tenant{{ID: "umbrella", Isolation: pgxtenant.IsolationDatabase, ConnString: f.own}}
	for i := range 6 {
		tenants = append(tenants, pgxtenant.Tenant{ID: fmt.Sprint("t", i)})
	}
	traces, errs := make([]trace.TraceID, len(tenants)), make([]error, len(tenants))
	var wg sync.WaitGroup
	for i, tenant := range tenants {
		wg.Go(func() {
			traces[i] = f.request(pgxtenant.WithTenant(t.Context(), tenant), func(ctx context.Context) { errs[i] = work(ctx, f.db) })
		})
	}
	wg.Wait()
	connects := 0
	for i, tenant := range tenants {
		require.NoError(t, errs[i])
		names := f.of(traces[i], tenant.ID)
		for _, want := range []string{"test: request", "otelpgx: pool.acquire", `otelpgx: copy_from "note"`, "otelpgx: SELECT", "otelpgx: batch start",
			"otelpgx: UPDATE", "otelpgx: DELETE", "otelpgx: BEGIN", "otelpgx: INSERT", "otelpgx: COMMIT"} {
			require.Positive(t, names[want], "%s of %s, in %v", want, tenant.ID, names)
		}
		require.GreaterOrEqual(t, names["otelpgx: SELECT"], 2, "the query's, and that of Prepare: %v", names)
		connects += names["otelpgx: connect"]
	}
	require.Positive(t, connects)
	require.EqualValues(t, "pgxtenant.tenant.id", tenantKey, "as it is documented")
}

// The tenant is the connection's, whatever context a statement comes with.
func TestASpanHasTheTenantItRanAs(t *testing.T) {
	t.Parallel()
	f := setUp(t)
	acme, globex := pgxtenant.WithTenantID(t.Context(), "acme"), pgxtenant.WithTenantID(t.Context(), "globex")
	conn, err := f.db.Acquire(acme)
	require.NoError(t, err)
	defer conn.Release()
	tx, err := conn.Begin(acme)
	require.NoError(t, err)
	var ran string
	for name, ctx := range map[string]context.Context{"nobody": t.Context(), "another": globex} {
		ctx, span := f.trace.Start(ctx, name)
		require.NoError(t, tx.QueryRow(ctx, "select current_setting('app.current_tenant_id')").Scan(&ran))
		require.Equal(t, "acme", ran)
		span.End()
		n := 0
		for _, s := range f.spans.GetSpans() {
			if s.Parent.SpanID() == span.SpanContext().SpanID() {
				require.Equal(t, "acme", tenantOf(s), "span %s under %s", s.Name, name)
				n++
			}
		}
		require.Positive(t, n)
	}
	require.NoError(t, tx.Commit(acme))
}

func TestWithoutATenantThereIsNone(t *testing.T) {
	t.Parallel()
	f := setUp(t)
	id := f.request(pgxtenant.WithoutTenant(t.Context()), func(ctx context.Context) {
		_, err := f.db.Exec(ctx, "select 1")
		require.NoError(t, err)
	})
	require.Positive(t, f.of(id, "")["otelpgx: SELECT"])

	// The same connection, for the next.
	id = f.request(pgxtenant.WithTenantID(t.Context(), "acme"), func(ctx context.Context) {
		_, err := f.db.Exec(ctx, "select 1")
		require.NoError(t, err)
	})
	require.Positive(t, f.of(id, "acme")["otelpgx: SELECT"])
}

// Tracing does not take the place of the library's own counting.
func TestStatementsAreStillCounted(t *testing.T) {
	t.Parallel()
	f := setUp(t)
	require.NoError(t, serve(pgxtenant.WithTenantID(t.Context(), "acme"), f.db, f.trace))
	load := f.db.Load().Minute.Tenants
	require.Len(t, load, 1)
	require.Equal(t, "acme", load[0].TenantID)
	require.EqualValues(t, 3, load[0].Statements())
}

var _ sdktrace.SpanProcessor = tenantProcessor{}
