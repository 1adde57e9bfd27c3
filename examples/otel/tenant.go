package main

import (
	"context"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/pgxtenant/pgxtenant"
)

// tenantKey is the attribute that spans carry. OpenTelemetry's semantic conventions have none for a tenant, and ask that
// attributes of one's own begin with a name of one's own.
const tenantKey = attribute.Key("pgxtenant.tenant.id")

// tenantProcessor puts the tenant on every span that begins where one is known: on those of pgx, and on the service's
// own below its middleware. It needs to be registered ahead of what exports. A batch's statements have spans that
// begin and end within otelpgx, so a tracer around it would come too late for them.
type tenantProcessor struct{}

func (tenantProcessor) OnStart(ctx context.Context, span sdktrace.ReadWriteSpan) {
	id, bound := ctx.Value(boundKey{}).(string)
	if !bound {
		t, _ := pgxtenant.FromContext(ctx)
		id = t.ID
	}
	if id != "" {
		span.SetAttributes(tenantKey.String(id))
	}
}

func (tenantProcessor) OnEnd(sdktrace.ReadOnlySpan)      {}
func (tenantProcessor) Shutdown(context.Context) error   { return nil }
func (tenantProcessor) ForceFlush(context.Context) error { return nil }

// boundTracer is otelpgx's tracer, and tells tenantProcessor the tenant that a connection is bound to. That is who a
// statement runs as; the context that it comes with may be without a tenant, or within a transaction even another's.
type boundTracer struct{ *otelpgx.Tracer }

// boundKey is under what a context tells a connection's tenant; a connection keeps it in its CustomData.
type boundKey struct{}

const customData = "tenant of the checkout"

func (t boundTracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if data.Conn != nil {
		tenant, _ := pgxtenant.FromContext(ctx)
		data.Conn.PgConn().CustomData()[customData] = tenant.ID // empty under WithoutTenant
	}
	t.Tracer.TraceAcquireEnd(ctx, pool, data)
}

func (t boundTracer) TraceRelease(_ *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	delete(data.Conn.PgConn().CustomData(), customData)
}

func bound(ctx context.Context, conn *pgx.Conn) context.Context {
	if id, ok := conn.PgConn().CustomData()[customData].(string); ok {
		return context.WithValue(ctx, boundKey{}, id)
	}
	return ctx
}

func (t boundTracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	return t.Tracer.TraceQueryStart(bound(ctx, conn), conn, data)
}

func (t boundTracer) TraceBatchStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	return t.Tracer.TraceBatchStart(bound(ctx, conn), conn, data)
}

func (t boundTracer) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromStartData) context.Context {
	return t.Tracer.TraceCopyFromStart(bound(ctx, conn), conn, data)
}

func (t boundTracer) TracePrepareStart(ctx context.Context, conn *pgx.Conn, data pgx.TracePrepareStartData) context.Context {
	return t.Tracer.TracePrepareStart(bound(ctx, conn), conn, data)
}
