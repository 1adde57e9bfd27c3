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

	set    *checkouts
	asked  atomic.Int32 // calls of Done
	joined atomic.Pointer[joinedContext]
}

type joinedContext struct {
	context.Context
	cancel context.CancelCauseFunc
}

// checkouts are the checkouts under way of one TenantDB.
type checkouts struct {
	// eager joins at the first Done: set when hooks other than our own see the context before puddle does.
	eager bool
	// keep is set when such hooks might keep the context. Otherwise nothing does that has not called Done
	// twice, and it is used again.
	keep bool
	free sync.Pool

	// mu guards what follows. No context is cancelled under it.
	mu      sync.Mutex
	closed  bool
	waiting map[*checkout]struct{}
}

func (s *checkouts) begin(ctx context.Context) *checkout {
	c, _ := s.free.Get().(*checkout)
	if c == nil {
		c = &checkout{set: s}
	}
	c.Context = ctx
	if s.eager {
		c.asked.Store(1)
	}
	return c
}

func (s *checkouts) end(c *checkout) {
	if j := c.joined.Load(); j != nil {
		s.mu.Lock()
		delete(s.waiting, c)
		s.mu.Unlock()
		j.cancel(nil)
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
		c.joined.Load().cancel(ErrClosed)
	}
}

func (c *checkout) Done() <-chan struct{} {
	if c.asked.Add(1) == 1 {
		return c.Context.Done()
	}
	return c.join().Done()
}

func (c *checkout) Err() error {
	j := c.joined.Load()
	if j == nil {
		return c.Context.Err()
	}
	if err := j.Err(); err != nil && context.Cause(j) == ErrClosed {
		return ErrClosed
	}
	return j.Err()
}

func (c *checkout) join() *joinedContext {
	if j := c.joined.Load(); j != nil {
		return j
	}
	ctx, cancel := context.WithCancelCause(c.Context)
	j := &joinedContext{ctx, cancel}
	s := c.set
	s.mu.Lock()
	if first := c.joined.Load(); first != nil { // by puddle's other goroutine
		s.mu.Unlock()
		cancel(nil)
		return first
	}
	c.joined.Store(j)
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
	return j
}
