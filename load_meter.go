package pgxtenant

import (
	"context"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// loadMeter counts what tenants use, for Load. The guards of connections tell it of each statement, and checkouts
// of each wait. A slice of time is current, and gives way to the next when tick is called.
type loadMeter struct {
	disabled bool
	clock    func() time.Duration // since some moment before the first call; never zero
	share    float64              // Config.HeavyShare
	onHeavy  func(TenantLoad)
	log      *slog.Logger
	events   events

	waits     [len(waitBounds) + 1]atomic.Int64 // checkouts that waited, by how long
	waitTime  atomic.Int64
	served    atomic.Int64 // of them, those that came to a connection
	unwaited  atomic.Int64 // the most that were told of as not having waited
	retired   atomic.Int64 // bindings sent on connections that are closed
	callbacks sync.WaitGroup

	// past guards what follows, which changes once for each slice. It is taken before mu.
	past   sync.Mutex
	fine   [fineSlices]*loadSlice   // those that are over, in a ring; nil for none yet
	coarse [coarseSlices]*loadSlice // each of fineSlices of them
	over   int                      // slices
	heavy  map[string]bool          // tenants that were called so, and have not fallen back
	spare  *loadSketch              // for the next slice, or a copy of the current one
	total  Usage                    // of slices that are over

	// mu guards what follows. It is taken for each statement, and held for a few dozen nanoseconds, so it
	// is not divided: a checkout alone takes the mutex of its pool for longer, twice.
	mu      sync.Mutex
	current *loadSketch
	conns   map[*connMeter]struct{}
}

// The slices of Load's windows. With the current one they reach back by no more than the windows' names say.
const (
	sliceTime    = 10 * time.Second
	minuteSlices = 5
	fineSlices   = 30 // of which FiveMinutes has all but the oldest
	coarseSlices = 11
)

// fallBack is the part of Config.HeavyShare below which a tenant must fall before it can be called heavy again.
const fallBack = 0.9

func newLoadMeter(c *Config) *loadMeter {
	epoch := time.Now().Add(-time.Nanosecond)
	l := &loadMeter{
		disabled: c.DisableLoad, share: c.HeavyShare, onHeavy: c.OnHeavyTenant, log: c.Logger,
		clock: func() time.Duration { return time.Since(epoch) },
		spare: &loadSketch{}, conns: make(map[*connMeter]struct{}), heavy: make(map[string]bool),
	}
	l.current = newLoadSketch(l.clock())
	return l
}

// run ends slices until closing is closed, and returns when no callback is left.
func (l *loadMeter) run(closing <-chan struct{}) {
	if !l.disabled {
		ticker := time.NewTicker(sliceTime)
		defer ticker.Stop()
		for open := true; open; {
			select {
			case <-closing:
				open = false
			case <-ticker.C:
				l.tick()
			}
		}
	}
	l.callbacks.Wait()
}

// charge counts what tenant id used.
func (l *loadMeter) charge(id string, u *Usage) { l.add(id, loadHash(id), u) }

func (l *loadMeter) add(id string, hash uint64, u *Usage) {
	l.mu.Lock()
	l.current.add(id, hash, u)
	l.mu.Unlock()
}

// tick ends the current slice, and tells of tenants that have become heavy.
func (l *loadMeter) tick() {
	l.past.Lock()
	l.settle()
	now := l.clock()
	l.spare.reset(now)
	l.mu.Lock()
	l.current, l.spare = l.spare, l.current
	l.mu.Unlock()
	at := &l.fine[l.over%fineSlices]
	if *at == nil {
		*at = &loadSlice{}
	}
	l.spare.finish(*at, now)
	l.total.add(&(*at).total)
	if l.over++; l.over%fineSlices == 0 {
		var sum loadSum
		for _, s := range l.fine {
			sum.add(s)
		}
		l.coarse[l.over/fineSlices%coarseSlices] = sum.slice(l.fine[0].start, now)
	}
	heavy := l.newlyHeavyLocked(now)
	l.past.Unlock()
	for _, t := range heavy {
		l.report(t)
	}
}

// settle charges the statements that run for the time so far.
func (l *loadMeter) settle() {
	l.mu.Lock()
	conns := make([]*connMeter, 0, len(l.conns))
	for m := range l.conns {
		conns = append(conns, m)
	}
	l.mu.Unlock()
	for _, m := range conns {
		since, bd := m.since.Load(), m.holder.Load()
		if now := l.clock(); since != 0 && bd != nil && m.since.CompareAndSwap(since, int64(now)) {
			u := Usage{Time: now - time.Duration(since)}
			u.shareTime(bd)
			l.add(bd.tenant.ID, bd.hash, &u)
		}
	}
}

// newlyHeavyLocked returns the tenants that have passed the share. past must be held.
func (l *loadMeter) newlyHeavyLocked(now time.Duration) (heavy []TenantLoad) {
	var sum loadSum
	l.sumLocked(&sum, fineSlices-1)
	busy := sum.total.SharedTime >= HeavyMinTime
	still := make(map[string]bool)
	for _, t := range sum.tenants {
		if t.id == "" {
			continue
		}
		share := ratio(t.usage.SharedTime, sum.total.SharedTime)
		switch {
		case l.heavy[t.id] && share >= l.share*fallBack:
			still[t.id] = true
		case busy && share >= l.share && t.usage.SharedTime < sum.total.SharedTime: // nobody else is there to suffer
			still[t.id] = true
			heavy = append(heavy, sum.load(t))
		}
	}
	l.heavy = still
	return heavy
}

func (l *loadMeter) report(t TenantLoad) {
	l.log.Warn("one tenant takes much of the shared database's time", "tenant", t.TenantID, "share", t.SharedShare,
		"limit", l.share, "time", t.SharedTime, "statements", t.Statements(),
		"advice", "move it to a database of its own (IsolationDatabase), or bound it by Config.Limits")
	if l.onHeavy == nil {
		return
	}
	l.callbacks.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				l.log.Error("Config.OnHeavyTenant panicked", "tenant", t.TenantID, "panic", p, "stack", string(debug.Stack()))
			}
		}()
		l.onHeavy(t)
	})
}

// sumLocked sums up to n of the slices that are over, the latest ones, and returns when they begin. past must be held.
func (l *loadMeter) sumLocked(sum *loadSum, n int) (start time.Duration) {
	for i := l.over - 1; i >= max(0, l.over-n); i-- {
		s := l.fine[i%fineSlices]
		sum.add(s)
		start = s.start
	}
	return start
}

func (l *loadMeter) snapshot() *Load {
	if l.disabled {
		return &Load{At: time.Now(), Held: map[string]int{}}
	}
	l.past.Lock()
	defer l.past.Unlock()
	l.settle()
	now := l.clock()
	load := &Load{At: time.Now(), Held: make(map[string]int)}
	l.mu.Lock()
	l.current.copyTo(l.spare)
	for m := range l.conns {
		if bd := m.holder.Load(); bd != nil {
			load.Held[bd.tenant.ID]++
		}
	}
	l.mu.Unlock()
	var current loadSlice
	l.spare.finish(&current, now)
	load.Total = l.total
	load.Total.add(&current.total)
	window := func(fine, coarse int) LoadWindow {
		var sum loadSum
		sum.add(&current)
		start := current.start
		if at := l.sumLocked(&sum, fine); at != 0 {
			start = at
		}
		for i := range coarse {
			if s := l.coarse[(l.over/fineSlices+coarseSlices-i)%coarseSlices]; s != nil {
				sum.add(s)
				start = s.start
			}
		}
		return sum.window(now - start)
	}
	load.Minute = window(minuteSlices, 0)
	load.FiveMinutes = window(fineSlices-1, 0)
	load.Hour = window(l.over%fineSlices, coarseSlices)
	return load
}

// waitBounds are the upper bounds of AcquireWaits.
var waitBounds = [...]time.Duration{
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// waited counts a checkout under ctx that has waited since the given time, and whether it came to a connection.
func (l *loadMeter) waited(ctx context.Context, since time.Duration, served bool) {
	if l.disabled {
		return
	}
	wait := l.clock() - since
	i := 0
	for i < len(waitBounds) && wait > waitBounds[i] {
		i++
	}
	l.waits[i].Add(1)
	l.waitTime.Add(int64(wait))
	if served {
		l.served.Add(1)
	}
	if c := carried(ctx); c != nil && (c.kind == kindWithout || ValidateID(c.tenant.ID) == nil) {
		l.charge(c.tenant.ID, &Usage{Waits: 1, WaitTime: wait})
	}
}

// histogram returns how long checkouts waited, of which so many came to a connection.
func (l *loadMeter) histogram(served int64) (h WaitHistogram) {
	if l.disabled {
		return h
	}
	h = WaitHistogram{Bounds: waitBounds[:], Counts: make([]int64, len(l.waits)), Sum: time.Duration(l.waitTime.Load())}
	for i := range l.waits {
		h.Counts[i] = l.waits[i].Load()
	}
	// Who did not wait is not told of each time. Of the two counts one may be ahead of the other, but what has been
	// told of does not become less.
	n := served - l.served.Load()
	for told := l.unwaited.Load(); ; told = l.unwaited.Load() {
		if n = max(n, told); n == told || l.unwaited.CompareAndSwap(told, n) {
			h.Counts[0] += n
			return h
		}
	}
}

// bound returns how many bindings have been sent.
func (l *loadMeter) bound() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.retired.Load()
	for m := range l.conns {
		n += m.bound.Load()
	}
	return n
}

// connMeter is the part of a loadMeter that belongs to one connection.
type connMeter struct {
	// Of the goroutine that has the connection. A checkout touches the first two.
	user    *binding // whose statements are counted; nil while nobody has it
	running statementKind
	batch   Usage // of the batch that runs, so far

	load   *loadMeter               // nil if nothing is counted
	holder *atomic.Pointer[binding] // who has it checked out, as its permit knows
	since  atomic.Int64             // from when the statement that runs is still to be charged; 0 if none does
	bound  atomic.Int64             // bindings sent
}

type statementKind uint8

const (
	idle statementKind = iota
	runsQuery
	runsBatch
	runsCopy
	runsPrepare
)

// begin and end are called with the connection's first checkout, and when it is closed.
func (m *connMeter) begin() {
	if l := m.load; l != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.conns[m] = struct{}{}
	}
}

func (m *connMeter) end() {
	if l := m.load; l != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		if _, ok := l.conns[m]; ok {
			delete(l.conns, m)
			l.retired.Add(m.bound.Load())
		}
	}
}

// released tells that nobody has the connection checked out. What still runs on it, such as rows that were never
// closed, ends with it.
func (m *connMeter) released() {
	if m.running != idle {
		m.running = idle
		m.chargeUser(&Usage{})
	}
	m.user = nil
}

// start notes that something begins to run, unless it is a part of what runs already, as the preparing of a query is.
func (m *connMeter) start(kind statementKind) {
	if m.load == nil || m.load.disabled || m.running != idle || m.user == nil {
		return
	}
	m.running = kind
	m.since.Store(int64(m.load.clock()))
}

// stop ends what runs, if that is of the given kind: a batch may be ended twice, and what did not begin ends too.
func (m *connMeter) stop(kind statementKind, tag pgconn.CommandTag, err error) {
	if m.running != kind {
		return
	}
	m.running = idle
	u := Usage{Rows: tag.RowsAffected()}
	switch kind {
	case runsQuery:
		if tag.Select() {
			u.Queries = 1
		} else {
			u.Execs = 1
		}
	case runsBatch:
		u, m.batch = m.batch, Usage{}
		u.Errors = min(u.Errors, 1)
	case runsCopy:
		u.Copies = 1
	}
	if err != nil {
		if u.Errors == 0 {
			m.failed(err)
		}
		u.Errors = 1
	}
	m.chargeUser(&u)
}

func (m *connMeter) failed(err error) {
	if m.user != nil {
		m.load.events.failed(m.user.tenant.ID, err)
	}
}

// batched notes one statement of a batch.
func (m *connMeter) batched(tag pgconn.CommandTag, err error) {
	if m.running != runsBatch {
		return
	}
	m.batch.Batched++
	m.batch.Rows += tag.RowsAffected()
	if err != nil {
		m.batch.Errors++
		m.failed(err)
	}
}

// chargeUser charges who has the connection for u and for the time that has not been charged yet.
func (m *connMeter) chargeUser(u *Usage) {
	now := m.load.clock()
	if since := m.since.Swap(0); since != 0 {
		u.Time = now - time.Duration(since)
	}
	if m.user != nil {
		u.shareTime(m.user)
		m.load.add(m.user.tenant.ID, m.user.hash, u)
	}
}

// shareTime notes whether the time was spent in the shared database.
func (u *Usage) shareTime(bd *binding) {
	if !bd.database {
		u.SharedTime = u.Time
	}
}
