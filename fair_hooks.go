package pgxtenant

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// acquired ends a checkout that entered with ctx, as its end finds it, and came to conn, or to none.
func (g *turnstile) acquired(ctx context.Context, conn *pgx.Conn) {
	if a, ok := ctx.(*admission); ok {
		ctx = a.Context // the budget's, which comes after the gate
	}
	p, bd := g.permitOf(conn)
	g.came(ctx, p, bd)
	if p != nil && bd.watched {
		p.watch.Load().begin(bd)
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
	if w.permit.gate == nil || bd.watched && w.permit.watch.Load() == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.closed {
			return nil, nil
		}
		w.permit.gate = g
		if bd.watched {
			w.permit.watch.Store(&holdWatch{log: g.log})
		}
	}
	return &w.permit, bd
}

// borrowed takes permits for connections that came from AcquireAllIdle.
func (g *turnstile) borrowed(conns []*pgxpool.Conn) {
	for _, conn := range conns {
		if g == nil {
			holds(conn.Conn())
		} else if p, bd := g.permitOf(conn.Conn()); p != nil {
			g.borrow(p, bd)
		}
	}
}
