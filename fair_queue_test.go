package pgxtenant

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fairModel is what a fairQueue must agree with: a list of tickets in order of arrival for each tenant, and
// the connections that each has.
type fairModel struct {
	t       testing.TB
	q       fairQueue
	now     time.Duration
	waiting map[string][]*ticket
	holding map[string][]*ticket
	virtual float64
	quick   bool // the books are not compared at each step
}

func newFairModel(t testing.TB, max int, share float64) *fairModel {
	return &fairModel{t: t, q: newFairQueue(max, share), waiting: make(map[string][]*ticket), holding: make(map[string][]*ticket)}
}

func (m *fairModel) held() (n int) {
	for _, h := range m.holding {
		n += len(h)
	}
	return n
}

func (m *fairModel) queued() (n int) {
	for _, w := range m.waiting {
		n += len(w)
	}
	return n
}

func (m *fairModel) push(id string, weight float64) *ticket {
	t := &ticket{}
	m.q.push(t, id, weight, m.now)
	m.waiting[id] = append(m.waiting[id], t)
	m.dispatch()
	return t
}

func (m *fairModel) cancel(id string, i int) {
	t := m.waiting[id][i]
	m.q.remove(t)
	m.waiting[id] = slices.Delete(m.waiting[id], i, i+1)
	m.dispatch()
}

func (m *fairModel) release(id string, i int) {
	t := m.holding[id][i]
	m.holding[id] = slices.Delete(m.holding[id], i, i+1)
	m.q.release(t.flow, t.estimate, m.now-t.since, m.now)
	m.dispatch()
}

// dispatch grants what can be granted, and checks each decision by looking at all flows.
func (m *fairModel) dispatch() {
	for m.held() < m.q.max {
		tags := make(map[string]float64)
		for id, f := range m.q.flows {
			if !m.quick {
				tags[id] = f.tag
			}
		}
		t, again := m.q.next(m.now)
		if t == nil {
			m.expectNone(again)
			break
		}
		id := t.flow.id
		require.Same(m.t, m.waiting[id][0], t, "the first of its tenant's")
		if len(m.holding[id]) >= m.q.limit {
			require.Equal(m.t, len(m.waiting[id]), m.queued(), "%s goes beyond its limit while others wait", id)
		}
		for other, w := range m.waiting {
			if !m.quick && len(w) > 0 && len(m.holding[other]) < m.q.limit {
				require.GreaterOrEqual(m.t, tags[other], tags[id], "%s was before %s", other, id)
			}
		}
		m.waiting[id] = m.waiting[id][1:]
		m.holding[id] = append(m.holding[id], t)
	}
	if !m.quick {
		m.check()
	}
}

// expectNone checks that a connection is rightly left idle.
func (m *fairModel) expectNone(again time.Duration) {
	for id, w := range m.waiting {
		if len(w) == 0 {
			continue
		}
		require.GreaterOrEqual(m.t, len(m.holding[id]), m.q.limit, "%s waits below its limit, while there is a connection", id)
		alone := m.queued() == len(w) && m.held() == len(m.holding[id])
		if alone {
			require.Greater(m.t, again, m.now, "%s is alone, and is told nothing", id)
			require.LessOrEqual(m.t, again, m.now+spreadMost)
		}
	}
}

// check compares the books.
func (m *fairModel) check() {
	require.Equal(m.t, m.queued(), m.q.waiting)
	require.GreaterOrEqual(m.t, m.q.virtual, m.virtual, "time goes on")
	m.virtual = m.q.virtual
	active := 0
	for id, f := range m.q.flows {
		require.Equal(m.t, len(m.waiting[id]), f.n)
		require.Equal(m.t, len(m.holding[id]), f.held)
		require.False(m.t, math.IsNaN(f.tag) || math.IsInf(f.tag, 0))
		if f.active() {
			active++
		} else {
			require.NotEqual(m.t, notQueued, f.index, "%s is kept for nothing", id)
		}
		require.Equal(m.t, f.parked, slices.Contains(m.q.parked, f))
		if f.n > 0 {
			require.NotEqual(m.t, f.parked, f.index != notQueued, "%s is either parked or queued", id)
		}
	}
	require.Equal(m.t, active, m.q.active)
	for i, f := range m.q.byTag {
		require.Equal(m.t, i, f.index)
		require.Same(m.t, f, m.q.flows[f.id])
		if i > 0 {
			require.False(m.t, m.q.byTag.Less(i, (i-1)/2))
		}
	}
}

// step does what b says.
func (m *fairModel) step(b, arg byte) {
	id := string(rune('a' + arg%7))
	pick := func(n int) int { return int(arg) / 7 % n }
	m.now += time.Duration(b>>4) * time.Duration(b>>4) * time.Millisecond
	switch b % 8 {
	case 0, 1, 2:
		m.push(id, Limits{Weight: float64(arg%5) - 1}.withDefaults().Weight)
	case 3:
		if n := len(m.waiting[id]); n > 0 {
			m.cancel(id, pick(n))
		}
	case 4:
		m.q.look()
		m.dispatch()
	case 5, 6, 7:
		for range 7 { // the next tenant that has one
			if n := len(m.holding[id]); n > 0 {
				m.release(id, pick(n))
				return
			}
			id = string(rune('a' + (id[0]-'a'+1)%7))
		}
	}
}

// end lets everybody finish, and finds nothing left.
func (m *fairModel) end() {
	for m.held() > 0 || m.queued() > 0 {
		m.now += recent
		m.q.look()
		m.dispatch()
		for id := range m.holding {
			for len(m.holding[id]) > 0 {
				m.release(id, 0)
			}
		}
	}
	require.Zero(m.t, m.q.active)
	require.Empty(m.t, m.q.parked)
	m.q.reset()
	require.Empty(m.t, m.q.flows)
	require.Empty(m.t, m.q.byTag)
}

func FuzzFairQueue(f *testing.F) {
	f.Add(byte(8), byte(75), []byte("\x00\x01\x00\x01\x00\x01\x05\x01\x00\x02\x25\x02"))
	f.Add(byte(1), byte(100), []byte("\x00\x00\x00\x01\x03\x01\x07\x00"))
	f.Add(byte(3), byte(1), []byte("\x10\x00\x20\x08\x30\x01\x45\x01\x00\x01\x04\x00\xf5\x00"))
	f.Fuzz(func(t *testing.T, max, share byte, ops []byte) {
		m := newFairModel(t, 1+int(max)%20, float64(1+share%100)/100)
		for i := 0; i+1 < len(ops); i += 2 {
			m.step(ops[i], ops[i+1])
		}
		m.end()
	})
}

// Random tenants ask for connections, give up and return them, and each decision is checked.
func TestFairQueueAgreesWithItsModel(t *testing.T) {
	t.Parallel()
	const ops = 5_000
	r := rand.New(rand.NewPCG(1, 2))
	for _, share := range []float64{0.1, 0.75, 1} {
		m := newFairModel(t, 8, share)
		for range ops {
			b := byte(r.Uint32())
			if m.queued() > 50 {
				b |= 5 // as many come as go
			}
			m.step(b, byte(r.Uint32()))
		}
		m.end()
	}
}

// fairSimulation runs so many tenants, each with more to do than it can, on a clock of its own.
type fairSimulation struct {
	*fairModel
	weight func(i int) float64
	length func(i int) time.Duration
	used   []time.Duration
	ends   map[*ticket]time.Duration
}

func (s *fairSimulation) run(tenants, max int, d time.Duration) {
	s.quick = true
	s.used, s.ends = make([]time.Duration, tenants), make(map[*ticket]time.Duration)
	ids := make([]string, tenants)
	for i := range ids {
		ids[i] = strconv.Itoa(i)
		for range max + 1 {
			s.push(ids[i], s.weight(i))
		}
	}
	for s.now < d {
		var first *ticket
		for _, id := range ids {
			for _, t := range s.holding[id] {
				i, _ := strconv.Atoi(id)
				if _, known := s.ends[t]; !known {
					s.ends[t] = t.since + s.length(i)
				}
				if first == nil || s.ends[t] < s.ends[first] {
					first = t
				}
			}
		}
		i, _ := strconv.Atoi(first.flow.id)
		s.now = s.ends[first]
		s.used[i] += s.now - first.since
		s.push(ids[i], s.weight(i))
		s.release(ids[i], slices.Index(s.holding[ids[i]], first))
	}
}

// jain is Jain's index of fairness: 1 if all have the same, 1/n if one has all.
func jain(used []time.Duration) float64 {
	var sum, squares float64
	for _, u := range used {
		sum += u.Seconds()
		squares += u.Seconds() * u.Seconds()
	}
	return sum * sum / (float64(len(used)) * squares)
}

// Tenants that all want more than there is get the same connection time, however long theirs take.
func TestFairQueueSharesTimeAlike(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 4))
	s := &fairSimulation{
		fairModel: newFairModel(t, 8, DefaultMaxShare),
		weight:    func(int) float64 { return 1 },
		length: func(i int) time.Duration { // from 1 ms to 20 ms, and now and then a hundred
			if r.IntN(50) == 0 {
				return 100 * time.Millisecond
			}
			return time.Duration(1+i%20) * time.Millisecond
		},
	}
	s.run(64, 8, 10*time.Second)
	require.Greater(t, jain(s.used), 0.98)
}

func TestFairQueueSharesTimeByWeight(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	s := &fairSimulation{
		fairModel: newFairModel(t, 8, DefaultMaxShare),
		weight:    func(i int) float64 { return float64(int(1) << i) },
		length:    func(int) time.Duration { return time.Duration(1+r.IntN(20)) * time.Millisecond },
	}
	s.run(3, 8, 10*time.Second)
	total := (s.used[0] + s.used[1] + s.used[2]).Seconds()
	for i, part := range []float64{1. / 7, 2. / 7, 4. / 7} {
		require.InEpsilon(t, part, s.used[i].Seconds()/total, 0.05, "tenant %d", i)
	}
}

// What a tenant has had beyond what was thought is charged when it is known: others come first until they have had as much.
func TestFairQueueChargesWhatWasUsed(t *testing.T) {
	t.Parallel()
	m := newFairModel(t, 1, 1)
	m.push("a", 1)
	m.push("a", 1)
	for range 200 {
		m.push("b", 1)
	}
	m.now += time.Second
	m.release("a", 0)
	for range 100 {
		require.Len(t, m.holding["b"], 1)
		m.now += time.Millisecond
		m.release("b", 0)
	}
}

// A weight that changes while the tenant waits takes effect, whatever it is.
func TestFairQueueWithChangingWeights(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 8))
	weights := []float64{0, -1, math.NaN(), math.Inf(1), math.Inf(-1), 1e-300, 1e300, 1, 3}
	s := &fairSimulation{
		fairModel: newFairModel(t, 4, DefaultMaxShare),
		weight:    func(int) float64 { return Limits{Weight: weights[r.IntN(len(weights))]}.withDefaults().Weight },
		length:    func(int) time.Duration { return time.Millisecond },
	}
	s.run(10, 4, time.Second)
	for i, used := range s.used {
		require.Positive(t, used, "tenant %d got nothing", i)
	}
}

// Ten thousand tenants wait at once in little memory, and leave none behind.
func TestFairQueueWithManyTenants(t *testing.T) {
	t.Parallel()
	const tenants = 10_000
	q := newFairQueue(1, 1)
	ids := make([]string, tenants)
	for i := range ids {
		ids[i] = fmt.Sprintf("t%05d", i)
	}
	var tickets []*ticket
	for _, id := range ids {
		tickets = append(tickets, &ticket{})
		q.push(tickets[len(tickets)-1], id, 1, 0)
	}
	require.Len(t, q.flows, tenants)
	for i, want := range tickets {
		got, _ := q.next(0)
		require.Same(t, want, got, "in order of arrival")
		q.release(got.flow, got.estimate, time.Duration(i), 0)
	}
	require.Zero(t, q.waiting)
	q.reset()
	require.Empty(t, q.flows)
	require.Zero(t, cap(q.byTag), "what was needed for many is not kept")
}
