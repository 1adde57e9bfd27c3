package pgxtenant_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A table that knows nothing of tenants is put under row-level security.
func ExampleTenantDB_EnableRLS() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.Exec("create table invoice (id bigint generated always as identity, item text)", "insert into invoice (item) values ('an old desk')")
	ctx := context.Background()
	db := openAsOwner(ctx, server)
	defer db.Close()

	// Whose the old rows are must be said.
	invoices := pgxtenant.RLSTable{Name: "invoice"}
	fmt.Println(db.EnableRLS(ctx, invoices))

	invoices.Backfill = "acme"
	plan, err := db.PlanEnableRLS(ctx, invoices) // for a migration, if you keep those
	fmt.Println(len(plan) > 0, err)
	fmt.Println(db.EnableRLS(ctx, invoices))
	fmt.Println(db.EnableRLS(ctx, invoices)) // nothing is left to do

	for _, tenant := range []string{"acme", "globex"} {
		var items int
		err := db.QueryRow(pgxtenant.WithTenantID(ctx, tenant), "select count(*) from invoice").Scan(&items)
		fmt.Println(tenant, items, err)
	}

	// Output:
	// pgxtenant: enable row-level security on table invoice: it has rows, and no column "tenant_id" that says whose they are; set Backfill to the tenant that gets them
	// true <nil>
	// <nil>
	// <nil>
	// acme 1 <nil>
	// globex 0 <nil>
}

// Tenants with a row in the registry and a schema of their own are made and removed by one call each.
func ExampleTenantDB_Provision() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.Exec("create schema template",
		"create table template.invoice (id bigint generated always as identity primary key, item text)",
		"grant usage on schema template to "+pgx.Identifier{server.App}.Sanitize(),
		"grant select, insert on template.invoice to "+pgx.Identifier{server.App}.Sanitize())
	ctx := context.Background()
	db := openAsOwner(ctx, server, func(config *pgxtenant.Config) {
		config.Template = "template"
		config.Registry = &pgxtenant.RegistryConfig{TTL: 1e6} // a millisecond; Deprovision waits for it
	})
	defer db.Close()
	fmt.Println(db.Registry().Install(ctx))

	initech := pgxtenant.Tenant{ID: "initech", Plan: "gold", Isolation: pgxtenant.IsolationSchema}
	fmt.Println(db.Provision(ctx, initech, pgxtenant.WithAliases("initech.example.com")))

	tenant, err := db.Registry().ByAlias(ctx, "Initech.example.com")
	fmt.Println(tenant.ID, tenant.Isolation, err)

	var schema string
	as := pgxtenant.WithTenantID(ctx, tenant.ID)
	err = db.QueryRow(as, "insert into invoice (item) values ('a desk') returning current_schema()").Scan(&schema)
	fmt.Println(schema, err)

	fmt.Println(db.Deprovision(ctx, "initech"))
	fmt.Println(errors.Is(db.Ping(as), pgxtenant.ErrTenantNotFound))

	// Output:
	// <nil>
	// <nil>
	// initech schema <nil>
	// tenant_initech <nil>
	// <nil>
	// true
}

// openAsOwner makes a TenantDB whose Admin is the role that owns the tables.
func openAsOwner(ctx context.Context, server *pgtest.DB, adjust ...func(*pgxtenant.Config)) *pgxtenant.TenantDB {
	config, err := pgxtenant.ParseConfig(server.AppURL())
	if err == nil {
		config.Admin, err = pgxpool.ParseConfig(server.OwnerURL())
	}
	if err != nil {
		panic(err)
	}
	for _, f := range adjust {
		f(config)
	}
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err != nil {
		panic(err)
	}
	return db
}
