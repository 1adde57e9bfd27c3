package pgxtenant

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// hook puts the gate before the pool that is made from config. It comes after the binding, which it asks
// for the tenant, and before the budget.
func (g *turnstile) hook(config *pgxpool.Config) {
	if g == nil {
		return
	}
	tracer := config.ConnConfig.Tracer
	config.ConnConfig.Tracer = &turnstileTracer{QueryTracer: tracer, gate: g}

	beforeConnect := config.BeforeConnect
	config.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.Tracer = tracer // the pool has taken its part of turnstileTracer; connections need none
		if beforeConnect != nil {
			return beforeConnect(ctx, cc)
		}
		return nil
	}
}

// turnstileTracer tells the gate when checkouts begin and end. pgxpool calls it in the goroutine of the checkout, before
// its own queue, and whatever comes of it; not for AcquireAllIdle, and not for Hijack.
type turnstileTracer struct {
	pgx.QueryTracer
	gate *turnstile
}

func (t *turnstileTracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireStartData) context.Context {
	if traced, ok := t.QueryTracer.(pgxpool.AcquireTracer); ok {
		ctx = traced.TraceAcquireStart(ctx, pool, data)
	}
	return t.gate.enter(ctx, pool)
}

func (t *turnstileTracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	entered := ctx
	if a, ok := ctx.(*admission); ok {
		entered = a.Context // the budget's, which comes after the gate
	}
	p, bd := t.gate.permitOf(data.Conn)
	t.gate.came(entered, p, bd)
	if p != nil && bd.limits.HoldLimit > 0 {
		p.watch.Load().begin(bd)
	}
	if traced, ok := t.QueryTracer.(pgxpool.AcquireTracer); ok {
		traced.TraceAcquireEnd(ctx, pool, data)
	}
}

func (t *turnstileTracer) TraceRelease(pool *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	if traced, ok := t.QueryTracer.(pgxpool.ReleaseTracer); ok {
		traced.TraceRelease(pool, data)
	}
	if w, ok := data.Conn.PgConn().Conn().(*wireConn); ok {
		t.gate.released(&w.permit)
		if watch := w.permit.watch.Load(); watch != nil {
			watch.end()
		}
	}
}

// permitOf returns the place for conn's permit, and who has it been bound to. It returns nil for a checkout
// that failed, or whose connection has been closed meanwhile.
func (g *turnstile) permitOf(conn *pgx.Conn) (*permit, *binding) {
	if conn == nil {
		return nil, nil
	}
	w, ok := conn.PgConn().Conn().(*wireConn)
	if !ok {
		return nil, nil
	}
	bd := w.current // which only a checkout changes
	if w.permit.gate == nil || bd.limits.HoldLimit > 0 && w.permit.watch.Load() == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.closed {
			return nil, nil
		}
		w.permit.gate = g
		if bd.limits.HoldLimit > 0 {
			w.permit.watch.Store(&holdWatch{log: g.log})
		}
	}
	return &w.permit, bd
}

// borrowed takes permits for connections that came from AcquireAllIdle.
func (g *turnstile) borrowed(conns []*pgxpool.Conn) {
	if g == nil {
		return
	}
	for _, conn := range conns {
		if p, bd := g.permitOf(conn.Conn()); p != nil {
			g.borrow(p, bd)
		}
	}
}
