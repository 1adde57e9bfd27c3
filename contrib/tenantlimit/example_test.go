package tenantlimit_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
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
	plans := tenantlimit.StarterPlans()
	free := plans["free"]
	free.Rate = tenantlimit.PerHour(60, 10)
	free.Endpoints = map[string]tenantlimit.Limits{"POST /exports": {Rate: tenantlimit.PerHour(2, 1)}}
	plans["free"] = free
	limiter, err := tenantlimit.New(tenantlimit.Config{
		Plans: plans,
		// Redis: redis.NewClient(&redis.Options{Addr: "localhost:6379"}), // to count over all processes
	})
	if err != nil {
		log.Fatal(err)
	}
	defer limiter.Close()
	limited := limiter.Middleware()

	mux := http.NewServeMux()
	ok := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	mux.Handle("GET /projects", limited(ok))
	mux.Handle("POST /exports", limited(ok))
	tenants := pgxtenant.Middleware(customers{"acme": {ID: "acme", Plan: "free"}},
		pgxtenant.ByHeader("X-Tenant-ID"), pgxtenant.WithoutAuthorization())
	service := tenants(mux)

	for _, request := range []string{"GET /projects", "POST /exports", "POST /exports", "GET /projects"} {
		var method, path string
		fmt.Sscan(request, &method, &path)
		r := httptest.NewRequest(method, path, nil)
		r.Header.Set("X-Tenant-ID", "acme")
		w := httptest.NewRecorder()
		service.ServeHTTP(w, r)
		fmt.Println(request, w.Code, w.Header().Get("RateLimit-Policy"), w.Header().Get("X-RateLimit-Remaining"))
	}
	// Output:
	// GET /projects 200 "rate";q=60;w=3600;pgxtenant-burst=10 9
	// POST /exports 200 "endpoint-rate";q=2;w=3600;pgxtenant-burst=1 0
	// POST /exports 429 "endpoint-rate";q=2;w=3600;pgxtenant-burst=1 0
	// GET /projects 200 "rate";q=60;w=3600;pgxtenant-burst=10 8
}

// A queue's consumer is no HTTP handler. It asks by itself, and each call may cost something else.
func ExampleLimiter_Take() {
	limiter, err := tenantlimit.New(tenantlimit.Config{Plans: map[string]tenantlimit.Plan{
		"free": {Limits: tenantlimit.Limits{Rate: tenantlimit.Rate{Requests: 1000, Period: 24 * time.Hour, Burst: 1000}, Concurrency: 2}},
	}})
	if err != nil {
		log.Fatal(err)
	}
	defer limiter.Close()

	ctx := pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{ID: "acme", Plan: "free"})
	send := func(mails int) {
		grant, err := limiter.Take(ctx, tenantlimit.Call{Cost: mails})
		if refused := (*tenantlimit.LimitError)(nil); errors.As(err, &refused) {
			fmt.Printf("%d refused by its %v, %d left\n", mails, refused.Kind, refused.State.Remaining)
			return
		} else if err != nil {
			log.Fatal(err)
		}
		defer grant.Release()
		fmt.Printf("%d sent\n", mails)
	}
	send(900)
	send(400)
	send(2000)
	send(100)
	// Output:
	// 900 sent
	// 400 refused by its rate, 100 left
	// 2000 refused by its cost, 100 left
	// 100 sent
}
