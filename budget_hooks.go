package pgxtenant

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// budgetConn is a server connection that holds a token of the budget, until the server has closed it too:
// its limit on connections counts a process that has not ended yet.
type budgetConn struct {
	net.Conn
	share *share

	// Guarded by budget.mu.
	busy      bool // counted in share.busy
	making    bool // not yet in its pool
	reclaimed bool // counted in budget.reclaiming
	closed    bool
}

// lingerTimeout is how long the server may take to close a connection before its token is given back all
// the same: it may be unreachable, or busy with a statement that nobody waits for.
const lingerTimeout = 2 * time.Second

// Close closes the connection for its user. What is left is done in the background.
func (c *budgetConn) Close() error {
	s, b := c.share, c.share.budget
	b.mu.Lock()
	if c.closed {
		b.mu.Unlock()
		return net.ErrClosed
	}
	c.closed = true
	if !c.busy { // nor is it idle any more
		c.busy = true
		s.busy++
	}
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if ok {
		b.background++
	}
	b.mu.Unlock()

	if !ok {
		err := c.Conn.Close()
		c.gone()
		return err
	}
	// The deadline also wakes whoever reads or writes.
	_ = c.Conn.SetDeadline(time.Now().Add(lingerTimeout))
	err := half.CloseWrite()
	go func() {
		if err == nil {
			_, _ = io.Copy(io.Discard, c.Conn)
		}
		_ = c.Conn.Close()
		c.gone()
		b.mu.Lock()
		b.doneLocked()
		b.mu.Unlock()
	}()
	return nil
}

// gone gives the token back.
func (c *budgetConn) gone() {
	s, b := c.share, c.share.budget
	b.mu.Lock()
	s.busy--
	if c.reclaimed {
		b.reclaiming--
	}
	b.putBackLocked(s)
	b.unlockAndDispatch()
}

func (c *budgetConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, c.ended(err)
}

func (c *budgetConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	return n, c.ended(err)
}

// ended puts the error right of one who used the connection while it was closed.
func (c *budgetConn) ended(err error) error {
	if err == nil {
		return nil
	}
	c.share.budget.mu.Lock()
	defer c.share.budget.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return err
}

// NetConn returns the connection under this one.
func (c *budgetConn) NetConn() net.Conn { return c.Conn }

// budgetConnKey is where a pgconn.PgConn keeps its budgetConn, which may be under TLS and other wrappers.
const budgetConnKey = "pgxtenant.budgetConn"

func budgetConnOf(conn *pgx.Conn) *budgetConn {
	if conn == nil {
		return nil
	}
	c, _ := conn.PgConn().CustomData()[budgetConnKey].(*budgetConn)
	return c
}

// open makes a pool whose connections count, and who waits for them does by weight. Without a budget the share is nil.
func (b *budget) open(ctx context.Context, config *pgxpool.Config, weight func() float64) (*pgxpool.Pool, *share, error) {
	if b == nil {
		pool, err := pgxpool.NewWithConfig(ctx, config)
		return pool, nil, err
	}
	s := &share{budget: b, max: int(config.MaxConns), turn: turn{weight: weight}}
	s.hook(config)
	// Under mu, since connections for MinConns may be made before this returns.
	b.mu.Lock()
	defer b.mu.Unlock()
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, nil, err
	}
	s.pool = pool
	s.last = len(b.shares) == 0 // the first is the shared pool
	b.shares[pool] = s
	return pool, s, nil
}

// remove forgets a pool that has been closed.
func (b *budget) remove(pool *pgxpool.Pool) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.shares, pool)
}

// borrowed counts connections that came from AcquireAllIdle, which no tracer sees.
func (b *budget) borrowed(conns []*pgxpool.Conn) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, conn := range conns {
		if c := budgetConnOf(conn.Conn()); c != nil && !c.closed && !c.busy {
			c.busy = true
			c.share.busy++
		}
	}
}

// hook puts the share's hooks around those that config has.
func (s *share) hook(config *pgxpool.Config) {
	tracer := config.ConnConfig.Tracer
	config.ConnConfig.Tracer = &budgetTracer{QueryTracer: tracer, share: s}

	beforeConnect := config.BeforeConnect
	config.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.Tracer = tracer // the pool has taken its part of budgetTracer; connections need none
		a := admissionOf(ctx, s)
		if ctx.Value(reclaimKey{}) != nil {
			return errNoneIdle
		}
		if beforeConnect != nil {
			if err := beforeConnect(ctx, cc); err != nil {
				return err
			}
		}
		if a != nil {
			if err := a.need(ctx); err != nil {
				return err
			}
		}
		(&attempt{share: s, admission: a}).hook(cc)
		return nil
	}

	afterConnect := config.AfterConnect
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		if afterConnect != nil {
			if err := afterConnect(ctx, conn); err != nil {
				return err
			}
		}
		s.made(budgetConnOf(conn))
		return nil
	}

	prepare := config.PrepareConn
	config.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		if ctx.Value(reclaimKey{}) != nil {
			s.budget.mu.Lock()
			if c := budgetConnOf(conn); c != nil && !c.closed && !c.busy {
				c.busy, c.reclaimed = true, true // takes over the counts
				s.budget.mu.Unlock()
				return false, errReclaimed
			}
			s.budget.mu.Unlock()
			return false, errNoneIdle // it is closed already, and its token back
		}
		return prepare(ctx, conn)
	}

	if ping := config.ShouldPing; ping != nil {
		config.ShouldPing = func(ctx context.Context, p pgxpool.ShouldPingParams) bool {
			return ctx.Value(reclaimKey{}) == nil && ping(ctx, p)
		}
	} else {
		config.ShouldPing = func(ctx context.Context, p pgxpool.ShouldPingParams) bool {
			return p.IdleDuration > time.Second && ctx.Value(reclaimKey{}) == nil // pgxpool's own rule
		}
	}
}

// made ends the making of a connection. If its caller has gone, it is idle now.
func (s *share) made(c *budgetConn) {
	if c == nil {
		return
	}
	b := s.budget
	b.mu.Lock()
	c.making = false
	if c.busy && !c.closed {
		c.busy = false
		s.busy--
	}
	b.unlockAndDispatch()
}

// attempt is the making of one pool connection, which may dial several servers in turn, and later again
// to have a query cancelled.
type attempt struct {
	share     *share
	admission *admission  // nil for a connection in the background
	current   *budgetConn // guarded by budget.mu
}

func (t *attempt) hook(cc *pgx.ConnConfig) {
	dial := cc.DialFunc
	cc.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := t.token(ctx)
		if err != nil {
			return nil, err
		}
		conn, err := dial(ctx, network, addr)
		if c == nil {
			return conn, err
		}
		if err != nil {
			c.Conn = noConn{}
			_ = c.Close()
			return nil, err
		}
		c.Conn = conn
		return c, nil
	}
	afterConnect := cc.AfterConnect
	cc.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		t.share.budget.mu.Lock()
		conn.CustomData()[budgetConnKey] = t.current
		t.share.budget.mu.Unlock()
		if afterConnect != nil {
			return afterConnect(ctx, conn)
		}
		return nil
	}
}

// token makes a budgetConn that holds a token, or nil for a dial that needs none: while the attempt has
// a connection, another one to the server can only be a request to cancel.
func (t *attempt) token(ctx context.Context) (*budgetConn, error) {
	s, b, a := t.share, t.share.budget, t.admission
	b.mu.Lock()
	if t.current != nil && !t.current.closed {
		b.mu.Unlock()
		return nil, nil
	}
	if a != nil && !a.token && !a.finished { // the first server was no good, and its token is gone
		b.mu.Unlock()
		if err := a.need(ctx); err != nil {
			return nil, err
		}
		b.mu.Lock()
	}
	defer b.mu.Unlock()
	c := &budgetConn{share: s, making: true}
	switch {
	case a != nil && a.token:
		a.useLocked()
		a.conn = c
	case b.free > 0 && b.waiting == 0: // in the background, or its caller has gone
		b.takeLocked(s)
		s.busy++
		c.busy = true
	default:
		return nil, errNoRoom
	}
	t.current = c
	return c, nil
}

// noConn stands for a connection that was not made.
type noConn struct{ net.Conn }

func (noConn) Close() error { return nil }

// budgetTracer tells the budget when checkouts begin and end. Only the pool sees it; queries are traced
// by what the config had before.
type budgetTracer struct {
	pgx.QueryTracer
	share *share
}

func (t *budgetTracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireStartData) context.Context {
	if ctx.Value(reclaimKey{}) != nil {
		return ctx
	}
	if traced, ok := t.QueryTracer.(pgxpool.AcquireTracer); ok {
		ctx = traced.TraceAcquireStart(ctx, pool, data)
	}
	if a := admissionOf(ctx, t.share); a != nil && a.enter() {
		return ctx
	}
	a, err := t.share.admit(ctx)
	if err != nil {
		return ctx // which has ended, or the pool has: Acquire finds out itself
	}
	a.entered = true
	return a
}

func (t *budgetTracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if ctx.Value(reclaimKey{}) != nil {
		return
	}
	if a := admissionOf(ctx, t.share); a != nil {
		a.finish(budgetConnOf(data.Conn))
	}
	if traced, ok := t.QueryTracer.(pgxpool.AcquireTracer); ok {
		traced.TraceAcquireEnd(ctx, pool, data)
	}
}

// TraceRelease runs while the connection is not yet idle. If it is to be given up for another pool's
// caller, it is closed here, and the pool will find it so.
func (t *budgetTracer) TraceRelease(pool *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	if traced, ok := t.QueryTracer.(pgxpool.ReleaseTracer); ok {
		traced.TraceRelease(pool, data)
	}
	c := budgetConnOf(data.Conn)
	if c == nil {
		return
	}
	s, b := t.share, t.share.budget
	b.mu.Lock()
	if !c.busy || c.closed {
		b.mu.Unlock()
		return
	}
	c.busy = false
	s.busy--
	victims := b.dispatchLocked()
	if i := slices.Index(victims, s); i >= 0 {
		c.busy, c.reclaimed = true, true // takes over the counts
		victims = slices.Delete(victims, i, i+1)
		b.doneLocked()
	}
	giveUp := c.reclaimed
	b.mu.Unlock()
	b.reclaim(victims)
	if giveUp {
		// Closing sends one message and waits for nothing, unless the network is stuck.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = data.Conn.Close(ctx)
	}
}

type admissionKey struct{}

func (a *admission) Value(key any) any {
	if key == (admissionKey{}) {
		return a
	}
	return a.Context.Value(key)
}

// admissionOf returns the innermost admission of ctx, if it is to s.
func admissionOf(ctx context.Context, s *share) *admission {
	if a, _ := ctx.Value(admissionKey{}).(*admission); a != nil && a.share == s {
		return a
	}
	return nil
}

// enter reports whether the admission is still unused.
func (a *admission) enter() bool {
	a.share.budget.mu.Lock()
	defer a.share.budget.mu.Unlock()
	if a.entered || a.finished {
		return false
	}
	a.entered = true
	return true
}

var (
	errReclaimed = errors.New("pgxtenant: connection given up for another pool")
	errNoneIdle  = errors.New("pgxtenant: no idle connection to give up")
	errNoRoom    = errors.New("pgxtenant: Config.MaxConns leaves no room for a connection in the background")
)

// closeIdle closes one idle connection, and reports false if there is none. It does not wait.
func (s *share) closeIdle() bool {
	for try := range 3 {
		_, err := s.pool.Acquire(&reclaimContext{Context: context.Background()})
		if errors.Is(err, errReclaimed) {
			return true
		}
		if try < 2 {
			runtime.Gosched() // one that is being released is idle in an instant
		}
	}
	return false
}

// reclaimContext takes an idle connection from a pool if there is one. Puddle asks Done first to see whether
// the context is alive, and again only to wait, which is when this one ends.
type reclaimContext struct {
	context.Context
	asked atomic.Bool
}

type reclaimKey struct{}

var ended = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (c *reclaimContext) Done() <-chan struct{} {
	if !c.asked.Swap(true) {
		return nil
	}
	return ended
}

func (c *reclaimContext) Err() error { return errNoneIdle }

func (c *reclaimContext) Value(key any) any {
	if key == (reclaimKey{}) {
		return true
	}
	return nil
}
