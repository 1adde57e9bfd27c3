// Package tenantlimit limits how often, and how much at once, each tenant of a service may call it, by the plan that it
// has bought:
//
//	limiter, err := tenantlimit.New(tenantlimit.Config{
//		Plans: map[string]tenantlimit.Plan{
//			"free": {Limits: tenantlimit.Limits{Rate: tenantlimit.PerMinute(60, 10)}},
//			"pro":  {Limits: tenantlimit.Limits{Rate: tenantlimit.PerMinute(600, 50), Concurrency: 20}},
//		},
//		Redis: redis.NewClient(&redis.Options{Addr: "localhost:6379"}), // nil: within this process
//	})
//	...
//	http.ListenAndServe(addr, tenants(limiter.Middleware()(mux))) // tenants is a pgxtenant.Middleware
//
// Whose call it is and on which plan comes from the context, never from the caller. What is not HTTP calls
// [Limiter.Take] itself.
//
// # Exact
//
// A rate is a token bucket. It fills at Requests per Period up to Burst, and a call takes its cost out, or is refused
// and takes nothing. A concurrency is a number of slots, which a call gives back when it ends. One call is decided on
// all its limits in one round trip, by one script and by Redis' own clock, so that any number of processes let
// exactly as many calls pass as one would. Each tenant and each endpoint with a limit of its own has one short key per
// limit; those of a tenant are in one slot of a Redis Cluster.
//
// A clock of Redis that goes backwards, a failover or a restart neither lock a tenant out nor hand out more than one
// burst. A process that is killed gives its slots back when its leases run out.
//
// # When Redis is lost
//
// A call waits for Redis no longer than Config.Timeout. After a few failures Redis is not asked at all, but for one
// call each Config.Retry, and is back with the first that succeeds. Meanwhile Config.OnLoss decides: a
// limiter of this process at the same limits, every call, or none. [Limiter.Stats] says so.
package tenantlimit
