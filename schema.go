package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// SchemaOptions describe the tenants' schemas of one database.
type SchemaOptions struct {
	// Template is the schema that tenants' schemas are copies of. Required.
	Template string

	// Reference are tables of the template, by their bare names, whose rows are copied too. The sequences
	// that their columns draw from go on where the template's are.
	Reference []string
}

// SchemaManager makes and removes tenants' schemas in one database. Which schema is whose is kept in a table
// in the schema pgxtenant, and no call touches a schema that is not there. It is safe for concurrent use, in
// any number of processes; a tenant's calls wait for each other.
//
// The pool's role owns the template and all that is in it, and may create schemas in the database.
type SchemaManager struct {
	admin *pgxpool.Pool
	o     SchemaOptions
	plan  *planDB // if not nil, changes are made on it
}

// NewSchemaManager returns a manager for the database that admin leads to. The pool stays the caller's.
func NewSchemaManager(admin *pgxpool.Pool, o SchemaOptions) (*SchemaManager, error) {
	if admin == nil {
		return nil, ErrNoAdmin
	}
	if err := validSchema(o.Template); err != nil {
		return nil, fmt.Errorf("pgxtenant: SchemaOptions.Template %q: %w", clip(o.Template), err)
	}
	o.Reference = slices.Clone(o.Reference)
	return &SchemaManager{admin: admin, o: o}, nil
}

// Schemas returns the manager of schemas that are copies of Config.Template, with the rows of
// Config.TemplateReference. It ends with the TenantDB.
func (db *TenantDB) Schemas() (*SchemaManager, error) {
	admin, err := db.adminPool()
	if err != nil {
		return nil, err
	}
	if db.config.Template == "" {
		return nil, errors.New("pgxtenant: Config.Template is not set, and this needs the schema that tenants' schemas are copies of")
	}
	return NewSchemaManager(admin, SchemaOptions{Template: db.config.Template, Reference: db.config.TemplateReference})
}

func (db *TenantDB) schemasOn(on adminRunner) (*SchemaManager, error) {
	m, err := db.Schemas()
	if err == nil {
		m.plan, _ = on.(*planDB)
	}
	return m, err
}

var schemaSteps = []string{`
	create table pgxtenant.schema (
		name        text collate "C" primary key,
		state       text not null check (state in ('live', 'stock', 'retired')),
		tenant      text collate "C" check ((tenant is null) = (state = 'stock')),
		was         text,                                -- the name before it was retired
		template    text not null,
		fingerprint bytea not null,                      -- of the template, when it was copied
		changed     timestamptz not null default now()
	);
	create unique index schema_tenant on pgxtenant.schema (tenant) where state = 'live'`, `
	alter table pgxtenant.schema add stamp text not null default ''`, // of stock: the template's, when it was copied; empty for one that says its name
}

// TenantSchema is a tenant's schema, as SchemaManager.List finds it.
type TenantSchema struct {
	Name     string
	TenantID string
	Retired  time.Time // when it was taken out of use; zero while it is in use
}

// Provision makes the tenant's schema, SchemaName(tenantID), as a copy of the template, if it is not
// there: everything that makes up the template but its rows. Nothing in it refers to the template. It is one
// transaction, so a call that fails has done nothing.
//
// A schema of that name that is not the tenant's, or that this manager did not make, is ErrWrongTenant. A
// template that is missing or empty is an error, as is one with objects of a kind that is not copied:
// foreign and typed tables, aggregates, operators and their classes, collations, conversions, base types, text
// search objects and extensions; and functions that name the template in their bodies.
func (m *SchemaManager) Provision(ctx context.Context, tenantID string) error {
	return m.provision(ctx, tenantID, SchemaName(tenantID))
}

func (m *SchemaManager) provision(ctx context.Context, tenantID, schema string) error {
	return m.locked(ctx, "provision schema", tenantID, schema, func(tx pgx.Tx, schema string) error {
		found, err := m.find(ctx, tx, schema)
		if err != nil {
			return err
		}
		if found.exists {
			return found.own(tenantID, schema)
		}
		if other, err := m.live(ctx, tx, tenantID); err != nil || other != "" && other != schema {
			return orDefault(err, fmt.Errorf("pgxtenant: the tenant has a schema already, %q; retire or drop it first", other))
		}
		fingerprint, err := m.fromStamped(ctx, tx, schema)
		if err == nil && fingerprint == nil {
			fingerprint, err = m.make(ctx, tx, schema)
		}
		if err != nil {
			return err
		}
		// A row without a schema is one that somebody dropped by other means.
		_, err = tx.Exec(ctx, `insert into pgxtenant.schema (name, state, tenant, template, fingerprint) values ($1, 'live', $2, $3, $4)
			on conflict (name) do update set state = 'live', tenant = excluded.tenant, was = null, template = excluded.template,
				fingerprint = excluded.fingerprint, changed = clock_timestamp()`, schema, tenantID, m.o.Template, fingerprint)
		return err
	})
}

// make makes a schema of the template as it is, and returns the template's fingerprint.
func (m *SchemaManager) make(ctx context.Context, tx pgx.Tx, schema string) ([]byte, error) {
	template, err := m.template(ctx, tx)
	if err != nil {
		return nil, err
	}
	fingerprint, err := m.fingerprint(ctx, tx, template)
	if err != nil {
		return nil, err
	}
	stocked, err := m.fromStock(ctx, tx, template, fingerprint, schema)
	if err == nil && !stocked {
		err = m.copy(ctx, tx, template, schema)
	}
	return fingerprint, err
}

// Exists reports whether the tenant's schema is there, and the tenant's; one that is not is ErrWrongTenant. A
// retired one does not count. It is the schema that the tenant has, by whatever name TenantDB.Provision gave it,
// as it is for Drop, Retire and Diff.
func (m *SchemaManager) Exists(ctx context.Context, tenantID string) (exists bool, err error) {
	err = m.locked(ctx, "find schema", tenantID, "", func(tx pgx.Tx, schema string) error {
		found, err := m.find(ctx, tx, schema)
		if err == nil && found.exists {
			exists, err = true, found.own(tenantID, schema)
		}
		return err
	})
	return exists && err == nil, err
}

// List returns the tenants' schemas, in the order of their names, retired ones included.
func (m *SchemaManager) List(ctx context.Context) ([]TenantSchema, error) {
	if err := install(ctx, m.admin, "schemas", schemaSteps); err != nil {
		return nil, err
	}
	rows, err := m.admin.Query(ctx, "select name, tenant, state = 'retired', changed from pgxtenant.schema where state <> 'stock' order by name")
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: list schemas: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s TenantSchema, err error) {
		var retired bool
		err = row.Scan(&s.Name, &s.TenantID, &retired, &s.Retired)
		if !retired {
			s.Retired = time.Time{}
		}
		return s, err
	})
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: list schemas: %w", err)
	}
	return list, nil
}

// Drop removes the tenant's schema with all that is in it, in one transaction. It waits for those who use its
// tables. One that is not there is no error.
func (m *SchemaManager) Drop(ctx context.Context, tenantID string) error {
	return m.drop(ctx, tenantID, "")
}

func (m *SchemaManager) drop(ctx context.Context, tenantID, schema string) error {
	return m.locked(ctx, "drop schema", tenantID, schema, func(tx pgx.Tx, schema string) error {
		found, err := m.find(ctx, tx, schema)
		if err != nil {
			return err
		}
		if found.exists {
			if err := found.own(tenantID, schema); err != nil {
				return err
			}
			if err := destroy(ctx, tx, "drop schema "+ident(schema)+" cascade"); err != nil {
				return err
			}
		}
		_, err = tx.Exec(ctx, "delete from pgxtenant.schema where name = $1 and tenant = $2", schema, tenantID)
		return err
	})
}

// Retire takes the tenant's schema out of use and keeps it, under another name, until Purge drops it or
// Restore brings it back. One that is not there is no error.
func (m *SchemaManager) Retire(ctx context.Context, tenantID string) error {
	return m.retire(ctx, tenantID, "")
}

func (m *SchemaManager) retire(ctx context.Context, tenantID, schema string) error {
	return m.locked(ctx, "retire schema", tenantID, schema, func(tx pgx.Tx, schema string) error {
		found, err := m.find(ctx, tx, schema)
		if err != nil || !found.exists {
			return err
		}
		if err := found.own(tenantID, schema); err != nil {
			return err
		}
		return m.rename(ctx, tx, schema, retiredName(schema, time.Now()), "retired", &tenantID)
	})
}

// Restore undoes the tenant's latest Retire. It is an error if there is none to undo, or if the tenant has
// a schema again.
func (m *SchemaManager) Restore(ctx context.Context, tenantID string) error {
	return m.locked(ctx, "restore schema", tenantID, "", func(tx pgx.Tx, schema string) error {
		var retired string
		err := tx.QueryRow(ctx, "select name, was from pgxtenant.schema where state = 'retired' and tenant = $1 order by changed desc limit 1", tenantID).Scan(&retired, &schema)
		if errors.Is(err, pgx.ErrNoRows) {
			return errors.New("pgxtenant: the tenant has no retired schema")
		}
		if err != nil {
			return err
		}
		if err := lockSchema(ctx, tx, schema); err != nil {
			return err
		}
		found, err := m.find(ctx, tx, schema)
		if err != nil {
			return err
		}
		if live, err := m.live(ctx, tx, tenantID); err != nil || live != "" || found.exists {
			return orDefault(err, fmt.Errorf("pgxtenant: there is a schema %q already; retire or drop it first", orDefault(live, schema)))
		}
		return m.rename(ctx, tx, retired, schema, "live", &tenantID)
	})
}

// Purge drops the schemas that were retired longer than retention ago, and returns which, each in a transaction of its
// own, since the server has only so many locks for one. On an error the ones before it are dropped.
func (m *SchemaManager) Purge(ctx context.Context, retention time.Duration) ([]TenantSchema, error) {
	list, err := m.List(ctx)
	if err != nil {
		return nil, err
	}
	var dropped []TenantSchema
	for _, s := range list {
		if s.Retired.IsZero() || time.Since(s.Retired) < retention {
			continue
		}
		var gone pgconn.CommandTag
		err := m.locked(ctx, "purge schema", s.TenantID, s.Name, func(tx pgx.Tx, _ string) (err error) {
			// The row is locked by this, so that Restore, or another Purge, comes before or after.
			gone, err = tx.Exec(ctx, "delete from pgxtenant.schema where name = $1 and state = 'retired'", s.Name)
			if err == nil && gone.RowsAffected() > 0 {
				_, err = tx.Exec(ctx, "drop schema if exists "+ident(s.Name)+" cascade")
			}
			return err
		})
		if err != nil {
			return dropped, err
		}
		if gone.RowsAffected() > 0 {
			dropped = append(dropped, s)
		}
	}
	return dropped, nil
}

// Diff tells how the tenant's schema differs from the template, as SQL: a line that begins with - for what
// it lacks, and one with + for what it has besides. Rows are not compared.
func (m *SchemaManager) Diff(ctx context.Context, tenantID string) (lines []string, err error) {
	err = m.locked(ctx, "compare schema", tenantID, "", func(tx pgx.Tx, schema string) error {
		lines, err = m.diff(ctx, tx, tenantID, schema)
		return err
	})
	return lines, err
}

func (m *SchemaManager) diff(ctx context.Context, tx pgx.Tx, tenantID, schema string) (lines []string, err error) {
	found, err := m.find(ctx, tx, schema)
	if err != nil {
		return nil, err
	}
	if !found.exists {
		return nil, fmt.Errorf("pgxtenant: there is no schema %q; Provision makes it", schema)
	}
	if err := found.own(tenantID, schema); err != nil {
		return nil, err
	}
	template, err := m.template(ctx, tx)
	if err != nil {
		return nil, err
	}
	own, err := describeSchema(ctx, tx, schema)
	if err != nil {
		return nil, err
	}
	return difference(template.lines(), own.lines()), nil
}

// difference tells how two descriptions differ, in lines that begin with - and +.
func difference(want, have []string) (lines []string) {
	for _, line := range want {
		if !slices.Contains(have, line) {
			lines = append(lines, "- "+line)
		}
	}
	for _, line := range have {
		if !slices.Contains(want, line) {
			lines = append(lines, "+ "+line)
		}
	}
	return lines
}

// Stock makes ready-made copies of the template until there are n, of which Provision takes one by a
// rename, and drops those that are not copies of the template as it is now. It returns how many it has made.
func (m *SchemaManager) Stock(ctx context.Context, n int) (made int, err error) {
	for {
		one, more, err := m.stockStep(ctx, n)
		if err != nil || !more {
			return made, err
		}
		if one {
			made++
		}
	}
}

// stockStep makes one copy, or drops one that is stale, in a transaction of its own for the sake of locks. It
// reports whether it made one, and whether there may be more to do.
func (m *SchemaManager) stockStep(ctx context.Context, n int) (made, more bool, err error) {
	err = m.locked(ctx, "stock schema", "stock", m.o.Template, func(tx pgx.Tx, _ string) error {
		stamp, err := m.stamp(ctx, tx) // first, so that a change meanwhile makes another of it
		if err != nil {
			return err
		}
		template, err := m.template(ctx, tx)
		if err != nil {
			return err
		}
		fingerprint, err := m.fingerprint(ctx, tx, template)
		if err != nil {
			return err
		}
		if len(template.naming(m.o.Template)) > 0 {
			stamp = ""
		}
		var stale []string
		var fresh int
		err = tx.QueryRow(ctx, `select coalesce(array_agg(name) filter (where fingerprint <> $2), '{}'), count(*) filter (where fingerprint = $2)
			from pgxtenant.schema where state = 'stock' and template = $1`, m.o.Template, fingerprint).Scan(&stale, &fresh)
		if err != nil {
			return err
		}
		if len(stale) > 0 {
			more = true
			return m.dropStock(ctx, tx, stale[0])
		}
		// What was changed and changed back is the same template with another stamp.
		if _, err := tx.Exec(ctx, "update pgxtenant.schema set stamp = $2 where state = 'stock' and template = $1 and stamp <> $2", m.o.Template, stamp); err != nil {
			return err
		}
		if fresh >= n {
			return nil
		}
		made, more = true, true
		var name string
		if err := tx.QueryRow(ctx, "select 'pgxtenant_stock_' || replace(gen_random_uuid()::text, '-', '')").Scan(&name); err != nil {
			return err
		}
		if err := m.copy(ctx, tx, template, name); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "insert into pgxtenant.schema (name, state, template, fingerprint, stamp) values ($1, 'stock', $2, $3, $4)", name, m.o.Template, fingerprint, stamp)
		return err
	})
	return made, more, err
}

func (m *SchemaManager) dropStock(ctx context.Context, tx pgx.Tx, name string) error {
	if _, err := tx.Exec(ctx, "drop schema if exists "+ident(name)+" cascade"); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, "delete from pgxtenant.schema where name = $1", name)
	return err
}

// fromStock gives a ready-made copy the tenant's name, if there is one.
func (m *SchemaManager) fromStock(ctx context.Context, tx pgx.Tx, template *description, fingerprint []byte, schema string) (bool, error) {
	var name string
	err := tx.QueryRow(ctx, `select name from pgxtenant.schema where state = 'stock' and template = $1 and fingerprint = $2
		order by name limit 1 for update skip locked`, m.o.Template, fingerprint).Scan(&name)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	text := "delete from pgxtenant.schema where name = " + literal(name) + "; alter schema " + ident(name) + " rename to " + ident(schema)
	for _, o := range template.naming(schema) {
		text += "; set local check_function_bodies = off; set local search_path = " + ident(schema) + ", pg_temp; " +
			strings.Replace(o.sql, "CREATE ", "CREATE OR REPLACE ", 1)
	}
	_, err = tx.Exec(ctx, text)
	return true, err
}

func (m *SchemaManager) rename(ctx context.Context, tx pgx.Tx, from, to, state string, tenant *string) error {
	if _, err := tx.Exec(ctx, "alter schema "+ident(from)+" rename to "+ident(to)); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, `update pgxtenant.schema set name = $2, state = $3, tenant = $4, was = case $3 when 'retired' then $1 end,
		changed = clock_timestamp() where name = $1`, from, to, state, tenant)
	return err
}

// foundSchema is what is known of a schema's name.
type foundSchema struct {
	exists bool    // there is a schema
	tenant *string // nil if this package did not make it
}

func (m *SchemaManager) find(ctx context.Context, tx pgx.Tx, schema string) (f foundSchema, err error) {
	err = tx.QueryRow(ctx, `select exists (select from pg_catalog.pg_namespace where nspname = $1),
		(select tenant from pgxtenant.schema where name = $1)`, schema).Scan(&f.exists, &f.tenant)
	return f, err
}

// live is the name of the schema that the tenant has, or empty. One that somebody dropped by other means is
// none.
func (m *SchemaManager) live(ctx context.Context, tx pgx.Tx, tenantID string) (name string, err error) {
	err = tx.QueryRow(ctx, `select s.name from pgxtenant.schema s join pg_catalog.pg_namespace n on n.nspname = s.name
		where s.tenant = $1 and s.state = 'live'`, tenantID).Scan(&name)
	if errors.Is(err, pgx.ErrNoRows) {
		_, err = tx.Exec(ctx, "delete from pgxtenant.schema where tenant = $1 and state = 'live'", tenantID)
	}
	return name, err
}

func (f foundSchema) own(tenantID, schema string) error {
	switch {
	case f.tenant == nil:
		return fmt.Errorf("%w: there is a schema %q that was not made for any tenant; rename it, or, if it is the tenant's, insert it into pgxtenant.schema",
			ErrWrongTenant, schema)
	case *f.tenant != tenantID:
		return fmt.Errorf("%w: schema %q is tenant %q's", ErrWrongTenant, schema, *f.tenant)
	}
	return nil
}

// notTemplate refuses a tenant's schema that is the template of all others.
func notTemplate(schema, template string) error {
	if schema == template {
		return fmt.Errorf("%w: schema %q is the template", ErrWrongTenant, schema)
	}
	return nil
}

// locked runs f in a transaction while no other process does anything for a schema of that name. An empty name
// is that of the tenant's schema: the one it has, or else SchemaName(tenantID).
func (m *SchemaManager) locked(ctx context.Context, op, tenantID, schema string, f func(tx pgx.Tx, schema string) error) (err error) {
	defer func() {
		if err != nil {
			err = &TenantError{clip(tenantID), op, m.explain(err)}
		}
	}()
	if err := ValidateID(tenantID); err != nil {
		return err
	}
	if err := validSchema(orDefault(schema, SchemaName(tenantID))); err != nil {
		return fmt.Errorf("pgxtenant: schema name %q: %w", clip(schema), err)
	}
	if op != "stock schema" {
		if err := notTemplate(schema, m.o.Template); err != nil {
			return err
		}
	}
	on := beginner(m.admin)
	if m.plan != nil {
		on = m.plan
	}
	if err := install(ctx, on, "schemas", schemaSteps); err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, on, func(tx pgx.Tx) error {
		schema := schema
		if schema == "" {
			if err := tx.QueryRow(ctx, "select coalesce((select name from pgxtenant.schema where tenant = $1 and state = 'live'), $2)",
				tenantID, SchemaName(tenantID)).Scan(&schema); err != nil {
				return err
			}
		}
		if err := lockSchema(ctx, tx, schema); err != nil {
			return err
		}
		return f(tx, schema)
	})
}

func lockSchema(ctx context.Context, tx pgx.Tx, schema string) error {
	_, err := tx.Exec(ctx, "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1, 0))", "pgxtenant schema "+schema)
	return err
}

func (m *SchemaManager) explain(err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42501" && strings.Contains(pgErr.Message, "database") {
		config := m.admin.Config().ConnConfig
		return fmt.Errorf("%w: grant create on database %s to %s", adminError(err), ident(config.Database), ident(config.User))
	}
	return adminError(err)
}
