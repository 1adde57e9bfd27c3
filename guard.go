package pgxtenant

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// guard is the tracer of a bound connection. It tells the connection's meter what runs on it, and refuses what comes under another tenant's context than the
// connection was checked out under, for whoever keeps connections of a pool for himself, as database/sql does
// unless its number of idle ones is set to zero, does not ask for them again when the tenant changes. A
// transaction is let go on: it is its tenant's to the end. Whatever the config's own tracer traces is passed on.
type guard struct {
	query   pgx.QueryTracer // any of them may be nil
	batch   pgx.BatchTracer
	copying pgx.CopyFromTracer
	prepare pgx.PrepareTracer
	connect pgx.ConnectTracer
}

// guardConnections puts a guard on each new connection of config. The pool itself keeps the config's own tracer.
func guardConnections(config *pgxpool.Config) {
	before, tracer := config.BeforeConnect, config.ConnConfig.Tracer
	config.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.Tracer = tracer // and not what stands before the pool
		if before != nil {
			if err := before(ctx, cc); err != nil {
				return err
			}
		}
		g := &guard{query: cc.Tracer}
		g.batch, _ = cc.Tracer.(pgx.BatchTracer)
		g.copying, _ = cc.Tracer.(pgx.CopyFromTracer)
		g.prepare, _ = cc.Tracer.(pgx.PrepareTracer)
		g.connect, _ = cc.Tracer.(pgx.ConnectTracer)
		cc.Tracer = g
		return nil
	}
}

// start begins something of the given kind. It breaks the connection off if ctx is another tenant's: a tracer has no
// other way to stop a statement. The attempt to send it then fails, with this error and before the first byte.
func (g *guard) start(ctx context.Context, conn *pgx.Conn, kind statementKind) {
	w, ok := conn.PgConn().Conn().(*wireConn)
	if !ok {
		return
	}
	if c := carried(ctx); c != nil && !w.isFor(c.tenant.ID) {
		_ = w.Close() // pgx would wait for an answer
	}
	w.meter.start(kind)
}

// stop ends it.
func (g *guard) stop(conn *pgx.Conn, kind statementKind, tag pgconn.CommandTag, err error) {
	if w, ok := conn.PgConn().Conn().(*wireConn); ok {
		w.meter.stop(kind, tag, err)
	}
}

// isFor reports whether a statement of tenant id may begin now. If not, the connection is broken off.
func (w *wireConn) isFor(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.current == nil || w.current.tenant.ID == id || w.status != 'I' || w.inFlight.len() > 0 {
		return true
	}
	_ = w.breakOff(fmt.Errorf("%w: the connection was checked out for tenant %q, and the context is tenant %q's; check out another, and in database/sql call SetMaxIdleConns(0)",
		ErrWrongTenant, w.current.tenant.ID, clip(id)))
	return false
}

func (g *guard) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	g.start(ctx, conn, runsQuery)
	if g.query == nil {
		return ctx
	}
	return g.query.TraceQueryStart(ctx, conn, data)
}

func (g *guard) TraceQueryEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryEndData) {
	g.stop(conn, runsQuery, data.CommandTag, data.Err)
	if g.query != nil {
		g.query.TraceQueryEnd(ctx, conn, data)
	}
}

func (g *guard) TraceBatchStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	g.start(ctx, conn, runsBatch)
	if g.batch == nil {
		return ctx
	}
	return g.batch.TraceBatchStart(ctx, conn, data)
}

func (g *guard) TraceBatchQuery(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchQueryData) {
	if w, ok := conn.PgConn().Conn().(*wireConn); ok {
		w.meter.batched(data.CommandTag, data.Err)
	}
	if g.batch != nil {
		g.batch.TraceBatchQuery(ctx, conn, data)
	}
}

func (g *guard) TraceBatchEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceBatchEndData) {
	g.stop(conn, runsBatch, pgconn.CommandTag{}, data.Err)
	if g.batch != nil {
		g.batch.TraceBatchEnd(ctx, conn, data)
	}
}

func (g *guard) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromStartData) context.Context {
	g.start(ctx, conn, runsCopy)
	if g.copying == nil {
		return ctx
	}
	return g.copying.TraceCopyFromStart(ctx, conn, data)
}

func (g *guard) TraceCopyFromEnd(ctx context.Context, conn *pgx.Conn, data pgx.TraceCopyFromEndData) {
	g.stop(conn, runsCopy, data.CommandTag, data.Err)
	if g.copying != nil {
		g.copying.TraceCopyFromEnd(ctx, conn, data)
	}
}

func (g *guard) TracePrepareStart(ctx context.Context, conn *pgx.Conn, data pgx.TracePrepareStartData) context.Context {
	g.start(ctx, conn, runsPrepare)
	if g.prepare == nil {
		return ctx
	}
	return g.prepare.TracePrepareStart(ctx, conn, data)
}

func (g *guard) TracePrepareEnd(ctx context.Context, conn *pgx.Conn, data pgx.TracePrepareEndData) {
	g.stop(conn, runsPrepare, pgconn.CommandTag{}, data.Err)
	if g.prepare != nil {
		g.prepare.TracePrepareEnd(ctx, conn, data)
	}
}

func (g *guard) TraceConnectStart(ctx context.Context, data pgx.TraceConnectStartData) context.Context {
	if g.connect == nil {
		return ctx
	}
	return g.connect.TraceConnectStart(ctx, data)
}

func (g *guard) TraceConnectEnd(ctx context.Context, data pgx.TraceConnectEndData) {
	if g.connect != nil {
		g.connect.TraceConnectEnd(ctx, data)
	}
}
