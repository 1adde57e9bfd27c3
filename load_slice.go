package pgxtenant

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// loadSlice is what was used in a stretch of time that is over, with up to LoadTenants of the tenants that used the most of it.
type loadSlice struct {
	start, end time.Duration
	total      Usage
	places     []loadPlace
	missed     time.Duration // how much a tenant without a place may have used at most
	seen       distinct      // the tenants that ever had a place
}

type loadPlace struct {
	id     string
	hash   uint64        // of id; 0 in a slice that is made of others
	before time.Duration // at most what it used before
	usage  Usage         // since the tenant has the place
}

func (p *loadPlace) weight() time.Duration { return p.usage.Time + p.before }

// loadSum is the sum of slices.
type loadSum struct {
	total   Usage
	tenants []*loadSummed
	index   map[string]*loadSummed
	missed  time.Duration // the most that a tenant without a place in any of them has used
	seen    distinct
}

type loadSummed struct {
	id     string
	usage  Usage
	missed time.Duration // beyond loadSum.missed, or if negative, less than that
}

func (sum *loadSum) add(s *loadSlice) {
	if sum.index == nil {
		sum.index = make(map[string]*loadSummed)
	}
	sum.total.add(&s.total)
	sum.missed += s.missed
	sum.seen.merge(&s.seen)
	for i := range s.places {
		p := &s.places[i]
		t := sum.index[p.id]
		if t == nil {
			t = &loadSummed{id: p.id}
			sum.index[p.id] = t
			sum.tenants = append(sum.tenants, t)
		}
		t.usage.add(&p.usage)
		t.missed += p.before - s.missed
	}
}

// sort puts the tenants in order, the heaviest first.
func (sum *loadSum) sort() {
	slices.SortFunc(sum.tenants, func(a, b *loadSummed) int {
		return cmp.Or(cmp.Compare(b.usage.Time, a.usage.Time), strings.Compare(a.id, b.id))
	})
}

// active returns how many tenants there are in the sum, and whether that is exact.
func (sum *loadSum) active() (n int, exact bool) {
	if !sum.seen.full {
		return len(sum.tenants), true
	}
	return max(sum.seen.estimate(), len(sum.tenants)), false
}

// slice makes one slice of the sum, with the heaviest of its tenants. They keep what they missed, and
// who is left out missed all.
func (sum *loadSum) slice(start, end time.Duration) *loadSlice {
	sum.sort()
	s := &loadSlice{start: start, end: end, total: sum.total, missed: sum.missed, seen: sum.seen}
	for n, t := range sum.tenants {
		if n >= LoadTenants {
			s.missed = max(s.missed, t.usage.Time+sum.missed+t.missed)
			s.seen.full = true
			continue
		}
		s.places = append(s.places, loadPlace{id: t.id, usage: t.usage, before: sum.missed + t.missed})
	}
	return s
}

// window makes of the sum what is told of it.
func (sum *loadSum) window(span time.Duration) LoadWindow {
	sum.sort()
	heaviest := sum.tenants[:min(len(sum.tenants), LoadTenants)]
	w := LoadWindow{Span: span, Total: sum.total, Other: sum.total, Tenants: make([]TenantLoad, len(heaviest))}
	w.Active, w.Exact = sum.active()
	for i, t := range heaviest {
		w.Other.sub(&t.usage)
		w.Tenants[i] = sum.load(t)
	}
	return w
}

func (sum *loadSum) load(t *loadSummed) TenantLoad {
	return TenantLoad{
		TenantID: t.id, Usage: t.usage, Missed: sum.missed + t.missed,
		TimeShare:      ratio(t.usage.Time, sum.total.Time),
		StatementShare: ratio(t.usage.Statements(), sum.total.Statements()),
		SharedShare:    ratio(t.usage.SharedTime, sum.total.SharedTime),
	}
}

func ratio[T ~int64](part, whole T) float64 {
	if whole <= 0 {
		return 0
	}
	return float64(part) / float64(whole)
}
