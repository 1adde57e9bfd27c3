package tenanttern

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/tern/v2/migrate"

	"github.com/pgxtenant/pgxtenant"
)

// VersionTable is the table that has a tenant's version, in its schema or database.
const VersionTable = "schema_version"

// Migrate brings the tenants that the options select to the newest migration of the files, templates first. Files are those of a folder
// of tern's, with nil as the data of their templates.
//
// The migrations are those of tenants with a schema or a database. With the Isolations IsolationRow, and nothing else, they are those
// of the shared schemas; these are otherwise left alone. The options' Versions and Target are set here. Report and
// error are those of [pgxtenant.TenantDB.ForEach].
func Migrate(ctx context.Context, db *pgxtenant.TenantDB, files fs.FS, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	return run(ctx, db, files, nil, o)
}

// MigrateTo is Migrate up or down to a version; zero takes all back. A migration without a way back fails on the way down.
func MigrateTo(ctx context.Context, db *pgxtenant.TenantDB, files fs.FS, version int32, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	return run(ctx, db, files, &version, o)
}

func run(ctx context.Context, db *pgxtenant.TenantDB, files fs.FS, to *int32, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	m, err := migrate.NewMigrator(ctx, nil, VersionTable) // without a connection it only reads
	if err == nil {
		err = m.LoadMigrations(files)
	}
	if err == nil {
		err = passedOver(files)
	}
	if err != nil {
		return nil, fmt.Errorf("tenanttern: read the migrations: %w", err)
	}
	target := int32(len(m.Migrations))
	if to != nil {
		target = *to
	}
	row := []pgxtenant.Isolation{pgxtenant.IsolationRow}
	c := db.Config()
	switch {
	case target < 0 || int(target) > len(m.Migrations):
		return nil, fmt.Errorf("tenanttern: there is no version %d; they are 0 to %d", target, len(m.Migrations))
	case o.Versions != nil || o.Target != "":
		return nil, errors.New("tenanttern: ForEachOptions.Versions and Target are set here; leave them unset")
	case slices.Equal(o.Isolations, row):
	case c.Template != "" && !slices.Contains(c.TemplateReference, VersionTable):
		return nil, fmt.Errorf("tenanttern: Config.TemplateReference lacks %q: schemas that are copied from template %q would not know their version", VersionTable, c.Template)
	default:
		o.SkipShared = true
		if o.Isolations == nil {
			o.Isolations = []pgxtenant.Isolation{pgxtenant.IsolationSchema, pgxtenant.IsolationDatabase}
		}
	}
	o.Target = strconv.Itoa(int(target))
	o.Versions = func(ctx context.Context, conn *pgx.Conn, tenants []pgxtenant.Tenant) (map[string]string, error) {
		versions, err := db.Ledgers(ctx, conn, tenants, VersionTable, "max(version)")
		for _, t := range tenants {
			if err == nil && versions[t.ID] == "" {
				versions[t.ID] = "0"
			}
		}
		return versions, err
	}
	return db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, _ pgxtenant.Tenant) error {
		return migrateTo(ctx, conn, m.Migrations, target)
	})
}

// passedOver refuses a file that tern would leave out, with its SQL, since it takes .sql in lower case alone.
func passedOver(files fs.FS) error {
	entries, err := fs.ReadDir(files, ".")
	for _, e := range entries {
		name := e.Name()
		if ext := path.Ext(name); name[0] >= '0' && name[0] <= '9' && strings.EqualFold(ext, ".sql") && ext != ".sql" {
			return fmt.Errorf("%s: its name must end in .sql, in lower case", name)
		}
	}
	return err
}

// migrateTo takes the steps from the version that the connection's place is at.
func migrateTo(ctx context.Context, conn *pgx.Conn, migrations []*migrate.Migration, target int32) error {
	var schema *string
	var searchPath string
	if err := conn.QueryRow(ctx, "select current_schema(), current_setting('search_path')", pgx.QueryExecModeExec).Scan(&schema, &searchPath); err != nil {
		return err
	}
	if schema == nil {
		return errors.New("tenanttern: the search_path leads to no schema that exists")
	}
	// In full: a table of that name in a shared schema is another.
	table := pgx.Identifier{*schema, VersionTable}.Sanitize()
	if _, err := conn.Exec(ctx, "create table if not exists "+table+" (version int4 not null); insert into "+table+" select 0 where not exists (select from "+table+")"); err != nil {
		return fmt.Errorf("tenanttern: make table %s: %w", table, err)
	}
	var version int32
	if err := conn.QueryRow(ctx, "select version from "+table, pgx.QueryExecModeExec).Scan(&version); err != nil {
		return fmt.Errorf("tenanttern: read table %s: %w", table, err)
	}
	if version < 0 || int(version) > len(migrations) {
		return fmt.Errorf("tenanttern: table %s has version %d, and the files have 0 to %d: they are older than what was applied", table, version, len(migrations))
	}
	for version != target {
		next := version + 1
		if version > target {
			next = version - 1
		}
		m := migrations[max(version, next)-1]
		sql := m.UpSQL
		if next < version {
			sql = m.DownSQL
		}
		if sql == "" {
			return fmt.Errorf("tenanttern: %s has no way back", m.Name)
		}
		if err := step(ctx, conn, sql, "update "+table+" set version = "+strconv.Itoa(int(next)), searchPath); err != nil {
			return fmt.Errorf("tenanttern: %s: %w", m.Name, err)
		}
		version = next
	}
	return nil
}

var disableTx = regexp.MustCompile(`(?m)^---- tern: disable-tx ----\r?$`)

// step runs one migration and notes it, in one transaction unless it is marked otherwise. The next one finds the search_path as this one did.
func step(ctx context.Context, conn *pgx.Conn, sql, note, searchPath string) error {
	mark := func() error {
		if _, err := conn.Exec(ctx, note); err != nil {
			return err
		}
		_, err := conn.Exec(ctx, "select set_config('search_path', $1, false)", pgx.QueryExecModeExec, searchPath)
		return err
	}
	if !disableTx.MatchString(sql) {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
			return mark()
		})
	}
	if _, err := conn.Exec(ctx, sql); err != nil {
		// Not wrapped: it must not be tried again after a lock timeout, as transactions are.
		return fmt.Errorf("it runs without a transaction, so what it did before it failed is there and is not noted; remove it and run it again. Several statements "+
			"in one file are one transaction to the server; a file that has CREATE INDEX CONCURRENTLY must have nothing else: %v", err)
	}
	return mark()
}
