package pgxtenant

import (
	"context"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Whatever is going on in a database, it is dropped or retired, or the error says what holds it and the database
// stays open.
func TestADatabaseIsDroppedFromUnderAnything(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := pgtest.NewServer(t)
	super, err := pgx.Connect(ctx, s.URL())
	require.NoError(t, err)
	for _, sql := range []string{"alter system set max_prepared_transactions = 4", "alter system set wal_level = logical"} {
		_, err := super.Exec(ctx, sql)
		require.NoError(t, err)
	}
	require.NoError(t, super.Close(ctx))
	require.NoError(t, s.Restart())
	d := s.New(t)
	d.SuperExec("alter role "+ident(d.Owner)+" createdb replication", "grant pg_signal_backend to "+ident(d.Owner), "grant set on parameter "+DefaultSetting+" to "+ident(d.Owner))
	t.Cleanup(func() { d.SuperExec("revoke set on parameter " + DefaultSetting + " from " + ident(d.Owner)) })
	pool, err := pgxpool.New(ctx, d.OwnerURL("pool_max_conns=4"))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	m := databases(t, pool, DatabaseOptions{AppRole: d.App, Grace: -1})

	id := uniqueID(d, "a")
	there := func(user func(...string) string) *pgx.Conn { return d.Connect(urlOf(t, d, user, DatabaseName(id))) }
	idle := func() {
		for _, sql := range []string{"begin", "select 1"} {
			_, err := there(d.AppURL).Exec(ctx, sql)
			require.NoError(t, err)
		}
		conn := there(d.AppURL)
		_, err := conn.Exec(ctx, "begin; select pg_advisory_lock(1)")
		require.NoError(t, err)
		waiting, pid := there(d.AppURL), 0
		require.NoError(t, waiting.QueryRow(ctx, "select pg_backend_pid()").Scan(&pid))
		ended := make(chan struct{})
		waits, cancel := context.WithCancel(ctx)
		go func() {
			defer close(ended)
			_, _ = waiting.Exec(waits, "select pg_advisory_lock(1)")
		}()
		t.Cleanup(func() { cancel(); <-ended })
		watch := d.Connect(d.SuperURL())
		eventually(t, "a query runs", func() bool {
			return count(t, watch, ctx, "select count(*) from pg_stat_activity where pid = $1 and wait_event = 'advisory'", pid) == 1
		})
	}
	for _, remove := range []func(context.Context, string) error{m.Retire, m.Drop} {
		require.NoError(t, m.Provision(ctx, id))
		idle()
		_, err := there(d.OwnerURL).Exec(ctx, "select pg_create_logical_replication_slot('s', 'pgoutput')")
		require.NoError(t, err)
		prepared := there(d.OwnerURL)
		_, err = prepared.Exec(ctx, "begin")
		require.NoError(t, err)
		_, err = prepared.Exec(ctx, "prepare transaction 'two ''phase'")
		require.NoError(t, err)
		err = remove(ctx, id)
		require.ErrorContains(t, err, "held by the prepared transaction 'two ''phase'")
		require.ErrorContains(t, err, id)
		_, err = there(d.OwnerURL).Exec(ctx, "rollback prepared 'two ''phase'")
		require.NoError(t, err)

		subscriber := d.Connect(urlOf(t, d, d.SuperURL, DatabaseName(id)))
		_, err = subscriber.Exec(ctx, "create subscription sub connection 'dbname=x' publication p with (connect = false)")
		require.NoError(t, err)
		require.ErrorContains(t, remove(ctx, id), "held by the subscription sub; drop it")
		_, err = subscriber.Exec(ctx, "alter subscription sub set (slot_name = none); drop subscription sub")
		require.NoError(t, err)

		err = remove(ctx, id)
		require.ErrorContains(t, err, "a superuser is connected")
		require.NotContains(t, err.Error(), "pg_signal_backend to")
		require.NoError(t, subscriber.Close(ctx))
		watch := d.Connect(d.SuperURL())
		eventually(t, "the superuser has gone", func() bool {
			return count(t, watch, ctx, "select count(*) from pg_stat_activity where datname = $1 and usesysid = 10", DatabaseName(id)) == 0
		})
		require.NoError(t, remove(ctx, id))
		// A retired one keeps its slot.
		_, err = d.Connect(d.OwnerURL()).Exec(ctx, "select pg_drop_replication_slot(slot_name) from pg_replication_slots")
		require.NoError(t, err)
	}
	_, err = m.Purge(ctx, 0)
	require.NoError(t, err)
}

// Eight processes make and remove the same databases; each is made once.
func TestDatabasesFromManyProcesses(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	made := make(chan string, 100)
	var managers []*DatabaseManager
	for range 8 {
		pool, err := pgxpool.New(ctx, d.OwnerURL("pool_max_conns=1"))
		require.NoError(t, err)
		t.Cleanup(pool.Close)
		managers = append(managers, databases(t, pool, DatabaseOptions{AppRole: d.App, Grace: -1, Setup: func(_ context.Context, _ *pgx.Conn, id string) error {
			made <- id
			return nil
		}}))
	}
	ids := []string{uniqueID(d, "a"), uniqueID(d, "b")}
	all := func(f func(m *DatabaseManager, id string) error) {
		var wg sync.WaitGroup
		for i, m := range managers {
			wg.Go(func() {
				if err := f(m, ids[i%2]); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	all(func(m *DatabaseManager, id string) error { return m.Provision(ctx, id) })
	require.Len(t, made, 2)
	all(func(m *DatabaseManager, id string) error { return m.Retire(ctx, id) })
	require.Equal(t, 2, count(t, admin, ctx, "select count(*) from pg_database where datdba = current_user::regrole and starts_with(datname, 'pgxtenant_old_')"))
}

// One takes back what the others would purge, or it is purged once.
func TestPurgeAndRestoreAtOnce(t *testing.T) {
	t.Parallel()
	const setting = "app.purged_at_once"
	d, admin := databasesAdmin(t, setting)
	ctx := context.Background()
	m := databases(t, admin, DatabaseOptions{Grace: -1, Setting: setting, Template: "template0"})
	id := uniqueID(d, "a")
	for range 3 {
		require.NoError(t, m.Provision(ctx, id))
		require.NoError(t, m.Retire(ctx, id))
		var wg sync.WaitGroup
		var restored error
		var purged [2][]TenantDatabase
		wg.Go(func() { restored = m.Restore(ctx, id) })
		for i := range purged {
			wg.Go(func() {
				var err error
				if purged[i], err = m.Purge(ctx, 0); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		there, err := m.Exists(ctx, id)
		require.NoError(t, err)
		require.Equal(t, there, restored == nil)
		require.Equal(t, there, len(purged[0])+len(purged[1]) == 0)
		if restored != nil {
			require.ErrorContains(t, restored, "no retired database")
		}
		require.NoError(t, m.Drop(ctx, id))
	}
}

// Credentials that come with each connection reach the one that Setup gets too.
func TestSetupConnectsAsThePoolDoes(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	config := admin.Config()
	password := config.ConnConfig.Password
	config.ConnConfig.Password = "out of date"
	config.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		c.Password = password
		return nil
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	id, name := uniqueID(d, "a"), ""
	m := databases(t, pool, DatabaseOptions{Setup: func(ctx context.Context, conn *pgx.Conn, _ string) error {
		return conn.QueryRow(ctx, "select current_database()").Scan(&name)
	}})
	ends(t, "provision", func() { err = m.Provision(ctx, id) })
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(name, passingPrefix), name)
}
