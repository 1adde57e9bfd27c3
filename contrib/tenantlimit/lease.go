package tenantlimit

import (
	"context"
	"crypto/rand"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// leases are the slots in Redis that this process has, and renews while it has them.
type leases struct {
	store *redisStore
	lasts time.Duration
	name  string // begins the IDs of this process
	last  atomic.Uint64

	mu     sync.Mutex
	held   map[string]map[string]time.Time // by key and ID, since when
	count  int
	ended  chan struct{} // closed when the renewal has ended; nil: it has not begun
	cancel context.CancelFunc
	closed bool
}

func newLeases(store *redisStore, lasts time.Duration) *leases {
	return &leases{store: store, lasts: lasts, name: rand.Text(), held: map[string]map[string]time.Time{}}
}

// newID returns an ID that no other process has.
func (l *leases) newID() string {
	return l.name + "-" + strconv.FormatUint(l.last.Add(1), 36)
}

func (l *leases) add(key, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ids := l.held[key]
	if ids == nil {
		ids = map[string]time.Time{}
		l.held[key] = ids
	}
	ids[id] = time.Now()
	l.count++
	if l.ended == nil && !l.closed {
		ctx, cancel := context.WithCancel(context.Background())
		l.cancel, l.ended = cancel, make(chan struct{})
		go l.keep(ctx, l.ended)
	}
}

func (l *leases) remove(key, id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count--
	delete(l.held[key], id)
	if len(l.held[key]) == 0 {
		delete(l.held, key)
	}
}

func (l *leases) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

func (l *leases) close() {
	l.mu.Lock()
	l.closed = true
	ended := l.ended
	if ended != nil {
		l.cancel()
	}
	l.mu.Unlock()
	if ended != nil {
		<-ended
	}
}

// keep renews until ctx is done. A third of the time that a lease lasts leaves room for one renewal that fails.
func (l *leases) keep(ctx context.Context, ended chan<- struct{}) {
	defer close(ended)
	tick := time.NewTicker(l.lasts / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			l.renew(ctx, now)
		}
	}
}

// renew renews the leases that would not last until the next renewal but one. Those of short calls never come to that.
func (l *leases) renew(ctx context.Context, now time.Time) {
	for key, ids := range l.old(now.Add(-l.lasts / 3)) {
		l.store.renew(ctx, key, ids)
		// A lease that was given back meanwhile may have been made anew.
		if gone := l.gone(key, ids); len(gone) > 0 {
			l.store.giveBack(key, gone...)
		}
	}
}

// old returns the leases that are held since before a time, by their key.
func (l *leases) old(before time.Time) map[string][]any {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := map[string][]any{}
	for key, ids := range l.held {
		for id, since := range ids {
			if since.Before(before) {
				old[key] = append(old[key], id)
			}
		}
	}
	return old
}

// gone returns those of ids that are not held any more.
func (l *leases) gone(key string, ids []any) (gone []any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		if _, ok := l.held[key][id.(string)]; !ok {
			gone = append(gone, id)
		}
	}
	return gone
}
