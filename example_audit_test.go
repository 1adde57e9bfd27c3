package pgxtenant_test

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A table was added by a migration that forgot about tenants. The audit finds it, and prints what mends it.
func ExampleTenantDB_Audit() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.Exec("create table payment (tenant_id text not null, id int, primary key (tenant_id, id))",
		"grant select, insert on payment to "+server.App)
	ctx := context.Background()
	db := openAsOwner(ctx, server)
	defer db.Close()

	report, err := db.Audit(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, f := range report.Findings {
		if f.Severity == pgxtenant.SeverityError {
			fmt.Printf("%s: %s\n%s\n%s\n", f.Code, f.Object, f.Allows, f.Mend)
			server.Exec(f.Mend)
		}
	}
	report, err = db.Audit(ctx)
	fmt.Println(report.Err(), err)

	// Output:
	// rls-off: table public.payment
	// The application sees and changes every tenant's rows of the table.
	// create policy "pgxtenant" on public.payment
	// 	using ("tenant_id" = (select nullif(current_setting('app.current_tenant_id', true), '')))
	// 	with check ("tenant_id" = (select nullif(current_setting('app.current_tenant_id', true), '')));
	// alter table public.payment enable row level security;
	// alter table public.payment force row level security;
	// <nil> <nil>
}

// A service that must not run on a database with holes says so in its Config, and what is there on purpose.
func ExampleConfig_requireAudit() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.Exec("create table feature (tenant_id text not null, name text, primary key (tenant_id, name))",
		"grant select on feature to "+server.App)
	ctx := context.Background()
	config, err := pgxtenant.ParseConfig(server.AppURL("tenant_require_audit=true"))
	if err != nil {
		fmt.Println(err)
		return
	}

	_, err = pgxtenant.NewWithConfig(ctx, config)
	var failed *pgxtenant.AuditError
	if errors.As(err, &failed) {
		for _, f := range failed.Report.Findings {
			if f.Severity == pgxtenant.SeverityError {
				fmt.Println(f.Code, "of", f.Object)
			}
		}
	}

	// Every tenant may see which features there are.
	config.AuditAllow = []pgxtenant.AllowedFinding{{Code: "rls-off", Object: "table public.feature"}}
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer db.Close()
	fmt.Println("started")

	// Output:
	// rls-off of table public.feature
	// started
}
