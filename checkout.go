package pgxtenant

import (
	"context"
	"sync"
	"sync/atomic"
)

// checkout is the context of one pool.Acquire: the caller's, and done as well once the TenantDB is
// closed, for pgxpool's Close leaves those who wait for a connection waiting.
//
// Joining two cancellations costs several allocations, and most checkouts find an idle connection and
// never wait. Whether this one does is told by puddle itself: it asks Done once to see whether the
// context is alive, and again only when it is about to wait. So the first answer is the caller's own
// channel, and the joined one is made for the second.
type checkout struct {
	context.Context // the caller's

	set   *checkouts
	asked atomic.Int32 // calls of Done

	// joined tells that both is set. They are set once, under set.mu.
	joined atomic.Bool
	both   context.Context // done with the caller's, or once cancelled
	cancel context.CancelCauseFunc
}

// checkouts are the checkouts under way of one TenantDB.
type checkouts struct {
	// keep is set when hooks other than our own get to see the context, and might keep it. Otherwise nothing
	// does that has not called Done twice, and it is used again.
	keep bool
	free sync.Pool

	// mu guards what follows. No context is cancelled under it.
	mu      sync.Mutex
	closed  bool
	waiting map[*checkout]struct{}
}

// begin returns the context for a checkout from a pool. traced tells that the pool has an AcquireTracer,
// which gets the context before puddle does and may ask Done to derive another from it: then the first
// answer is the joined one.
func (s *checkouts) begin(ctx context.Context, traced bool) *checkout {
	c, _ := s.free.Get().(*checkout)
	if c == nil {
		c = &checkout{set: s}
	}
	c.Context = ctx
	if traced {
		c.asked.Store(1)
	}
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
