package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// isolatedPool is the pool of one database tenant. It is opened once for all who ask, serves until it
// is taken out of the set (evicted), then drains: it is closed when the last reference is gone, and
// ends when the last connection is returned. It may be used by any number of goroutines.
type isolatedPool struct {
	set    *isolatedPools
	tenant Tenant // as of the opening; its Plan and Settings may be outdated

	// Set when ready is closed: either err or the pool.
	ready chan struct{}
	err   error
	pool  *pgxpool.Pool
	gate  *turnstile // before the pool; nil with Config.ArrivalOrder

	// first is the room under Config.MaxConns that the opening has waited for, and is now the first caller's.
	first atomic.Pointer[admission]

	// refs are calls of Acquire that are under way, and leases. While there are any, pgxpool's Close must
	// not begin, for it would fail them; connections that are out need none, since Close waits for
	// them. refs are only added under set.mu to a pool in the set, so none come to one that drains.
	refs     atomic.Int64
	leases   atomic.Int32
	draining atomic.Bool
	lastUsed atomic.Int64 // nanoseconds since set.epoch

	// Guarded by set.mu.
	dropped bool               // evicted while being opened
	waiting bool               // the opening waits for room under Config.MaxConns
	closing bool               // the closer has been started
	reason  string             // why it drains
	cancel  context.CancelFunc // ends the opening
}

// isolatedPools are the pools of one TenantDB's database tenants.
type isolatedPools struct {
	db    *TenantDB
	epoch time.Time

	// mu guards what follows. Nothing that blocks is done under it, and no function of the user's called.
	mu                        sync.Mutex
	open                      *simplelru.LRU[string, *isolatedPool] // by tenant ID; never filled beyond its size
	opening                   map[string]*isolatedPool              // by tenant ID
	others                    map[*isolatedPool]struct{}            // all that are not in open: opening and draining
	failed                    map[string]failedOpening              // by tenant ID
	retired                   counters                              // of pools that have ended
	opened, evicted, failures int64                                 // pools so far
	janitor                   bool                                  // has been started
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
	s.open, _ = simplelru.NewLRU[string, *isolatedPool](db.config.MaxPools, nil) // fails only below 1
	s.opening = make(map[string]*isolatedPool)
	s.others = make(map[*isolatedPool]struct{})
	s.failed = make(map[string]failedOpening)
}

// get returns the open pool of t with a reference to it, opening it first if need be.
func (s *isolatedPools) get(ctx context.Context, t *Tenant) (*isolatedPool, error) {
	s.mu.Lock()
	if p, ok := s.open.Get(t.ID); ok && p.tenant.ConnString == t.ConnString {
		p.refs.Add(1)
		s.mu.Unlock()
		p.lastUsed.Store(int64(time.Since(s.epoch)))
		return p, nil
	}
	s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, s.db.failure(ctx, t, err)
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
		p.lastUsed.Store(int64(time.Since(s.epoch)))
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
	if p, ok := s.open.Get(t.ID); ok {
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
	if surplus := s.open.Len() + len(s.opening) + 1 - s.db.config.MaxPools; surplus > 0 && len(s.unusedLocked(surplus)) < surplus {
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
	p, ok := s.open.Peek(t.ID)
	if !ok || p.tenant.ConnString != t.ConnString {
		return nil
	}
	p.refs.Add(1)
	return p
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
		p.lastUsed.Store(int64(time.Since(s.epoch)))
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
	for s.open.Len() >= s.db.config.MaxPools {
		// If all are in use by now, the oldest goes: it serves those who have it to the end.
		victim := s.unusedLocked(1)
		if victim == nil {
			_, oldest, _ := s.open.GetOldest()
			victim = append(victim, oldest)
		}
		s.retireLocked(victim[0], reasonFull)
	}
	delete(s.others, p)
	s.open.Add(p.tenant.ID, p)
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
	for _, p := range s.open.Values() {
		if !p.inUse() {
			if unused = append(unused, p); len(unused) == n {
				break
			}
		}
	}
	return unused
}

func (p *isolatedPool) inUse() bool { return p.refs.Load() > 0 || p.pool.Stat().AcquiredConns() > 0 }

// retireLocked takes an open pool out of the set. mu must be held.
func (s *isolatedPools) retireLocked(p *isolatedPool, reason string) {
	s.open.Remove(p.tenant.ID)
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
	p.set.mu.Unlock()
}

func (s *isolatedPools) evict(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.failed, id)
	if p, ok := s.open.Peek(id); ok {
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
	for _, p := range s.open.Values() {
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
	pools := s.open.Values()
	s.mu.Unlock()
	for _, p := range pools {
		p.pool.Reset()
	}
}

// close takes all pools out of the set, without waiting for them to end.
func (s *isolatedPools) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, p := range s.open.Values() {
		s.retireLocked(p, reasonClosed)
	}
	for _, p := range s.opening {
		s.dropLocked(p, reasonClosed)
		p.cancel()
	}
}

func (s *isolatedPools) wait() { s.wg.Wait() }

// startJanitorLocked starts the goroutine that closes idle pools, with the first pool. mu must be held.
func (s *isolatedPools) startJanitorLocked() {
	timeout := s.db.config.IdleTimeout
	if s.janitor || timeout < 0 {
		return
	}
	s.janitor = true
	s.wg.Go(func() {
		ticker := time.NewTicker(max(timeout/4, time.Millisecond))
		defer ticker.Stop()
		for {
			select {
			case <-s.db.closing:
				return
			case <-ticker.C:
				s.retireIdle(timeout)
			}
		}
	})
}

func (s *isolatedPools) retireIdle(timeout time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Since(s.epoch)
	for _, p := range s.open.Values() {
		if p.inUse() {
			p.lastUsed.Store(int64(now)) // idle from when it was last seen in use, not from the checkout
		} else if now-time.Duration(p.lastUsed.Load()) >= timeout {
			s.retireLocked(p, reasonIdle)
		}
	}
	s.forgetFailuresLocked()
}

// open makes the pool and its first connection. If that fails it returns the pool as well, if there is one.
func (p *isolatedPool) open(ctx context.Context) (pool *pgxpool.Pool, err error) {
	db := p.set.db
	defer func() {
		// A panic here would end the process, since no caller's recover sees this goroutine.
		if v := recover(); v != nil {
			err = fmt.Errorf("pgxtenant: panic while opening the pool: %v", v)
			db.config.Logger.Error("panic while opening a pool", "tenant", p.tenant.ID, "panic", v, "stack", string(debug.Stack()))
		}
	}()
	config, err := p.configure()
	if err != nil {
		return nil, err
	}
	var share *share
	weight := db.binder.limitsOf(p.tenant).Weight
	if pool, share, err = db.budget.open(ctx, config, func() float64 { return weight }); err != nil {
		return nil, err
	}
	if ctx, err = p.waitForRoom(ctx, share); err != nil {
		return pool, err
	}
	ctx, cancel := context.WithTimeout(ctx, db.config.OpenTimeout)
	defer cancel()
	conn, err := pool.Acquire(ctx)
	if err != nil {
		if ctx.Err() == context.DeadlineExceeded {
			err = fmt.Errorf("no connection within %v (Config.OpenTimeout): %w", db.config.OpenTimeout, err)
		}
		return pool, err
	}
	if share != nil {
		if first := share.keep(budgetConnOf(conn.Conn())); first != nil {
			p.first.Store(first)
		}
	}
	conn.Release()
	return pool, nil
}

// waitForRoom takes the opening's place under Config.MaxConns, for as long as anyone waits for it.
func (p *isolatedPool) waitForRoom(ctx context.Context, share *share) (context.Context, error) {
	if share == nil {
		return ctx, nil
	}
	set := func(waiting bool) {
		p.set.mu.Lock()
		defer p.set.mu.Unlock()
		if p.waiting = waiting; waiting && p.refs.Load() == 0 { // they left before
			p.set.dropLocked(p, reasonEvicted)
			p.cancel()
		}
	}
	set(true)
	defer set(false)
	return share.admit(ctx)
}

// configure makes the configuration of the pool.
func (p *isolatedPool) configure() (*pgxpool.Config, error) {
	db, text := p.set.db, p.tenant.ConnString
	c, err := parsePoolConfig(text)
	if err != nil {
		return nil, err
	}
	for name := range c.ConnConfig.RuntimeParams {
		if ownParam(name) {
			return nil, fmt.Errorf("%w: parameter %q has no meaning in a tenant's connection string", ErrInvalidTenant, clip(name))
		}
	}
	// Whether a value was given can no longer be seen in c. That a password holds the name is harmless.
	given := func(name string) bool { return strings.Contains(text, name) }
	if !given("pool_max_conns") {
		c.MaxConns = DefaultPoolMaxConns
	}
	if !given("pool_max_conn_lifetime_jitter") {
		c.MaxConnLifetimeJitter = DefaultPoolMaxConnLifetimeJitter
	}
	shared := db.config.Shared
	c.AfterConnect = shared.AfterConnect
	c.ConnConfig.Tracer = shared.ConnConfig.Tracer
	if !given("default_query_exec_mode") {
		c.ConnConfig.DefaultQueryExecMode = shared.ConnConfig.DefaultQueryExecMode
	}
	if !given("statement_cache_capacity") {
		c.ConnConfig.StatementCacheCapacity = shared.ConnConfig.StatementCacheCapacity
	}
	if !given("description_cache_capacity") {
		c.ConnConfig.DescriptionCacheCapacity = shared.ConnConfig.DescriptionCacheCapacity
	}
	if db.config.AdjustPool != nil {
		if err := db.config.AdjustPool(p.tenant, c); err != nil {
			return nil, fmt.Errorf("pgxtenant: Config.AdjustPool: %w", err)
		}
		if problems := poolProblems(c); problems != nil {
			return nil, fmt.Errorf("pgxtenant: after Config.AdjustPool, the pool's config%w", errors.Join(problems...))
		}
	}

	then := c.ConnConfig.AfterConnect
	c.ConnConfig.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		// First of all that is sent, since a later statement could change what this one reads.
		if err := p.identify(ctx, conn); err != nil || then == nil {
			return err
		}
		return then(ctx, conn)
	}
	db.binder.install(c, db.load, p.resolve)
	db.checkouts.hook(c)
	p.gate = newTurnstile(db.config, c.MaxConns, db.closing, p.resolve)
	p.gate.hook(c)
	return c, nil
}

// identify checks that a new connection is in the database meant for the tenant. It reads the tenant
// setting as the server left it, before anything is bound.
func (p *isolatedPool) identify(ctx context.Context, conn *pgconn.PgConn) error {
	config := p.set.db.config
	results, err := conn.Exec(ctx, "select pg_catalog.current_setting("+literal(config.Setting)+", true), pg_catalog.current_database()").ReadAll()
	if err != nil {
		return fmt.Errorf("check whose database it is: %w", err)
	}
	mark, database := string(results[0].Rows[0][0]), string(results[0].Rows[0][1])
	switch {
	case mark == p.tenant.ID, mark == "" && !config.RequireIdentity:
		return nil
	case mark == "":
		return fmt.Errorf("%w: database %q does not say that it is tenant %q's, which Config.RequireIdentity asks for; alter database … set %s = …",
			ErrWrongTenant, database, p.tenant.ID, config.Setting)
	}
	return fmt.Errorf("%w: database %q is tenant %q's, not tenant %q's", ErrWrongTenant, database, clip(mark), p.tenant.ID)
}

// resolve names the binding for a checkout from this pool, which serves one tenant only, whoever has it.
func (p *isolatedPool) resolve(ctx context.Context) (*binding, error) {
	c, bd, err := p.set.db.resolve(ctx)
	switch {
	case err != nil:
		return nil, err
	case c.kind == kindWithout:
		err = fmt.Errorf("%w: the context is WithoutTenant", ErrWrongTenant)
	case c.tenant.ID != p.tenant.ID:
		err = fmt.Errorf("%w: the context is tenant %q's", ErrWrongTenant, c.tenant.ID)
	case c.tenant.Isolation != IsolationDatabase:
		err = fmt.Errorf("%w: the context's tenant has %v isolation and no pool of its own", ErrInvalidTenant, c.tenant.Isolation)
	default:
		return bd, nil
	}
	return nil, &TenantError{p.tenant.ID, "acquire", err}
}
