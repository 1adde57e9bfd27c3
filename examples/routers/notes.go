package main

import (
	"context"
	"net/http"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// service keeps each tenant's notes.
type service struct {
	db      *pgxtenant.TenantDB
	tenants func(http.Handler) http.Handler // the middleware
}

func openService(ctx context.Context, appURL, ownerURL string) (*service, error) {
	config, err := pgxtenant.ParseConfig(appURL)
	if err != nil {
		return nil, err
	}
	if config.Admin, err = pgxpool.ParseConfig(ownerURL); err != nil {
		return nil, err
	}
	config.Registry = &pgxtenant.RegistryConfig{}
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	if err = db.Registry().Install(ctx); err == nil {
		for _, id := range []string{"acme", "globex"} {
			if err = db.Provision(ctx, pgxtenant.Tenant{ID: id}, pgxtenant.WithAliases("notes."+id+".test")); err != nil {
				break
			}
		}
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	return &service{db, pgxtenant.Middleware(db.Registry(),
		pgxtenant.BySubdomain("example.com"),
		pgxtenant.ByDomain(),
		pgxtenant.ByHeader("X-Tenant-ID"),
		pgxtenant.ByClaim(tenantOfCaller),
	)}, nil
}

// list and add know nothing of tenants: the context does.

func (s *service) list(ctx context.Context) ([]string, error) {
	rows, err := s.db.Query(ctx, "select body from note order by id")
	if err != nil {
		return nil, err
	}
	return pgx.AppendRows([]string{}, rows, pgx.RowTo[string])
}

func (s *service) add(ctx context.Context, body string) error {
	_, err := s.db.Exec(ctx, "insert into note (id, body) select count(*), $1 from note", body)
	return err
}

type callerKey struct{}

// authenticate stands for what verifies tokens.
func authenticate(next http.Handler) http.Handler {
	tenantOf := map[string]string{"Bearer acme-token": "acme", "Bearer globex-token": "globex"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if tenant, ok := tenantOf[r.Header.Get("Authorization")]; ok {
			r = r.WithContext(context.WithValue(r.Context(), callerKey{}, tenant))
		}
		next.ServeHTTP(w, r)
	})
}

func tenantOfCaller(ctx context.Context) (string, bool) {
	tenant, ok := ctx.Value(callerKey{}).(string)
	return tenant, ok
}
