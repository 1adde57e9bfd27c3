package tenantlimit

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// localStore keeps the counts of one process.
type localStore struct {
	mu      sync.Mutex
	buckets map[string]*bucket
	taken   map[string]int // slots, by their key; none that is zero
	sweepAt int            // buckets
}

// bucket is a rate.Limiter that knows what it was made of.
type bucket struct {
	*rate.Limiter
	of Rate
}

// sweepFirst is the number of buckets at which full ones are looked for.
const sweepFirst = 1024

func newLocalStore() *localStore {
	return &localStore{buckets: map[string]*bucket{}, taken: map[string]int{}, sweepAt: sweepFirst}
}

func (s *localStore) take(_ context.Context, q *question) (answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	a := answer{taken: s.taken[q.leasesKey]}
	var b *bucket
	if q.rateKey != "" {
		b = s.bucket(q.rateKey, q.state.Rate, now)
		a.tokens = b.TokensAt(now)
	}
	switch {
	case b != nil && a.tokens < float64(q.cost):
		a.refused = KindRate
		return a, nil
	case q.leasesKey != "" && a.taken >= q.state.Concurrency:
		a.refused = KindConcurrency
		return a, nil
	}
	if b != nil {
		b.AllowN(now, q.cost) // it does
		a.tokens -= float64(q.cost)
	}
	if q.leasesKey != "" {
		a.taken++
		s.taken[q.leasesKey] = a.taken
		a.release = func() { s.giveBack(q.leasesKey) }
	}
	return a, nil
}

func (s *localStore) giveBack(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken[key]--; s.taken[key] <= 0 {
		delete(s.taken, key)
	}
}

// bucket returns the bucket of that key, changed to the rate that it now has.
func (s *localStore) bucket(key string, r Rate, now time.Time) *bucket {
	b := s.buckets[key]
	if b == nil {
		if len(s.buckets) >= s.sweepAt {
			s.sweep(now)
		}
		b = &bucket{Limiter: rate.NewLimiter(rate.Limit(r.perSecond()), r.Burst), of: r}
		s.buckets[key] = b
	} else if b.of != r {
		b.SetLimitAt(now, rate.Limit(r.perSecond()))
		b.SetBurstAt(now, r.Burst)
		b.of = r
	}
	return b
}

// sweep drops what is full, which is as good as none. It is called when the buckets have doubled, so that it costs a
// call nothing on average, and memory is bounded by the tenants that called while a bucket of theirs filled.
func (s *localStore) sweep(now time.Time) {
	for key, b := range s.buckets {
		if b.TokensAt(now) >= float64(b.of.Burst) {
			delete(s.buckets, key)
		}
	}
	s.sweepAt = max(sweepFirst, 2*len(s.buckets))
}

func (s *localStore) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.buckets)
}
