package tenantcache

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"
)

// GetOrLoad returns the value of key; if there is none it calls load and keeps what that returns for ttl, of which
// zero means Config.TTL.
//
// However many goroutines of a process ask for the same key of the same tenant meanwhile, load is called once, and
// all get its value, each its own copy of it: what load returns goes through the codec in any case, so nobody sees a
// difference between a value that was cached and one that was not. Who must see something newer than what the load
// may have read, having called Set, Delete or an invalidation in between, gets another load.
//
// load runs in a goroutine of its own, under a context that has ctx's tenant and other values but not its
// cancellation: it goes on when its first caller leaves, for Config.LoadTimeout at most. It must return when its
// context is done; Close of the Store waits for it. Each caller waits for as long as its own ctx says. An error of
// load goes as it is to all who waited and is not kept, but see Config.RememberErrors; a panic is a *PanicError. Nor
// is a value kept that the store does not take.
//
// When Redis fails load is called all the same, unless RedisConfig.OnFailure says otherwise.
func (c *Cache[V]) GetOrLoad(ctx context.Context, key string, ttl time.Duration, load func(ctx context.Context) (V, error)) (value V, err error) {
	e, err := c.entry(ctx, key, true)
	if err != nil {
		return value, err
	}
	if ttl, err = c.ttl(ttl); err != nil {
		return value, failed(e, "read the cache", err)
	}
	j := &job[V]{cache: c, entry: e, ttl: ttl, load: load}
	before := c.flights.landings()
	h, err := c.find(ctx, e)
	if err == nil && h.ok {
		if c.isEarly(&h) {
			j.state = state{generations: h.generations, head: h.head()}
			j.start(ctx, before, true)
		}
		return h.value, h.err
	}
	if err == nil && !h.known {
		h.generations, err = c.store.ensure(ctx, e, c.keep(ttl))
		// A Cluster's nodes may answer of different moments: no generations yet, and an entry that is of these.
		if err == nil && c.read(e, &h) && h.ok {
			return h.value, h.err
		}
	}
	switch {
	case err == nil:
		j.state = state{generations: h.generations, head: h.head()}
	case !c.mayProceed(ctx):
		return value, failed(e, "read the cache", err)
	}
	return c.wait(ctx, e, j.start(ctx, before, false))
}

// isEarly decides whether a hit refreshes its entry. It is the rule of XFetch (Vattani and others, Optimal
// Probabilistic Cache Stampede Prevention, VLDB 2015) with a quarter of the window for the cost of a load.
func (c *Cache[V]) isEarly(h *hit[V]) bool {
	window := c.config.EarlyRefresh
	if window == 0 {
		return false
	}
	left := h.left()
	return left < window && rand.Float64() < math.Exp(-4*float64(left)/float64(window))
}

func (c *Cache[V]) wait(ctx context.Context, e *entry, f *flight) (value V, err error) {
	select {
	case <-f.done:
	case <-ctx.Done():
		return value, failed(e, "wait for a load", ctx.Err())
	}
	if f.err != nil {
		return value, f.err
	}
	value, remembered, err := c.decode(f.kind, f.payload)
	if err != nil {
		return value, failed(e, "load", fmt.Errorf("%w: it does not read what it wrote: %w", ErrCodec, err))
	}
	return value, remembered
}

// state is what a load is based on: the generations, and the entry that was there. Only who has seen the same may
// share the load: one who deleted the entry, or saw that somebody did, has not. The zero value is of those who could
// not see anything.
type state struct {
	generations
	head string
}

type flightKey struct {
	tenant, key string
	state       state
}

// flight is a load that is going on. What comes before done is set before it is closed.
type flight struct {
	kind    byte
	payload []byte
	err     error

	done chan struct{}
}

// flights are the loads of a Cache.
type flights struct {
	mu      sync.Mutex
	flights map[flightKey]*flight
	landed  uint64
}

// landings counts the loads that have ended.
func (fs *flights) landings() uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.landed
}

// join returns the flight of k, and whether the caller must fly it. doubtful means that another one has landed since
// the caller looked into the store, so it may have missed what that stored.
func (fs *flights) join(k flightKey, before uint64) (f *flight, mine, doubtful bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f := fs.flights[k]; f != nil {
		return f, false, false
	}
	if fs.flights == nil {
		fs.flights = map[flightKey]*flight{}
	}
	f = &flight{done: make(chan struct{})}
	fs.flights[k] = f
	return f, true, fs.landed != before
}

// land ends a flight and lets the next caller begin another. It reports false if it has ended already.
func (fs *flights) land(k flightKey, f *flight, kind byte, payload []byte, err error) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.flights[k] != f {
		return false
	}
	delete(fs.flights, k)
	fs.landed++
	f.kind, f.payload, f.err = kind, payload, err
	close(f.done)
	return true
}

// job is one load to be done.
type job[V any] struct {
	cache *Cache[V]
	entry *entry
	ttl   time.Duration
	load  func(context.Context) (V, error)
	state state
}

// start begins the load, or finds the one that another caller has begun.
func (j *job[V]) start(ctx context.Context, before uint64, refresh bool) *flight {
	c := j.cache
	k := flightKey{j.entry.tenant.ID, j.entry.key, j.state}
	f, mine, doubtful := c.flights.join(k, before)
	if !mine {
		if !refresh {
			c.core.sharedLoads.Add(1)
		}
		return f
	}
	if !c.core.spawn(func() { j.fly(ctx, k, f, doubtful) }) {
		c.flights.land(k, f, 0, nil, failed(j.entry, "load", ErrClosed))
		return f
	}
	if refresh {
		c.core.refreshes.Add(1)
	}
	return f
}

func (j *job[V]) fly(ctx context.Context, k flightKey, f *flight, doubtful bool) {
	c := j.cache
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.config.LoadTimeout)
	defer cancel()
	defer context.AfterFunc(c.core.ctx, cancel)()
	land := func(kind byte, payload []byte, err error) {
		if c.flights.land(k, f, kind, payload, err) && err != nil {
			c.core.loadErrors.Add(1)
		}
	}
	// Of a loader that ends its goroutine, or a function of the configuration's that panics: anything else has landed by then.
	defer func() {
		p := &PanicError{}
		if v := recover(); v != nil {
			p = &PanicError{Value: v, Stack: debug.Stack()}
		}
		land(0, nil, failed(j.entry, "load", p))
	}()
	// A loader that does not heed its context keeps its goroutine, but nobody who waits.
	defer context.AfterFunc(ctx, func() { land(0, nil, failed(j.entry, "load", c.overdue())) })()

	if doubtful {
		h := hit[V]{}
		var err error
		if h.found, err = c.store.look(ctx, j.entry); err == nil && h.generations == j.state.generations {
			if c.read(j.entry, &h); h.ok && h.head() != j.state.head {
				land(h.raw[0], h.raw[headerLen:], nil)
				return
			}
		}
	}
	kind, payload, err := j.call(ctx)
	switch {
	case ctx.Err() != nil:
		err = failed(j.entry, "load", c.overdue()) // too late to be stored, or even an error of the context
	case err == nil:
		// Before those who wait go on, so that they find it.
		j.keep(ctx, kind, payload)
	}
	land(kind, payload, err)
}

// overdue is why a flight ended before its load.
func (c *Cache[V]) overdue() error {
	if c.core.ctx.Err() != nil {
		return ErrClosed
	}
	return fmt.Errorf("%w (%v)", ErrLoadTimeout, c.config.LoadTimeout)
}

// call calls the loader, contains its panic, and encodes what it returns.
func (j *job[V]) call(ctx context.Context) (kind byte, payload []byte, err error) {
	c := j.cache
	c.core.loads.Add(1)
	defer func() {
		if p := recover(); p != nil {
			err = failed(j.entry, "load", &PanicError{Value: p, Stack: debug.Stack()})
		}
	}()
	value, err := j.load(ctx)
	for _, remembered := range c.config.RememberErrors {
		if err != nil && errors.Is(err, remembered) {
			return kindError, []byte(remembered.Error()), nil
		}
	}
	if err != nil {
		return 0, nil, err
	}
	if payload, err = c.config.Codec.Encode(value); err != nil {
		return 0, nil, failed(j.entry, "load", fmt.Errorf("%w: %w", ErrCodec, err))
	}
	return kindValue, payload, nil
}

// keep stores what was loaded, if nothing has come in between. Its failure concerns nobody but the counters.
func (j *job[V]) keep(ctx context.Context, kind byte, payload []byte) {
	c := j.cache
	if !j.state.known {
		return
	}
	if len(payload) > c.core.maxValue {
		c.core.big.Add(1)
		return
	}
	ttl := j.ttl
	if kind == kindError {
		ttl = c.config.ErrorTTL
	}
	raw := j.entry.seal(j.state.generations, kind, payload, ttl)
	switch ok, err := c.store.replace(ctx, j.entry, j.state.head, raw, ttl, c.keep(ttl)); {
	case errors.Is(err, ErrTooLarge):
		c.core.big.Add(1)
	case err == nil && !ok:
		c.core.overtaken.Add(1)
	}
}
