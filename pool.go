package pgxtenant

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// isolatedPool is the pool of one database tenant. It is opened once for all who ask, serves until it
// is taken out of the set (evicted), then drains: it is closed when the last reference is gone, and
// ends when the last connection is returned. It may be used by any number of goroutines.
type isolatedPool struct {
	// A checkout touches what stands before ready, and no more: a cache line, if the whole is as long as some of them. With hundreds of pools in
	// turn it is cache lines that take its time.
	set  *isolatedPools
	pool *pgxpool.Pool // set when ready is closed

	// first is the room under Config.MaxConns that the opening has waited for, and is now the first caller's.
	first atomic.Pointer[admission]

	// refs are calls of Acquire that are under way, and leases. While there are any, pgxpool's Close must
	// not begin, for it would fail them; connections that are out need none, since Close waits for
	// them. Who adds one without holding set.mu looks at draining after, and gives it back if that is set.
	refs     atomic.Int64
	leases   atomic.Int32
	draining atomic.Bool
	lastUse  atomic.Int64 // its number among all of set.uses
	lastUsed atomic.Int64 // when a checkout began, or was seen under way, by set.clock

	// Either err or the pool is set when ready is closed.
	ready chan struct{}
	err   error

	gate *turnstile // before the pool; nil with Config.ArrivalOrder

	tenant Tenant // as of the opening; its Plan and Settings may be outdated

	// Guarded by set.mu.
	dropped bool               // evicted while being opened
	waiting bool               // the opening waits for room under Config.MaxConns
	closing bool               // the closer has been started
	reason  string             // why it drains
	cancel  context.CancelFunc // ends the opening

	_ [48]byte // to the end of a cache line
}

// isolatedPools are the pools of one TenantDB's database tenants.
type isolatedPools struct {
	db    *TenantDB
	epoch time.Time
	clock atomic.Int64 // nanoseconds since epoch, as of the janitor's last look: reading the time takes as long as the rest of get
	uses  atomic.Int64 // checkouts so far, but those in a row from one pool

	// mu guards what follows. Nothing that blocks is done under it, and no function of the user's called. A
	// checkout from the pool that served its tenant last time does without it.
	mu                        sync.Mutex
	open                      map[string]*isolatedPool   // by tenant ID; at most Config.MaxPools
	opening                   map[string]*isolatedPool   // by tenant ID
	others                    map[*isolatedPool]struct{} // all that are not in open: opening and draining
	failed                    map[string]failedOpening   // by tenant ID
	retired                   counters                   // of pools that have ended
	opened, evicted, failures int64                      // pools so far
	janitor                   bool                       // has been started
	closed                    bool

	wg sync.WaitGroup // one for each pool until it has ended, and one for the janitor
}

// failedOpening is what is remembered of it.
type failedOpening struct {
	connString string
	err        error
	until      time.Time
}

// Why pools are closed, for the log.
const (
	reasonFull    = "Config.MaxPools reached"
	reasonIdle    = "idle"
	reasonEvicted = "evicted"
	reasonMoved   = "connection string changed"
	reasonClosed  = "TenantDB closed"
)

func (s *isolatedPools) init(db *TenantDB) {
	s.db, s.epoch = db, time.Now()
	s.uses.Store(1) // which no pool has noted yet
	s.open = make(map[string]*isolatedPool)
	s.opening = make(map[string]*isolatedPool)
	s.others = make(map[*isolatedPool]struct{})
	s.failed = make(map[string]failedOpening)
}

// get returns the open pool of bd's tenant with a reference to it, opening it first if need be.
func (s *isolatedPools) get(ctx context.Context, bd *binding) (*isolatedPool, error) {
	if p := bd.pool.Load(); p != nil && p.ref() {
		p.used()
		return p, nil
	}
	p, err := s.find(ctx, bd)
	if err != nil {
		return nil, err
	}
	bd.pool.Store(p)
	p.used()
	return p, nil
}

// find is get for a tenant whose pool is not at hand.
func (s *isolatedPools) find(ctx context.Context, bd *binding) (*isolatedPool, error) {
	t := &bd.tenant
	if p := s.peek(t); p != nil {
		return p, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, s.db.failure(ctx, bd, err)
	}
	s.mu.Lock()
	p, err := s.joinLocked(ctx, t)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}

	select {
	case <-p.ready:
		if p.err != nil {
			return nil, p.err
		}
		return p, nil
	case <-ctx.Done():
		p.leave()
		return nil, &TenantError{t.ID, "open pool", ctx.Err()}
	case <-s.db.closing:
		p.leave()
		return nil, ErrClosed
	}
}

// joinLocked returns t's pool with a reference to it: the open one, the one being opened, or one whose
// opening it starts. mu must be held.
func (s *isolatedPools) joinLocked(ctx context.Context, t *Tenant) (*isolatedPool, error) {
	if s.closed {
		return nil, ErrClosed
	}
	if p, ok := s.open[t.ID]; ok {
		if p.tenant.ConnString == t.ConnString {
			p.refs.Add(1)
			return p, nil
		}
		s.retireLocked(p, reasonMoved)
	}
	if p, ok := s.opening[t.ID]; ok {
		if p.tenant.ConnString == t.ConnString {
			p.refs.Add(1)
			return p, nil
		}
		s.dropLocked(p, reasonMoved)
	}
	if f, ok := s.failed[t.ID]; ok {
		if wait := time.Until(f.until); wait > 0 && f.connString == t.ConnString {
			return nil, &TenantError{t.ID, "open pool", fmt.Errorf("%w (tried before; the next attempt is made in %v)", f.err, wait.Round(time.Millisecond))}
		}
		delete(s.failed, t.ID)
	}
	// A place is only taken from another pool once this one is open, so that a server that does not answer
	// costs nobody a pool. But there must be one to take.
	if surplus := len(s.open) + len(s.opening) + 1 - s.db.config.MaxPools; surplus > 0 && len(s.unusedLocked(surplus)) < surplus {
		return nil, &TenantError{t.ID, "open pool", fmt.Errorf("%w: all %d that Config.MaxPools allows", ErrPoolsBusy, s.db.config.MaxPools)}
	}

	opening, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &isolatedPool{set: s, tenant: *t, ready: make(chan struct{}), cancel: cancel}
	p.refs.Store(1)
	s.opening[t.ID] = p
	s.others[p] = struct{}{}
	s.wg.Add(1)
	s.startJanitorLocked()
	go p.run(opening)
	return p, nil
}

// peek returns the open pool of t with a reference to it, or nil.
func (s *isolatedPools) peek(t *Tenant) *isolatedPool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.open[t.ID]
	if !ok || p.tenant.ConnString != t.ConnString {
		return nil
	}
	p.refs.Add(1)
	return p
}

// ref takes a reference, and reports whether the pool is still to be used: one that drains is not.
func (p *isolatedPool) ref() bool {
	p.refs.Add(1)
	if p.draining.Load() {
		p.unref()
		return false
	}
	return true
}

// unref gives a reference back.
func (p *isolatedPool) unref() {
	// Either this sees draining, or whoever sets it after this sees no reference.
	if p.refs.Add(-1) == 0 && p.draining.Load() {
		p.set.mu.Lock()
		p.set.closeUnusedLocked(p)
		p.set.mu.Unlock()
	}
}

// leave is unref for a caller who no longer waits for the opening. The opening goes on for the next
// one, unless it has not even begun: it would take other callers' room under Config.MaxConns.
func (p *isolatedPool) leave() {
	p.unref()
	p.set.mu.Lock()
	abandoned := p.refs.Load() == 0
	if p.waiting && abandoned {
		p.set.dropLocked(p, reasonEvicted)
		p.cancel()
	}
	p.set.mu.Unlock()
	if abandoned {
		p.dropFirst()
	}
}

// enter returns the context for a checkout, which is ctx but for the first.
func (p *isolatedPool) enter(ctx context.Context) context.Context {
	if p.first.Load() != nil {
		if a := p.first.Swap(nil); a != nil {
			a.Context = ctx
			return a
		}
	}
	return ctx
}

// dropFirst gives the first caller's room to others.
func (p *isolatedPool) dropFirst() {
	if a := p.first.Swap(nil); a != nil {
		a.finish(nil)
	}
}

// run opens the pool and tells those who wait.
func (p *isolatedPool) run(ctx context.Context) {
	s := p.set
	defer p.cancel()
	pool, err := p.open(WithTenant(ctx, p.tenant))
	p.pool = pool

	log := s.db.config.Logger.With("tenant", p.tenant.ID)
	s.mu.Lock()
	if s.opening[p.tenant.ID] == p {
		delete(s.opening, p.tenant.ID)
	}
	if err != nil {
		delete(s.others, p)
		p.err = s.rememberLocked(p, err)
	} else {
		p.used()
		s.publishLocked(p)
	}
	s.mu.Unlock()
	close(p.ready)

	if err == nil {
		if p.refs.Load() == 0 {
			p.dropFirst() // all have left
		}
		log.Debug("isolated pool opened")
		return
	}
	log.Warn("isolated pool not opened", "error", p.err)
	if pool != nil {
		p.end()
	}
	s.wg.Done()
}

// publishLocked puts an opened pool into the set. mu must be held.
func (s *isolatedPools) publishLocked(p *isolatedPool) {
	s.opened++
	s.db.load.events.pool(p.tenant.ID, "opened")
	if p.dropped || s.closed {
		s.drainLocked(p)
		return
	}
	for len(s.open) >= s.db.config.MaxPools {
		// If all are in use by now, the oldest goes: it serves those who have it to the end.
		victim := s.unusedLocked(1)
		if victim == nil {
			victim = s.byUseLocked()
		}
		s.retireLocked(victim[0], reasonFull)
	}
	delete(s.others, p)
	s.open[p.tenant.ID] = p
}

// rememberLocked keeps the failure of an opening, and returns it as those who wait for it are to see
// it. mu must be held.
func (s *isolatedPools) rememberLocked(p *isolatedPool, cause error) error {
	if s.closed {
		return ErrClosed
	}
	s.failures++
	s.db.load.events.pool(p.tenant.ID, "not opened: "+errorCode(cause))
	if retry := s.db.config.OpenRetry; retry > 0 && !p.dropped {
		s.failed[p.tenant.ID] = failedOpening{p.tenant.ConnString, cause, time.Now().Add(retry)}
		if len(s.failed) > 2*s.db.config.MaxPools {
			s.forgetFailuresLocked()
		}
		cause = fmt.Errorf("%w (the next attempt is made in %v)", cause, retry)
	}
	return &TenantError{p.tenant.ID, "open pool", cause}
}

func (s *isolatedPools) forgetFailuresLocked() {
	for id, f := range s.failed {
		if time.Until(f.until) <= 0 {
			delete(s.failed, id)
		}
	}
}

// unusedLocked returns up to n open pools that nobody uses, the least recently used first. mu must be held.
func (s *isolatedPools) unusedLocked(n int) (unused []*isolatedPool) {
	for _, p := range s.byUseLocked() {
		if !p.inUse() {
			if unused = append(unused, p); len(unused) == n {
				break
			}
		}
	}
	return unused
}

// byUseLocked returns all open pools, the least recently used first. mu must be held. The order is made when it is
// asked for, which only the opening of a pool does: a list would have to be kept in order by each checkout, under mu.
func (s *isolatedPools) byUseLocked() []*isolatedPool {
	type use struct {
		at   int64 // which may change meanwhile
		pool *isolatedPool
	}
	uses := make([]use, 0, len(s.open))
	for _, p := range s.open {
		uses = append(uses, use{p.lastUse.Load(), p})
	}
	slices.SortFunc(uses, func(a, b use) int { return cmp.Compare(a.at, b.at) })
	pools := make([]*isolatedPool, len(uses))
	for i, u := range uses {
		pools[i] = u.pool
	}
	return pools
}

func (p *isolatedPool) inUse() bool { return p.refs.Load() > 0 || p.pool.Stat().AcquiredConns() > 0 }

// retireLocked takes an open pool out of the set. mu must be held.
func (s *isolatedPools) retireLocked(p *isolatedPool, reason string) {
	delete(s.open, p.tenant.ID)
	p.reason = reason
	s.db.load.events.pool(p.tenant.ID, "closed: "+reason)
	s.others[p] = struct{}{}
	s.drainLocked(p)
}

// dropLocked takes a pool that is being opened out of the set: it drains when it is open, and serves
// only those who wait for it. mu must be held.
func (s *isolatedPools) dropLocked(p *isolatedPool, reason string) {
	if s.opening[p.tenant.ID] == p {
		delete(s.opening, p.tenant.ID)
	}
	p.dropped, p.reason = true, reason
}

func (s *isolatedPools) drainLocked(p *isolatedPool) {
	s.evicted++
	p.draining.Store(true)
	s.closeUnusedLocked(p)
}

// closeUnusedLocked starts to close a draining pool once it has no reference. mu must be held.
func (s *isolatedPools) closeUnusedLocked(p *isolatedPool) {
	if p.refs.Load() > 0 || p.closing {
		return
	}
	p.closing = true
	go func() {
		defer s.wg.Done()
		p.end()
		s.db.config.Logger.Debug("isolated pool closed", "tenant", p.tenant.ID, "reason", p.reason)
	}()
}

// end closes the pool, which waits for the connections that are out.
func (p *isolatedPool) end() {
	p.pool.Close()
	p.set.db.budget.remove(p.pool)
	last := countersOf(p.pool.Stat(), p.gate)
	last.maxConns = 0 // of the sums only those over time go on counting
	p.set.mu.Lock()
	delete(p.set.others, p)
	p.set.retired.add(last)
	p.pool, p.gate = nil, nil // bindings may keep p
	p.set.mu.Unlock()
}

func (s *isolatedPools) evict(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failed, id)
	if p, ok := s.open[id]; ok {
		s.retireLocked(p, reasonEvicted)
	}
	if p, ok := s.opening[id]; ok {
		s.dropLocked(p, reasonEvicted)
	}
}

// places returns where the open pools lead, and those being opened, by tenant ID: all, or only the one of id.
func (s *isolatedPools) places(id string) map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	places := make(map[string]string)
	for _, p := range s.open {
		if id == "" || p.tenant.ID == id {
			places[p.tenant.ID] = p.tenant.ConnString
		}
	}
	for _, p := range s.opening {
		if id == "" || p.tenant.ID == id {
			places[p.tenant.ID] = p.tenant.ConnString
		}
	}
	return places
}

func (s *isolatedPools) reset() {
	s.mu.Lock()
	pools := slices.Collect(maps.Values(s.open))
	for _, p := range pools {
		p.refs.Add(1) // one that is retired meanwhile must not end
	}
	s.mu.Unlock()
	for _, p := range pools {
		p.pool.Reset()
		p.unref()
	}
}

// close takes all pools out of the set, without waiting for them to end.
func (s *isolatedPools) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, p := range s.open {
		s.retireLocked(p, reasonClosed)
	}
	for _, p := range s.opening {
		s.dropLocked(p, reasonClosed)
		p.cancel()
	}
}

func (s *isolatedPools) wait() { s.wg.Wait() }

// maxClockStep is how late isolatedPools.clock may be.
const maxClockStep = time.Second

// startJanitorLocked starts the goroutine that sets the clock and closes idle pools, with the first pool. mu must
// be held.
func (s *isolatedPools) startJanitorLocked() {
	if s.janitor {
		return
	}
	s.janitor = true
	timeout, step := s.db.config.IdleTimeout, maxClockStep
	if timeout >= 0 {
		step = min(step, max(timeout/4, time.Millisecond))
	}
	looked := s.setClock()
	s.wg.Go(func() {
		ticker := time.NewTicker(step)
		defer ticker.Stop()
		for {
			select {
			case <-s.db.closing:
				return
			case <-ticker.C:
			}
			if now := s.setClock(); timeout >= 0 && now-looked >= timeout/4 {
				looked = now
				s.retireIdle(now, timeout+step)
			}
		}
	})
}

func (s *isolatedPools) setClock() time.Duration {
	now := time.Since(s.epoch)
	s.clock.Store(int64(now))
	return now
}

// used notes that a checkout begins. What has been noted is only looked at, which costs less than a store.
func (p *isolatedPool) used() {
	if p.lastUse.Load() != p.set.uses.Load() {
		p.lastUse.Store(p.set.uses.Add(1))
	}
	if now := p.set.clock.Load(); p.lastUsed.Load() != now {
		p.lastUsed.Store(now)
	}
}

// retireIdle closes the pools that nobody has used for as long as timeout, which must make up for the clock's step.
func (s *isolatedPools) retireIdle(now, timeout time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.open {
		if p.inUse() {
			p.lastUsed.Store(int64(now)) // idle from when it was last seen in use, not from the checkout
		} else if now-time.Duration(p.lastUsed.Load()) >= timeout {
			s.retireLocked(p, reasonIdle)
		}
	}
	s.forgetFailuresLocked()
}
