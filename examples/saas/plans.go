package main

import (
	"time"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
)

// What a tenant has bought is Tenant.Plan: free, pro or enterprise. Three things follow from it.

// callLimits is how often it may call the API. The pattern of a route is the name of an endpoint.
func callLimits() map[string]tenantlimit.Plan {
	plans := tenantlimit.StarterPlans()
	for name, report := range map[string]tenantlimit.Limits{
		"free":       {Rate: tenantlimit.PerHour(10, 2), Concurrency: 1},
		"pro":        {Rate: tenantlimit.PerMinute(600, 100), Concurrency: 8},
		"enterprise": {Rate: tenantlimit.PerMinute(600, 100), Concurrency: 8},
	} {
		p := plans[name]
		p.Endpoints = map[string]tenantlimit.Limits{routeReport: report} // expensive, so counted apart
		plans[name] = p
	}
	return plans
}

// connectionLimits is how it shares the database's connections with others while there are not enough for all, and
// how long the server works for it. A process that hangs on to a connection is told to the log after HoldLimit.
func connectionLimits(t pgxtenant.Tenant) pgxtenant.Limits {
	switch t.Plan {
	case "enterprise":
		return pgxtenant.Limits{Weight: 4, MaxWaiting: 1000, MaxWait: 10 * time.Second, StatementTimeout: 30 * time.Second, HoldLimit: time.Minute}
	case "pro":
		return pgxtenant.Limits{Weight: 2, MaxWaiting: 200, MaxWait: 5 * time.Second, StatementTimeout: 10 * time.Second, HoldLimit: 30 * time.Second}
	default:
		return pgxtenant.Limits{MaxWaiting: 50, MaxWait: 2 * time.Second, StatementTimeout: 5 * time.Second, HoldLimit: 15 * time.Second}
	}
}

// cacheBytes is how much of the cache in the process it may fill. In Redis, Redis' own maxmemory holds for all.
func cacheBytes(t pgxtenant.Tenant) int64 {
	switch t.Plan {
	case "enterprise":
		return 16 << 20
	case "pro":
		return 4 << 20
	default:
		return 1 << 20
	}
}
