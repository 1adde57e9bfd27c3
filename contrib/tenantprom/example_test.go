package tenantprom_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantprom"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// customers stands for a registry; see pgxtenant.Registry.
type customers map[string]pgxtenant.Tenant

func (c customers) Lookup(_ context.Context, id string) (pgxtenant.Tenant, error) {
	t, ok := c[id]
	if !ok {
		return t, pgxtenant.ErrTenantNotFound
	}
	return t, nil
}

func Example() {
	t := new(pgtest.Example)
	defer t.End()
	db, err := pgxtenant.New(context.Background(), pgtest.New(t).AppURL())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()
	requests := tenantprom.NewRequests()
	registry := prometheus.NewRegistry()
	registry.MustRegister(requests, tenantprom.NewCollector(db, tenantprom.TopK(1)))

	// The service.
	mux := http.NewServeMux()
	mux.HandleFunc("GET /projects/{id}", func(w http.ResponseWriter, r *http.Request) {
		if _, err := db.Exec(r.Context(), "select 1"); err != nil {
			pgxtenant.Refuse(w, r, err)
		}
	})
	tenants := pgxtenant.Middleware(customers{"acme": {ID: "acme", Plan: "free"}, "globex": {ID: "globex", Plan: "pro"}},
		pgxtenant.ByHeader("X-Tenant-ID"), pgxtenant.WithoutAuthorization())
	service := requests.Around(tenants)(mux)

	for _, tenant := range []string{"acme", "globex", "globex", "initech"} {
		r := httptest.NewRequest("GET", "/projects/7", nil)
		r.Header.Set("X-Tenant-ID", tenant)
		service.ServeHTTP(httptest.NewRecorder(), r)
	}

	// What Prometheus is told.
	w := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if regexp.MustCompile(`^pgxtenant_(http_requests_total|active_tenants|tenant_held|bindings)`).MatchString(line) {
			fmt.Print(regexp.MustCompile(`"(acme|globex)"(} 0)`).ReplaceAllString(line, `"the heaviest"$2`))
		}
	}

	// Output:
	// pgxtenant_active_tenants{window="1h"} 2
	// pgxtenant_active_tenants{window="1m"} 2
	// pgxtenant_active_tenants{window="5m"} 2
	// pgxtenant_bindings_total 3
	// pgxtenant_http_requests_total{code="2xx",endpoint="GET /projects/{id}",plan="free"} 1
	// pgxtenant_http_requests_total{code="2xx",endpoint="GET /projects/{id}",plan="pro"} 2
	// pgxtenant_http_requests_total{code="4xx",endpoint="none",plan="none"} 1
	// pgxtenant_tenant_held_connections{tenant="the heaviest"} 0
	// pgxtenant_tenant_held_connections{tenant="other"} 0
}
