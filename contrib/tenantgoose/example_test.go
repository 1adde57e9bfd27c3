package tenantgoose_test

import (
	"context"
	"fmt"
	"testing/fstest"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Two tenants are brought to version 2, and one that comes later starts there.
func Example() {
	t := new(pgtest.Example)
	defer t.End()
	ctx := context.Background()
	db := exampleDB(ctx, t)
	defer db.Close()

	migrations := fstest.MapFS{ // or os.DirFS("migrations"), or an embed.FS
		"shared/00001_country.sql": &fstest.MapFile{Data: []byte("-- +goose Up\ncreate table country (code text primary key);\n-- +goose Down\ndrop table country;\n")},
		"tenant/00001_invoice.sql": &fstest.MapFile{Data: []byte("-- +goose Up\ncreate table invoice (id bigint primary key, country text references country);\n-- +goose Down\ndrop table invoice;\n")},
	}
	migrator, err := tenantgoose.New(db, migrations)
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := migrator.Up(ctx, pgxtenant.ForEachOptions{Name: "release 1"})
	fmt.Println(report.Done, "done", err) // the shared schemas and the template

	for _, id := range []string{"acme", "globex"} {
		err := db.Provision(ctx, pgxtenant.Tenant{ID: id, Isolation: pgxtenant.IsolationSchema})
		fmt.Println("provision", id, err)
	}
	migrations["tenant/00002_item.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nalter table invoice add item text;\n-- +goose Down\nalter table invoice drop item;\n")}
	migrator, _ = tenantgoose.New(db, migrations)

	plan, err := migrator.Plan(ctx, pgxtenant.ForEachOptions{})
	for _, step := range plan.Steps {
		fmt.Println(step.Migration.Name, "for", step.Places, err)
	}
	report, err = migrator.Up(ctx, pgxtenant.ForEachOptions{Name: "release 2", Canaries: []string{"acme"}})
	fmt.Println(report.Done, "done,", report.Current, "current", err)

	_ = db.Provision(ctx, pgxtenant.Tenant{ID: "initech", Isolation: pgxtenant.IsolationSchema})
	for status, err := range migrator.Status(ctx, pgxtenant.ForEachOptions{}) {
		fmt.Println(status.Place, status.Version, len(status.Pending), err)
	}

	// Output:
	// 2 done <nil>
	// provision acme <nil>
	// provision globex <nil>
	// tenant/00002_item.sql for 3 <nil>
	// 3 done, 1 current <nil>
	// shared 1 0 <nil>
	// template 2 0 <nil>
	// tenant_acme 2 0 <nil>
	// tenant_globex 2 0 <nil>
	// tenant_initech 2 0 <nil>
}

// exampleDB is a database of the tests' server, with a registry and an empty schema for the template.
func exampleDB(ctx context.Context, t *pgtest.Example) *pgxtenant.TenantDB {
	server := pgtest.New(t)
	server.Exec("create schema template")
	config, err := pgxtenant.ParseConfig(server.AppURL())
	if err != nil {
		panic(err)
	}
	if config.Admin, err = pgxpool.ParseConfig(server.OwnerURL()); err != nil {
		panic(err)
	}
	config.Registry = &pgxtenant.RegistryConfig{}
	config.Template, config.TemplateReference = "template", []string{"goose_db_version"}
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err == nil {
		err = db.Registry().Install(ctx)
	}
	if err != nil {
		panic(err)
	}
	return db
}
