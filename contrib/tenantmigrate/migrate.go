package tenantmigrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database"
	"github.com/golang-migrate/migrate/v4/source"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"

	"github.com/pgxtenant/pgxtenant"
)

// VersionTable is the table that has a tenant's version, in its schema or database.
const VersionTable = "schema_migrations"

// Migrate brings the tenants that the options select to the newest version of the files, templates first. Files are named as
// golang-migrate wants them, such as 000001_name.up.sql.
//
// The migrations are those of tenants with a schema or a database. With the Isolations IsolationRow, and nothing else, they are those
// of the shared schemas; these are otherwise left alone. The options' Versions, Target and Attempts are set here. Report and
// error are those of [pgxtenant.TenantDB.ForEach]; the error of a tenant that is dirty is a migrate.ErrDirty.
func Migrate(ctx context.Context, db *pgxtenant.TenantDB, files fs.FS, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	src, versions, err := read(files)
	if err != nil {
		return nil, err
	}
	return run(ctx, db, src, versions, versions[len(versions)-1], o)
}

// MigrateTo is Migrate up or down to a version; zero takes all back. A version that no file has is an error. A migration
// without a file for the way back is passed over on the way, as golang-migrate does.
func MigrateTo(ctx context.Context, db *pgxtenant.TenantDB, files fs.FS, version uint, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	src, versions, err := read(files)
	if err != nil {
		return nil, err
	}
	if version != 0 && !slices.Contains(versions, version) {
		return nil, fmt.Errorf("tenantmigrate: no file has version %d; they are %v", version, versions)
	}
	return run(ctx, db, src, versions, version, o)
}

// Force notes that a tenant is at a version and not dirty, without running anything; zero means that nothing was applied. For
// a row tenant that is the version of the shared schemas.
func Force(ctx context.Context, db *pgxtenant.TenantDB, tenantID string, version uint) error {
	if tenantID == "" {
		return fmt.Errorf("tenantmigrate: Force: %w", pgxtenant.ErrInvalidTenant)
	}
	_, err := db.ForEach(ctx, pgxtenant.ForEachOptions{IDs: []string{tenantID}}, force(version))
	return err
}

// ForceTemplate is Force for Config.Template, which comes first and so is the first to be dirty. In a template database the
// table is to be set by hand.
func ForceTemplate(ctx context.Context, db *pgxtenant.TenantDB, version uint) error {
	if db.Config().Template == "" {
		return errors.New("tenantmigrate: ForceTemplate: there is no Config.Template")
	}
	var done atomic.Bool
	o := pgxtenant.ForEachOptions{Isolations: []pgxtenant.Isolation{pgxtenant.IsolationSchema}, Target: "forced"}
	o.Versions = func(_ context.Context, _ *pgx.Conn, tenants []pgxtenant.Tenant) (map[string]string, error) {
		found := make(map[string]string)
		for _, t := range tenants { // of tenants nothing is asked, and nothing done for them
			if t.ID != "" || done.Load() {
				found[t.ID] = o.Target
			}
		}
		return found, nil
	}
	_, err := db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, t pgxtenant.Tenant) error {
		if t.ID != "" { // one that came meanwhile is a copy
			return nil
		}
		err := force(version)(ctx, conn, t)
		done.Store(err == nil)
		return err
	})
	return err
}

func force(version uint) pgxtenant.ForEachFunc {
	return func(ctx context.Context, conn *pgx.Conn, _ pgxtenant.Tenant) error {
		d, err := newDriver(ctx, conn)
		if err != nil {
			return err
		}
		return d.set(orNil(version), false)
	}
}

// orNil is golang-migrate's number for a version.
func orNil(version uint) int {
	if version == 0 {
		return database.NilVersion
	}
	return int(version)
}

// read lists the files. The source may be used for several tenants at once.
func read(files fs.FS) (source.Driver, []uint, error) {
	src, err := iofs.New(files, ".")
	if err != nil {
		return nil, nil, fmt.Errorf("tenantmigrate: read the migrations: %w", err)
	}
	var versions []uint
	v, err := src.First()
	for ; err == nil; v, err = src.Next(v) {
		versions = append(versions, v)
	}
	if !errors.Is(err, fs.ErrNotExist) || len(versions) == 0 || versions[0] == 0 {
		return nil, nil, fmt.Errorf("tenantmigrate: read the migrations: there must be some, with versions above zero: %w", err)
	}
	return src, versions, nil
}

func run(ctx context.Context, db *pgxtenant.TenantDB, src source.Driver, versions []uint, version uint, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	c := db.Config()
	switch {
	case o.Versions != nil || o.Target != "" || o.Attempts > 1:
		return nil, errors.New("tenantmigrate: ForEachOptions.Versions, Target and Attempts are set here; leave them unset")
	case slices.Equal(o.Isolations, []pgxtenant.Isolation{pgxtenant.IsolationRow}):
	case c.Template != "" && !slices.Contains(c.TemplateReference, VersionTable):
		return nil, fmt.Errorf("tenantmigrate: Config.TemplateReference lacks %q: schemas that are copied from template %q would not know their version", VersionTable, c.Template)
	default:
		o.SkipShared = true
		if o.Isolations == nil {
			o.Isolations = []pgxtenant.Isolation{pgxtenant.IsolationSchema, pgxtenant.IsolationDatabase}
		}
	}
	o.Attempts = 1 // the first one leaves a dirty version
	o.Target = strconv.FormatUint(uint64(version), 10)
	o.Versions = func(ctx context.Context, conn *pgx.Conn, tenants []pgxtenant.Tenant) (map[string]string, error) {
		found, err := db.Ledgers(ctx, conn, tenants, VersionTable, "max(version) || case when bool_or(dirty) then ' dirty' else '' end")
		for _, t := range tenants {
			if err == nil && found[t.ID] == "" {
				found[t.ID] = "0"
			}
		}
		return found, err
	}
	return db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, _ pgxtenant.Tenant) error {
		d, err := newDriver(ctx, conn)
		if err != nil {
			return err
		}
		return migrateTo(src, versions, d, orNil(version))
	})
}

// migrateTo goes one step at a time: golang-migrate reads ahead, and after a failure would never end to.
func migrateTo(src source.Driver, versions []uint, d *driver, target int) error {
	m, err := migrate.NewWithInstance("files", src, "tenant", d)
	if err != nil {
		return fmt.Errorf("tenantmigrate: %w", err)
	}
	for {
		version, dirty, err := d.Version()
		if err != nil || version == target && !dirty {
			return err
		}
		if !dirty && version != database.NilVersion && !slices.Contains(versions, uint(version)) {
			return fmt.Errorf("tenantmigrate: it is at version %d, which no file has; they are %v: they are older than what was applied, or others", version, versions)
		}
		one := 1
		if version > target {
			one = -1
		}
		var isDirty migrate.ErrDirty
		if err := m.Steps(one); errors.As(err, &isDirty) {
			return fmt.Errorf("tenantmigrate: version %d is dirty: it was begun and did not succeed; see what of it is there, undo or complete that, "+
				"and call Force, or ForceTemplate, with the version that it then is: %w", isDirty.Version, err)
		} else if err != nil {
			return fmt.Errorf("tenantmigrate: from version %d: %w", max(version, 0), err)
		}
	}
}

// driver is golang-migrate's view of a tenant's connection, for one call of the run's function.
type driver struct {
	ctx    context.Context // the interface has none
	conn   *pgx.Conn
	table  string
	failed error // of the last SetVersion
}

var _ database.Driver = (*driver)(nil)

func newDriver(ctx context.Context, conn *pgx.Conn) (*driver, error) {
	var schema *string
	if err := conn.QueryRow(ctx, "select current_schema()", pgx.QueryExecModeExec).Scan(&schema); err != nil {
		return nil, err
	}
	if schema == nil {
		return nil, errors.New("tenantmigrate: the search_path leads to no schema that exists")
	}
	// In full: a table of that name in a shared schema is another, and a file may change the search_path.
	d := &driver{ctx: ctx, conn: conn, table: pgx.Identifier{*schema, VersionTable}.Sanitize()}
	if _, err := conn.Exec(ctx, "create table if not exists "+d.table+" (version bigint not null primary key, dirty boolean not null)"); err != nil {
		return nil, fmt.Errorf("tenantmigrate: make table %s: %w", d.table, err)
	}
	return d, nil
}

func (d *driver) Version() (version int, dirty bool, err error) {
	err = d.conn.QueryRow(d.ctx, "select version, dirty from "+d.table+" limit 1", pgx.QueryExecModeExec).Scan(&version, &dirty)
	if errors.Is(err, pgx.ErrNoRows) {
		return database.NilVersion, false, nil
	}
	return version, dirty, err
}

// SetVersion keeps an error for Run where that comes next: golang-migrate would not read the file then, and what
// is to be read would wait for ever.
func (d *driver) SetVersion(version int, dirty bool) error {
	if d.failed == nil {
		d.failed = d.set(version, dirty)
	}
	if dirty {
		return nil
	}
	return d.failed
}

func (d *driver) set(version int, dirty bool) error {
	sql := "delete from " + d.table
	if version >= 0 || dirty {
		sql += fmt.Sprintf("; insert into %s values (%d, %v)", d.table, version, dirty)
	}
	_, err := d.conn.Exec(d.ctx, sql) // one transaction
	return err
}

func (d *driver) Run(file io.Reader) error {
	sql, err := io.ReadAll(file)
	if err = errors.Join(d.failed, err); err != nil {
		return err
	}
	_, err = d.conn.Exec(d.ctx, string(sql))
	return err
}

func (d *driver) Lock() error   { return nil } // the run has one for the tenant
func (d *driver) Unlock() error { return nil }
func (d *driver) Close() error  { return nil } // the connection is the run's

func (d *driver) Open(string) (database.Driver, error) {
	return nil, errors.New("tenantmigrate: a tenant's connection is given, not opened")
}

func (d *driver) Drop() error {
	return errors.New("tenantmigrate: a tenant's objects are not dropped this way; TenantDB.Deprovision does that")
}
