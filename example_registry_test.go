package pgxtenant_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A request's host name leads to its tenant, and the tenant's status decides what it may do.
func ExampleRegistry() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.RLSTable("note")
	ctx := context.Background()

	config, err := pgxtenant.ParseConfig(server.AppURL())
	if err != nil {
		fmt.Println(err)
		return
	}
	config.Admin, err = pgxpool.ParseConfig(server.OwnerURL()) // the role that owns the tables
	if err != nil {
		fmt.Println(err)
		return
	}
	config.Registry = &pgxtenant.RegistryConfig{Key: bytes.Repeat([]byte("k"), 32)} // from your secret store
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()

	registry := db.Registry()
	if err := registry.Install(ctx); err != nil { // at each start, or in a migration
		fmt.Println(err)
		return
	}
	_, err = registry.Create(ctx, pgxtenant.Record{
		Tenant:  pgxtenant.Tenant{ID: "acme", Plan: "gold"},
		Aliases: []string{"acme.example.com"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}

	tenant, err := registry.ByAlias(ctx, "ACME.example.com")
	fmt.Println(tenant.ID, tenant.Plan, err)

	acme := pgxtenant.WithTenantID(ctx, tenant.ID)
	_, err = db.Exec(acme, "insert into note (id, body) values (1, 'hello')")
	fmt.Println("active:", err)

	_ = registry.MakeReadOnly(ctx, "acme")
	_, err = db.Exec(acme, "insert into note (id, body) values (2, 'hello')")
	fmt.Println("read-only:", err)

	_ = registry.Suspend(ctx, "acme")
	fmt.Println("suspended:", errors.Is(db.Ping(acme), pgxtenant.ErrTenantSuspended))

	// Output:
	// acme gold <nil>
	// active: <nil>
	// read-only: ERROR: cannot execute INSERT in a read-only transaction (SQLSTATE 25006)
	// suspended: true
}
