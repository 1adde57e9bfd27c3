package pgxtenant

import (
	"context"
	"errors"
	"sync"
	"time"
)

// lease is the part of a call's claims that runs out if they are not renewed.
type lease struct {
	mu     sync.Mutex // guards what follows
	until  time.Time  // other processes leave the claims alone before; zero until there are any
	holds  map[*context.CancelCauseFunc]struct{}
	broken bool
}

var errLeaseLost = errors.New("pgxtenant: the registry could not be reached for so long that another process may take over")

// keepClaims renews the claims of the call until it ends, and ends it when the TenantDB is closed.
func (r *tenantRun) keepClaims() {
	ticker := time.NewTicker(r.o.Lease / 4)
	defer ticker.Stop()
	for {
		select {
		case <-r.db.closing:
			// What is written down last goes on, by connections of the run's own.
			r.cancel(ErrClosed)
			return
		case <-r.ctx.Done():
			return
		case <-ticker.C:
		}
		begun := time.Now()
		ctx, cancel := context.WithTimeout(r.ctx, r.o.Lease/4)
		err := r.beat(ctx)
		cancel()
		r.lease.renewed(err == nil, begun, r.o.Lease)
	}
}

// renewed takes note of an attempt to renew. When the lease is about to run out, what depends on it is cancelled.
func (l *lease) renewed(ok bool, begun time.Time, lease time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ok || l.until.IsZero() {
		l.until, l.broken = begun.Add(lease), false
		return
	}
	if l.broken || time.Until(l.until) > lease/2 {
		return
	}
	l.broken = true
	for cancel := range l.holds {
		(*cancel)(errLeaseLost)
	}
	l.holds = nil
}

// fenced is the context of what is done for a target. A session that holds the target's lock needs no more: who takes
// over its claim finds the lock. Behind a pooler no lock spans two transactions, so that one who has lost the lease
// must not begin another.
func (r *tenantRun) fenced(ctx context.Context, p *runPlace) (context.Context, context.CancelFunc) {
	if p.pooled == nil {
		return context.WithCancel(ctx)
	}
	l := &r.lease
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken {
		cancel(errLeaseLost)
	}
	if l.holds == nil {
		l.holds = make(map[*context.CancelCauseFunc]struct{})
	}
	l.holds[&cancel] = struct{}{}
	return ctx, func() {
		l.mu.Lock()
		delete(l.holds, &cancel)
		l.mu.Unlock()
		cancel(nil)
	}
}
