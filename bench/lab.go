package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Sizes of the data that the jobs work on.
const (
	tenants       = 100     // in turn, unless a job says otherwise
	rowsPerTenant = 1_000   // of table note
	manyTenants   = 100_000 // of table note_many, one row each
	copiedRows    = 100_000
	schemas       = tenants // each with a table note
)

// poolConns is the size of every pool, but where a job says otherwise.
const poolConns = 8

// Lab is a throw-away server with a database for the jobs. It may be used by one job at a time.
type Lab struct {
	Server   *pgtest.Server
	db       *pgtest.DB
	bypass   string // role that no policy holds, and its password
	password string
	proxy    *pgtest.Proxy
	filled   bool

	filledPolicies, filledTemplate bool
}

// Open starts a server and makes a database on it. The tables are filled when a job needs them.
func Open(ctx context.Context) (*Lab, error) {
	server, err := pgtest.Start(ctx)
	if err != nil {
		return nil, err
	}
	l := &Lab{Server: server}
	if err := l.prepare(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Close stops the server and removes its folder. On a server that is not the Lab's own it removes the
// database and the roles.
func (l *Lab) Close() error {
	if l.proxy != nil {
		l.proxy.Close()
	}
	var err error
	if l.db != nil && !ownServer() {
		statements := []string{"drop database if exists " + ident(l.db.Name) + " with (force)",
			"drop role if exists " + ident(l.db.Owner), "drop role if exists " + ident(l.db.App), "drop role if exists " + ident(l.bypass)}
		for _, f := range policyForms {
			statements = append(statements, "drop role if exists "+ident(l.policyRole(f.name)))
		}
		err = execute(context.Background(), l.Server.URL(), statements...)
	}
	return errors.Join(err, l.Server.Close())
}

func ownServer() bool { return os.Getenv(pgtest.EnvDatabase) == "" }

func (l *Lab) prepare(ctx context.Context) (err error) {
	if ownServer() {
		if err := execute(ctx, l.Server.URL(),
			"alter system set shared_buffers = '512MB'", "alter system set max_connections = 500"); err != nil {
			return err
		}
		if err := l.Server.Restart(); err != nil {
			return err
		}
	}
	if l.db, err = l.Server.Create(ctx); err != nil {
		return err
	}
	if l.proxy, err = pgtest.StartProxy(l.Server.Addr()); err != nil {
		return err
	}
	l.proxy.SetDelay(time.Millisecond / 2) // each way
	l.bypass, l.password = l.db.App+"_bypass", "bench"
	return execute(ctx, l.db.SuperURL(), "create role "+ident(l.bypass)+" login bypassrls password 'bench'")
}

// fill makes the tables. All jobs share them.
func (l *Lab) fill(ctx context.Context) error {
	if l.filled {
		return nil
	}
	l.filled = true
	for _, table := range []string{"note", "note_many", "copy_bound"} {
		l.db.RLSTable(table)
	}
	app, bypass := ident(l.db.App), ident(l.bypass)
	statements := []string{
		fmt.Sprintf(`insert into note select 't' || lpad(t::text, 6, '0'), i, repeat(md5(t::text || i), 3)
			from generate_series(0, %d) t, generate_series(0, %d) i`, tenants-1, rowsPerTenant-1),
		fmt.Sprintf(`insert into note_many select 't' || lpad(t::text, 6, '0'), 0, repeat(md5(t::text), 3)
			from generate_series(0, %d) t`, manyTenants-1),
		"create table copy_plain (like copy_bound including all)",
	}
	if err := l.fillSealed(ctx); err != nil {
		return err
	}
	for i := range schemas {
		schema := ident(pgxtenant.SchemaName(tenantID(i)))
		statements = append(statements, fmt.Sprintf(`create schema %[1]s;
			create table %[1]s.note (id bigint primary key, body text);
			insert into %[1]s.note select id, body from note where tenant_id = '%[2]s';
			grant usage on schema %[1]s to %[3]s, %[4]s;
			grant select on %[1]s.note to %[3]s, %[4]s`, schema, tenantID(i), app, bypass))
	}
	statements = append(statements,
		"insert into note_sealed select * from note",
		"grant select, insert, update, delete, truncate on note, note_many, copy_bound, copy_plain to "+app+", "+bypass,
		"vacuum analyze")
	return execute(ctx, l.db.SuperURL(), statements...)
}

// seal signs the tenants of note_sealed.
var seal = pgxtenant.SealConfig{Key: []byte("a key that is no secret to anybody")}

// fillSealed makes note_sealed, which is note under a policy of sealed tenants.
func (l *Lab) fillSealed(ctx context.Context) error {
	l.db.Exec("create table note_sealed (like note including all)")
	admin, err := pgxpool.ParseConfig(l.db.OwnerURL())
	if err != nil {
		return err
	}
	db, err := tenantDB(ctx, l.db.AppURL(), func(c *pgxtenant.Config) { c.Admin, c.Seal = admin, &seal })
	if err != nil {
		return err
	}
	defer db.Close()
	if err := db.InstallSeal(ctx); err != nil {
		return err
	}
	return db.EnableRLS(ctx, pgxtenant.Tables("note_sealed")...)
}

// Version is the server's, as it prints it.
func (l *Lab) Version(ctx context.Context) (string, error) {
	conn, err := pgx.Connect(ctx, l.Server.URL())
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	var version string
	err = conn.QueryRow(ctx, "select current_setting('server_version') || ', shared_buffers ' || current_setting('shared_buffers')").Scan(&version)
	return version, err
}

// place is a way to reach the database: directly, or through the delaying proxy.
type place struct{ app, bypass string }

func (l *Lab) near() place { return l.place(l.db) }
func (l *Lab) far() place  { return l.place(l.db.Via(l.proxy.Addr())) }

func (l *Lab) place(db *pgtest.DB) place {
	conns := fmt.Sprintf("pool_max_conns=%d", poolConns)
	app := db.AppURL(conns)
	bypass := strings.Replace(app, "//"+l.db.App+":", "//"+l.bypass+":", 1)
	_, rest, _ := strings.Cut(bypass, "@")
	return place{app: app, bypass: "postgres://" + l.bypass + ":" + l.password + "@" + rest}
}

func execute(ctx context.Context, url string, statements ...string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("%w\n%s", err, statement)
		}
	}
	return nil
}

func ident(name string) string { return pgx.Identifier{name}.Sanitize() }

func tenantID(i int) string { return fmt.Sprintf("t%06d", i) }

// pool opens a pool of pgxpool alone. adjust may be nil.
func pool(ctx context.Context, url string, adjust func(*pgxpool.Config)) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	if adjust != nil {
		adjust(config)
	}
	return pgxpool.NewWithConfig(ctx, config)
}

// tenantDB opens a TenantDB. adjust may be nil.
func tenantDB(ctx context.Context, url string, adjust func(*pgxtenant.Config)) (*pgxtenant.TenantDB, error) {
	config, err := pgxtenant.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	if adjust != nil {
		adjust(config)
	}
	return pgxtenant.NewWithConfig(ctx, config)
}

// contexts returns n contexts, each with a tenant made by f.
func contexts(ctx context.Context, n int, f func(i int) pgxtenant.Tenant) []context.Context {
	all := make([]context.Context, n)
	for i := range all {
		all[i] = pgxtenant.WithTenant(ctx, f(i))
	}
	return all
}

// contextsByID returns n contexts, each with a tenant's ID alone.
func contextsByID(ctx context.Context, n int) []context.Context {
	all := make([]context.Context, n)
	for i := range all {
		all[i] = pgxtenant.WithTenantID(ctx, tenantID(i))
	}
	return all
}

func rowTenant(i int) pgxtenant.Tenant { return pgxtenant.Tenant{ID: tenantID(i)} }

// spread makes successive reads hit rows far from each other.
func spread(n, rows int) int { return int(uint64(n) * 7919 % uint64(rows)) }

// noLimit stands for an allocation count that nothing is asked of.
var noLimit = math.Inf(1)
