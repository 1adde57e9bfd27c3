package pgxtenant

import "time"

// Config.MaxConns is shared among pools as a pool is among tenants, by connection time and weight: the pool of a
// database tenant counts as that tenant, and the shared pool as all those who wait for or use it. Which connection
// serves whom, and who must give one up, stays the budget's affair.

// budgetTurns tells which pool's caller is next. The zero value is ready for use. It belongs to budget.mu.
type budgetTurns struct {
	arrival bool      // in order of arrival instead
	since   time.Time // connection time is charged up to here; zero while nobody waits
	virtual float64   // tag of the last pool that was served
}

// turn is one pool's part in them.
type turn struct {
	weight func() float64 // nil is 1
	tag    float64        // seconds of connections, by weight
}

// charge adds up what all pools have used since it was last called. While nobody waits nothing is charged.
func (t *budgetTurns) charge(b *budget) {
	if t.arrival {
		return
	}
	now := time.Now()
	if t.since.IsZero() {
		t.virtual = 0
		for _, s := range b.shares {
			s.turn.tag = 0
		}
		t.since = now
	}
	d := now.Sub(t.since).Seconds()
	t.since = now
	for _, s := range b.shares {
		s.turn.tag += d * float64(s.busy) / s.turn.weightNow()
	}
}

// begin puts a pool whose callers begin to wait where the others are.
func (t *budgetTurns) begin(s *share) { s.turn.tag = max(s.turn.tag, t.virtual) }

// serve notes that a caller of s was served.
func (t *budgetTurns) serve(s *share) { t.virtual = max(t.virtual, s.turn.tag) }

// end notes that nobody waits any more.
func (t *budgetTurns) end() { t.since = time.Time{} }

// before reports whether the caller v of r comes before the caller w of s.
func (t *budgetTurns) before(r, s *share, v, w *waiter) bool {
	if t.arrival || v.dialing || w.dialing || r.turn.tag == s.turn.tag {
		return v.order < w.order // who dials has had its turn, and comes before all
	}
	return r.turn.tag < s.turn.tag
}

func (t *turn) weightNow() float64 {
	if t.weight == nil {
		return DefaultWeight
	}
	return t.weight()
}
