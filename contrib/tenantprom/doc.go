// Package tenantprom tells Prometheus what a pgxtenant.TenantDB, its caches, its limiters and a service's requests do:
//
//	requests := tenantprom.NewRequests()
//	prometheus.MustRegister(requests, tenantprom.NewCollector(db,
//		tenantprom.WithCache("catalog", store),
//		tenantprom.WithLimiter("api", limiter)))
//	...
//	http.ListenAndServe(addr, requests.Around(tenants)(mux)) // tenants is a pgxtenant.Middleware
//
// docs/metrics.md lists all metrics, and [Dashboard] is one for Grafana.
//
// # However many tenants
//
// The number of series does not grow with that of tenants. [TopK] of them have series of their own, those that use the
// most of the databases' time, and all others together are the tenant "other". Plans and endpoints have bounds too.
//
// Who is among the TopK changes. What is told of a tenant is therefore an average over a [Window] that slides, as a
// gauge: it may end and begin again at any time, and has no beginning to be mistaken for a reset. What must be counted
// exactly, for an invoice for instance, is not for Prometheus.
//
// # Labels
//
// The word "other" stands for the rest, and "none" for work under pgxtenant.WithoutTenant, for requests without a
// tenant, and for tenants without a plan. A tenant with such an ID is "other (tenant)" or "none (tenant)"; plans of these
// names are counted with the rest.
package tenantprom
