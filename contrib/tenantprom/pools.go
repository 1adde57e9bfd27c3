package tenantprom

import "github.com/pgxtenant/pgxtenant"

// poolFamilies are made of pgxtenant.Stat.
var poolFamilies = []family[*snapshot]{
	gauge("pgxtenant_connections", "Connections of the shared pool, and of all isolated pools together.",
		func(s *snapshot, add adder) {
			i := &s.isolated
			add(float64(i.IdleConns), "isolated", "idle")
			add(float64(i.AcquiredConns), "isolated", "acquired")
			add(float64(i.ConstructingConns), "isolated", "constructing")
			add(float64(s.stat.IdleConns()-i.IdleConns), "shared", "idle")
			add(float64(s.stat.AcquiredConns()-i.AcquiredConns), "shared", "acquired")
			add(float64(s.stat.ConstructingConns()-i.ConstructingConns), "shared", "constructing")
		}, "pool", "state"),
	gauge("pgxtenant_connections_max", "The most connections that the shared pool may hold, and the isolated pools open now together.",
		func(s *snapshot, add adder) {
			add(float64(s.isolated.MaxConns), "isolated")
			add(float64(s.sharedMax), "shared")
		}, "pool"),
	gauge("pgxtenant_connections_limit", "The most connections that all pools open now may hold together, under Config.MaxConns.",
		number(func(s *snapshot) int32 { return s.stat.MaxConns() })),
	counter("pgxtenant_connections_opened_total", "Connections opened.",
		number(func(s *snapshot) int64 { return s.stat.NewConnsCount() })),
	counter("pgxtenant_connections_closed_total", "Connections closed since they were idle for too long, or too old.",
		func(s *snapshot, add adder) {
			add(float64(s.stat.MaxIdleDestroyCount()), "idle")
			add(float64(s.stat.MaxLifetimeDestroyCount()), "lifetime")
		}, "reason"),
	counter("pgxtenant_acquires_total", "Checkouts that got a connection, that their context ended before, and that were refused with ErrTenantOverloaded.",
		func(s *snapshot, add adder) {
			add(float64(s.stat.AcquireCount()), "acquired")
			add(float64(s.stat.CanceledAcquireCount()), "canceled")
			add(float64(s.stat.RefusedAcquireCount()), "refused")
		}, "result"),
	gauge("pgxtenant_acquires_waiting", "Checkouts that wait for their tenant's turn.",
		func(s *snapshot, add adder) {
			add(float64(s.isolated.WaitingAcquires), "isolated")
			add(float64(s.stat.WaitingAcquires()-s.isolated.WaitingAcquires), "shared")
		}, "pool"),
	gauge("pgxtenant_pools", "Isolated pools.",
		func(s *snapshot, add adder) {
			for _, state := range []pgxtenant.PoolState{pgxtenant.PoolOpening, pgxtenant.PoolOpen, pgxtenant.PoolDraining} {
				add(float64(s.pools[state]), string(state))
			}
		}, "state"),
	counter("pgxtenant_pools_opened_total", "Isolated pools opened.",
		number(func(s *snapshot) int64 { return s.stat.OpenedPoolsCount() })),
	counter("pgxtenant_pools_evicted_total", "Isolated pools that were opened and have been told to close, for whatever reason.",
		number(func(s *snapshot) int64 { return s.stat.EvictedPoolsCount() })),
	counter("pgxtenant_pools_failed_total", "Isolated pools that could not be opened.",
		number(func(s *snapshot) int64 { return s.stat.FailedPoolsCount() })),
	gauge("pgxtenant_leases", "Leases of isolated pools that have not been released.",
		number(func(s *snapshot) int { return s.isolated.Leases })),
	counter("pgxtenant_bindings_total", "Times that a tenant was bound: for each statement outside of a transaction, each transaction and each batch.",
		number(func(s *snapshot) int64 { return s.stat.BoundCount() })),
	counter("pgxtenant_directory_lookups_total", "Checkouts whose tenant the directory knew by heart (hit), and that it had to look up (miss).",
		func(s *snapshot, add adder) {
			add(float64(s.stat.DirectoryHitCount()), "hit")
			add(float64(s.stat.DirectoryMissCount()), "miss")
		}, "result"),
}

// auditFamilies are made of the last audit. Without one they have no series.
var auditFamilies = []family[*snapshot]{
	gauge("pgxtenant_audit_findings", "What the last audit found, without what is allowed.",
		func(s *snapshot, add adder) {
			if s.audit != nil {
				for _, severity := range []pgxtenant.Severity{pgxtenant.SeverityError, pgxtenant.SeverityWarning, pgxtenant.SeverityInfo} {
					add(float64(s.audit.Count(severity)), string(severity))
				}
			}
		}, "severity"),
	gauge("pgxtenant_audit_allowed_findings", "What the last audit found that Config.AuditAllow has.",
		func(s *snapshot, add adder) {
			if s.audit == nil {
				return
			}
			allowed := 0
			for _, f := range s.audit.Findings {
				if f.Allowed {
					allowed++
				}
			}
			add(float64(allowed))
		}),
	gauge("pgxtenant_audit_timestamp_seconds", "When the last audit ended, since 1970.",
		func(s *snapshot, add adder) {
			if s.audit != nil {
				add(float64(s.auditAt.UnixMilli()) / 1000)
			}
		}),
}
