package pgxtenant_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Three tenants, each isolated in another way, are used through one TenantDB by the same statements.
func Example() {
	server := newShop() // with the tables, policies and databases that examples/quickstart explains
	defer server.close()
	ctx := context.Background()

	db, err := pgxtenant.New(ctx, server.connString)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()

	for _, tenant := range []pgxtenant.Tenant{
		{ID: "acme"}, // rows in a shared table
		{ID: "initech", Isolation: pgxtenant.IsolationSchema},
		{ID: "umbrella", Isolation: pgxtenant.IsolationDatabase, ConnString: server.umbrella},
	} {
		ctx := pgxtenant.WithTenant(ctx, tenant)

		_, err := db.Exec(ctx, "insert into invoice (id, item) values ($1, $2)", 1, tenant.ID+"'s desk")
		if err != nil {
			fmt.Println(err)
			return
		}

		var schema, items string
		err = db.QueryRow(ctx, "select current_schema(), string_agg(item, ', ') from invoice").Scan(&schema, &items)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s (%v), in schema %s: %s\n", tenant.ID, tenant.Isolation, schema, items)
	}

	// Without a tenant there is no connection.
	_, err = db.Exec(ctx, "delete from invoice")
	fmt.Println(errors.Is(err, pgxtenant.ErrNoTenant))

	// Output:
	// acme (row), in schema public: acme's desk
	// initech (schema), in schema tenant_initech: initech's desk
	// umbrella (database), in schema public: umbrella's desk
	// true
}

// The tenant of the context decides which rows there are. Another tenant's cannot be reached, whatever
// the statement says.
func ExampleWithTenant() {
	server := newShop()
	defer server.close()
	db, err := pgxtenant.New(context.Background(), server.connString)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()

	acme := pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{ID: "acme"})
	globex := pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{ID: "globex"})

	tag, err := db.Exec(acme, "insert into invoice (id, item) values (1, 'desk'), (2, 'lamp')")
	fmt.Println("acme inserts:", tag.RowsAffected(), err)

	tag, err = db.Exec(globex, "select * from invoice")
	fmt.Println("globex selects:", tag.RowsAffected(), err)

	tag, err = db.Exec(globex, "update invoice set item = 'chair' where tenant_id = 'acme'")
	fmt.Println("globex updates acme's:", tag.RowsAffected(), err)

	_, err = db.Exec(globex, "insert into invoice (tenant_id, id, item) values ('acme', 3, 'chair')")
	fmt.Println("globex inserts as acme:", err)

	// Output:
	// acme inserts: 2 <nil>
	// globex selects: 0 <nil>
	// globex updates acme's: 0 <nil>
	// globex inserts as acme: ERROR: new row violates row-level security policy for table "invoice" (SQLSTATE 42501)
}

// A service that makes its own pool binds it by its config. Nothing else changes.
func ExampleBind() {
	server := newShop()
	defer server.close()

	config, err := pgxpool.ParseConfig(server.connString)
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := pgxtenant.Bind(config, pgxtenant.DefaultSetting); err != nil {
		fmt.Println(err)
		return
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer pool.Close()

	for _, id := range []string{"acme", "globex"} {
		ctx := pgxtenant.WithTenantID(context.Background(), id)
		var bound string
		err := pool.QueryRow(ctx, "select current_setting('app.current_tenant_id')").Scan(&bound)
		fmt.Println(bound, err)
	}
	fmt.Println(pool.Ping(context.Background()))

	// Output:
	// acme <nil>
	// globex <nil>
	// pgxtenant: no tenant in the context; use WithTenant or WithTenantID, or WithoutTenant to run as none
}

// A library that wants a pool, here database/sql, is given the one of a database tenant for as long as it
// is needed. The pool serves that tenant alone.
func ExampleTenantDB_Lease() {
	server := newShop()
	defer server.close()
	db, err := pgxtenant.New(context.Background(), server.connString)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()

	ctx := pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{
		ID: "umbrella", Isolation: pgxtenant.IsolationDatabase, ConnString: server.umbrella,
	})
	pool, release, err := db.Lease(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer release() // until then neither eviction nor Close closes the pool

	standard := stdlib.OpenDBFromPool(pool)
	defer standard.Close()
	var invoices int
	err = standard.QueryRowContext(ctx, "select count(*) from invoice").Scan(&invoices)
	fmt.Println(invoices, err)

	acme := pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{ID: "acme"})
	err = standard.QueryRowContext(acme, "select count(*) from invoice").Scan(&invoices)
	fmt.Println(errors.Is(err, pgxtenant.ErrWrongTenant))

	// Output:
	// 0 <nil>
	// true
}

// Work that goes on after the request keeps its tenant, but not its end.
func ExampleDetach() {
	server := newShop()
	defer server.close()
	db, err := pgxtenant.New(context.Background(), server.connString)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()

	request, cancel := context.WithCancel(context.Background())
	request = pgxtenant.WithTenant(request, pgxtenant.Tenant{ID: "acme"})

	done := make(chan error)
	ended := make(chan struct{})
	go func(ctx context.Context) {
		<-ended
		_, err := db.Exec(ctx, "insert into invoice (id, item) values (1, 'desk')")
		done <- err
	}(pgxtenant.Detach(request))

	cancel() // the request ends
	close(ended)
	fmt.Println("in the background:", <-done)
	fmt.Println("in the request:", db.Ping(request))

	// Output:
	// in the background: <nil>
	// in the request: tenant "acme": acquire: context canceled
}

// Tables that belong to no tenant are used without one. That has to be said, and shows no tenant's rows.
func ExampleWithoutTenant() {
	server := newShop()
	defer server.close()
	db, err := pgxtenant.New(context.Background(), server.connString)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()

	acme := pgxtenant.WithTenant(context.Background(), pgxtenant.Tenant{ID: "acme"})
	if _, err := db.Exec(acme, "insert into invoice (id, item) values (1, 'desk')"); err != nil {
		fmt.Println(err)
		return
	}

	// For instance in the middle of acme's request.
	ctx := pgxtenant.WithoutTenant(acme)
	for _, table := range []string{"currency", "invoice"} {
		var rows int
		err := db.QueryRow(ctx, "select count(*) from "+pgx.Identifier{table}.Sanitize()).Scan(&rows)
		fmt.Println(table, rows, err)
	}

	// Output:
	// currency 2 <nil>
	// invoice 0 <nil>
}

// shop is what the examples work on: a database with the shared table invoice, the schema of tenant
// initech and the table currency, which is nobody's, and another database for tenant umbrella.
type shop struct {
	connString string // as the service's role
	umbrella   string // umbrella's
	close      func()
}

func newShop() *shop {
	t := new(pgtest.Example)
	db := pgtest.New(t)
	db.Exec(`
		create table invoice (
			tenant_id text not null check (tenant_id <> '') default current_setting('app.current_tenant_id'),
			id bigint,
			item text not null,
			primary key (tenant_id, id)
		);
		alter table invoice enable row level security;
		alter table invoice force row level security;
		create policy tenant on invoice using
			(tenant_id = (select nullif(current_setting('app.current_tenant_id', true), '')));
		create schema tenant_initech;
		create table tenant_initech.invoice (id bigint primary key, item text not null);
		create table currency (code text primary key);
		insert into currency values ('EUR'), ('USD');
		grant usage on schema tenant_initech to ` + db.App + `;
		grant select, insert, update, delete on invoice, tenant_initech.invoice, currency to ` + db.App)
	umbrella := db.Database("app.current_tenant_id=umbrella")
	umbrella.Exec(`
		create table invoice (id bigint primary key, item text not null);
		grant select, insert, update, delete on invoice to ` + db.App)
	return &shop{connString: db.AppURL(), umbrella: umbrella.AppURL(), close: t.End}
}
