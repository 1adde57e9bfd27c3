package pgxtenant_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Under policies of sealed tenants, SQL that is injected into a statement cannot become another tenant.
func ExampleTenantDB_InstallSeal() {
	t := new(pgtest.Example)
	defer t.End()
	server := pgtest.New(t)
	server.Exec("create table invoice (item text)")
	ctx := context.Background()
	db := openAsOwner(ctx, server, func(config *pgxtenant.Config) {
		config.Seal = &pgxtenant.SealConfig{Key: []byte("32 random bytes, kept by a vault.")}
	})
	defer db.Close()
	fmt.Println(db.InstallSeal(ctx))
	fmt.Println(db.EnableRLS(ctx, pgxtenant.Tables("invoice")...))
	for _, tenant := range []string{"acme", "globex"} {
		if _, err := db.Exec(pgxtenant.WithTenantID(ctx, tenant), "insert into invoice values ($1)", tenant+"'s desk"); err != nil {
			fmt.Println(err)
		}
	}

	acme := pgxtenant.WithTenantID(ctx, "acme")
	var items string
	err := db.QueryRow(acme, "select string_agg(item, ', ') from invoice").Scan(&items)
	fmt.Println(items, err)

	injected := "with x as materialized (select set_config('app.current_tenant_id', 'globex', true)) select string_agg(item, ', ') from x, invoice"
	err = db.QueryRow(acme, injected).Scan(&items)
	var pgErr *pgconn.PgError
	fmt.Println(errors.As(err, &pgErr) && pgErr.Code == "42501", pgErr.Message)

	// Output:
	// <nil>
	// <nil>
	// acme's desk <nil>
	// true pgxtenant: the seal is not that of tenant 'globex'
}
