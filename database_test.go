package pgxtenant

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// uniqueID keeps tests apart, for databases are the whole server's.
func uniqueID(d *pgtest.DB, id string) string {
	return id + "-" + strings.TrimPrefix(d.Name, "pgxtenant_")
}

// parameterGrants are made one at a time: the server fails two at once for one parameter.
var parameterGrants sync.Mutex

// databasesAdmin is a server on which the owner's role may do what a DatabaseManager needs.
func databasesAdmin(t *testing.T, settings ...string) (*pgtest.DB, *pgxpool.Pool) {
	t.Helper()
	d := pgtest.New(t)
	owner := ident(d.Owner)
	parameters := strings.Join(append(settings, DefaultSetting), ", ")
	grant := func(conn *pgx.Conn, sql string) {
		parameterGrants.Lock()
		defer parameterGrants.Unlock()
		_, err := conn.Exec(context.Background(), sql)
		require.NoError(t, err)
	}
	d.SuperExec("alter role "+owner+" createdb", "grant pg_signal_backend to "+owner)
	grant(d.Connect(d.SuperURL()), "grant set on parameter "+parameters+" to "+owner)
	t.Cleanup(func() {
		super := d.Connect(d.SuperURL())
		ctx := context.Background()
		names := strs(t, super, ctx, "select datname from pg_database where datdba = (select oid from pg_roles where rolname = $1) and datname <> $2", d.Owner, d.Name)
		for _, name := range names {
			_, err := super.Exec(ctx, "drop database "+ident(name)+" with (force)")
			require.NoError(t, err)
		}
		grant(super, "revoke set on parameter "+parameters+" from "+owner)
	})
	pool, err := pgxpool.New(context.Background(), d.OwnerURL("pool_max_conns=4"))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return d, pool
}

func databases(t *testing.T, pool *pgxpool.Pool, o DatabaseOptions) *DatabaseManager {
	t.Helper()
	m, err := NewDatabaseManager(pool, o)
	require.NoError(t, err)
	return m
}

// urlOf is one of d's URLs for another database of the same server.
func urlOf(t *testing.T, d *pgtest.DB, user func(...string) string, name string) string {
	config, err := pgx.ParseConfig(user())
	require.NoError(t, err)
	require.Equal(t, d.Name, config.Database)
	i := strings.LastIndex(user(), d.Name)
	return user()[:i] + name + user()[i+len(d.Name):]
}

func TestAProvisionedDatabaseIsTheTenantsAlone(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	m := databases(t, admin, DatabaseOptions{
		AppRole: d.App, ConnLimit: 7,
		Setup: func(ctx context.Context, conn *pgx.Conn, tenantID string) error {
			_, err := conn.Exec(ctx, "create table note (body text); grant select, insert on note to "+ident(d.App))
			return err
		},
	})
	a, b := uniqueID(d, "a"), uniqueID(d, "b")
	for _, id := range []string{a, b, a} {
		require.NoError(t, m.Provision(ctx, id))
		there, err := m.Exists(ctx, id)
		require.NoError(t, err)
		require.True(t, there)
	}
	list, err := m.List(ctx)
	require.NoError(t, err)
	require.Subset(t, list, []TenantDatabase{{Name: DatabaseName(a), TenantID: a}, {Name: DatabaseName(b), TenantID: b}})

	// The core accepts it, also when a database must say whose it is, and for nobody else.
	dir := newDirectory(
		Tenant{ID: a, Isolation: IsolationDatabase, ConnString: urlOf(t, d, d.AppURL, DatabaseName(a))},
		Tenant{ID: b, Isolation: IsolationDatabase, ConnString: urlOf(t, d, d.AppURL, DatabaseName(a))})
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir; c.RequireIdentity = true })
	_, err = db.Exec(WithTenantID(ctx, a), "insert into note values ('hers')")
	require.NoError(t, err)
	require.ErrorIs(t, db.Ping(WithTenantID(ctx, b)), ErrWrongTenant)

	// Each connection carries the mark, through RESET; other roles may not connect.
	inside := d.Connect(urlOf(t, d, d.AppURL, DatabaseName(a)))
	_, err = inside.Exec(ctx, "set app.current_tenant_id = 'x'; reset all")
	require.NoError(t, err)
	require.Equal(t, []string{a}, strs(t, inside, ctx, readTenant))
	_, err = inside.Exec(ctx, "create temporary table t ()")
	require.Equal(t, "42501", pgCode(err))
	require.Equal(t, []string{"7"}, strs(t, admin, ctx, "select datconnlimit::text from pg_database where datname = $1", DatabaseName(a)))
	other := pgtest.New(t)
	_, err = pgx.Connect(ctx, urlOf(t, other, other.AppURL, DatabaseName(a)))
	require.Equal(t, "42501", pgCode(err))
}

func TestADatabaseFromATemplate(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	template := d.Database()
	d.SuperExec("alter database " + ident(template.Name) + " is_template true") // an owner needs CREATEDB besides
	t.Cleanup(func() { d.SuperExec("alter database " + ident(template.Name) + " is_template false") })
	template.Exec("create table plan (name text); insert into plan values ('free'); grant select on plan to " + ident(d.App))
	m := databases(t, admin, DatabaseOptions{Template: template.Name, AppRole: d.App})
	// Several at once, from one template.
	var wg sync.WaitGroup
	for _, id := range []string{"a", "b", "c", "a", "b", "c"} {
		wg.Go(func() {
			if err := m.Provision(ctx, uniqueID(d, id)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, id := range []string{"a", "b", "c"} {
		inside := d.Connect(urlOf(t, d, d.AppURL, DatabaseName(uniqueID(d, id))))
		require.Equal(t, []string{"free"}, strs(t, inside, ctx, "select name from plan"))
	}

	template.Connect(template.AppURL())
	err := m.Provision(ctx, uniqueID(d, "d"))
	require.ErrorContains(t, err, "allow_connections false")
	require.ErrorContains(t, err, uniqueID(d, "d"))
}

// Whatever step a call dies at, no database of the tenant's name is there, and the next call completes it.
func TestProvisioningADatabaseIsWholeOrNot(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	id := uniqueID(d, "a")
	failing := errors.New("the script is wrong")
	fail := true
	cancelled, cancel := context.WithCancel(ctx)
	setup := func(ctx context.Context, conn *pgx.Conn, tenantID string) error {
		_, err := conn.Exec(ctx, "create table note ()")
		if err == nil && fail {
			err = failing
		}
		return err
	}
	m := databases(t, admin, DatabaseOptions{AppRole: d.App, Setup: setup})
	err := m.Provision(ctx, id)
	require.ErrorIs(t, err, failing)
	require.ErrorContains(t, err, id)
	require.Empty(t, strs(t, admin, ctx, "select datname from pg_database where datdba = current_user::regrole and datname <> current_database()"))

	// Killed: the process is gone in the middle, without a chance to clean up.
	killed := databases(t, admin, DatabaseOptions{Setup: func(context.Context, *pgx.Conn, string) error {
		cancel()
		return cancelled.Err()
	}})
	require.ErrorIs(t, killed.Provision(cancelled, id), context.Canceled)
	require.Equal(t, []string{passingName(DatabaseName(id))}, strs(t, admin, ctx, "select datname from pg_database where datdba = current_user::regrole and datname <> current_database()"))
	there, err := m.Exists(ctx, id)
	require.NoError(t, err)
	require.False(t, there)
	list, err := m.List(ctx)
	require.NoError(t, err)
	for _, found := range list {
		require.NotEqual(t, id, found.TenantID)
	}

	// The server ends the session that does it.
	lost := databases(t, admin, DatabaseOptions{Setup: func(ctx context.Context, _ *pgx.Conn, _ string) error {
		super := d.Connect(d.SuperURL())
		_, err := super.Exec(ctx, "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", d.Owner)
		return err
	}})
	require.Error(t, lost.Provision(ctx, id))

	fail = false
	require.NoError(t, m.Provision(ctx, id))
	require.Equal(t, []string{DatabaseName(id)}, strs(t, admin, ctx, "select datname from pg_database where datdba = current_user::regrole and datname <> current_database()"))
	require.Empty(t, strs(t, d.Connect(inDatabaseOf(t, d, id)), ctx, "select 'x' from note"))
}

func inDatabaseOf(t *testing.T, d *pgtest.DB, id string) string {
	return urlOf(t, d, d.OwnerURL, DatabaseName(id))
}

func TestADatabaseThatIsNotTheTenantsIsLeftAlone(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	m := databases(t, admin, DatabaseOptions{Grace: -1})
	unmarked, others := uniqueID(d, "unmarked"), uniqueID(d, "others")
	for _, sql := range []string{
		"create database " + ident(DatabaseName(unmarked)),
		"create database " + ident(DatabaseName(others)),
		"alter database " + ident(DatabaseName(others)) + " set app.current_tenant_id = 'somebody'",
	} {
		_, err := admin.Exec(ctx, sql)
		require.NoError(t, err)
	}
	for _, id := range []string{unmarked, others} {
		_, exists := m.Exists(ctx, id)
		for op, err := range map[string]error{
			"provision": m.Provision(ctx, id), "drop": m.Drop(ctx, id), "retire": m.Retire(ctx, id), "exists": exists,
		} {
			require.ErrorIs(t, err, ErrWrongTenant, op)
			require.ErrorContains(t, err, DatabaseName(id), op)
		}
		require.Len(t, strs(t, admin, ctx, "select datname from pg_database where datname = $1 and datallowconn", DatabaseName(id)), 1)
	}
}

func TestADatabaseIsDroppedFromUnderItsConnections(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	id := uniqueID(d, "a")
	drop := func(m *DatabaseManager) error { return m.Drop(ctx, id) }
	retire := func(m *DatabaseManager) error { return m.Retire(ctx, id) }
	closed := func() bool {
		late, err := pgx.Connect(ctx, urlOf(t, d, d.AppURL, DatabaseName(id)))
		if err == nil {
			_ = late.Close(ctx)
		}
		return pgCode(err) == "55000"
	}
	for _, remove := range []func(*DatabaseManager) error{drop, retire} {
		patient := databases(t, admin, DatabaseOptions{AppRole: d.App, Grace: time.Hour})
		require.NoError(t, patient.Provision(ctx, id))
		conn, err := pgx.Connect(ctx, urlOf(t, d, d.AppURL, DatabaseName(id)))
		require.NoError(t, err)

		// A patient call waits for the connection, and lets no new one in.
		gone := make(chan error, 1)
		go func() { gone <- remove(patient) }()
		eventually(t, "no new connection is let in", closed)
		require.NoError(t, conn.Ping(ctx))
		require.Empty(t, gone)
		require.NoError(t, conn.Close(ctx))
		require.NoError(t, <-gone)

		// An impatient one ends it.
		hasty := databases(t, admin, DatabaseOptions{AppRole: d.App, Grace: -1})
		require.NoError(t, hasty.Provision(ctx, id))
		conn, err = pgx.Connect(ctx, urlOf(t, d, d.AppURL, DatabaseName(id)))
		require.NoError(t, err)
		require.NoError(t, remove(hasty))
		require.Error(t, conn.Ping(ctx))
		require.NoError(t, remove(hasty), "nothing is left to remove")
		there, err := hasty.Exists(ctx, id)
		require.NoError(t, err)
		require.False(t, there)
	}

	// One that is interrupted while it waits leaves the database closed, for the next call.
	m := databases(t, admin, DatabaseOptions{AppRole: d.App, Grace: time.Hour})
	require.NoError(t, m.Provision(ctx, id))
	conn := d.Connect(urlOf(t, d, d.AppURL, DatabaseName(id)))
	short, cancel := context.WithCancel(ctx)
	defer cancel()
	interrupted := make(chan error, 1)
	go func() { interrupted <- m.Drop(short, id) }()
	eventually(t, "it waits", closed)
	cancel()
	require.ErrorIs(t, <-interrupted, context.Canceled)
	require.NoError(t, conn.Ping(ctx))
	require.ErrorContains(t, m.Provision(ctx, id), "takes no connections")
	require.NoError(t, conn.Close(ctx))
	require.NoError(t, m.Drop(ctx, id))
}

func TestARetiredDatabaseComesBackOrIsPurged(t *testing.T) {
	t.Parallel()
	const setting = "app.purged_tenant" // Purge is the whole server's, and other tests retire databases too
	d, admin := databasesAdmin(t, setting)
	ctx := context.Background()
	m := databases(t, admin, DatabaseOptions{AppRole: d.App, Grace: -1, Setting: setting})
	id := uniqueID(d, "a")
	require.ErrorContains(t, m.Restore(ctx, id), "no retired database")
	require.NoError(t, m.Provision(ctx, id))
	owner := d.Connect(inDatabaseOf(t, d, id))
	_, err := owner.Exec(ctx, "create table kept ()")
	require.NoError(t, err)
	require.ErrorContains(t, m.Restore(ctx, id), "already")

	require.NoError(t, m.Retire(ctx, id))
	require.NoError(t, m.Provision(ctx, id)) // the ID is free again
	require.ErrorContains(t, m.Restore(ctx, id), "already")
	require.NoError(t, m.Drop(ctx, id))
	require.NoError(t, m.Restore(ctx, id))
	require.Empty(t, strs(t, d.Connect(inDatabaseOf(t, d, id)), ctx, "select 'x' from kept"))

	require.NoError(t, m.Retire(ctx, id))
	dropped, err := m.Purge(ctx, time.Hour)
	require.NoError(t, err)
	require.Empty(t, dropped)
	list, err := m.List(ctx)
	require.NoError(t, err)
	var retired []TenantDatabase
	for _, found := range list {
		if found.TenantID == id {
			retired = append(retired, found)
		}
	}
	require.Len(t, retired, 1)
	require.WithinDuration(t, time.Now(), retired[0].Retired, patience)

	dropped, err = m.Purge(ctx, 0)
	require.NoError(t, err)
	require.Equal(t, retired, dropped)
	require.Empty(t, strs(t, admin, ctx, "select datname from pg_database where datdba = current_user::regrole and datname <> current_database()"))
}

func TestDatabasesBadInput(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	m := databases(t, admin, DatabaseOptions{})
	for _, id := range []string{"", "a b", "a'b", strings.Repeat("a", 129), "a\x00b"} {
		_, exists := m.Exists(ctx, id)
		for _, err := range []error{m.Provision(ctx, id), m.Drop(ctx, id), m.Retire(ctx, id), m.Restore(ctx, id), exists} {
			require.ErrorIs(t, err, ErrInvalidTenantID)
		}
	}
	require.ErrorContains(t, m.provision(ctx, "a", strings.Repeat("x", 64)), "64 bytes, more than the server keeps (63)")
	require.ErrorContains(t, m.provision(ctx, "a", "a\x00"), "NUL")

	_, err := NewDatabaseManager(nil, DatabaseOptions{})
	require.ErrorIs(t, err, ErrNoAdmin)
	_, err = NewDatabaseManager(admin, DatabaseOptions{ConnLimit: -1, Setting: "bad", Template: strings.Repeat("x", 64)})
	require.ErrorContains(t, err, "ConnLimit is -1")
	require.ErrorContains(t, err, `"bad"`)
	require.ErrorContains(t, err, "Template")
	require.ErrorContains(t, databases(t, admin, DatabaseOptions{Template: "no such"}).Provision(ctx, uniqueID(d, "a")), `Template "no such" is not there`)

	// A role without a right is told which one it lacks.
	id := uniqueID(d, "a")
	super := d.Connect(d.SuperURL())
	for _, right := range []struct{ take, give, want string }{
		{"alter role ROLE nocreatedb", "alter role ROLE createdb", "createdb"},
		{"revoke set on parameter app.current_tenant_id from ROLE", "grant set on parameter app.current_tenant_id to ROLE", "grant set on parameter app.current_tenant_id to "},
	} {
		sql := strings.NewReplacer("ROLE", ident(d.Owner))
		_, err := super.Exec(ctx, sql.Replace(right.take))
		require.NoError(t, err)
		err = m.Provision(ctx, id)
		require.ErrorContains(t, err, sql.Replace(right.want))
		require.Equal(t, "42501", pgCode(err))
		_, err = super.Exec(ctx, sql.Replace(right.give))
		require.NoError(t, err)
	}
	require.NoError(t, m.Provision(ctx, id))
	inside := d.Connect(urlOf(t, d, d.SuperURL, DatabaseName(id)))
	_, err = super.Exec(ctx, "revoke pg_signal_backend from "+ident(d.Owner))
	require.NoError(t, err)
	hasty := databases(t, admin, DatabaseOptions{Grace: -1})
	require.Equal(t, "42501", pgCode(hasty.Drop(ctx, id)))
	require.NoError(t, inside.Ping(ctx))

	closed, err := pgxpool.New(ctx, d.OwnerURL())
	require.NoError(t, err)
	closed.Close()
	require.Error(t, databases(t, closed, DatabaseOptions{}).Provision(ctx, id))
	var pgErr *pgconn.ConnectError
	dead, err := pgxpool.New(ctx, "postgres://user:hidden@127.0.0.1:1/x")
	require.NoError(t, err)
	t.Cleanup(dead.Close)
	err = databases(t, dead, DatabaseOptions{}).Provision(ctx, id)
	require.ErrorAs(t, err, &pgErr)
	require.NotContains(t, err.Error(), "hidden")
}

// Autovacuum may be at work in a database when it is dropped, and no role but a superuser may end it.
func TestADatabaseUnderAutovacuumIsDropped(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.NewServer(t).New(t)
	d.SuperExec("alter role "+ident(d.Owner)+" createdb", "grant pg_signal_backend to "+ident(d.Owner),
		"grant set on parameter "+DefaultSetting+" to "+ident(d.Owner),
		"alter system set autovacuum_naptime = '1s'", "alter system set autovacuum_vacuum_cost_delay = '100ms'",
		"alter system set autovacuum_vacuum_cost_limit = 1", "select pg_reload_conf()")
	t.Cleanup(func() { d.SuperExec("revoke set on parameter " + DefaultSetting + " from " + ident(d.Owner)) })
	admin, err := pgxpool.New(ctx, d.OwnerURL("pool_max_conns=4"))
	require.NoError(t, err)
	t.Cleanup(admin.Close)
	m := databases(t, admin, DatabaseOptions{Grace: -1, Setup: func(ctx context.Context, conn *pgx.Conn, _ string) error {
		_, err := conn.Exec(ctx, "create table note as select i, repeat('x', 1000) body from generate_series(1, 20000) i; delete from note")
		return err
	}})
	require.NoError(t, m.Provision(ctx, "a"))
	super := d.Connect(d.SuperURL())
	eventually(t, "autovacuum is at it", func() bool {
		return count(t, super, ctx, "select count(*) from pg_stat_activity where datname = $1 and backend_type = 'autovacuum worker'", DatabaseName("a")) > 0
	})
	require.NoError(t, m.Drop(ctx, "a"))
	require.Empty(t, strs(t, super, ctx, "select datname from pg_database where datname = $1", DatabaseName("a")))
}
