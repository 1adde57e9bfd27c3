package pgxtenant_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Who keeps the database busy?
func ExampleTenantDB_Load() {
	t := new(pgtest.Example)
	defer t.End()
	ctx := context.Background()
	db, err := pgxtenant.New(ctx, pgtest.New(t).AppURL())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()
	for id, seconds := range map[string]float64{"acme": 0.01, "initech": 0.2} {
		if _, err := db.Exec(pgxtenant.WithTenantID(ctx, id), "select pg_sleep($1)", seconds); err != nil {
			fmt.Println(err)
		}
	}

	window := db.Load().FiveMinutes
	for _, t := range window.Tenants {
		fmt.Printf("%s: %d statement, most of the time: %t\n", t.TenantID, t.Statements(), t.TimeShare > 0.5)
	}
	fmt.Println(window.Active, "tenants,", window.Total.Rows, "rows")

	// Output:
	// initech: 1 statement, most of the time: true
	// acme: 1 statement, most of the time: false
	// 2 tenants, 2 rows
}

// A service tells its operators of a tenant that needs a place of its own.
func ExampleConfig_onHeavyTenant() {
	config, err := pgxtenant.ParseConfig("host=localhost tenant_heavy_share=0.25")
	if err != nil {
		fmt.Println(err)
		return
	}
	config.OnHeavyTenant = func(t pgxtenant.TenantLoad) {
		fmt.Printf("%s takes %.0f %% of the shared database\n", t.TenantID, 100*t.SharedShare)
	}
	config.OnHeavyTenant(pgxtenant.TenantLoad{TenantID: "initech", SharedShare: 0.55})

	// Output: initech takes 55 % of the shared database
}

// The page for operators, and the same for programs.
func ExampleTenantDB_DebugHandler() {
	t := new(pgtest.Example)
	defer t.End()
	db, err := pgxtenant.New(context.Background(), pgtest.New(t).AppURL())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()
	mux := http.NewServeMux()
	mux.Handle("/debug/tenants", db.DebugHandler()) // where only operators come

	for _, target := range []string{"/debug/tenants", "/debug/tenants?format=json"} {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, target, nil))
		fmt.Println(w.Code, w.Header().Get("Content-Type"))
	}

	// Output:
	// 200 text/html; charset=utf-8
	// 200 application/json
}
