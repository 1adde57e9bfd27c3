package bench

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

type callerKey struct{}

func caller(ctx context.Context) (string, bool) {
	id, ok := ctx.Value(callerKey{}).(string)
	return id, ok
}

// BenchmarkMiddleware shows what finding the tenant adds to a request, with a registry that has all tenants in
// memory, and their requests in turn. via=bare is the floor: the handler alone. The price is to be at most 1 µs and
// 3 allocations.
func BenchmarkMiddleware(b *testing.B) {
	registry := warmRegistry(b)
	allowed := pgxtenant.Authorize(func(context.Context, *http.Request, pgxtenant.Tenant) error { return nil })
	requests := make([]*http.Request, tenants)
	for i := range requests {
		ctx := context.WithValue(b.Context(), callerKey{}, tenantID(i))
		r := httptest.NewRequest(http.MethodGet, "http://api.example.net/t/"+tenantID(i)+"/notes", nil).WithContext(ctx)
		r.Header.Set("X-Tenant-ID", tenantID(i))
		r.Header.Set("Cookie", "session=0123456789; tenant="+tenantID(i))
		requests[i] = r
	}
	own := func(int) string { return "api.example.net" }
	below := func(i int) string { return tenantID(i) + ".example.com:8080" }
	alias := func(i int) string { return tenantID(i) + ".test" }
	bare := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for _, bc := range []struct {
		via     string
		host    func(i int) string
		options []pgxtenant.MiddlewareOption
	}{
		{"bare", own, nil},
		{"claim", own, []pgxtenant.MiddlewareOption{pgxtenant.ByClaim(caller)}},
		{"header", own, []pgxtenant.MiddlewareOption{pgxtenant.ByHeader("X-Tenant-ID"), allowed}},
		{"path", own, []pgxtenant.MiddlewareOption{pgxtenant.ByPath("/t/"), allowed}},
		{"cookie", own, []pgxtenant.MiddlewareOption{pgxtenant.ByCookie("tenant"), allowed}},
		{"subdomain", below, []pgxtenant.MiddlewareOption{pgxtenant.BySubdomain("example.com"), allowed}},
		{"domain", alias, []pgxtenant.MiddlewareOption{pgxtenant.ByDomain(), allowed}},
		{"subdomain+domain+header+claim", below, []pgxtenant.MiddlewareOption{pgxtenant.BySubdomain("example.com"), pgxtenant.ByDomain(),
			pgxtenant.ByHeader("X-Tenant-ID"), pgxtenant.ByClaim(caller)}},
	} {
		b.Run("via="+bc.via, func(b *testing.B) {
			h := http.Handler(bare)
			if bc.options != nil {
				h = pgxtenant.Middleware(registry, bc.options...)(bare)
			}
			for i, r := range requests {
				r.Host = bc.host(i)
			}
			w := httptest.NewRecorder()
			n := 0
			serve := func() {
				clear(w.Header())
				h.ServeHTTP(w, requests[n%tenants])
				n++
			}
			for range requests {
				serve()
			}
			if w.Code != http.StatusOK {
				b.Fatal(w.Code, w.Body)
			}
			b.ReportAllocs()
			for b.Loop() {
				serve()
			}
		})
	}
}

// warmRegistry is a registry with every tenant, each with an alias, that has read them all.
func warmRegistry(b *testing.B) *pgxtenant.Registry {
	b.Helper()
	pool, err := pgxpool.ParseConfig(openLab(b).db.OwnerURL())
	if err != nil {
		b.Fatal(err)
	}
	registry, err := pgxtenant.NewRegistry(b.Context(), pgxtenant.RegistryConfig{Pool: pool})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(registry.Close)
	if err := registry.Install(b.Context()); err != nil {
		b.Fatal(err)
	}
	for i := range tenants {
		rec := pgxtenant.Record{Tenant: rowTenant(i), Aliases: []string{tenantID(i) + ".test"}}
		if _, err := registry.Create(b.Context(), rec); err != nil {
			b.Fatal(err)
		}
	}
	return registry
}
