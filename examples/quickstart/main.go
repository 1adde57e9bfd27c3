// Quickstart shows one TenantDB at work for tenants of all three kinds, on a PostgreSQL server that it
// starts for itself and removes when it ends:
//
//	go run ./examples/quickstart
//
// It prints what the server answers, and fails if that is not what is promised. The SQL to begin with is
// in setup.go, the attempts to reach another tenant's rows in attempts.go, and the recipes that
// pgxtenant is compared with in timings.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/pgxtenant/pgxtenant"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("interrupted: %w", err)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "\nquickstart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	start := time.Now()
	fmt.Println("Starting a PostgreSQL server for this demonstration alone ...")
	s, err := openShop(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	fmt.Printf("Ready after %.1f s.\n", time.Since(start).Seconds())
	start = time.Now()

	db, err := s.open(ctx)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := s.provision(ctx, db); err != nil {
		return err
	}
	fmt.Printf("Tenants provisioned: %d, through the registry, in %.1f s.\n", len(tenants), time.Since(start).Seconds())

	if err := write(ctx, db); err != nil {
		return err
	}
	if err := look(ctx, db); err != nil {
		return err
	}
	if err := reach(ctx, db, s); err != nil {
		return err
	}
	if err := compare(ctx, s); err != nil {
		return err
	}
	if err := audit(ctx, db); err != nil {
		return err
	}
	fmt.Printf("\nAll as promised, in %.1f s. The server is being removed.\n", time.Since(start).Seconds())
	return nil
}

// written is how many invoices each tenant is given.
var written = []struct {
	tenant string
	rows   int
}{{"acme", 3}, {"globex", 2}, {"initech", 4}, {"umbrella", 1}}

func write(ctx context.Context, db *pgxtenant.TenantDB) error {
	const sql = "insert into invoice (id, item) values ($1, $2)"
	fmt.Printf("\n1. FOUR TENANTS WRITE, all by the same statement through one TenantDB\n\n%s\n\n", sql)
	var done []string
	for _, t := range written {
		// A service puts the tenant into the context once per request. Its statements stay as they are.
		ctx := pgxtenant.WithTenantID(ctx, t.tenant)
		for id := range t.rows {
			if _, err := db.Exec(ctx, sql, id, fmt.Sprintf("%s's item %d", t.tenant, id)); err != nil {
				return err
			}
		}
		done = append(done, fmt.Sprintf("%s %d", t.tenant, t.rows))
	}
	fmt.Println("Rows written:", strings.Join(done, ", "))
	return nil
}

func look(ctx context.Context, db *pgxtenant.TenantDB) error {
	const sql = `select current_database(), current_schema(), current_setting('search_path'), count(*),
		count(*) filter (where item like current_setting('app.current_tenant_id') || '''s %') from invoice`
	fmt.Printf("\n2. WHAT EACH TENANT SEES, with no WHERE on the tenant in any statement\n\n")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "tenant\tisolation\tpool\tdatabase\tschema\tsearch path\trows")
	for _, t := range written {
		tenant, err := db.Registry().Lookup(ctx, t.tenant)
		if err != nil {
			return err
		}
		ctx := pgxtenant.WithTenantID(ctx, t.tenant)
		var database, schema, path string
		var rows, own int
		if err := db.QueryRow(ctx, sql).Scan(&database, &schema, &path, &rows, &own); err != nil {
			return err
		}
		pool, release, err := db.Lease(ctx) // the pool that serves ctx's tenant
		if err != nil {
			return err
		}
		which := "own"
		if pool == db.Shared() {
			which = "shared"
		}
		release()
		fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\t%s\t%4d\n", t.tenant, tenant.Isolation, which,
			database, schema, strings.ReplaceAll(path, `"`, ""), rows)
		if rows != t.rows || own != t.rows {
			return fmt.Errorf("%s wrote %d rows and sees %d, of which %d are its own", t.tenant, t.rows, rows, own)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	all, shared := db.Stat().NewConnsCount(), db.Shared().Stat().NewConnsCount()
	fmt.Printf("\nConnections opened: %d for acme, globex and initech in turn, %d for umbrella.\n", shared, all-shared)
	return nil
}

// audit looks for what gets around all that. It must find what was left unmade on purpose, and nothing graver.
func audit(ctx context.Context, db *pgxtenant.TenantDB) error {
	fmt.Printf("\n5. WHAT THE AUDIT FINDS: hooli has a row in the registry, and no schema\n\n")
	report, err := db.Audit(ctx)
	if err != nil {
		return err
	}
	fmt.Print(report)
	for _, f := range report.Findings {
		if f.Severity != pgxtenant.SeverityInfo && !strings.Contains(f.Object, "hooli") {
			return fmt.Errorf("the audit finds %s: %s", f.Code, f.Object)
		}
	}
	return nil
}
