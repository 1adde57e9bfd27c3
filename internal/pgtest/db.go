package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// DB is a database of one test, with two roles of its own. Its methods are safe
// for concurrent use; those that can fail end the test when they do.
type DB struct {
	Name  string // the database
	Owner string // role that owns the database and its tables; no superuser
	App   string // role that a service would use: owns nothing, creates nothing, is under every policy

	server   *Server
	password string   // of both roles
	addr     string   // host and port in URLs
	t        reporter // ends the test
}

// reporter is the part of testing.TB that a DB needs.
type reporter interface {
	Helper()
	Fatal(args ...any)
	Cleanup(func())
}

// New makes a database on the process's server, and drops it and its roles after the test.
func New(t testing.TB) *DB {
	t.Helper()
	s, err := shared.get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.New(t)
}

// New makes a database on this server, and drops it and its roles after the test.
func (s *Server) New(t testing.TB) *DB {
	t.Helper()
	db, err := s.create(t.Context(), t)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// Create makes a database outside of a test. It stays until the server is closed;
// its methods that would end a test panic instead.
func (s *Server) Create(ctx context.Context) (*DB, error) {
	return s.create(ctx, panics{})
}

// AppURL connects to the database as the application's role. Each param is of the
// form key=value, as in a connection string's query, and takes the place of the
// default of that key; the only default is sslmode=disable.
func (db *DB) AppURL(params ...string) string { return db.url(db.App, db.password, params) }

// OwnerURL connects to the database as the tables' owner.
func (db *DB) OwnerURL(params ...string) string { return db.url(db.Owner, db.password, params) }

// SuperURL connects to the database as the server's superuser.
func (db *DB) SuperURL(params ...string) string {
	user := db.server.url.User
	password, _ := user.Password()
	return db.url(user.Username(), password, params)
}

// Server is the server that the database is on.
func (db *DB) Server() *Server { return db.server }

// Via is the same database reached at another address, such as a Proxy's.
func (db *DB) Via(addr string) *DB {
	via := *db
	via.addr = addr
	return &via
}

// Exec runs statements as the tables' owner, each text on its own and all on one
// connection.
func (db *DB) Exec(sql ...string) {
	db.t.Helper()
	db.must(execute(context.Background(), db.OwnerURL(), sql...))
}

// SuperExec runs statements as the superuser, whom no policy holds.
func (db *DB) SuperExec(sql ...string) {
	db.t.Helper()
	db.must(execute(context.Background(), db.SuperURL(), sql...))
}

// Connect opens a connection that is closed after the test.
func (db *DB) Connect(url string) *pgx.Conn {
	db.t.Helper()
	conn, err := pgx.Connect(context.Background(), url)
	db.must(err)
	db.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// Database makes a further database of the same roles, as a tenant of its own
// would have. Each setting is of the form name=value and becomes the database's
// own default (ALTER DATABASE … SET).
func (db *DB) Database(settings ...string) *DB {
	db.t.Helper()
	other := *db
	other.Name = newName()
	db.must(other.createDatabase(context.Background(), settings))
	db.t.Cleanup(func() { db.must(db.server.drop("drop database if exists " + quote(other.Name) + " with (force)")) })
	return &other
}

// RLSTable makes the table that the tests share by custom: rows of tenant_id, id
// and body, held apart by a policy on app.current_tenant_id that the owner is under
// too, and open to the application's role. The name may carry a schema.
func (db *DB) RLSTable(name string) {
	db.t.Helper()
	table := pgx.Identifier(strings.Split(name, ".")).Sanitize()
	db.Exec(strings.NewReplacer("TABLE", table, "APP", quote(db.App)).Replace(`
		create table TABLE (
			tenant_id text not null default current_setting('app.current_tenant_id', true),
			id bigint,
			body text,
			primary key (tenant_id, id)
		);
		alter table TABLE enable row level security;
		alter table TABLE force row level security;
		create policy tenant on TABLE
			using (tenant_id = (select nullif(current_setting('app.current_tenant_id', true), '')))
			with check (tenant_id = (select nullif(current_setting('app.current_tenant_id', true), '')));
		grant select, insert, update, delete on TABLE to APP`))
}

// TrackStatements makes the extension pg_stat_statements, which from now on counts what new connections to the
// database send.
func (db *DB) TrackStatements() {
	db.t.Helper()
	db.SuperExec("create extension pg_stat_statements", "alter database "+quote(db.Name)+" set pg_stat_statements.track = 'top'")
}

func (db *DB) url(user, password string, params []string) string {
	u := db.server.url
	u.User = url.UserPassword(user, password)
	u.Path = "/" + db.Name
	if db.addr != "" {
		u.Host = db.addr
	}
	return withParams(u, params)
}

func (db *DB) must(err error) {
	db.t.Helper()
	if err != nil {
		db.t.Fatal(err)
	}
}

func (s *Server) create(ctx context.Context, t reporter) (*DB, error) {
	name := newName()
	db := &DB{Name: name, Owner: name + "_owner", App: name + "_app", server: s, password: randomHex(8), t: t}
	t.Cleanup(func() {
		db.t.Helper()
		db.must(s.drop("drop database if exists "+quote(db.Name)+" with (force)",
			"drop role if exists "+quote(db.Owner), "drop role if exists "+quote(db.App)))
	})
	hash, err := verifier(db.password)
	if err != nil {
		return nil, err
	}
	role := " login nosuperuser nobypassrls nocreatedb nocreaterole password '" + hash + "'"
	if err := db.createDatabase(ctx, nil,
		"create role "+quote(db.Owner)+role,
		"create role "+quote(db.App)+role,
		// A role that is no superuser may give a database only to a role that it is a member of.
		"grant "+quote(db.Owner)+" to current_user"); err != nil {
		return nil, err
	}
	return db, nil
}

// createDatabase makes the database db.Name of db's roles, after the statements in first.
func (db *DB) createDatabase(ctx context.Context, settings []string, first ...string) error {
	// Nothing but the server's defaults is in template0, whatever others do to template1.
	statements := append(first, "create database "+quote(db.Name)+" owner "+quote(db.Owner)+" template template0")
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		statements = append(statements, fmt.Sprintf("alter database %s set %s = '%s'", quote(db.Name),
			pgx.Identifier(strings.Split(name, ".")).Sanitize(), strings.ReplaceAll(value, "'", "''")))
	}
	if err := execute(ctx, db.server.URL(), statements...); err != nil {
		return err
	}
	if db.server.version >= 150000 {
		return nil // in public every role may use what is there, and only the database's owner creates
	}
	direct := *db
	direct.addr = ""
	return execute(ctx, direct.SuperURL(),
		"revoke create on schema public from public",
		"grant create on schema public to "+quote(db.Owner))
}

// drop runs statements that clean up after a test. A server that the test left
// stopped is about to be removed with all that is on it.
func (s *Server) drop(statements ...string) error {
	if !s.isRunning() {
		return nil
	}
	return execute(context.Background(), s.URL(), statements...)
}

// execute runs each statement on its own, on one new connection: a test may have
// ended or blocked any that was kept.
func execute(ctx context.Context, url string, statements ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*startTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		// The simple protocol allows many statements in one text.
		if _, err := conn.Exec(ctx, statement, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("pgtest: %w\n%s", err, statement)
		}
	}
	return nil
}

// newName is unique among all processes that share a server.
func newName() string { return "pgxtenant_" + randomHex(6) }

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

// panics stands in for a test where there is none.
type panics struct{}

func (panics) Helper()           {}
func (panics) Fatal(args ...any) { panic(errors.New(fmt.Sprint(args...))) }
func (panics) Cleanup(func())    {}
