package pgxtenant

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestWithDatabaseLeadsToAnother(t *testing.T) {
	t.Parallel()
	for _, connString := range []string{
		"postgres://u:p%40%2F@h:1234/x?sslmode=disable&pool_max_conns=3",
		"postgresql://u:p%40%2F@h:1234?dbname=x&sslmode=disable&pool_max_conns=3",
		"host=h port=1234 user=u password='p@/' dbname=x sslmode=disable pool_max_conns=3",
		"host=h port=1234 user=u password=p@/ sslmode=disable pool_max_conns=3",
	} {
		for _, name := range []string{"tenant_a", "a b", `it's "\ %2F/?#`, "dbname"} {
			got, err := withDatabase(connString, name)
			require.NoError(t, err)
			config, err := pgxpool.ParseConfig(got)
			require.NoError(t, err, got)
			require.Equal(t, name, config.ConnConfig.Database, got)
			require.Equal(t, "u p@/ h", config.ConnConfig.User+" "+config.ConnConfig.Password+" "+config.ConnConfig.Host)
			require.EqualValues(t, 3, config.MaxConns)
		}
	}
}

func TestDatabasesOfAConfiguredServer(t *testing.T) {
	t.Parallel()
	d, admin := databasesAdmin(t)
	ctx := context.Background()
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.Servers = map[string]DatabaseServer{"eu": {Admin: admin.Config(), ConnString: d.AppURL()}}
	})
	m, err := db.Databases("eu")
	require.NoError(t, err)
	id := uniqueID(d, "a")
	require.NoError(t, m.Provision(ctx, id))
	connString, err := withDatabase(d.AppURL(), DatabaseName(id))
	require.NoError(t, err)
	require.Equal(t, []string{id}, strs(t, db, WithTenant(ctx, Tenant{ID: id, Isolation: IsolationDatabase, ConnString: connString}), readTenant))

	_, err = db.Databases("us")
	require.ErrorContains(t, err, `no server "us", only ["eu"]`)
	db.Close()
	_, err = db.Databases("eu")
	require.ErrorIs(t, err, ErrClosed)
	require.Error(t, m.Provision(ctx, id))
}

func TestABadServerIsRefused(t *testing.T) {
	t.Parallel()
	config, err := ParseConfig(pgtest.New(t).AppURL())
	require.NoError(t, err)
	config.Servers = map[string]DatabaseServer{
		"a": {ConnString: "postgres://u:hidden@h:port/x"},
		"b": {Admin: config.Shared, DatabaseOptions: DatabaseOptions{ConnLimit: -1}},
	}
	_, err = NewWithConfig(context.Background(), config)
	require.ErrorContains(t, err, `Config.Servers["a"].Admin must come from pgxpool.ParseConfig`)
	require.ErrorContains(t, err, `Config.Servers["a"].ConnString: `)
	require.ErrorContains(t, err, `Config.Servers["b"].ConnString is empty`)
	require.ErrorContains(t, err, `Config.Servers["b"].ConnLimit is -1`)
	require.NotContains(t, err.Error(), "hidden")
}
