package tenantlimit

import "sync/atomic"

// Stats are counts since the Limiter was made, and how it stands. Each field is right by itself; one call may be
// in one of them already and not yet in another.
type Stats struct {
	Allowed              uint64 // calls that passed
	RefusedByRate        uint64
	RefusedByConcurrency uint64
	RefusedByCost        uint64
	Failed               uint64 // calls of Take without a decision: no tenant, no such plan, ErrLost, context done and the like

	// Fallbacks are the calls, of all of these, that came to Config.OnLoss.
	Fallbacks uint64
	// RedisErrors are commands that Redis failed, or did not answer in time. Those that it was not even asked,
	// since it had failed before, are not among them.
	RedisErrors uint64

	// Lost says that Redis is being left alone at the moment, but for a call now and then.
	Lost bool
	// Leases are the slots of concurrency limits that this process has in Redis.
	Leases int
	// LocalBuckets are the rates that this process counts by itself, without Redis or while it was lost.
	LocalBuckets int
}

type counts struct {
	allowed, failed, fallbacks atomic.Uint64
	refused                    [KindCost + 1]atomic.Uint64
}

// Stats returns what the Limiter has done so far.
func (l *Limiter) Stats() Stats {
	s := Stats{
		Allowed:              l.counts.allowed.Load(),
		RefusedByRate:        l.counts.refused[KindRate].Load(),
		RefusedByConcurrency: l.counts.refused[KindConcurrency].Load(),
		RefusedByCost:        l.counts.refused[KindCost].Load(),
		Failed:               l.counts.failed.Load(),
		Fallbacks:            l.counts.fallbacks.Load(),
		LocalBuckets:         l.local.len(),
	}
	if l.remote != nil {
		s.RedisErrors = l.remote.failed.Load()
		s.Lost = l.remote.lost()
		s.Leases = l.remote.leases.len()
	}
	return s
}
