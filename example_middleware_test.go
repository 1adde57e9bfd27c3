package pgxtenant_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A request's way to its tenant's rows: the caller is authenticated, the Middleware finds the tenant that the
// host names and holds it against the caller's own, and the handler's statements run as that tenant.
func ExampleMiddleware() {
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
	config.Admin, err = pgxpool.ParseConfig(server.OwnerURL())
	if err != nil {
		fmt.Println(err)
		return
	}
	config.Registry = &pgxtenant.RegistryConfig{}
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()
	registry := db.Registry()
	if err := registry.Install(ctx); err != nil {
		fmt.Println(err)
		return
	}
	for id, domain := range map[string]string{"acme": "notes.acme.test", "globex": "notes.globex.test"} {
		if err := db.Provision(ctx, pgxtenant.Tenant{ID: id, Plan: "gold"}, pgxtenant.WithAliases(domain)); err != nil {
			fmt.Println(err)
			return
		}
	}

	// The service's log lines have the tenant from here on.
	log := slog.New(pgxtenant.LogHandler(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: withoutTime})))

	mux := http.NewServeMux()
	mux.HandleFunc("POST /notes", func(w http.ResponseWriter, r *http.Request) {
		var notes int
		_, err := db.Exec(r.Context(), "insert into note (id, body) select count(*), $1 from note", r.FormValue("body"))
		if err == nil {
			err = db.QueryRow(r.Context(), "select count(*) from note").Scan(&notes)
		}
		if err != nil {
			pgxtenant.Refuse(w, r, err) // suspended a moment ago, for instance
			return
		}
		tenant, _ := pgxtenant.FromContext(r.Context())
		log.InfoContext(r.Context(), "note added", "plan", tenant.Plan)
		fmt.Fprintf(w, "%s: note %d\n", tenant.ID, notes)
	})
	tenants := pgxtenant.Middleware(registry,
		pgxtenant.BySubdomain("example.com"), // acme.example.com
		pgxtenant.ByDomain(),                 // notes.acme.test
		pgxtenant.ByClaim(tenantOfCaller),    // the only one that proves anything
	)
	service := httptest.NewServer(authenticate(tenants(mux)))
	defer service.Close()

	post := func(host, token string) {
		r, _ := http.NewRequest(http.MethodPost, service.URL+"/notes?body=hello", nil)
		r.Host = host
		r.Header.Set("Authorization", token)
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			fmt.Println(err)
			return
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		fmt.Println(res.StatusCode, string(body))
	}
	post("acme.example.com", "Bearer token-of-acme")
	post("notes.acme.test", "Bearer token-of-acme")
	post("globex.example.com", "Bearer token-of-acme")
	_ = registry.Suspend(ctx, "acme")
	post("acme.example.com", "Bearer token-of-acme")

	// Output:
	// level=INFO msg="note added" plan=gold tenant=acme
	// 200 acme: note 1
	//
	// level=INFO msg="note added" plan=gold tenant=acme
	// 200 acme: note 2
	//
	// 403 {"type":"https://github.com/pgxtenant/pgxtenant/blob/main/docs/http.md#forbidden","title":"Not authorised for this tenant","status":403,"detail":"The caller may not act for this tenant."}
	// 403 {"type":"https://github.com/pgxtenant/pgxtenant/blob/main/docs/http.md#suspended","title":"Tenant suspended","status":403,"detail":"This tenant is suspended."}
}

type callerKey struct{}

// authenticate stands for what verifies tokens: it puts the tenant of each into the context.
func authenticate(next http.Handler) http.Handler {
	known := map[string]string{"Bearer token-of-acme": "acme", "Bearer token-of-globex": "globex"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if tenant, ok := known[r.Header.Get("Authorization")]; ok {
			r = r.WithContext(context.WithValue(r.Context(), callerKey{}, tenant))
		}
		next.ServeHTTP(w, r)
	})
}

func tenantOfCaller(ctx context.Context) (string, bool) {
	tenant, ok := ctx.Value(callerKey{}).(string)
	return tenant, ok
}

func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// What a hook may go by is the service's affair: here the members of each tenant.
func ExampleAuthorize() {
	directory := tenants{"acme": {ID: "acme"}, "globex": {ID: "globex"}}
	members := map[string]string{"jill": "acme", "jack": "globex"}

	handler := pgxtenant.Middleware(directory,
		pgxtenant.ByHeader("X-Tenant-ID"),
		pgxtenant.Authorize(func(_ context.Context, r *http.Request, t pgxtenant.Tenant) error {
			user, _, ok := r.BasicAuth()
			switch {
			case !ok:
				return pgxtenant.ErrUnauthenticated
			case members[user] != t.ID:
				return pgxtenant.ErrForbidden
			}
			return nil
		}),
		pgxtenant.OnRefusal(func(w http.ResponseWriter, _ *http.Request, p *pgxtenant.Problem) {
			http.Error(w, p.Title, p.Status) // in place of JSON
		}),
	)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tenant, _ := pgxtenant.FromContext(r.Context())
		fmt.Fprintln(w, "Welcome to", tenant.ID)
	}))

	for _, user := range []string{"jill", "jack", ""} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("X-Tenant-ID", "acme")
		if user != "" {
			r.SetBasicAuth(user, "password")
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Print(w.Code, " ", w.Body)
	}

	// Output:
	// 200 Welcome to acme
	// 403 Not authorised for this tenant
	// 401 Not authenticated
}

// tenants is a directory in memory.
type tenants map[string]pgxtenant.Tenant

func (d tenants) Lookup(_ context.Context, id string) (pgxtenant.Tenant, error) {
	t, ok := d[id]
	if !ok {
		return t, pgxtenant.ErrTenantNotFound
	}
	return t, nil
}
