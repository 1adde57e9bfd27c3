package pgxtenant_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A column for every tenant: the template first, then a canary, then the others. One cannot take it; the second call
// does what is left.
func ExampleTenantDB_ForEach() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.Exec("create schema template", "create table template.invoice (item text)")
	ctx := context.Background()
	db := openAsOwner(ctx, server, func(config *pgxtenant.Config) {
		config.Template = "template"
		config.Registry = &pgxtenant.RegistryConfig{}
	})
	defer db.Close()
	fmt.Println(db.Registry().Install(ctx))
	for _, id := range []string{"acme", "globex", "initech", "umbrella"} {
		if err := db.Provision(ctx, pgxtenant.Tenant{ID: id, Isolation: pgxtenant.IsolationSchema}); err != nil {
			fmt.Println(err)
		}
	}
	server.Exec("insert into tenant_globex.invoice values (null)") // which nobody expected

	options := pgxtenant.ForEachOptions{Name: "items are required", Isolations: []pgxtenant.Isolation{pgxtenant.IsolationSchema}, Canaries: []string{"umbrella"}}
	require := func(ctx context.Context, conn *pgx.Conn, t pgxtenant.Tenant) error {
		_, err := conn.Exec(ctx, "alter table invoice alter item set not null")
		return err
	}
	report, err := db.ForEach(ctx, options, require)
	fmt.Println(report.Done, "done,", report.Failed, "failed")
	var failed *pgxtenant.TenantError
	if errors.As(err, &failed) {
		fmt.Println(failed)
	}

	server.Exec("delete from tenant_globex.invoice where item is null")
	report, err = db.ForEach(ctx, options, require)
	fmt.Println(report.Done, "done, complete:", report.Complete, err)
	for result, err := range report.Results(ctx, pgxtenant.RunDone) {
		fmt.Println(result.Place, result.State, err)
	}

	// Output:
	// <nil>
	// 4 done, 1 failed
	// tenant "globex": run: ERROR: column "item" of relation "invoice" contains null values (SQLSTATE 23502)
	// 1 done, complete: true <nil>
	// template done <nil>
	// tenant_acme done <nil>
	// tenant_globex done <nil>
	// tenant_initech done <nil>
	// tenant_umbrella done <nil>
}
