package tenantgoose

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/pressly/goose/v3"

	"github.com/pgxtenant/pgxtenant"
)

// Migrator brings tenants to a version. It is safe for concurrent use, in any number of processes.
type Migrator struct {
	db             *pgxtenant.TenantDB
	shared, tenant *folder // nil if there is none; not both
	outOfOrder     bool
	sums           sums
}

// An Option adjusts what New makes.
type Option func(*options)

type options struct {
	inGo, sharedInGo []*goose.Migration
	outOfOrder       bool
	accept           []int64
}

// WithGoMigrations adds migrations in Go to those of the folder tenant, made by goose.NewGoMigration. They run on the tenant's one
// connection: what they query must be closed before the next statement, and one without a transaction must not begin
// two at once. The functions run for several tenants at once.
func WithGoMigrations(migrations ...*goose.Migration) Option {
	return func(o *options) { o.inGo = append(o.inGo, migrations...) }
}

// WithSharedGoMigrations is WithGoMigrations for the folder shared.
func WithSharedGoMigrations(migrations ...*goose.Migration) Option {
	return func(o *options) { o.sharedInGo = append(o.sharedInGo, migrations...) }
}

// WithOutOfOrder lets Up apply what a tenant lacks below the version that it is at, as when branches with a
// migration each are merged. Without it such a tenant fails, as it does in goose.
func WithOutOfOrder() Option {
	return func(o *options) { o.outOfOrder = true }
}

// AcceptEdits says that the files of these versions may differ from what was applied, in both folders, and have the
// same effect, such as after a change of a comment. Their content as it is now is what counts from the next call on that migrates.
func AcceptEdits(versions ...int64) Option {
	return func(o *options) { o.accept = append(o.accept, versions...) }
}

// New reads all migrations, once: later changes of the files have no effect. At least one of the folders shared and tenant must have
// some. Nothing is asked of the database.
//
// It needs Config.Registry and Config.Admin and, for tenants whose schemas are copied from Config.Template, the table
// goose_db_version in Config.TemplateReference: without its rows a new tenant would count as one that nothing was applied to.
func New(db *pgxtenant.TenantDB, migrations fs.FS, list ...Option) (*Migrator, error) {
	if db == nil || migrations == nil {
		return nil, errors.New("tenantgoose: New needs a TenantDB and a file system")
	}
	var o options
	for _, set := range list {
		set(&o)
	}
	m := &Migrator{db: db, outOfOrder: o.outOfOrder, sums: sums{db: db, accept: o.accept}}
	var errs [3]error
	m.shared, errs[0] = readFolder(migrations, sharedFolder, o.sharedInGo)
	m.tenant, errs[1] = readFolder(migrations, tenantFolder, o.inGo)
	c := db.Config()
	switch astray := sqlOutside(migrations); {
	case astray != "":
		errs[2] = fmt.Errorf("tenantgoose: %s is in neither of the folders %s and %s, and would never run", astray, sharedFolder, tenantFolder)
	case c.Registry == nil:
		errs[2] = pgxtenant.ErrNoRegistry
	case c.Admin == nil:
		errs[2] = pgxtenant.ErrNoAdmin
	case m.tenant != nil && c.Template != "" && !slices.Contains(c.TemplateReference, ledgerTable):
		errs[2] = fmt.Errorf("tenantgoose: Config.TemplateReference lacks %q: schemas that are copied from template %q would not know what was applied to it",
			ledgerTable, c.Template)
	}
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	if m.shared == nil && m.tenant == nil {
		return nil, fmt.Errorf("tenantgoose: %w: there is none in the folders %s and %s", goose.ErrNoMigrations, sharedFolder, tenantFolder)
	}
	return m, nil
}

// Migrations returns the migrations of both folders, by version.
func (m *Migrator) Migrations() []Migration {
	var list []Migration
	for _, f := range m.folders() {
		for _, mi := range f.migrations {
			list = append(list, mi.Migration)
		}
	}
	slices.SortStableFunc(list, func(a, b Migration) int { return cmp.Compare(a.Version, b.Version) })
	return list
}

func (m *Migrator) folders() (list []*folder) {
	for _, f := range []*folder{m.shared, m.tenant} {
		if f != nil {
			list = append(list, f)
		}
	}
	return list
}

// folderOf is the one whose migrations a target of a run gets.
func (m *Migrator) folderOf(t pgxtenant.Tenant) *folder {
	if t.Isolation == pgxtenant.IsolationRow {
		return m.shared
	}
	return m.tenant
}

// Up applies what was not applied yet: to the shared schemas, then to the templates, then to the tenants that the options select. The
// options' Versions and Target are the Migrator's own. Report and error are those of [pgxtenant.TenantDB.ForEach].
//
// What fails is rolled back with its version, and the tenant stays at the one before; what it had before that was
// applied is kept. A file that was edited after it had been applied anywhere is ErrEdited, before anything is done.
func (m *Migrator) Up(ctx context.Context, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	return m.upTo(ctx, max(m.shared.newest(), m.tenant.newest()), o)
}

// UpTo is Up for the migrations up to a version, of both folders. A version that no migration has is an error.
func (m *Migrator) UpTo(ctx context.Context, version int64, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	if !m.known(version) {
		return nil, m.unknown(version)
	}
	return m.upTo(ctx, version, o)
}

func (m *Migrator) known(version int64) bool {
	return slices.ContainsFunc(m.folders(), func(f *folder) bool { return f.find(version) != nil })
}

func (m *Migrator) unknown(version int64) error {
	return fmt.Errorf("tenantgoose: no migration has version %d; they are %s", version, versions(m.Migrations()))
}

func (m *Migrator) upTo(ctx context.Context, version int64, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	if err := m.prepare(&o); err != nil {
		return nil, err
	}
	if err := m.sums.check(ctx, m.folders()); err != nil {
		return nil, err
	}
	goal := goal{version: version}
	o.Target, o.Versions = goal.String(), m.versionsOf(goal, nil)
	return m.db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, t pgxtenant.Tenant) error {
		return m.up(ctx, conn, m.folderOf(t), version)
	})
}

// Down takes back the newest migration of the folder tenant where it is applied: it is DownTo the version before.
func (m *Migrator) Down(ctx context.Context, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	f, err := m.prepareDown(&o)
	if err != nil {
		return nil, err
	}
	return m.downTo(ctx, f, f.before(f.newest()), o)
}

// DownTo takes back all migrations above a version, the last one applied first; zero means all. One that has no way
// back, or that no file has, is an error before anything is done for the tenant.
//
// It is about the tenants and their templates, and leaves the shared schemas alone, unless the options' Isolations are IsolationRow and nothing
// else: what tenants have may depend on them, so they go last, by a call of their own, which is about them alone.
func (m *Migrator) DownTo(ctx context.Context, version int64, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	f, err := m.prepareDown(&o)
	if err != nil {
		return nil, err
	}
	if version != 0 && !m.known(version) {
		return nil, m.unknown(version)
	}
	return m.downTo(ctx, f, version, o)
}

func (m *Migrator) downTo(ctx context.Context, f *folder, version int64, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	if err := m.sums.check(ctx, m.folders()); err != nil {
		return nil, err
	}
	goal := goal{version: version, down: true}
	o.Target, o.Versions = goal.String(), m.versionsOf(goal, nil)
	report, err := m.db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, _ pgxtenant.Tenant) error {
		return m.down(ctx, conn, f, version)
	})
	if err == nil && report.Complete && everywhere(&o, f) {
		// What is applied nowhere may be edited.
		err = m.sums.forget(ctx, f, version)
	}
	return report, err
}

// everywhere reports whether the options select all that a folder is for.
func everywhere(o *pgxtenant.ForEachOptions, f *folder) bool {
	all := o.Plans == nil && o.IDs == nil && o.Percent == 0 && o.Select == nil && !o.SkipTemplates
	return all && (f.name == sharedFolder ||
		slices.Contains(o.Isolations, pgxtenant.IsolationSchema) && slices.Contains(o.Isolations, pgxtenant.IsolationDatabase))
}

// Redo takes back the newest migration of the folder tenant and applies it again, while it is being written. A tenant that does not have it
// gets it. Between the two steps, which are two transactions, a tenant is at the version before. The shared schemas are
// treated as by DownTo.
func (m *Migrator) Redo(ctx context.Context, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
	f, err := m.prepareDown(&o)
	if err != nil {
		return nil, err
	}
	newest := f.newest()
	if err := m.sums.check(ctx, m.folders(), newest); err != nil {
		return nil, err
	}
	o.Versions = m.versionsOf(goal{version: newest}, nil)
	return m.db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, _ pgxtenant.Tenant) error {
		if err := m.down(ctx, conn, f, f.before(newest)); err != nil {
			return err
		}
		return m.up(ctx, conn, f, newest)
	})
}

var rowOnly = []pgxtenant.Isolation{pgxtenant.IsolationRow}

// prepare checks options, and leaves out what there are no migrations for.
func (m *Migrator) prepare(o *pgxtenant.ForEachOptions) error {
	if o.Versions != nil || o.Target != "" {
		return errors.New("tenantgoose: ForEachOptions.Versions and Target are the Migrator's own; leave them unset")
	}
	o.SkipShared = o.SkipShared || m.shared == nil
	switch {
	case m.shared == nil && slices.Equal(o.Isolations, rowOnly):
		return noFolder(sharedFolder)
	case m.tenant != nil:
	case o.Isolations == nil:
		o.Isolations = rowOnly
	case !slices.Equal(o.Isolations, rowOnly):
		return noFolder(tenantFolder)
	}
	return nil
}

func noFolder(name string) error {
	return fmt.Errorf("tenantgoose: %w for what is selected: the folder %s has none", goose.ErrNoMigrations, name)
}

// prepareDown is prepare for ways that go back, and returns the folder that they are about.
func (m *Migrator) prepareDown(o *pgxtenant.ForEachOptions) (*folder, error) {
	shared := slices.Equal(o.Isolations, rowOnly) // as given: prepare may make it so
	if err := m.prepare(o); err != nil {
		return nil, err
	}
	if shared {
		return m.shared, nil
	}
	if m.tenant == nil {
		return nil, noFolder(tenantFolder)
	}
	o.SkipShared = true
	if o.Isolations == nil {
		o.Isolations = []pgxtenant.Isolation{pgxtenant.IsolationSchema, pgxtenant.IsolationDatabase}
	}
	return m.tenant, nil
}

// versionsOf returns the ForEachOptions.Versions of a goal. The ledgers go to see too, if it is not nil.
func (m *Migrator) versionsOf(goal goal, see func(tenantID string, l *ledger, f *folder)) func(context.Context, *pgx.Conn, []pgxtenant.Tenant) (map[string]string, error) {
	return func(ctx context.Context, conn *pgx.Conn, tenants []pgxtenant.Tenant) (map[string]string, error) {
		texts, err := m.db.Ledgers(ctx, conn, tenants, ledgerTable, ledgerSQL)
		if err != nil {
			return nil, err
		}
		type known struct {
			ledger  *ledger
			version string
		}
		read := make(map[string]known) // by text: most tenants have the same
		found := make(map[string]string, len(tenants))
		for _, t := range tenants {
			f, text := m.folderOf(t), texts[t.ID]
			k, ok := read[text]
			if !ok {
				l, err := parseLedger(text)
				if err != nil {
					return nil, fmt.Errorf("tenant %q: %w", t.ID, err)
				}
				k = known{&l, goal.describe(&l, f)}
				read[text] = k
				// Whatever applied it, this call, another process or goose itself: from now on its file must stay as it is.
				if see == nil && !goal.down {
					if err := m.sums.record(ctx, f, l.applied); err != nil {
						return nil, err
					}
				}
			}
			found[t.ID] = k.version
			if see != nil {
				see(t.ID, k.ledger, f)
			}
		}
		return found, nil
	}
}

// provide calls f with goose's own migrator for the place of a connection.
func (m *Migrator) provide(conn *pgx.Conn, f *folder, call func(*goose.Provider) error) error {
	db, end := openDB(conn)
	defer end()
	store, err := newStore()
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectCustom, db, f.files, f.providerOptions(goose.WithStore(store), goose.WithAllowOutofOrder(m.outOfOrder))...)
	if err != nil {
		return err
	}
	return call(p)
}

func (m *Migrator) up(ctx context.Context, conn *pgx.Conn, f *folder, version int64) error {
	return m.provide(conn, f, func(p *goose.Provider) error {
		_, err := p.UpTo(ctx, version)
		if err != nil && strings.Contains(err.Error(), "out-of-order") { // goose has no error value for it
			return fmt.Errorf("tenantgoose: %w; WithOutOfOrder applies it", err)
		}
		return f.explain(err, false)
	})
}

// down takes back what is above a version, in the opposite order of how it was applied.
func (m *Migrator) down(ctx context.Context, conn *pgx.Conn, f *folder, version int64) error {
	var there bool
	if err := conn.QueryRow(ctx, "select pg_catalog.to_regclass(pg_catalog.quote_ident(current_schema()) || '."+ledgerTable+"') is not null",
		pgx.QueryExecModeExec).Scan(&there); err != nil || !there {
		return err
	}
	var text *string
	if err := conn.QueryRow(ctx, "select "+ledgerSQL+" from "+ledgerTable, pgx.QueryExecModeExec).Scan(&text); err != nil || text == nil {
		return err
	}
	l, err := parseLedger(*text)
	if err != nil {
		return err
	}
	if err := l.doubtful(); err != nil {
		return err
	}
	slices.Reverse(l.applied)
	l.applied = slices.DeleteFunc(l.applied, func(v int64) bool { return v <= version })
	for _, v := range l.applied {
		switch mi := f.find(v); {
		case mi == nil:
			return fmt.Errorf("tenantgoose: version %d was applied, and no file of folder %s has it; take it back with the files that do", v, f.name)
		case mi.noDown:
			return fmt.Errorf("tenantgoose: %s has no way back: write a +goose Down section, with nothing in it if there is nothing to do", mi.Name)
		}
	}
	return m.provide(conn, f, func(p *goose.Provider) error {
		for _, v := range l.applied {
			if _, err := p.ApplyVersion(ctx, v, false); err != nil {
				return f.explain(err, true)
			}
		}
		return nil
	})
}

// explain says of a failed migration which one it was, and what has become of it.
func (f *folder) explain(err error, down bool) error {
	var partial *goose.PartialError
	if !errors.As(err, &partial) {
		return err
	}
	mi := f.find(partial.Failed.Source.Version)
	if mi == nil {
		return err
	}
	if noTx := !down && mi.noTx || down && mi.downNoTx; !noTx {
		return fmt.Errorf("tenantgoose: %s: %w", mi.Name, partial.Err)
	}
	// Not wrapped: it must not be tried again after a lock timeout, as transactions are.
	return fmt.Errorf("tenantgoose: %s runs outside of a transaction, so what it did before it failed is there, and is not noted in %s; "+
		"remove the remains (CREATE INDEX CONCURRENTLY leaves an INVALID index) and run it again: %v", mi.Name, ledgerTable, partial.Err)
}
