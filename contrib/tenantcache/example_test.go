package tenantcache_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
)

// A value is loaded once for each tenant, and nobody else's context leads to it. With NewRedis in place of NewMemory
// all processes share it.
func ExampleCache_GetOrLoad() {
	store, err := tenantcache.NewMemory(tenantcache.MemoryConfig{})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	type project struct{ Name string }
	projects, err := tenantcache.New(store, tenantcache.Config[project]{Namespace: "project/1", TTL: time.Minute})
	if err != nil {
		log.Fatal(err)
	}

	load := func(ctx context.Context) (project, error) {
		tenant, _ := pgxtenant.FromContext(ctx)
		fmt.Println("loading for", tenant.ID)
		return project{Name: "Roadmap of " + tenant.ID}, nil
	}
	for _, id := range []string{"acme", "acme", "globex"} {
		p, err := projects.GetOrLoad(pgxtenant.WithTenantID(context.Background(), id), "1", 0, load)
		fmt.Println(p.Name, err)
	}
	_, _, err = projects.Get(context.Background(), "1")
	fmt.Println(errors.Is(err, pgxtenant.ErrNoTenant))
	// Output:
	// loading for acme
	// Roadmap of acme <nil>
	// Roadmap of acme <nil>
	// loading for globex
	// Roadmap of globex <nil>
	// true
}
