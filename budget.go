package pgxtenant

import (
	"container/list"
	"context"
	"errors"
	"math"
	"runtime"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// budget limits the server connections of all pools of one TenantDB together (Config.MaxConns). A token
// stands for one connection, from just before it is dialled until its net.Conn is closed.
//
// A checkout is admitted before it enters its pool, if the pool has an idle connection for it, or a
// token can be taken for a new one; otherwise it waits here, in order with all others. Waiting inside
// the pool would be wrong both ways: puddle decides to construct a connection first, and one that is
// released to the pool a moment later would not reach the caller who waits for the construction.
//
// A nil *budget is one without a limit. The hooks that feed it are in budget_hooks.go.
type budget struct {
	limit int

	// mu guards what follows, and the fields of shares, admissions and budgetConns that say so. Of a
	// pool only Stat is called under it.
	mu         sync.Mutex
	free       int // tokens nobody holds
	shares     map[*pgxpool.Pool]*share
	waiting    int   // callers in all queues
	clock      int64 // counts admissions and waiters, to tell which was first
	reclaiming int   // idle connections on their way to being closed for a waiter
	turns      budgetTurns
	retry      *time.Timer
	retryAt    time.Time // when retry fires; zero if it does not
	closed     bool

	background int       // goroutines of the budget's own
	quiet      sync.Cond // signalled when there are none; L is &mu
}

// share is one pool's part in the budget.
type share struct {
	budget *budget
	pool   *pgxpool.Pool // set before the first checkout
	max    int           // the pool's own limit
	last   bool          // the shared pool, whose idle connections are given up last

	// Guarded by budget.mu.
	conns    int       // tokens held, for connections and for admissions that may need one
	busy     int       // of these promised to a caller, in use, or being made; the others are idle
	reserved int       // of these held by admissions
	queue    list.List // of *waiter
	used     int64     // budget.clock at the last admission
	turn     turn

	// Of a pass of dispatchLocked.
	next    *list.Element
	blocked bool
}

// admission is the context of one Acquire on a pool under a budget, and what it holds meanwhile.
type admission struct {
	context.Context
	share *share

	// Guarded by budget.mu.
	entered  bool        // used for an Acquire
	busy     bool        // counted in share.busy
	token    bool        // counted in share.reserved: holds a token that no connection has used yet
	finished bool        // the Acquire has returned
	conn     *budgetConn // being made for it
}

// waiter is a place in a share's queue.
type waiter struct {
	order   int64         // of all waiters
	dialing bool          // needs a token: its pool has already decided to make a connection
	granted chan struct{} // closed, with mu held, when the waiter is taken out of the queue
	token   bool          // what it was granted; otherwise an idle connection
}

var errBudgetClosed = errors.New("pgxtenant: the budget is closed")

func newBudget(limit int, arrival bool) *budget {
	b := &budget{limit: limit, free: limit, shares: make(map[*pgxpool.Pool]*share), turns: budgetTurns{arrival: arrival}}
	b.quiet.L = &b.mu
	return b
}

// close lets all who wait go on, to find their pools closed.
func (b *budget) close() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, s := range b.shares {
		for s.queue.Len() > 0 {
			b.removeLocked(s, s.queue.Front())
		}
	}
	if b.retry != nil {
		b.retry.Stop()
	}
}

// wait returns when no goroutine of the budget's own is left.
func (b *budget) wait() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.background > 0 {
		b.quiet.Wait()
	}
}

// admit waits until ctx may enter the pool, and returns the context to do so with. The error is ctx's,
// or errBudgetClosed.
func (s *share) admit(ctx context.Context) (*admission, error) {
	b := s.budget
	a := &admission{Context: ctx, share: s}
	b.mu.Lock()
	b.clock++
	s.used = b.clock
	switch {
	case b.closed:
		b.mu.Unlock()
		return nil, errBudgetClosed
	case s.queue.Len() == 0 && s.conns > s.busy:
		s.busy++
		a.busy = true
		b.mu.Unlock()
		return a, nil
	case b.waiting == 0 && b.free > 0 && !s.fullLocked():
		b.takeLocked(s)
		s.busy++
		a.busy = true
		a.reserveLocked()
		b.mu.Unlock()
		return a, nil
	}
	w := &waiter{order: b.clock, granted: make(chan struct{})}
	e := s.queue.PushBack(w)
	b.unlockAfterEnqueue(s)
	waits(ctx)
	if err := s.await(e, ctx, nil); err != nil {
		return nil, err
	}
	if !w.token {
		s.awaitIdle()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	a.busy = true
	if w.token {
		a.reserveLocked()
	}
	return a, nil
}

// need waits for a token for an admission whose pool is about to make a connection that nothing was
// reserved for: another caller was quicker to the idle one that a was admitted for, or that one turned out
// dead. ctx ends with the pool; a with its caller.
func (a *admission) need(ctx context.Context) error {
	s, b := a.share, a.share.budget
	b.mu.Lock()
	switch {
	case a.token:
		b.mu.Unlock()
		return nil
	case a.finished:
		b.mu.Unlock()
		return context.Canceled
	case b.closed:
		b.mu.Unlock()
		return errBudgetClosed
	case b.free > 0:
		b.takeLocked(s)
		a.reserveLocked()
		b.mu.Unlock()
		return nil
	}
	// What a was promised is free for others now, and may be needed to make room.
	if a.busy {
		a.busy = false
		s.busy--
	}
	e := s.queue.PushFront(&waiter{dialing: true, granted: make(chan struct{})}) // it has waited its turn before
	b.unlockAfterEnqueue(s)
	if err := s.await(e, a, ctx); err != nil {
		return err
	}
	b.mu.Lock()
	if !a.finished {
		a.busy = true
		a.reserveLocked()
		b.mu.Unlock()
		return nil
	}
	s.busy-- // finish came first, and had nothing to give back
	b.putBackLocked(s)
	b.unlockAndDispatch()
	return context.Canceled
}

// await waits for the grant of the waiter in e. If it returns an error, nothing is left of the waiter.
func (s *share) await(e *list.Element, caller, pool context.Context) error {
	w, b := e.Value.(*waiter), s.budget
	var poolDone <-chan struct{}
	if pool != nil {
		poolDone = pool.Done()
	}
	var err error
	select {
	case <-w.granted:
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.closed {
			return errBudgetClosed
		}
		return nil
	case <-caller.Done():
		err = caller.Err()
	case <-poolDone:
		err = pool.Err()
	}
	b.mu.Lock()
	select {
	case <-w.granted: // in the same moment
		if !b.closed {
			s.busy--
			if w.token {
				b.putBackLocked(s)
			}
		}
	default:
		b.removeLocked(s, e)
	}
	b.unlockAndDispatch()
	return err
}

// awaitIdle gives the connection that a waiter was granted the instant that lies between the moment it
// is known to be released and the moment it is idle. If that is not enough, need will find another.
func (s *share) awaitIdle() {
	for try := range 16 {
		if s.pool.Stat().IdleConns() > 0 {
			return
		}
		if try < 4 {
			runtime.Gosched()
		} else {
			time.Sleep(time.Microsecond << try) // the goroutine that releases it has been set aside
		}
	}
}

// keep turns the connection in use into a promise of one, for whoever finishes or enters the admission
// that is returned. The connection must be released after this; it is not given to anyone else.
func (s *share) keep(conn *budgetConn) *admission {
	b := s.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if conn == nil || conn.closed || !conn.busy {
		return nil
	}
	conn.busy = false
	return &admission{Context: context.Background(), share: s, busy: true}
}

// finish ends an admission with the connection it came to, or without one.
func (a *admission) finish(conn *budgetConn) {
	s, b := a.share, a.share.budget
	b.mu.Lock()
	a.finished = true
	if a.token {
		a.useLocked()
		b.putBackLocked(s)
	}
	switch making := a.conn; {
	case !a.busy:
	case conn != nil && !conn.closed && !conn.busy:
		conn.busy = true // takes over the count
	case conn == nil && making != nil && making.making && !making.closed && !making.busy:
		making.busy = true // until it is made, though for nobody
	default:
		s.busy--
	}
	a.busy = false
	b.unlockAndDispatch()
}

// The methods below want mu held.

// takeLocked takes a free token for s.
func (b *budget) takeLocked(s *share) {
	b.free--
	s.conns++
}

// putBackLocked returns a token that s held.
func (b *budget) putBackLocked(s *share) {
	b.free++
	s.conns--
}

// reserveLocked leaves a token that s holds to a, useLocked takes it away from a again.
func (a *admission) reserveLocked() {
	a.token = true
	a.share.reserved++
}

func (a *admission) useLocked() {
	a.token = false
	a.share.reserved--
}

// fullLocked reports whether the pool's own limit leaves no room for another connection. Hijacked connections
// hold tokens but no room, and when one is hijacked nobody is told, so the pool is asked.
func (s *share) fullLocked() bool {
	return s.conns >= s.max && int(s.pool.Stat().TotalConns())+s.reserved >= s.max
}

func (b *budget) removeLocked(s *share, e *list.Element) {
	s.queue.Remove(e)
	if b.waiting--; b.waiting == 0 {
		b.turns.end()
	}
	close(e.Value.(*waiter).granted)
}

func (b *budget) unlockAfterEnqueue(s *share) {
	b.waiting++
	b.turns.charge(b)
	b.turns.begin(s)
	b.unlockAndDispatch()
}

// unlockAndDispatch ends every change that could help a waiter.
func (b *budget) unlockAndDispatch() {
	victims := b.dispatchLocked()
	b.mu.Unlock()
	b.reclaim(victims)
}

// dispatchLocked grants what can be granted, in order, and returns the pools that must each give up an
// idle connection for those who are left.
func (b *budget) dispatchLocked() (victims []*share) {
	if b.waiting == 0 || b.closed {
		return nil
	}
	b.turns.charge(b)
	for _, s := range b.shares {
		s.next, s.blocked = s.queue.Front(), false
	}
	coming := b.reclaiming // tokens for those who were first
	full := false
	for {
		s := b.firstLocked()
		if s == nil {
			break
		}
		e := s.next
		w := e.Value.(*waiter)
		s.next = e.Next()
		switch {
		case !w.dialing && s.conns > s.busy:
			s.busy++
			b.turns.serve(s)
			b.removeLocked(s, e)
		case !w.dialing && s.fullLocked():
			full, s.blocked = true, true
		case b.free > 0:
			b.takeLocked(s)
			s.busy++
			w.token = true
			b.turns.serve(s)
			b.removeLocked(s, e)
		case coming > 0:
			coming--
		default:
			v := b.victimLocked(s, w)
			if v == nil {
				s.blocked = true // as would be all behind w
				break
			}
			v.busy++ // nobody else's any more
			b.reclaiming++
			b.background++
			victims = append(victims, v)
		}
	}
	if full {
		b.retryLocked(100 * time.Millisecond) // one of its connections may be hijacked
	}
	return victims
}

// firstLocked returns the share whose next waiter of this pass comes before all others.
func (b *budget) firstLocked() (first *share) {
	for _, s := range b.shares {
		if s.next == nil || s.blocked {
			continue
		}
		if first == nil || b.turns.before(s, first, s.next.Value.(*waiter), first.next.Value.(*waiter)) {
			first = s
		}
	}
	return first
}

// victimLocked returns the least recently used pool that has an idle connection to give up for w of
// share s, or nil. A pool whose own callers wait gives nothing to one that has its fair share, since two
// busy pools would otherwise close each other's connections at every release.
func (b *budget) victimLocked(s *share, w *waiter) (victim *share) {
	oldest, fair := int64(math.MaxInt64), 0
	for _, v := range b.shares {
		if v.conns <= v.busy {
			continue
		}
		if v.queue.Len() > 0 && v != s {
			if fair == 0 {
				fair = b.fairLocked(s)
			}
			if s.conns >= fair {
				continue
			}
		}
		used := v.used
		if v.last {
			used = math.MaxInt64 - 1
		}
		if used < oldest {
			oldest, victim = used, v
		}
	}
	return victim
}

// fairLocked is s's part if the pools that are busy divide the budget by their weights.
func (b *budget) fairLocked(s *share) int {
	weights := 0.0
	for _, o := range b.shares {
		if o.busy > 0 || o.queue.Len() > 0 {
			weights += b.weight(o)
		}
	}
	own := b.weight(s)
	return max(1, int(float64(b.limit)*own/max(own, weights)+1e-9))
}

func (b *budget) weight(s *share) float64 {
	if b.turns.arrival {
		return 1
	}
	return s.turn.weightNow()
}

// retryLocked looks at the queues again after d at the latest, for what no event tells.
func (b *budget) retryLocked(d time.Duration) {
	at := time.Now().Add(d)
	if b.closed || b.waiting == 0 || !b.retryAt.IsZero() && b.retryAt.Before(at) {
		return
	}
	b.retryAt = at
	if b.retry != nil {
		b.retry.Reset(d)
		return
	}
	b.retry = time.AfterFunc(d, func() {
		b.mu.Lock()
		b.retryAt = time.Time{}
		b.unlockAndDispatch()
	})
}

// reclaim closes one idle connection of each victim. The token comes back when the server has closed it too.
func (b *budget) reclaim(victims []*share) {
	for _, s := range victims {
		// Not in the caller's goroutine, which may be inside a pool, or closing a connection.
		go func() {
			ok := s.closeIdle()
			b.mu.Lock()
			defer b.mu.Unlock()
			b.doneLocked()
			if !ok { // it was not idle yet, being marked as released just before it is, or is no more
				s.busy--
				b.reclaiming--
				b.retryLocked(time.Millisecond)
			}
		}()
	}
}

// doneLocked ends one of the budget's own goroutines.
func (b *budget) doneLocked() {
	if b.background--; b.background == 0 {
		b.quiet.Broadcast()
	}
}
