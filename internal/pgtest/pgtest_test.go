package pgtest

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

func scan[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) (value T) {
	t.Helper()
	require.NoError(t, conn.QueryRow(t.Context(), sql, args...).Scan(&value))
	return value
}

func requireCode(t *testing.T, code string, err error) {
	t.Helper()
	var pgErr *pgconn.PgError
	require.ErrorAs(t, err, &pgErr)
	require.Equal(t, code, pgErr.Code, pgErr.Message)
}

func TestAppRoleHasNoPrivileges(t *testing.T) {
	t.Parallel()
	db := New(t)
	conn := db.Connect(db.AppURL())
	for _, attribute := range []string{"rolsuper", "rolbypassrls", "rolcreatedb", "rolcreaterole", "rolreplication"} {
		require.False(t, scan[bool](t, conn, "select "+attribute+" from pg_roles where rolname = current_user"), attribute)
	}
	require.Zero(t, scan[int](t, conn, "select count(*) from pg_auth_members where member = current_user::regrole"))
	for _, sql := range []string{"create table public.x ()", "create schema x", "create role x"} {
		_, err := conn.Exec(t.Context(), sql)
		requireCode(t, "42501", err)
	}
}

func TestOwnerIsNoSuperuserAndMayCreate(t *testing.T) {
	t.Parallel()
	db := New(t)
	conn := db.Connect(db.OwnerURL())
	require.False(t, scan[bool](t, conn, "select rolsuper or rolbypassrls from pg_roles where rolname = current_user"))
	db.Exec("create table x (); create table y ()", "create schema z")
	require.Equal(t, db.Owner, scan[string](t, conn, "select tableowner from pg_tables where tablename = 'y'"))
}

func TestRLSTableHoldsTenantsApart(t *testing.T) {
	t.Parallel()
	db := New(t)
	db.Exec("create schema s; grant usage on schema s to " + db.App)
	for _, table := range []string{"note", "s.note"} {
		db.RLSTable(table)
		db.SuperExec("insert into " + table + " values ('a', 1, 'of a'), ('b', 1, 'of b')")
		for _, url := range []string{db.AppURL(), db.OwnerURL()} {
			conn := db.Connect(url)
			count := func() int { return scan[int](t, conn, "select count(*) from "+table) }
			require.Zero(t, count(), "setting missing")
			_, err := conn.Exec(t.Context(), "insert into "+table+" (id, body) values (2, 'nobody')")
			require.Error(t, err)
			_, err = conn.Exec(t.Context(), "select set_config('app.current_tenant_id', 'a', false)")
			require.NoError(t, err)
			require.Equal(t, "of a", scan[string](t, conn, "select string_agg(body, ',') from "+table))
			_, err = conn.Exec(t.Context(), "insert into "+table+" values ('b', 3, 'stolen')")
			requireCode(t, "42501", err)
			_, err = conn.Exec(t.Context(), "select set_config('app.current_tenant_id', '', false)")
			require.NoError(t, err)
			require.Zero(t, count(), "setting empty")
		}
	}
}

func TestDatabaseCarriesItsOwnSetting(t *testing.T) {
	t.Parallel()
	db := New(t)
	other := db.Database("app.current_tenant_id=o'acme")
	require.NotEqual(t, db.Name, other.Name)
	conn := other.Connect(other.AppURL())
	require.Equal(t, "o'acme", scan[string](t, conn, "select current_setting('app.current_tenant_id')"))
	require.Equal(t, other.Name, scan[string](t, conn, "select current_database()"))
	require.Equal(t, db.App, scan[string](t, conn, "select current_user"))
	other.RLSTable("note")
}

func TestNothingIsLeftAfterTheTest(t *testing.T) {
	t.Parallel()
	var names, roles []string
	var url string
	t.Run("test", func(t *testing.T) {
		db := New(t)
		other := db.Database()
		names, roles, url = []string{db.Name, other.Name}, []string{db.App, db.Owner}, db.Server().URL()
		db.RLSTable("note")
		// A connection that the test forgot is no hindrance.
		conn, err := pgx.Connect(context.Background(), db.AppURL())
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
	})
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer conn.Close(t.Context())
	require.Zero(t, scan[int](t, conn, "select count(*) from pg_database where datname = any($1)", names))
	require.Zero(t, scan[int](t, conn, "select count(*) from pg_roles where rolname = any($1)", roles))
}

func TestServerSpeaksTLSWithItsCertificate(t *testing.T) {
	t.Parallel()
	db := New(t)
	if db.Server().CertFile() == "" {
		t.Log("the server of " + EnvDatabase + " has a certificate of its own")
		return
	}
	conn := db.Connect(db.AppURL("sslmode=verify-full", "sslrootcert="+db.Server().CertFile()))
	require.True(t, scan[bool](t, conn, "select ssl from pg_stat_ssl where pid = pg_backend_pid()"))
	conn = db.Connect(db.AppURL())
	require.False(t, scan[bool](t, conn, "select ssl from pg_stat_ssl where pid = pg_backend_pid()"))
}

func TestServerCountsStatements(t *testing.T) {
	t.Parallel()
	db := New(t)
	db.Exec("select 1 as before")
	db.TrackStatements()
	db.Exec("select 1 as after")
	conn := db.Connect(db.SuperURL())
	const calls = "select coalesce(sum(calls), 0)::int from pg_stat_statements where query like $1 and dbid = (select oid from pg_database where datname = current_database())"
	require.Equal(t, 1, scan[int](t, conn, calls, "%as after"))
	if os.Getenv(EnvDatabase) == "" {
		require.Zero(t, scan[int](t, conn, calls, "%as before"), "nobody has asked for it")
	}
}

func TestParamsTakeThePlaceOfDefaults(t *testing.T) {
	t.Parallel()
	db := New(t)
	conn := db.Connect(db.AppURL("application_name=a b", "statement_timeout=1234"))
	require.Equal(t, "a b", scan[string](t, conn, "select current_setting('application_name')"))
	require.Equal(t, "1234ms", scan[string](t, conn, "select current_setting('statement_timeout')"))
}

func TestServerOfOneTest(t *testing.T) {
	t.Parallel()
	s := NewServer(t)
	db := s.New(t)
	db.Exec("create table x (n int); insert into x values (1)")
	_, err := pgx.Connect(t.Context(), db.url(db.App, "wrong", nil))
	requireCode(t, "28P01", err)
	addr := s.Addr()
	rows := 1
	for name, stop := range map[string]func() error{"Stop": s.Stop, "Kill": s.Kill} {
		conn := db.Connect(db.OwnerURL())
		db.Exec("insert into x values (1)") // committed a moment before: it must be there afterwards
		rows++
		require.NoError(t, stop(), name)
		require.NoError(t, stop(), "%s twice", name)
		require.Error(t, conn.Ping(t.Context()))
		_, err := pgx.Connect(t.Context(), db.OwnerURL())
		require.Error(t, err)
		require.NoError(t, s.Start(), name)
		require.NoError(t, s.Start(), "Start twice")
		conn = db.Connect(db.OwnerURL())
		require.Equal(t, rows, scan[int](t, conn, "select count(*) from x"), name)
	}
	require.NoError(t, s.Restart())
	require.Equal(t, addr, s.Addr())
	db.Exec("insert into x values (2)")
	require.NoError(t, s.Stop()) // dropping the database after the test must not fail for it
}

func TestServerOutsideATest(t *testing.T) {
	t.Parallel()
	s, err := Start(t.Context())
	require.NoError(t, err)
	db, err := s.Create(t.Context())
	require.NoError(t, err)
	db.Exec("create table x ()")
	require.Panics(t, func() { db.Exec("create table x ()") })
	require.NoError(t, s.Close())
	require.NoError(t, s.Close(), "twice")
	if os.Getenv(EnvDatabase) == "" {
		require.Error(t, s.Start())
	}
}

func TestStartObeysItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Start(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

func TestExternalServer(t *testing.T) {
	s := NewServer(t)
	t.Setenv(EnvDatabase, s.URL())
	external, err := Start(t.Context())
	require.NoError(t, err)
	db := external.New(t)
	db.RLSTable("note")
	require.Error(t, external.Stop())
	require.NoError(t, external.Close())
	db = s.New(t)
	db.Exec("select 1") // still there

	// A role that may create databases and roles, and nothing else, is enough.
	require.NoError(t, execute(t.Context(), s.URL(), "create role maker login createdb createrole password 'x'"))
	maker := s.url
	maker.User = nil
	t.Setenv("PGUSER", "maker")
	t.Setenv("PGPASSWORD", "x")
	t.Setenv(EnvDatabase, maker.String())
	external, err = Start(t.Context())
	require.NoError(t, err)
	external.New(t).RLSTable("note")

	for _, bad := range []string{"host=127.0.0.1 password=secret", "postgres://x:secret@127.0.0.1:1/x", "://secret"} {
		t.Setenv(EnvDatabase, bad)
		_, err = Start(t.Context())
		require.ErrorContains(t, err, EnvDatabase)
		require.NotContains(t, err.Error(), "secret")
	}
}

func TestContainerFailureIsToldWithItsCause(t *testing.T) {
	t.Setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
	t.Setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
	s := new(Server)
	err := s.startContainer(t.Context())
	require.ErrorContains(t, err, "pgtest: container: error: ")
	t.Log(err)
	_, err = os.Stat(s.cert)
	require.ErrorIs(t, err, os.ErrNotExist, "its folder is removed")
}

func TestPgBouncerPoolsByTransaction(t *testing.T) {
	t.Parallel()
	db := New(t)
	via := PgBouncer(t, db)
	require.NotEqual(t, db.AppURL(), via.AppURL())
	exec := func(conn *pgx.Conn, sql string) {
		_, err := conn.Exec(t.Context(), sql)
		require.NoError(t, err)
	}
	backends := map[int]bool{}
	for range 5 {
		conn := via.Connect(via.AppURL("default_query_exec_mode=simple_protocol"))
		backends[scan[int](t, conn, "select pg_backend_pid()")] = true
		// Whoever holds a transaction holds a server connection.
		exec(conn, "begin")
		backends[scan[int](t, conn, "select pg_backend_pid()")] = true
		exec(conn, "commit")
	}
	require.LessOrEqual(t, len(backends), 2)

	session := PgBouncer(t, db, "pool_mode=session", "default_pool_size=5")
	conn := session.Connect(session.OwnerURL())
	require.Equal(t, db.Owner, scan[string](t, conn, "select current_user"))
	// Above, a prepared statement would be on one of two server connections.
	session.Exec("select 1")
}

func TestPgBouncerTellsWhyItDidNotStart(t *testing.T) {
	t.Parallel()
	db := New(t)
	program, err := findPgBouncer()
	require.NoError(t, err)
	sup, err := supervise("KILL")
	require.NoError(t, err)
	_, err = startPgBouncer(sup, program, db, []string{"pool_mode=nonsense"})
	require.ErrorContains(t, err, "pool_mode")
	require.NoError(t, sup.close())
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	const patience = 2 * time.Minute
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
