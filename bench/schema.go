package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// Schema makes a tenant's schema as a copy of a template of 50 tables, with two indexes, a foreign key and a
// serial key each, one trigger and five views.
var Schema = Job{
	Name: "Schema", Unit: "a tenant's schema of 50 tables",
	Rows: []Row{
		{What: "Provision, against pg_dump -s | psql", Base: "dump", Way: "provision", Limit: 0.6, Allocs: noLimit},
		{What: "the same from Stock, by a rename", Base: "dump", Way: "stock", Allocs: noLimit},
	},
	open: openSchema,
}

const (
	schemaTemplate = "template"
	schemaTables   = 50
	schemaStock    = 16 // for a slice; when they are used up, Provision copies
)

func openSchema(ctx context.Context, l *Lab) (ways []Way, err error) {
	if err := l.fillTemplate(ctx); err != nil {
		return nil, err
	}
	admin, err := pool(ctx, l.db.OwnerURL("pool_max_conns=2"), nil)
	if err != nil {
		return nil, err
	}
	manager, err := pgxtenant.NewSchemaManager(admin, pgxtenant.SchemaOptions{Template: schemaTemplate})
	if err != nil {
		admin.Close()
		return nil, err
	}
	// What a slice has made is dropped before the next, so that the catalogue does not grow.
	drop := func() error { return dropMade(ctx, admin) }
	provision := func(n int) error { return manager.Provision(ctx, fmt.Sprintf("provisioned_%d", n)) }
	ways = append(ways,
		Way{Name: "dump", Close: admin.Close, Reset: drop, Do: func(n int) error {
			return copyByDump(ctx, l.db.OwnerURL(), fmt.Sprintf("dumped_%06d", n))
		}},
		Way{Name: "provision", Reset: drop, Do: provision},
		Way{Name: "stock", Do: provision, Reset: func() error {
			err := drop()
			if err == nil {
				_, err = manager.Stock(ctx, schemaStock)
			}
			return err
		}})
	return ways, nil
}

// copyByDump is what one would do by hand, in one transaction too: the name is replaced on the way.
func copyByDump(ctx context.Context, url, schema string) error {
	var failed bytes.Buffer
	dump := exec.CommandContext(ctx, "pg_dump", "-s", "-n", schemaTemplate, url)
	dump.Stderr = &failed
	text, err := dump.Output()
	if err != nil {
		return fmt.Errorf("pg_dump: %w: %s", err, failed.String())
	}
	psql := exec.CommandContext(ctx, "psql", "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", url)
	psql.Stdin = strings.NewReader(strings.ReplaceAll(string(text), schemaTemplate, schema))
	psql.Stdout, psql.Stderr = nil, &failed
	psql.Env = append(os.Environ(), "PGOPTIONS=-c client_min_messages=warning")
	if err := psql.Run(); err != nil {
		return fmt.Errorf("psql: %w: %s", err, failed.String())
	}
	return nil
}

func dropMade(ctx context.Context, admin *pgxpool.Pool) error {
	_, err := admin.Exec(ctx, `do $$ declare s name; begin
		for s in select nspname from pg_namespace where nspname ~ '^(dumped|pgxtenant_stock|tenant_provisioned)_' loop
			execute format('drop schema %I cascade', s);
		end loop;
		if to_regclass('pgxtenant.schema') is not null then delete from pgxtenant.schema; end if; end $$`)
	return err
}

func (l *Lab) fillTemplate(ctx context.Context) error {
	if l.filledTemplate {
		return nil
	}
	l.filledTemplate = true
	statements := []string{"create schema " + schemaTemplate, "set search_path = " + schemaTemplate,
		"create function touch() returns trigger language plpgsql as $$ begin new.changed := now(); return new; end $$"}
	for i := range schemaTables {
		references := ""
		if i > 0 {
			references = fmt.Sprintf(" references part_%d", i-1)
		}
		statements = append(statements,
			fmt.Sprintf("create table part_%d (id bigserial primary key, parent bigint%s, name text not null default '', amount numeric(12, 2) check (amount >= 0), changed timestamptz default now())", i, references),
			fmt.Sprintf("create index on part_%d (parent)", i), fmt.Sprintf("create index on part_%d (name, changed)", i))
		if i%10 == 0 {
			statements = append(statements, fmt.Sprintf("create view overview_%d as select id, name, amount * 2 as double from part_%d where amount > 0", i, i))
		}
	}
	return execute(ctx, l.db.OwnerURL(), append(statements,
		"create trigger touch before update on part_0 for each row execute function touch()",
		fmt.Sprintf("grant select, insert, update, delete on all tables in schema %s to %s", schemaTemplate, ident(l.db.App)))...)
}
