package bench

import (
	"context"
	"fmt"
	"io/fs"
	"runtime"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Limits of migrations over schema tenants.
const (
	MaxCheck         = 2 * time.Second // 1,000 of them, with nothing to apply
	MaxMigrateRatio  = 0.35            // one small migration by 2 workers, of goose once per schema in sequence
	MaxNewRatio      = 0.25            // a new tenant by a copy of the template, of goose with 100 migrations
	MaxFleetRatio    = 1.5             // live heap with 10,000 in the registry, of that with 100
	templateVersions = 100             // migrations that the template of a new tenant is made by
	migrateWorkers   = 2
)

// Fleet is a database with schema tenants that goose has been run on.
type Fleet struct {
	db      *pgxtenant.TenantDB
	d       *pgtest.DB
	tenants int
	files   fstest.MapFS // of the tenants, up to the version that all are at
}

// OpenFleet makes a database with so many tenants, by the means of the server alone. Each has an empty table and a ledger.
func OpenFleet(ctx context.Context, l *Lab, tenants int) (*Fleet, error) {
	d, err := l.Server.Create(ctx)
	if err != nil {
		return nil, err
	}
	return openFleet(ctx, d, tenants)
}

func openFleet(ctx context.Context, d *pgtest.DB, tenants int) (_ *Fleet, err error) {
	f := &Fleet{d: d, tenants: tenants, files: fstest.MapFS{}}
	f.db, err = tenantDB(ctx, d.AppURL(), func(c *pgxtenant.Config) {
		c.Admin, _ = pgxpool.ParseConfig(d.OwnerURL()) // one of pgtest's own, which parses
		c.Registry = &pgxtenant.RegistryConfig{}
		c.Template, c.TemplateReference = "template", []string{goose.DefaultTablename}
	})
	if err != nil {
		return nil, err
	}
	if err := f.fill(ctx); err != nil {
		f.db.Close()
		return nil, err
	}
	return f, nil
}

// Close closes the TenantDB. The database goes with the Lab.
func (f *Fleet) Close() { f.db.Close() }

func (f *Fleet) fill(ctx context.Context) error {
	if err := f.db.Registry().Install(ctx); err != nil {
		return err
	}
	f.add("create table note (id bigint primary key, body text)", "drop table note")
	if err := execute(ctx, f.d.OwnerURL(), "create schema template"); err != nil {
		return err
	}
	m, err := f.migrator()
	if err != nil {
		return err
	}
	if _, err := m.Up(ctx, pgxtenant.ForEachOptions{}); err != nil {
		return err
	}
	// In steps, since a transaction locks what it makes.
	for first := 0; first < f.tenants; first += 200 {
		err := execute(ctx, f.d.OwnerURL(), fmt.Sprintf(`do $$ declare s text; begin for i in %d..%d loop
				s := 'tenant_t' || lpad(i::text, 6, '0');
				execute format('create schema %%1$s; create table %%1$s.note (like template.note including all); create table %%1$s.goose_db_version (like template.goose_db_version including all);
					insert into %%1$s.goose_db_version select * from template.goose_db_version; alter table %%1$s.goose_db_version alter id restart with 100', s);
			end loop; end $$`, first, min(first+200, f.tenants)-1))
		if err != nil {
			return err
		}
	}
	return execute(ctx, f.d.OwnerURL(), fmt.Sprintf(`insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings)
		select 't' || lpad(i::text, 6, '0'), '', 'schema', '', 'tenant_t' || lpad(i::text, 6, '0'), '', '', 'active', '{}' from generate_series(0, %d) i`, f.tenants-1), "vacuum analyze")
}

// add writes the next migration.
func (f *Fleet) add(up, down string) {
	f.files[fmt.Sprintf("tenant/%05d_x.sql", len(f.files)+1)] = &fstest.MapFile{Data: []byte("-- +goose Up\n" + up + ";\n-- +goose Down\n" + down + ";\n")}
}

// AddSmall writes the next migration: a column and an index on it.
func (f *Fleet) AddSmall() {
	n := len(f.files) + 1
	f.add(fmt.Sprintf("alter table note add c%[1]d int;\ncreate index note_c%[1]d on note (c%[1]d)", n), fmt.Sprintf("alter table note drop c%d", n))
}

func (f *Fleet) migrator() (*tenantgoose.Migrator, error) { return tenantgoose.New(f.db, f.files) }

// Up brings all tenants to the newest migration, and returns how many were not there.
func (f *Fleet) Up(ctx context.Context, progress func(pgxtenant.RunProgress)) (time.Duration, *pgxtenant.RunReport, error) {
	start := time.Now()
	m, err := f.migrator()
	if err != nil {
		return 0, nil, err
	}
	report, err := m.Up(ctx, pgxtenant.ForEachOptions{Concurrency: migrateWorkers, OnProgress: progress})
	return time.Since(start), report, err
}

// UpByGoose does the same with goose alone: once for each schema, on a connection with that search_path, one after the other.
func (f *Fleet) UpByGoose(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	folder, err := fs.Sub(f.files, "tenant")
	if err != nil {
		return 0, err
	}
	for i := -1; i < f.tenants; i++ {
		schema := "template"
		if i >= 0 {
			schema = pgxtenant.SchemaName(tenantID(i))
		}
		if err := gooseUp(ctx, f.d.OwnerURL("search_path="+schema), folder); err != nil {
			return 0, fmt.Errorf("%s: %w", schema, err)
		}
	}
	return time.Since(start), nil
}

func gooseUp(ctx context.Context, url string, folder fs.FS) error {
	c, err := pgxpool.ParseConfig(url)
	if err != nil {
		return err
	}
	db := stdlib.OpenDB(*c.ConnConfig)
	defer db.Close()
	p, err := goose.NewProvider(goose.DialectPostgres, db, folder, goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return err
	}
	_, err = p.Up(ctx)
	return err
}

// Onboard has a template that a hundred migrations have made: 30 tables, each with an index and a reference to another, and 70 changes.
type Onboard struct{ *Fleet }

// OpenOnboard makes the database and migrates the template. A far one is reached through a proxy that adds 1 ms to each round trip.
func OpenOnboard(ctx context.Context, l *Lab, far bool) (*Onboard, error) {
	d, err := l.Server.Create(ctx)
	if err != nil {
		return nil, err
	}
	if far {
		d = d.Via(l.proxy.Addr())
	}
	f, err := openFleet(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	for i := len(f.files); i < templateVersions; i++ {
		switch table := i % 30; {
		case i < 30:
			f.add(fmt.Sprintf(`create table t%[1]d (id bigint generated always as identity primary key, note bigint references note, name text not null, at timestamptz not null default now());
create index t%[1]d_note on t%[1]d (note)`, table), fmt.Sprintf("drop table t%d", table))
		case table == 0:
			f.add(fmt.Sprintf("create view v%d as select id, name from t1", i), fmt.Sprintf("drop view v%d", i))
		case i%2 == 0:
			f.add(fmt.Sprintf("create index on t%d (name, at)", table), "select 1")
		default:
			f.add(fmt.Sprintf("alter table t%d add c%d int default 0 check (c%d >= 0)", table, i, i), "select 1")
		}
	}
	if _, _, err := f.Up(ctx, nil); err != nil {
		f.Close()
		return nil, err
	}
	return &Onboard{f}, nil
}

// ByCopy makes a new tenant's schema as Provision does: a copy of the template, at its version.
func (o *Onboard) ByCopy(ctx context.Context, name string) (time.Duration, error) {
	start := time.Now()
	err := o.db.Provision(ctx, pgxtenant.Tenant{ID: name, Isolation: pgxtenant.IsolationSchema})
	return time.Since(start), err
}

// Stock makes so many copies ahead.
func (o *Onboard) Stock(ctx context.Context, n int) error {
	schemas, err := o.db.Schemas()
	if err != nil {
		return err
	}
	_, err = schemas.Stock(ctx, n)
	return err
}

// ByGoose makes a new tenant's schema by all migrations.
func (o *Onboard) ByGoose(ctx context.Context, i int) (time.Duration, error) {
	start := time.Now()
	schema := fmt.Sprintf("migrated%d", i)
	if err := execute(ctx, o.d.OwnerURL(), "create schema "+schema); err != nil {
		return 0, err
	}
	folder, err := fs.Sub(o.files, "tenant")
	if err != nil {
		return 0, err
	}
	err = gooseUp(ctx, o.d.OwnerURL("search_path="+schema), folder)
	return time.Since(start), err
}

// LiveHeap brings all tenants to the newest migration and returns the most that was in use at any of some forty looks.
func (f *Fleet) LiveHeap(ctx context.Context) (bytes uint64, done int, err error) {
	every, seen := max(f.tenants/40, 1), 0
	_, report, err := f.Up(ctx, func(p pgxtenant.RunProgress) {
		if p.Ended()/every == seen {
			return
		}
		seen = p.Ended() / every
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		bytes = max(bytes, m.HeapAlloc)
	})
	if report != nil {
		done = report.Done
	}
	return bytes, done, err
}

// Durable makes the server wait for its disk, as one that is in use does. It is one of the Lab's own.
func (l *Lab) Durable(ctx context.Context) error {
	return execute(ctx, l.Server.URL(), "alter system set fsync = on", "alter system set synchronous_commit = on", "select pg_reload_conf()")
}
