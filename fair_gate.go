package pgxtenant

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// turnstile lets checkouts into one pool, as many as it has connections, in the order of a fairQueue. A checkout
// takes a permit before the pool looks for a connection and keeps it until the connection is returned or
// closed. It works by the pool's tracer (checkout.go), so it holds for everybody who has the pool.
//
// While nobody waits it only counts permits, in an atomic: who has them is not known, and nobody is charged
// for having them. The first checkout that finds none begins a period: the connections are asked
// who holds them, and from then on all is done under mu, with the tenant at hand, until nobody waits.
type turnstile struct {
	max int64

	// state is the number of permits out, times two, plus one during a period. It changes under mu
	// then, and by anybody otherwise.
	state atomic.Int64

	resolve func(context.Context) (*binding, error)
	closing <-chan struct{} // of the TenantDB
	log     *slog.Logger
	epoch   time.Time
	refused atomic.Int64 // checkouts, by limits
	ended   atomic.Int64 // the most that were told of as ended by their contexts

	// mu guards what follows, and the fields of permits and tickets that say so. Of the pool only Stat is
	// called under it, and no function of the user's.
	mu      sync.Mutex
	busy    func() int // connections, as far as the pool knows; nil before the first period
	permits []*permit  // of all connections
	queue   fairQueue  // empty outside of a period
	period  int64      // counts them
	counted int        // permits that the queue knows the holders of
	away    int        // permits that went with hijacked connections: they are not in state
	timer   *time.Timer
	timerAt time.Duration // when timer fires; 0 if it does not
}

const (
	permitOut  = 2 // of gate.state
	periodFlag = 1
)

// permit is a connection's place for one. It lives as long as the connection, and is held while that is checked out.
type permit struct {
	// Guarded by gate.mu.
	closed   bool  // the connection is
	index    int   // in gate.permits
	period   int64 // in which it was counted
	flow     *flow // of that period
	since    time.Duration
	estimate float64 // charged beforehand

	// Each checkout touches these.
	gate   *turnstile                // of the connection's pool; nil until its first checkout
	listed bool                      // it is in gate.permits, or was
	holder atomic.Pointer[binding]   // nil while it is not held
	watch  atomic.Pointer[holdWatch] // nil unless its holders were ever to be reported
}

// ticket is a checkout that waits, or has waited, and the context that it goes on with.
type ticket struct {
	context.Context
	err error // why it was refused; the context has ended then

	// Guarded by gate.mu.
	queued     bool
	granted    chan struct{} // closed when it is taken out of the queue
	flow       *flow
	period     int64
	prev, next *ticket
	since      time.Duration // it was granted
	estimate   float64       // of what it will take, in seconds
}

func (t *ticket) Done() <-chan struct{} {
	if t.err != nil {
		return ended
	}
	return t.Context.Done()
}

func (t *ticket) Err() error {
	if t.err != nil {
		return t.err
	}
	return t.Context.Err()
}

// How often it is looked at what nobody tells: hijacked connections, and tenants that hold still.
const gateTick = 100 * time.Millisecond

// newTurnstile returns the turnstile for a pool of max connections, or nil, which is none, if c does not want it.
// Who waits is woken when closing is closed.
func newTurnstile(c *Config, max int32, closing <-chan struct{}, resolve func(context.Context) (*binding, error)) *turnstile {
	if c.ArrivalOrder {
		return nil
	}
	if c.MaxConns > 0 {
		max = min(max, c.MaxConns)
	}
	return &turnstile{max: int64(max), closing: closing, resolve: resolve, log: c.Logger, epoch: time.Now(), queue: newFairQueue(int(max), c.MaxShare)}
}

func (g *turnstile) now() time.Duration { return time.Since(g.epoch) }

// enter waits for a permit, and returns the context to enter the pool with: ctx itself if it did not
// have to wait, a ticket otherwise. A ticket with an error has no permit.
func (g *turnstile) enter(ctx context.Context, pool *pgxpool.Pool) context.Context {
	if g.tryEnter() {
		return ctx
	}
	bd, err := g.resolve(ctx)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return &ticket{Context: ctx, err: err}
	}
	t := &ticket{Context: ctx, granted: make(chan struct{})}
	if g.enqueue(t, bd, pool) {
		g.await(t, bd)
	}
	return t
}

// tryEnter takes a permit if that is all there is to do.
func (g *turnstile) tryEnter() bool {
	for {
		s := g.state.Load()
		if s&periodFlag != 0 || s/permitOut >= g.max {
			return false
		}
		if g.state.CompareAndSwap(s, s+permitOut) {
			return true
		}
	}
}

// enqueue puts t into the queue, and reports whether it has to wait.
func (g *turnstile) enqueue(t *ticket, bd *binding, pool *pgxpool.Pool) bool {
	id, limits := bd.tenant.ID, &bd.limits
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	if g.busy == nil {
		g.busy = func() int { return int(pool.Stat().AcquiredConns()) }
	}
	if !g.inPeriod() {
		g.beginLocked()
	}
	if f := g.queue.flows[id]; f != nil && f.n > 0 {
		delay := g.queue.delay(f, f.n+1)
		if f.n >= limits.MaxWaiting || limits.MaxWait > 0 && delay > limits.MaxWait {
			t.err = g.overloaded(id, f.n, 0, delay)
			return false
		}
	}
	g.queue.push(t, id, limits.Weight, now)
	t.period = g.period
	g.dispatchLocked(now)
	return t.queued
}

// await waits for t's grant.
func (g *turnstile) await(t *ticket, bd *binding) {
	waits(t.Context)
	var late <-chan time.Time
	if wait := bd.limits.MaxWait; wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		late = timer.C
	}
	var err error
	select {
	case <-t.granted:
		return
	case <-t.Context.Done():
		err = t.Context.Err()
	case <-g.closing:
		err = ErrClosed
	case <-late:
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !t.queued { // granted in the same moment: if ctx has ended, the pool says so
		return
	}
	f := t.flow
	g.queue.remove(t)
	if err == nil {
		err = g.overloaded(f.id, f.n, bd.limits.MaxWait, g.queue.delay(f, f.n+1))
	}
	t.err = err
	g.dispatchLocked(g.now())
}

// overloaded is the error of a checkout that its tenant's limits refuse.
func (g *turnstile) overloaded(id string, waiting int, waited, retry time.Duration) error {
	g.refused.Add(1)
	if retry <= 0 {
		retry = time.Second
	}
	return &TenantError{id, "acquire", &OverloadError{Waiting: waiting, Waited: waited, RetryAfter: min(max(retry, time.Millisecond), time.Hour)}}
}

// came ends a checkout that entered with ctx and came to the connection of p, or to none if p is nil.
func (g *turnstile) came(ctx context.Context, p *permit, bd *binding) {
	t, _ := ctx.(*ticket)
	switch {
	case t != nil && t.err != nil:
	case p == nil:
		g.giveBack(t)
	default:
		if t == nil && p.listed {
			p.holder.Store(bd)
			if g.state.Load()&periodFlag == 0 {
				return // who begins a period from here on sees it
			}
		}
		g.keep(p, t, bd)
	}
}

// keep leaves a permit to p, whose connection bd's tenant has. t is the ticket that brought it, or nil.
func (g *turnstile) keep(p *permit, t *ticket, bd *binding) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.closed {
		g.giveBackLocked(t)
		return
	}
	if !p.listed {
		p.listed, p.index = true, len(g.permits)
		g.permits = append(g.permits, p)
	}
	p.holder.Store(bd)
	g.countLocked(p, t, bd)
}

// countLocked tells the queue who holds p, if it asks. t is its ticket or nil.
func (g *turnstile) countLocked(p *permit, t *ticket, bd *binding) {
	if !g.inPeriod() || p.period == g.period {
		return
	}
	p.period = g.period
	g.counted++
	if t != nil && t.period == g.period {
		p.flow, p.since, p.estimate = t.flow, t.since, t.estimate
		return
	}
	p.flow, p.since, p.estimate = g.queue.hold(bd.tenant.ID, bd.limits.Weight), g.now(), 0
}

// giveBack returns the permit of a checkout that failed.
func (g *turnstile) giveBack(t *ticket) {
	if g.tryLeave() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.giveBackLocked(t)
}

func (g *turnstile) giveBackLocked(t *ticket) {
	now := g.now()
	if t != nil && g.inPeriod() && t.period == g.period {
		g.queue.release(t.flow, t.estimate, now-t.since, now)
	}
	g.state.Add(-permitOut)
	g.dispatchLocked(now)
}

// released takes back the permit of a connection that is being returned to the pool.
func (g *turnstile) released(p *permit) {
	if p.holder.Swap(nil) == nil || g.tryLeave() {
		return // it had none, or nobody waits for it
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	g.settleLocked(p, now)
	g.state.Add(-permitOut)
	g.dispatchLocked(now)
}

// tryLeave gives a permit back if that is all there is to do.
func (g *turnstile) tryLeave() bool {
	for {
		s := g.state.Load()
		if s&periodFlag != 0 {
			return false
		}
		if g.state.CompareAndSwap(s, s-permitOut) {
			return true
		}
	}
}

// gone forgets a connection that has been closed. If it was checked out, or hijacked, its permit is free.
func (g *turnstile) gone(p *permit) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if twice := p.closed; twice || !p.listed {
		p.closed = true
		return
	}
	p.closed = true
	last := len(g.permits) - 1
	g.permits[p.index] = g.permits[last]
	g.permits[p.index].index = p.index
	g.permits[last] = nil
	g.permits = g.permits[:last]
	if p.holder.Swap(nil) == nil {
		return
	}
	now := g.now()
	g.settleLocked(p, now)
	if g.away > 0 {
		g.away--
	} else {
		g.state.Add(-permitOut)
	}
	g.dispatchLocked(now)
}

// settleLocked charges who held p.
func (g *turnstile) settleLocked(p *permit, now time.Duration) {
	if g.inPeriod() && p.period == g.period {
		g.counted--
		g.queue.release(p.flow, p.estimate, now-p.since, now)
	}
	p.period, p.flow = 0, nil
}

// borrow takes permits for connections that came from AcquireAllIdle, which no tracer sees. There may be more
// of them out then than connections, for an instant.
func (g *turnstile) borrow(p *permit, bd *binding) {
	g.state.Add(permitOut)
	g.keep(p, nil, bd)
}

func (g *turnstile) inPeriod() bool { return g.state.Load()&periodFlag != 0 }

// beginLocked begins a period, unless there is a permit by now: then it is over with the ticket that wanted it.
func (g *turnstile) beginLocked() {
	g.state.Or(periodFlag)
	g.period++
	g.counted = 0
	for _, p := range g.permits {
		if bd := p.holder.Load(); bd != nil {
			g.countLocked(p, nil, bd)
		}
	}
	g.findHijackedLocked()
}

// findHijackedLocked gives back the permits of connections that were hijacked, as pgxpool tells nobody: of
// those that are checked out as far as is known, it has fewer. That is never too many, since a
// connection has its permit for less long than it counts as acquired.
func (g *turnstile) findHijackedLocked() {
	if missing := g.counted - g.busy(); missing > g.away {
		g.state.Add(int64(g.away-missing) * permitOut)
		g.away = missing
	}
}

// dispatchLocked ends every change that could help who waits.
func (g *turnstile) dispatchLocked(now time.Duration) {
	if !g.inPeriod() {
		return
	}
	again := now + gateTick
	for g.state.Load()/permitOut < g.max {
		t, at := g.queue.next(now)
		if t == nil {
			if at > 0 {
				again = min(again, at)
			}
			break
		}
		g.state.Add(permitOut)
		close(t.granted)
	}
	if g.queue.waiting == 0 {
		g.queue.reset()
		g.state.And(^periodFlag)
		return
	}
	if g.timerAt == 0 || again < g.timerAt {
		g.timerAt = again
		if g.timer == nil {
			g.timer = time.AfterFunc(again-now, g.tick)
		} else {
			g.timer.Reset(again - now)
		}
	}
}

// tick looks again at what no event tells.
func (g *turnstile) tick() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.timerAt = 0
	g.lookLocked()
}

func (g *turnstile) lookLocked() {
	if !g.inPeriod() {
		return
	}
	g.findHijackedLocked()
	g.queue.look()
	g.dispatchLocked(g.now())
}

// weight is that of all tenants who wait for, or have, connections of the pool. While nobody waits it is that of one.
func (g *turnstile) weight() float64 {
	if g == nil {
		return DefaultWeight
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.queue.active == 0 {
		return DefaultWeight
	}
	return max(g.queue.weight, MinWeight)
}

// endedOf returns how many of the checkouts that the pool counts as cancelled were ended by their own contexts: those that
// were refused are counted there too, and before that here. So there may be too few at first, but never fewer than before.
func (g *turnstile) endedOf(cancelled, refused int64) int64 {
	if g == nil {
		return cancelled
	}
	for told := g.ended.Load(); ; told = g.ended.Load() {
		if n := max(told, cancelled-refused); n == told || g.ended.CompareAndSwap(told, n) {
			return n
		}
	}
}

// stat returns how many checkouts wait, and how many were refused.
func (g *turnstile) stat() (waiting int32, refused int64) {
	if g == nil {
		return 0, 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return int32(g.queue.waiting), g.refused.Load()
}
