package pgxtenant

import (
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Stat is a snapshot of a TenantDB's statistics. Its methods are those of pgxpool.Stat, each the sum
// over the shared pool and all isolated pools; cumulative counts keep those of pools that have been
// closed. The Admin pool has its own Stat.
type Stat struct {
	sum                            counters
	pools                          []PoolStat
	opened, evicted, failed        int64
	bound                          int64
	directoryHits, directoryMisses int64
	waits                          WaitHistogram
}

// counters are the numbers of a pgxpool.Stat.
type counters struct {
	acquireCount, canceledAcquireCount, emptyAcquireCount int64
	newConnsCount, maxLifetimeDestroyCount                int64
	maxIdleDestroyCount                                   int64
	acquireDuration, emptyAcquireWaitTime                 time.Duration
	acquired, constructing, idle, maxConns, total         int32
	waiting                                               int32
	refused                                               int64
}

// AcquireCount returns the cumulative count of successful acquires.
func (s *Stat) AcquireCount() int64 { return s.sum.acquireCount }

// AcquireDuration returns the total duration of all successful acquires.
func (s *Stat) AcquireDuration() time.Duration { return s.sum.acquireDuration }

// AcquiredConns returns the number of connections in use.
func (s *Stat) AcquiredConns() int32 { return s.sum.acquired }

// CanceledAcquireCount returns the cumulative count of acquires that were cancelled by their context.
func (s *Stat) CanceledAcquireCount() int64 { return s.sum.canceledAcquireCount }

// ConstructingConns returns the number of connections that are being made.
func (s *Stat) ConstructingConns() int32 { return s.sum.constructing }

// EmptyAcquireCount returns the cumulative count of successful acquires that waited for a connection to
// be released or made.
func (s *Stat) EmptyAcquireCount() int64 { return s.sum.emptyAcquireCount }

// EmptyAcquireWaitTime returns the cumulative time waited by EmptyAcquireCount's acquires.
func (s *Stat) EmptyAcquireWaitTime() time.Duration { return s.sum.emptyAcquireWaitTime }

// IdleConns returns the number of idle connections.
func (s *Stat) IdleConns() int32 { return s.sum.idle }

// MaxConns returns the most connections that the pools open now may hold together: the sum of their
// own limits, or Config.MaxConns if that is less.
func (s *Stat) MaxConns() int32 { return s.sum.maxConns }

// MaxIdleDestroyCount returns the cumulative count of connections closed because they were idle too long.
func (s *Stat) MaxIdleDestroyCount() int64 { return s.sum.maxIdleDestroyCount }

// MaxLifetimeDestroyCount returns the cumulative count of connections closed because they were too old.
func (s *Stat) MaxLifetimeDestroyCount() int64 { return s.sum.maxLifetimeDestroyCount }

// NewConnsCount returns the cumulative count of connections opened.
func (s *Stat) NewConnsCount() int64 { return s.sum.newConnsCount }

// BoundCount returns the cumulative count of times a tenant was bound: once for each statement outside of a transaction,
// for each transaction, and for each batch. It costs no round trip.
func (s *Stat) BoundCount() int64 { return s.bound }

// DirectoryHitCount returns the cumulative count of checkouts whose tenant Config.Directory knew by heart, as a Peeker.
func (s *Stat) DirectoryHitCount() int64 { return s.directoryHits }

// DirectoryMissCount returns the cumulative count of checkouts that called Lookup of Config.Directory, or joined
// others that had.
func (s *Stat) DirectoryMissCount() int64 { return s.directoryMisses }

// OpenedPoolsCount returns the cumulative count of isolated pools that were opened.
func (s *Stat) OpenedPoolsCount() int64 { return s.opened }

// EvictedPoolsCount returns the cumulative count of isolated pools that were opened and have been told to close since,
// for whatever reason.
func (s *Stat) EvictedPoolsCount() int64 { return s.evicted }

// FailedPoolsCount returns the cumulative count of isolated pools that could not be opened.
func (s *Stat) FailedPoolsCount() int64 { return s.failed }

// AcquireWaits returns how long checkouts waited for a connection, or for their turn, whether they got it or not.
// It is empty with Config.DisableLoad.
func (s *Stat) AcquireWaits() WaitHistogram {
	return WaitHistogram{slices.Clone(s.waits.Bounds), slices.Clone(s.waits.Counts), s.waits.Sum}
}

// WaitHistogram counts waits by their length.
type WaitHistogram struct {
	Bounds []time.Duration // upper bounds, themselves included, in ascending order
	Counts []int64         // one for each of Bounds, of what is above the bound before it, and one for what is above all
	Sum    time.Duration   // of all waits
}

// RefusedAcquireCount returns the cumulative count of acquires that were refused with ErrTenantOverloaded.
func (s *Stat) RefusedAcquireCount() int64 { return s.sum.refused }

// TotalConns returns the number of connections: idle, in use and being made.
func (s *Stat) TotalConns() int32 { return s.sum.total }

// WaitingAcquires returns the number of acquires that wait for their tenant's turn. It is 0 with
// Config.ArrivalOrder.
func (s *Stat) WaitingAcquires() int32 { return s.sum.waiting }

// Pools returns a row for each isolated pool, those being opened and those that drain included, in the
// order of tenant IDs. A tenant may have an open pool and several that drain.
func (s *Stat) Pools() []PoolStat { return slices.Clone(s.pools) }

// PoolState is what an isolated pool is doing.
type PoolState string

const (
	// PoolOpening pools make their first connection.
	PoolOpening PoolState = "opening"
	// PoolOpen pools serve checkouts.
	PoolOpen PoolState = "open"
	// PoolDraining pools have been evicted: they serve those who have them until the last lease and the
	// last connection are returned.
	PoolDraining PoolState = "draining"
)

// PoolStat is a snapshot of one isolated pool. Its numbers are those of pgxpool.Stat.
type PoolStat struct {
	TenantID string
	State    PoolState
	LastUsed time.Time // last checkout, to the second, or last seen in use; zero while opening
	Leases   int       // from TenantDB.Lease, not yet released

	MaxConns, TotalConns, IdleConns, AcquiredConns, ConstructingConns, WaitingAcquires int32

	AcquireCount, NewConnsCount, EmptyAcquireCount, CanceledAcquireCount, RefusedAcquireCount int64

	AcquireDuration, EmptyAcquireWaitTime time.Duration
}

// Stat returns a snapshot of the statistics of all pools but Admin's.
func (db *TenantDB) Stat() *Stat {
	stat := db.isolated.stat()
	stat.sum.add(countersOf(db.shared.Stat(), db.gate))
	if limit := db.config.MaxConns; limit > 0 {
		stat.sum.maxConns = min(stat.sum.maxConns, limit)
	}
	stat.bound = db.load.bound()
	stat.directoryHits, stat.directoryMisses = db.lookups.hits.Load(), db.lookups.misses.Load()
	stat.waits = db.load.histogram(stat.sum.acquireCount)
	return stat
}

func (s *isolatedPools) stat() *Stat {
	s.mu.Lock()
	stat := &Stat{sum: s.retired, opened: s.opened, evicted: s.evicted, failed: s.failures}
	for _, p := range s.open {
		stat.addPool(p, PoolOpen)
	}
	for p := range s.others {
		state := PoolOpening
		if p.draining.Load() {
			state = PoolDraining
		}
		stat.addPool(p, state)
	}
	s.mu.Unlock()
	slices.SortFunc(stat.pools, func(a, b PoolStat) int {
		if c := strings.Compare(a.TenantID, b.TenantID); c != 0 {
			return c
		}
		return a.LastUsed.Compare(b.LastUsed)
	})
	return stat
}

func (s *Stat) addPool(p *isolatedPool, state PoolState) {
	row := PoolStat{TenantID: p.tenant.ID, State: state, Leases: int(p.leases.Load())}
	if state != PoolOpening { // before that p.pool belongs to the goroutine that opens it
		c := countersOf(p.pool.Stat(), p.gate)
		s.sum.add(c)
		row.LastUsed = p.set.epoch.Add(time.Duration(p.lastUsed.Load()))
		row.MaxConns, row.TotalConns, row.IdleConns = c.maxConns, c.total, c.idle
		row.AcquiredConns, row.ConstructingConns, row.WaitingAcquires = c.acquired, c.constructing, c.waiting
		row.AcquireCount, row.NewConnsCount = c.acquireCount, c.newConnsCount
		row.EmptyAcquireCount, row.CanceledAcquireCount = c.emptyAcquireCount, c.canceledAcquireCount
		row.RefusedAcquireCount = c.refused
		row.AcquireDuration, row.EmptyAcquireWaitTime = c.acquireDuration, c.emptyAcquireWaitTime
	}
	s.pools = append(s.pools, row)
}

// countersOf returns the counters of a pool and its turnstile, the latter from after s was taken.
func countersOf(s *pgxpool.Stat, g *turnstile) counters {
	waiting, refused := g.stat()
	return counters{
		acquireCount: s.AcquireCount(), canceledAcquireCount: g.endedOf(s.CanceledAcquireCount(), refused),
		emptyAcquireCount: s.EmptyAcquireCount(), newConnsCount: s.NewConnsCount(),
		maxLifetimeDestroyCount: s.MaxLifetimeDestroyCount(), maxIdleDestroyCount: s.MaxIdleDestroyCount(),
		acquireDuration: s.AcquireDuration(), emptyAcquireWaitTime: s.EmptyAcquireWaitTime(),
		acquired: s.AcquiredConns(), constructing: s.ConstructingConns(), idle: s.IdleConns(),
		maxConns: s.MaxConns(), total: s.TotalConns(),
		waiting: waiting, refused: refused,
	}
}

func (c *counters) add(o counters) {
	c.acquireCount += o.acquireCount
	c.canceledAcquireCount += o.canceledAcquireCount
	c.emptyAcquireCount += o.emptyAcquireCount
	c.newConnsCount += o.newConnsCount
	c.maxLifetimeDestroyCount += o.maxLifetimeDestroyCount
	c.maxIdleDestroyCount += o.maxIdleDestroyCount
	c.acquireDuration += o.acquireDuration
	c.emptyAcquireWaitTime += o.emptyAcquireWaitTime
	c.acquired += o.acquired
	c.constructing += o.constructing
	c.idle += o.idle
	c.maxConns += o.maxConns
	c.total += o.total
	c.waiting += o.waiting
	c.refused += o.refused
}
