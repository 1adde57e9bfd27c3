package tenantprom

import (
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
)

// cacheStats are those of one store.
type cacheStats struct {
	tenantcache.Stats
	inProcess bool // a tenantcache.Memory
}

var cacheFamilies = []family[cacheStats]{
	counter("pgxtenant_cache_requests_total", "Entries that were looked for, and found or not.",
		func(s cacheStats, add adder) {
			add(float64(s.Hits), "hit")
			add(float64(s.Misses), "miss")
		}, "result"),
	counter("pgxtenant_cache_stale_total", "Misses that found an entry of an earlier generation.",
		number(func(s cacheStats) uint64 { return s.Stale })),
	counter("pgxtenant_cache_undecodable_total", "Misses that found an entry which the codec does not read.",
		number(func(s cacheStats) uint64 { return s.Undecodable })),
	counter("pgxtenant_cache_loads_total", "Calls of loaders, refreshes included.",
		number(func(s cacheStats) uint64 { return s.Loads })),
	counter("pgxtenant_cache_load_errors_total", "Calls of loaders that failed, panicked or took too long.",
		number(func(s cacheStats) uint64 { return s.LoadErrors })),
	counter("pgxtenant_cache_shared_loads_total", "Calls that waited for a load that another had begun.",
		number(func(s cacheStats) uint64 { return s.Shared })),
	counter("pgxtenant_cache_refreshes_total", "Loads before the end of an entry.",
		number(func(s cacheStats) uint64 { return s.Refreshes })),
	counter("pgxtenant_cache_overtaken_total", "Loaded values that were not stored, since the entry was written or deleted meanwhile.",
		number(func(s cacheStats) uint64 { return s.Overtaken })),
	counter("pgxtenant_cache_too_large_total", "Values that the store did not take.",
		number(func(s cacheStats) uint64 { return s.TooLarge })),
	counter("pgxtenant_cache_invalidations_total", "Invalidations of tenants and namespaces.",
		number(func(s cacheStats) uint64 { return s.Invalidations })),

	inRedis(counter("pgxtenant_cache_redis_errors_total", "Calls to Redis that failed or took too long.",
		number(func(s cacheStats) uint64 { return s.Failures }))),
	inRedis(counter("pgxtenant_cache_redis_spared_total", "Calls to Redis that the open circuit breaker spared.",
		number(func(s cacheStats) uint64 { return s.Refused }))),
	inRedis(counter("pgxtenant_cache_breaker_opens_total", "Times that the circuit breaker before Redis has opened.",
		number(func(s cacheStats) uint64 { return s.BreakerOpens }))),
	inRedis(gauge("pgxtenant_cache_breaker_state", "1 for the state that the circuit breaker before Redis is in, 0 for the others.",
		func(s cacheStats, add adder) {
			for _, state := range []tenantcache.BreakerState{tenantcache.BreakerClosed, tenantcache.BreakerHalfOpen, tenantcache.BreakerOpen} {
				add(is(s.Breaker == state), state.String())
			}
		}, "state")),

	inProcess(gauge("pgxtenant_cache_tenants", "Tenants with entries, in the process.",
		number(func(s cacheStats) int { return s.Tenants }))),
	inProcess(gauge("pgxtenant_cache_entries", "Entries, in the process.",
		number(func(s cacheStats) int { return s.Entries }))),
	inProcess(gauge("pgxtenant_cache_bytes", "Size of the entries, in the process.",
		number(func(s cacheStats) int64 { return s.Bytes }))),
	inProcess(counter("pgxtenant_cache_evictions_total", "Entries that made room for others, in the process.",
		number(func(s cacheStats) uint64 { return s.Evictions }))),
}

// inRedis has a family tell of stores in Redis only, and inProcess of those in the process.
func inRedis(f family[cacheStats]) family[cacheStats]   { return only(false, f) }
func inProcess(f family[cacheStats]) family[cacheStats] { return only(true, f) }

func only(inProcess bool, f family[cacheStats]) family[cacheStats] {
	read := f.read
	f.read = func(s cacheStats, add adder) {
		if s.inProcess == inProcess {
			read(s, add)
		}
	}
	return f
}

var limiterFamilies = []family[tenantlimit.Stats]{
	counter("pgxtenant_limiter_decisions_total", "Calls that passed, that were refused, by limit, and for which nothing could be decided.",
		func(s tenantlimit.Stats, add adder) {
			add(float64(s.Allowed), "allowed")
			add(float64(s.RefusedByRate), "refused_rate")
			add(float64(s.RefusedByConcurrency), "refused_concurrency")
			add(float64(s.RefusedByCost), "refused_cost")
			add(float64(s.Failed), "failed")
		}, "decision"),
	counter("pgxtenant_limiter_fallbacks_total", "Calls, of all decided, that came to Config.OnLoss.",
		number(func(s tenantlimit.Stats) uint64 { return s.Fallbacks })),
	counter("pgxtenant_limiter_redis_errors_total", "Commands that Redis failed, or did not answer in time.",
		number(func(s tenantlimit.Stats) uint64 { return s.RedisErrors })),
	gauge("pgxtenant_limiter_redis_lost", "1 while Redis is left alone, but for a call now and then, else 0.",
		func(s tenantlimit.Stats, add adder) { add(is(s.Lost)) }),
	gauge("pgxtenant_limiter_leases", "Slots of concurrency limits that this process has in Redis.",
		number(func(s tenantlimit.Stats) int { return s.Leases })),
	gauge("pgxtenant_limiter_local_buckets", "Rates that this process counts by itself, without Redis or while it is lost.",
		number(func(s tenantlimit.Stats) int { return s.LocalBuckets })),
}

func is(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
