package pgxtenant

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// checkout is the context of one pool.Acquire: the caller's, and done as well once the TenantDB is
// closed, for pgxpool's Close leaves those who wait for a connection waiting. It also knows since when its
// caller waits.
//
// Joining two cancellations costs several allocations, and most checkouts find an idle connection and
// never wait. Whether this one does is told by puddle itself: it asks Done once to see whether the
// context is alive, and again only when it is about to wait. So the first answer is the caller's own
// channel, and the joined one is made for the second.
type checkout struct {
	context.Context // the caller's

	set   *checkouts
	asked atomic.Int32 // calls of Done
	since atomic.Int64 // load.clock when it began to wait; 0 if it does not

	// joined tells that both is set. They are set once, under set.mu.
	joined atomic.Bool
	both   context.Context // done with the caller's, or once cancelled
	cancel context.CancelCauseFunc
}

// checkouts are the checkouts under way of one TenantDB.
type checkouts struct {
	load *loadMeter

	// keep is set when hooks other than our own get to see the context, and might keep it. Otherwise nothing
	// does that has not called Done twice, and it is used again.
	keep bool
	free sync.Pool

	// mu guards what follows. No context is cancelled under it.
	mu      sync.Mutex
	closed  bool
	waiting map[*checkout]struct{}
}

// hook has the checkouts of the pool that is made from config begin and end here, whoever has the pool, and go through
// gate, which may be nil. It comes after the binding, which both ask for the tenant, and before the budget.
func (s *checkouts) hook(config *pgxpool.Config, gate *turnstile) {
	t := &checkoutTracer{QueryTracer: config.ConnConfig.Tracer, set: s, gate: gate}
	t.acquire, _ = t.QueryTracer.(pgxpool.AcquireTracer)
	t.release, _ = t.QueryTracer.(pgxpool.ReleaseTracer)
	config.ConnConfig.Tracer = t
}

// checkoutTracer wraps the contexts of checkouts, and tells the gate when they begin and end. pgxpool calls it in the goroutine of
// the checkout, before its own queue, and whatever comes of it; not for AcquireAllIdle, and not for Hijack. Only the
// pool sees it; connections have a guard.
type checkoutTracer struct {
	set  *checkouts
	gate *turnstile // nil with Config.ArrivalOrder

	pgx.QueryTracer // the config's own; may be nil, and so may what else it is
	acquire         pgxpool.AcquireTracer
	release         pgxpool.ReleaseTracer
}

func (t *checkoutTracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireStartData) context.Context {
	if t.acquire != nil {
		ctx = t.acquire.TraceAcquireStart(ctx, pool, data)
	}
	c := t.set.begin(ctx)
	if t.gate == nil {
		return c
	}
	return t.gate.enter(c, pool)
}

func (t *checkoutTracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if t.gate != nil {
		t.gate.acquired(ctx, data.Conn)
	} else if data.Conn != nil {
		holds(data.Conn)
	}
	if t.acquire != nil {
		t.acquire.TraceAcquireEnd(ctx, pool, data)
	}
	c := checkoutOf(ctx)
	if since := c.since.Load(); since != 0 {
		t.set.load.waited(c.Context, time.Duration(since), data.Err == nil)
	}
	t.set.end(c)
}

func (t *checkoutTracer) TraceRelease(pool *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	if t.release != nil {
		t.release.TraceRelease(pool, data)
	}
	w, ok := data.Conn.PgConn().Conn().(*wireConn)
	if !ok {
		return
	}
	w.meter.released()
	if t.gate != nil {
		t.gate.released(&w.permit)
		w.permit.unwatch()
	} else {
		w.permit.holder.Store(nil)
	}
}

// holds notes who has conn where no gate does.
func holds(conn *pgx.Conn) {
	if w, ok := conn.PgConn().Conn().(*wireConn); ok {
		w.permit.holder.Store(w.current)
	}
}

type checkoutKey struct{}

func (c *checkout) Value(key any) any {
	if key == (checkoutKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// checkoutOf returns the innermost checkout of ctx, or nil.
func checkoutOf(ctx context.Context) *checkout {
	if c, ok := ctx.(*checkout); ok {
		return c
	}
	c, _ := ctx.Value(checkoutKey{}).(*checkout)
	return c
}

// waits is called by what stands before the pool, where a checkout begins to wait.
func waits(ctx context.Context) {
	if c := checkoutOf(ctx); c != nil {
		c.wait()
	}
}

func (c *checkout) wait() {
	if c.since.Load() == 0 {
		c.since.CompareAndSwap(0, int64(c.set.load.clock()))
	}
}

// begin returns the context for a checkout from a pool.
func (s *checkouts) begin(ctx context.Context) *checkout {
	c, _ := s.free.Get().(*checkout)
	if c == nil {
		c = &checkout{set: s}
	}
	c.Context = ctx
	return c
}

func (s *checkouts) end(c *checkout) {
	if c.joined.Load() {
		s.mu.Lock()
		delete(s.waiting, c)
		s.mu.Unlock()
		c.cancel(nil)
		return
	}
	if !s.keep && c.asked.Load() <= 1 {
		c.Context = nil
		c.asked.Store(0)
		if c.since.Load() != 0 { // a store takes more than a look
			c.since.Store(0)
		}
		s.free.Put(c)
	}
}

// close wakes all who wait, now and from now on.
func (s *checkouts) close() {
	s.mu.Lock()
	s.closed = true
	waiting := s.waiting
	s.waiting = nil
	s.mu.Unlock()
	for c := range waiting {
		c.cancel(ErrClosed)
	}
}

func (c *checkout) Done() <-chan struct{} {
	if c.asked.Add(1) == 1 {
		return c.Context.Done()
	}
	c.wait()
	if !c.joined.Load() {
		c.join()
	}
	return c.both.Done()
}

func (c *checkout) Err() error {
	if !c.joined.Load() {
		return c.Context.Err()
	}
	err := c.both.Err()
	if err != nil && context.Cause(c.both) == ErrClosed {
		return ErrClosed
	}
	return err
}

func (c *checkout) join() {
	both, cancel := context.WithCancelCause(c.Context)
	s := c.set
	s.mu.Lock()
	if c.joined.Load() { // by puddle's other goroutine
		s.mu.Unlock()
		cancel(nil)
		return
	}
	c.both, c.cancel = both, cancel
	c.joined.Store(true)
	closed := s.closed
	if !closed {
		if s.waiting == nil {
			s.waiting = make(map[*checkout]struct{})
		}
		s.waiting[c] = struct{}{}
	}
	s.mu.Unlock()
	if closed {
		cancel(ErrClosed)
	}
}
