package tenantcache

import (
	"context"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// A Store keeps the entries of any number of Caches and tenants: [Redis], shared by all processes, or [Memory], of
// one process. It is safe for concurrent use.
type Store interface {
	// InvalidateTenant makes all entries of ctx's tenant invalid, in all namespaces, at a cost that does not
	// depend on how many there are. Loads that go on at the time are not stored. Call it when a tenant is
	// deprovisioned, before its ID is given to another.
	//
	// After an error it must be repeated, or entries may be served until they expire.
	InvalidateTenant(ctx context.Context) error

	// Stats returns what has been counted so far.
	Stats() Stats

	// Close ends loads and refreshes in progress, by their contexts, and returns when they have ended.
	// Afterwards the Store and its Caches fail with ErrClosed.
	Close()

	// look reads an entry and its generations.
	look(ctx context.Context, e *entry) (found, error)
	// ensure returns the generations, and makes those that there are not. They last for keep at least.
	ensure(ctx context.Context, e *entry, keep time.Duration) (generations, error)
	// put stores an entry, whatever is there.
	put(ctx context.Context, e *entry, raw []byte, ttl, keep time.Duration) error
	// replace stores an entry if there still is one with this head; an empty head means none.
	replace(ctx context.Context, e *entry, head string, raw []byte, ttl, keep time.Duration) (bool, error)
	// bury puts tombstones in the place of entries.
	bury(ctx context.Context, entries []entry, keep time.Duration) error
	// invalidate forgets the generation of one namespace of a tenant.
	invalidate(ctx context.Context, tenantID, namespace string) error
	// proceed reports whether a load may go on although the store failed.
	proceed() bool
	shared() *core
}

// Stats are counters since the Store was made, of all its Caches together, and a few states. Those of Redis are
// this process's.
type Stats struct {
	Hits        uint64 // values, and remembered errors, that were found
	Misses      uint64 // all else that was looked for, failures of Redis included
	Stale       uint64 // misses that found an entry of an earlier generation, or one that is not this key's
	Undecodable uint64 // misses that found an entry which the codec does not read

	Loads      uint64 // calls of loaders, refreshes included
	LoadErrors uint64 // those that failed, panicked or took too long
	Shared     uint64 // calls of GetOrLoad that waited for a load that another had begun
	Refreshes  uint64 // loads before the end of an entry
	Overtaken  uint64 // loaded values that were not stored, since the entry was written or deleted meanwhile
	TooLarge   uint64 // values that the store did not take

	Invalidations uint64 // of tenants and namespaces

	Failures     uint64       // calls to Redis that failed or took too long
	Refused      uint64       // calls to Redis that the open circuit breaker spared
	Breaker      BreakerState // zero for Memory
	BreakerOpens uint64       // how often it has opened

	// Of Memory only, and as of now.
	Tenants   int
	Entries   int
	Bytes     int64
	Evictions uint64 // entries that made room, since the Store was made
}

// BreakerState is the state of the circuit breaker before Redis.
type BreakerState uint8

const (
	// BreakerClosed lets all calls through.
	BreakerClosed BreakerState = iota
	// BreakerHalfOpen lets one call through, to see how it fares.
	BreakerHalfOpen
	// BreakerOpen lets none through but Delete and invalidations.
	BreakerOpen
)

// String returns "closed", "half-open" or "open".
func (s BreakerState) String() string {
	switch s {
	case BreakerHalfOpen:
		return "half-open"
	case BreakerOpen:
		return "open"
	}
	return "closed"
}

// counters are the part of Stats that both stores have.
type counters struct {
	hits, misses, stale, undecodable                          atomic.Uint64
	loads, loadErrors, sharedLoads, refreshes, overtaken, big atomic.Uint64
	invalidations                                             atomic.Uint64
}

func (c *counters) stats() Stats {
	return Stats{
		Hits: c.hits.Load(), Misses: c.misses.Load(), Stale: c.stale.Load(), Undecodable: c.undecodable.Load(),
		Loads: c.loads.Load(), LoadErrors: c.loadErrors.Load(), Shared: c.sharedLoads.Load(),
		Refreshes: c.refreshes.Load(), Overtaken: c.overtaken.Load(), TooLarge: c.big.Load(),
		Invalidations: c.invalidations.Load(),
	}
}

// core is what both stores are made of: counters, and the goroutines that end with Close.
type core struct {
	counters
	maxValue int

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu     sync.Mutex // orders Add before Wait
	closed bool
	wg     sync.WaitGroup
}

func newCore(maxValue int) *core {
	c := &core{maxValue: maxValue}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// spawn runs f in a goroutine that Close waits for. It reports false, and does nothing, once Close was called.
func (c *core) spawn(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.wg.Go(f)
	return true
}

func (c *core) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
}

func (c *core) shared() *core { return c }

// check reports why nothing can be asked of the store.
func (c *core) check(ctx context.Context) error {
	if c.ctx.Err() != nil {
		return ErrClosed
	}
	return ctx.Err()
}

// isNil reports whether v is nil, or an interface that holds a nil pointer, which looks as if it were something.
func isNil(v any) bool {
	r := reflect.ValueOf(v)
	return v == nil || r.Kind() == reflect.Pointer && r.IsNil()
}

func orDefault[T comparable](value, byDefault T) T {
	var zero T
	if value == zero {
		return byDefault
	}
	return value
}
