package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// settled reports whether nobody has, or waits for, a permit of the gate's.
func (g *turnstile) settled() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.state.Load(); s != 0 || g.away != 0 {
		return fmt.Errorf("state %d, away %d", s, g.away)
	}
	if g.queue.waiting != 0 || g.queue.active != 0 || len(g.queue.flows) != 0 {
		return fmt.Errorf("waiting %d, active %d, flows %d", g.queue.waiting, g.queue.active, len(g.queue.flows))
	}
	for _, p := range g.permits {
		if p.holder.Load() != nil || p.closed {
			return errors.New("a permit is held, or its connection closed")
		}
	}
	return nil
}

// testBinding is that of a tenant without any settings.
func testBinding(id string, limits Limits) *binding {
	return &binding{tenant: Tenant{ID: id}, limits: limits.withDefaults(), hash: loadHash(id), served: true, watched: limits.HoldLimit > 0}
}

// gateModel is a gate before a pool of its own making, which has no connections but counts them. What it does is
// checked against a count of who has what.
type gateModel struct {
	t        testing.TB
	g        *turnstile
	bindings []*binding

	queued   []*ticket         // wait
	entered  []context.Context // have a permit, and no connection yet
	inUse    []*permit         // connections
	hijacked []*permit
	idle     []*permit
}

func newGateModel(t testing.TB, max int32, share float64) *gateModel {
	m := &gateModel{t: t, g: newTurnstile(&Config{MaxShare: share}, max, nil, nil)}
	m.g.busy = func() int { return len(m.inUse) }
	m.g.timerAt = 1 // no timer but that of the steps
	for i := range 5 {
		m.bindings = append(m.bindings, testBinding(string(rune('a'+i)), Limits{MaxWaiting: 20, Weight: float64(i)}))
	}
	return m
}

type modelContext struct {
	context.Context
	bd *binding
}

// settle moves those whose turn has come.
func (m *gateModel) settle() {
	m.queued = slices.DeleteFunc(m.queued, func(t *ticket) bool {
		if !t.queued {
			m.entered = append(m.entered, t)
		}
		return !t.queued
	})
}

func (m *gateModel) enter(i int) {
	ctx := &modelContext{context.Background(), m.bindings[i]}
	if m.g.tryEnter() {
		m.entered = append(m.entered, ctx)
		return
	}
	t := &ticket{Context: ctx, granted: make(chan struct{})}
	switch wait := m.g.enqueue(t, ctx.bd, nil); {
	case t.err != nil:
		require.ErrorIs(m.t, t.err, ErrTenantOverloaded)
		n := 0
		for _, q := range m.queued {
			if q.flow == m.g.queue.flows[ctx.bd.tenant.ID] {
				n++
			}
		}
		require.Equal(m.t, 20, n)
	case wait:
		m.queued = append(m.queued, t)
	default:
		m.entered = append(m.entered, t)
	}
}

func take[T any](from *[]T, i int) T {
	v := (*from)[i]
	*from = slices.Delete(*from, i, i+1)
	return v
}

// bindingOf finds who entered with ctx.
func (m *gateModel) bindingOf(ctx context.Context) *binding {
	if t, ok := ctx.(*ticket); ok {
		ctx = t.Context
	}
	return ctx.(*modelContext).bd
}

// step does what b says.
func (m *gateModel) step(b, arg byte) {
	pick := func(n int) int { return int(arg) % n }
	switch b % 16 {
	case 0, 1, 2, 3:
		m.enter(int(arg) % len(m.bindings))
	case 4: // cancelled
		if n := len(m.queued); n > 0 {
			t := take(&m.queued, pick(n))
			ctx, cancel := context.WithCancel(t.Context)
			cancel()
			m.bindContext(t, ctx)
		}
	case 5, 6, 7: // it comes to a connection, an idle one if there is one
		if n := len(m.entered); n > 0 {
			ctx := take(&m.entered, pick(n))
			p := &permit{gate: m.g}
			if len(m.idle) > 0 {
				p = take(&m.idle, len(m.idle)-1)
			}
			m.inUse = append(m.inUse, p)
			m.g.came(ctx, p, m.bindingOf(ctx))
		}
	case 8: // it comes to none
		if n := len(m.entered); n > 0 {
			m.g.came(take(&m.entered, pick(n)), nil, nil)
		}
	case 9, 10, 11:
		if n := len(m.inUse); n > 0 {
			p := m.inUse[pick(n)]
			m.g.released(p)
			m.inUse = slices.DeleteFunc(m.inUse, func(o *permit) bool { return o == p })
			if !p.closed {
				m.idle = append(m.idle, p)
			}
		}
	case 12:
		if n := len(m.inUse); n > 0 {
			m.hijacked = append(m.hijacked, take(&m.inUse, pick(n)))
		}
	case 13:
		if n := len(m.hijacked); n > 0 {
			m.g.gone(take(&m.hijacked, pick(n)))
		}
	case 14: // closed while in use, or idle
		if n := len(m.inUse) + len(m.idle); n > 0 {
			if i := pick(n); i < len(m.inUse) {
				m.g.gone(m.inUse[i])
			} else {
				m.g.gone(take(&m.idle, i-len(m.inUse)))
			}
		}
	case 15:
		m.g.lookLocked()
	}
	m.settle()
	m.check()
}

// bindContext has a ticket notice that its context has ended.
func (m *gateModel) bindContext(t *ticket, ctx context.Context) {
	t.Context = ctx
	m.g.await(t, testBinding("", Limits{}))
	require.ErrorIs(m.t, t.err, context.Canceled)
}

// out is how many permits are out by the model's count. One whose connection was closed in use is free.
func (m *gateModel) out() (n int) {
	for _, p := range append(slices.Clone(m.inUse), m.hijacked...) {
		if !p.closed {
			n++
		}
	}
	return n + len(m.entered)
}

func (m *gateModel) check() {
	s := m.g.state.Load()
	require.Equal(m.t, m.out(), int(s/permitOut)+m.g.away, "a permit was lost or doubled")
	require.LessOrEqual(m.t, m.g.away, len(m.hijacked), "not more are away than were hijacked")
	require.Equal(m.t, len(m.queued) > 0, s&periodFlag != 0, "a period lasts as long as somebody waits")
	require.Equal(m.t, len(m.queued), m.g.queue.waiting)
	if len(m.queued) == 0 {
		require.Empty(m.t, m.g.queue.flows, "nothing is kept for who does not wait")
	}
	// No connection is idle while a tenant below its limit waits.
	if s/permitOut < m.g.max {
		for _, t := range m.queued {
			require.GreaterOrEqual(m.t, t.flow.held, m.g.queue.limit)
		}
	}
}

func (m *gateModel) end() {
	for len(m.queued)+len(m.entered)+len(m.inUse)+len(m.hijacked) > 0 {
		for _, b := range []byte{5, 9, 13, 15} {
			m.step(b, 0)
		}
		m.g.queue.seen, m.g.queue.seenOld = -recent, -recent // a second has gone by
	}
	require.NoError(m.t, m.g.settled())
	require.Len(m.t, m.g.permits, len(m.idle))
}

func FuzzGate(f *testing.F) {
	f.Add(byte(2), byte(75), []byte("\x00\x00\x00\x00\x00\x01\x05\x00\x05\x00\x09\x00\x09\x00"))
	f.Add(byte(1), byte(100), []byte("\x00\x00\x05\x00\x00\x01\x0c\x00\x0f\x00\x05\x00\x0d\x00"))
	f.Add(byte(3), byte(30), []byte("\x00\x00\x05\x00\x00\x01\x05\x00\x00\x02\x00\x02\x0e\x01\x04\x00\x09\x01\x08\x00"))
	f.Fuzz(func(t *testing.T, max, share byte, ops []byte) {
		m := newGateModel(t, 1+int32(max)%20, float64(1+share%100)/100)
		for i := 0; i+1 < len(ops); i += 2 {
			m.step(ops[i], ops[i+1])
		}
		m.end()
	})
}

// Random steps lose no permit and double none.
func TestGateAgreesWithItsModel(t *testing.T) {
	t.Parallel()
	gateSteps(t, 50_000)
}

func gateSteps(t *testing.T, steps int) {
	r := rand.New(rand.NewPCG(9, 10))
	for _, max := range []int32{1, 4, 9} {
		m := newGateModel(t, max, 0.5)
		for range steps / 3 {
			m.step(byte(r.Uint32()), byte(r.Uint32()))
		}
		m.end()
	}
}

// Checkouts by many goroutines, which wait, give up and fail at random, end with everything in place.
func TestGateUnderManyGoroutines(t *testing.T) {
	t.Parallel()
	gateCheckouts(t, 50_000)
}

func gateCheckouts(t *testing.T, checkouts int) {
	const max, workers = 4, 32
	g := newTurnstile(&Config{MaxShare: DefaultMaxShare}, max, nil, func(ctx context.Context) (*binding, error) {
		return ctx.(*modelContext).bd, nil
	})
	// What the pool would do: there are so many connections, and never more are asked for.
	conns := make(chan *permit, max)
	for range max {
		conns <- &permit{gate: g}
	}
	var acquired, inside, beyond, refused, done atomic.Int64
	g.busy = func() int { return int(acquired.Load()) }
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 11))
			bd := testBinding(fmt.Sprint(w%6), Limits{MaxWaiting: 5, Weight: float64(w % 6)})
			for done.Add(1) <= int64(checkouts) {
				base, cancel := context.WithCancel(context.Background())
				if r.IntN(8) == 0 {
					go cancel()
				}
				ctx := g.enter(&modelContext{base, bd}, nil)
				if ticket, _ := ctx.(*ticket); ticket != nil && ticket.err != nil {
					refused.Add(1)
					g.came(ctx, nil, nil)
					cancel()
					continue
				}
				if inside.Add(1) > max {
					beyond.Add(1)
				}
				if r.IntN(8) == 0 { // the pool has an error
					inside.Add(-1)
					g.came(ctx, nil, nil)
					cancel()
					continue
				}
				p := <-conns
				acquired.Add(1)
				g.came(ctx, p, bd)
				if r.IntN(4) == 0 {
					runtime.Gosched()
				}
				inside.Add(-1)
				g.released(p)
				acquired.Add(-1)
				conns <- p
				cancel()
			}
		})
	}
	wg.Wait()
	require.Zero(t, beyond.Load(), "more were let in than there are connections")
	require.Positive(t, refused.Load())
	require.NoError(t, g.settled())
	t.Logf("%d periods, %d refused", g.period, refused.Load())
}

// One tenant with a hundred thousand checkouts leaves the way free for a thousand with one each.
func TestGateWithAFlood(t *testing.T) {
	t.Parallel()
	g := newTurnstile(&Config{MaxShare: DefaultMaxShare}, 8, nil, nil)
	g.busy = func() int { return 8 }
	flood := testBinding("flood", Limits{MaxWaiting: -1})
	var inside []*ticket
	push := func(bd *binding) *ticket {
		ticket := &ticket{Context: context.Background(), granted: make(chan struct{})}
		g.enqueue(ticket, bd, nil)
		return ticket
	}
	for range 100_000 {
		if g.tryEnter() {
			inside = append(inside, nil)
		} else {
			push(flood)
		}
	}
	require.Len(t, inside, 8)
	others := make([]*ticket, 1000)
	for i := range others {
		others[i] = push(testBinding(fmt.Sprint("t", i), Limits{}))
	}
	// They come first: the flood has had its part.
	for _, ticket := range inside {
		g.giveBack(ticket)
	}
	for _, other := range others {
		require.False(t, other.queued)
		g.giveBack(other)
	}
}

// Whoever waits when the gate closes is told, and so is whoever comes later.
func TestGateClose(t *testing.T) {
	t.Parallel()
	bd := testBinding("a", Limits{})
	closing := make(chan struct{})
	g := newTurnstile(&Config{MaxShare: 1}, 1, closing, func(context.Context) (*binding, error) { return bd, nil })
	g.busy = func() int { return 1 }
	require.True(t, g.tryEnter())
	results := make(chan context.Context)
	for range 10 {
		go func() { results <- g.enter(context.Background(), nil) }()
	}
	eventually(t, "they wait", func() bool { n, _ := g.stat(); return n == 10 })
	close(closing)
	for range 10 {
		ctx := <-results
		require.ErrorIs(t, ctx.Err(), ErrClosed)
		<-ctx.Done()
		g.came(ctx, nil, nil)
	}
	require.ErrorIs(t, g.enter(context.Background(), nil).Err(), ErrClosed)
	g.giveBack(nil)
	require.NoError(t, g.settled())
}

// A checkout that has waited as long as its tenant may says when to come back, and one that would have to
// is refused at once.
func TestGateRefusesWhatTakesTooLong(t *testing.T) {
	t.Parallel()
	bd := testBinding("a", Limits{MaxWait: 20 * time.Millisecond})
	g := newTurnstile(&Config{MaxShare: 1}, 1, nil, func(context.Context) (*binding, error) { return bd, nil })
	g.busy = func() int { return 1 }
	require.True(t, g.tryEnter())
	refused := func(ctx context.Context) *OverloadError {
		var overload *OverloadError
		require.ErrorAs(t, ctx.Err(), &overload)
		require.ErrorIs(t, overload, ErrTenantOverloaded)
		require.Positive(t, overload.RetryAfter)
		return overload
	}
	require.Equal(t, 20*time.Millisecond, refused(g.enter(context.Background(), nil)).Waited)

	// Once it is known that a connection is held for a second, one may wait for it, and no more.
	first := &ticket{Context: context.Background(), granted: make(chan struct{})}
	require.True(t, g.enqueue(first, bd, nil))
	g.queue.usual = 1
	second := &ticket{Context: context.Background(), granted: make(chan struct{})}
	g.enqueue(second, bd, nil)
	overload := refused(second)
	require.Zero(t, overload.Waited)
	require.Equal(t, 1, overload.Waiting)
	require.GreaterOrEqual(t, overload.RetryAfter, time.Second)
}
