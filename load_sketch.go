package pgxtenant

import (
	"hash/maphash"
	"time"
)

// loadSketch counts what is used in the current slice, and finds the tenants that use the most. One goroutine may
// use it at a time.
//
// It is the sketch Misra-Gries with weights, as Anderson, Bevin, Lang, Liberty, Rhodes and Thaler made it quick (2017): tenants
// get places as they come, and when all are taken, the lighter half gives them up at once. Who comes
// later is held to have used up to as much before as the heaviest of those; what it uses from then on is counted
// exactly. Each time, LoadTenants others had used at least as much more than what was so taken from the earlier halves, so a tenant
// misses at most 1/LoadTenants of the slice's time.
//
// Space-Saving, which keeps half the places and replaces the lightest at each newcomer, promises the same, and pays
// for it with a heap and an index to be put in order at each.
type loadSketch struct {
	start  time.Duration
	lost   Usage // what was used by those that had no place, or have lost it
	places []loadPlace
	index  loadIndex     // of places
	seen   distinct      // the tenants that ever had a place
	floor  time.Duration // how much a tenant without a place has used at most; none of places weighs less
}

// loadPlaces is how many places a sketch has.
const loadPlaces = 2 * LoadTenants

// newLoadSketch returns a sketch of what is used from start on.
func newLoadSketch(start time.Duration) *loadSketch { return &loadSketch{start: start} }

// reset makes the sketch empty, and keeps its memory.
func (s *loadSketch) reset(start time.Duration) {
	clear(s.places[:cap(s.places)]) // the IDs
	*s = loadSketch{start: start, places: s.places[:0]}
}

// loadHash is the hash of a tenant's ID.
func loadHash(id string) uint64 { return maphash.String(loadSeed, id) }

// loadSeed is of the hashes of tenant IDs.
var loadSeed = maphash.MakeSeed()

// add counts u, which tenant id used, whose hash is given: a binding has it, since the ID of one of very many
// tenants has to be fetched from memory.
func (s *loadSketch) add(id string, hash uint64, u *Usage) {
	slot := hash % loadSlots
	for ; s.index[slot] != 0; slot = (slot + 1) % loadSlots {
		if p := &s.places[s.index[slot]-1]; p.hash == hash && p.id == id {
			p.usage.add(u)
			return
		}
	}
	s.seen.add(hash)
	if len(s.places) == loadPlaces {
		if u.Time <= 0 { // which costs nobody a place
			s.lost.add(u)
			return
		}
		s.halve()
		slot = s.index.free(hash)
	}
	s.places = append(s.places, loadPlace{})
	p := &s.places[len(s.places)-1]
	p.id, p.hash, p.before, p.usage = id, hash, s.floor, *u
	s.index[slot] = uint16(len(s.places))
}

// halve takes the places of all but the LoadTenants heaviest.
func (s *loadSketch) halve() {
	surplus := len(s.places) - LoadTenants
	if surplus <= 0 {
		return
	}
	var weights [loadPlaces]time.Duration
	for i := range s.places {
		weights[i] = s.places[i].weight()
	}
	s.floor = nth(weights[:len(s.places)], surplus-1)
	stay := LoadTenants // of those at the floor, how many
	for i := range s.places {
		if s.places[i].weight() > s.floor {
			stay--
		}
	}
	s.index = loadIndex{}
	kept := s.places[:0] // the IDs behind are soon written over
	for i := range s.places {
		p := &s.places[i]
		w := p.weight()
		if w == s.floor {
			stay--
		}
		if w < s.floor || w == s.floor && stay < 0 {
			s.lost.add(&p.usage)
			continue
		}
		kept = append(kept, *p)
		s.index[s.index.free(p.hash)] = uint16(len(kept))
	}
	s.places = kept
}

// nth puts the n+1 smallest of all first and returns the largest of them, by Hoare's quickselect.
func nth(all []time.Duration, n int) time.Duration {
	for lo, hi := 0, len(all)-1; lo < hi; {
		// The middle one of three, in its place.
		mid := lo + (hi-lo)/2
		a, b, c := all[lo], all[mid], all[hi]
		pivot := max(min(a, b), min(max(a, b), c))
		i, j := lo, hi
		for i <= j {
			for all[i] < pivot {
				i++
			}
			for all[j] > pivot {
				j--
			}
			if i <= j {
				all[i], all[j] = all[j], all[i]
				i++
				j--
			}
		}
		switch {
		case n <= j:
			hi = j
		case n >= i:
			lo = i
		default:
			return all[n]
		}
	}
	return all[n]
}

// finish makes dst the slice that ends now with what the sketch has, which is then to be reset.
func (s *loadSketch) finish(dst *loadSlice, end time.Duration) {
	s.halve()
	clear(dst.places)
	*dst = loadSlice{start: s.start, end: end, total: s.lost, places: append(dst.places[:0], s.places...), seen: s.seen}
	for i := range s.places {
		dst.total.add(&s.places[i].usage)
	}
	if s.seen.full {
		dst.missed = s.floor
	}
}

// copyTo makes dst a copy of the sketch.
func (s *loadSketch) copyTo(dst *loadSketch) {
	clear(dst.places)
	places := append(dst.places[:0], s.places...)
	*dst = *s
	dst.places = places
}

// loadIndex finds places by the hash of their tenants: in the slot of the hash, or one of those that follow until an
// empty one. A slot has the place's number plus one.
type loadIndex [loadSlots]uint16

// loadSlots is enough for most searches to end in the first slot.
const loadSlots = 4 * loadPlaces

// free returns the slot for a hash that is not there.
func (x *loadIndex) free(hash uint64) uint64 {
	slot := hash % loadSlots
	for x[slot] != 0 {
		slot = (slot + 1) % loadSlots
	}
	return slot
}
