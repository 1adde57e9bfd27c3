package pgxtenant

import (
	"cmp"
	"hash/maphash"
	"math"
	"math/bits"
	"slices"
	"strings"
	"time"
)

// loadSlice is what was used in a stretch of time, with the tenants that used the most of it. One goroutine may
// use it at a time.
//
// It is the sketch Space-Saving, with the time used as weight: a tenant that comes when all places are taken
// gets the place of the one that used the least, and is held to have used up to as much before. What it used since
// is counted exactly. No place's sum is then above the average, so a tenant misses at most 1/LoadTenants of
// the slice's time.
type loadSlice struct {
	start, end time.Duration // end is set once it is over
	total      Usage
	places     []loadPlace
	index      loadIndex // of places, by tenant ID
	seen       distinct  // the tenants that ever had a place

	// order is a heap, of four branches at each node, of places, by what they had used when last looked at, the least first. What they have used
	// since can only have made them heavier: only the first is put right, and only when the least is asked for. So
	// counting costs no step of the heap. It is empty until all places are taken.
	order []loadRank

	// missed is how much a tenant without a place may have used at most. It is set once the slice is over.
	missed time.Duration
}

type loadPlace struct {
	id     string
	hash   uint64        // of id; 0 in a slice that is made of others
	before time.Duration // at most what it used before
	usage  Usage         // since the tenant has the place
}

type loadRank struct {
	weight time.Duration // as last put in order
	place  int32
}

func (p *loadPlace) weight() time.Duration { return p.usage.Time + p.before }

// reset makes the slice empty, and keeps its memory.
func (s *loadSlice) reset(start time.Duration) {
	clear(s.places) // the IDs
	*s = loadSlice{start: start, places: s.places[:0], order: s.order[:0]}
}

// add counts u, which tenant id used.
func (s *loadSlice) add(id string, u *Usage) {
	s.total.add(u)
	hash := maphash.String(loadSeed, id)
	i := s.find(id, hash)
	if i < 0 {
		if i = s.place(id, hash, u.Time); i < 0 {
			return
		}
	}
	s.places[i].usage.add(u)
}

// place returns a place for a tenant that has none, or -1 if there is none for what has used no time.
func (s *loadSlice) place(id string, hash uint64, used time.Duration) int32 {
	s.seen.add(hash)
	if len(s.places) < LoadTenants {
		i := int32(len(s.places))
		s.places = append(s.places, loadPlace{id: id, hash: hash})
		s.index.put(hash, i)
		return i
	}
	if used <= 0 {
		return -1
	}
	i := s.least()
	p := &s.places[i]
	s.index.remove(s.places, i)
	s.index.put(hash, i)
	*p = loadPlace{id: id, hash: hash, before: p.weight()}
	return i
}

// find returns the place of a tenant, or -1.
func (s *loadSlice) find(id string, hash uint64) int32 {
	for slot := hash; ; slot++ {
		i := int32(s.index[slot%uint64(len(s.index))]) - 1
		if i < 0 {
			return -1
		}
		if p := &s.places[i]; p.hash == hash && p.id == id {
			return i
		}
	}
}

// loadIndex finds places by the hash of their tenants: in the slot of the hash, or one of those that follow until an
// empty one. A slot has the place's number plus one. A map takes three times as long to have one tenant replaced by another.
type loadIndex [2 * LoadTenants]uint16

func (x *loadIndex) put(hash uint64, place int32) {
	slot := hash
	for x[slot%uint64(len(x))] != 0 {
		slot++
	}
	x[slot%uint64(len(x))] = uint16(place + 1)
}

// remove takes a place out, and moves up those that it stood in the way of.
func (x *loadIndex) remove(places []loadPlace, place int32) {
	const n = uint64(len(x))
	gap := places[place].hash % n
	for x[gap] != uint16(place+1) {
		gap = (gap + 1) % n
	}
	for slot := (gap + 1) % n; x[slot] != 0; slot = (slot + 1) % n {
		home := places[x[slot]-1].hash % n
		if (slot-home)%n >= (slot-gap)%n { // its search begins at the gap, or before
			x[gap] = x[slot]
			gap = slot
		}
	}
	x[gap] = 0
}

// least returns the place that has used the least.
func (s *loadSlice) least() int32 {
	if len(s.order) == 0 {
		for i := range s.places {
			s.order = append(s.order, loadRank{s.places[i].weight(), int32(i)})
		}
		s.order = append(s.order, loadRank{weight: math.MaxInt64}) // so that each node has four branches or none
		for i := len(s.order) / 4; i >= 0; i-- {
			s.sink(i)
		}
	}
	for {
		first := &s.order[0]
		w := s.places[first.place].weight()
		if first.weight == w {
			return first.place
		}
		first.weight = w
		s.sink(0)
	}
}

func (s *loadSlice) sink(i int) {
	moved := s.order[i]
	for 4*i+4 < len(s.order) {
		// Written out, so that it compiles to no branches, which could not be foretold.
		branches := (*[4]loadRank)(s.order[4*i+1:])
		a, b := branches[0].weight, branches[1].weight
		left := 0
		if b < a {
			left = 1
		}
		c, d := branches[2].weight, branches[3].weight
		right := 2
		if d < c {
			right = 3
		}
		if min(c, d) < min(a, b) {
			left = right
		}
		if moved.weight <= min(a, b, c, d) {
			break
		}
		s.order[i] = branches[left]
		i = 4*i + 1 + left
	}
	s.order[i] = moved
}

// finish ends the slice.
func (s *loadSlice) finish(end time.Duration) {
	s.end = end
	if s.seen.full {
		s.missed = s.places[s.least()].weight() // who lost its place had used no more than this one now
	}
}

// copyTo makes dst a slice that ends now and has what s has so far.
func (s *loadSlice) copyTo(dst *loadSlice, now time.Duration) {
	places, order := append(dst.places[:0], s.places...), append(dst.order[:0], s.order...)
	*dst = *s
	dst.places, dst.order = places, order
	dst.finish(now)
}

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

// distinct estimates how many different strings were added, by their hashes, by the HyperLogLog algorithm of Flajolet, Fusy,
// Gandouet and Meunier (2007).
type distinct struct {
	registers [1 << distinctBits]uint8
	n         int  // of the first LoadTenants added
	full      bool // there were more than LoadTenants
}

const distinctBits = 11 // a standard error of 1.04/√2048

// loadSeed is of the hashes of tenant IDs.
var loadSeed = maphash.MakeSeed()

// add adds the string with hash h.
func (d *distinct) add(h uint64) {
	if d.n++; d.n > LoadTenants {
		d.full = true
	}
	r := &d.registers[h>>(64-distinctBits)]
	*r = max(*r, uint8(bits.LeadingZeros64(h<<distinctBits|1<<(distinctBits-1)))+1)
}

func (d *distinct) merge(o *distinct) {
	for i, r := range o.registers {
		d.registers[i] = max(d.registers[i], r)
	}
	d.full = d.full || o.full
}

func (d *distinct) estimate() int {
	const m = 1 << distinctBits
	sum, empty := 0.0, 0
	for _, r := range d.registers {
		sum += math.Ldexp(1, -int(r))
		if r == 0 {
			empty++
		}
	}
	e := 0.7213 / (1 + 1.079/m) * m * m / sum
	if e <= 2.5*m && empty > 0 {
		e = m * math.Log(m/float64(empty)) // counting the empty ones is better for few
	}
	return int(math.Round(e))
}
