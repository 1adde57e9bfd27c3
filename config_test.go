package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestParseConfig(t *testing.T) {
	t.Parallel()
	c, err := ParseConfig("host=h user=u dbname=d pool_max_conns=7 app.custom=1 tenant_zone.id=x " +
		"tenant_setting=x.y tenant_shared_schemas='ext, common' tenant_strict=true tenant_max_pools=3 tenant_idle_timeout=-1s " +
		"tenant_max_conns=9 tenant_disable_load=true tenant_heavy_share=0.25 tenant_open_timeout=2s tenant_open_retry=-1s tenant_require_identity=1 tenant_require_audit=true")
	require.NoError(t, err)
	require.EqualValues(t, 7, c.Shared.MaxConns)
	require.Equal(t, map[string]string{"app.custom": "1", "tenant_zone.id": "x"}, c.Shared.ConnConfig.RuntimeParams,
		"settings of the user's own go to the server, this package's do not")
	c.Shared = nil
	require.Equal(t, &Config{
		Setting: "x.y", SharedSchemas: []string{"ext", "common"}, Strict: true, MaxPools: 3, IdleTimeout: -time.Second,
		MaxConns: 9, DisableLoad: true, HeavyShare: 0.25, OpenTimeout: 2 * time.Second, OpenRetry: -time.Second, RequireIdentity: true, RequireAudit: true,
	}, c)

	c, err = ParseConfig("postgres://u@h/d?tenant_shared_schemas=&tenant_max_conns=0")
	require.NoError(t, err)
	require.Empty(t, c.SharedSchemas)
	require.NotNil(t, c.SharedSchemas, "none, not the default")

	_, err = ParseConfig("host=h tenant_max_pool=3 tenant_strict=maybe tenant_max_pools=0 tenant_max_conns=-1 tenant_idle_timeout=5 tenant_heavy_share=0 tenant_open_retry=x")
	for _, want := range []string{
		`tenant_max_pool="3" in the connection string: there is no such parameter`, `tenant_strict="maybe"`, `tenant_max_pools="0"`,
		"want 1 or more", `tenant_max_conns="-1"`, "want 0 or more", `tenant_idle_timeout="5"`, `tenant_heavy_share="0"`, `tenant_open_retry="x"`,
	} {
		require.ErrorContains(t, err, want)
	}
	require.NotContains(t, err.Error(), "host=h")
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	given, err := ParseConfig("host=h")
	require.NoError(t, err)
	c := given.withDefaults()
	require.Equal(t, DefaultMaxPools, c.MaxPools)
	require.Equal(t, DefaultIdleTimeout, c.IdleTimeout)
	require.Equal(t, DefaultOpenTimeout, c.OpenTimeout)
	require.Equal(t, DefaultOpenRetry, c.OpenRetry)
	require.Equal(t, DefaultSetting, c.Setting)
	require.Equal(t, DefaultSharedSchemas, c.SharedSchemas)
	require.Equal(t, DefaultHeavyShare, c.HeavyShare)
	require.Zero(t, c.MaxConns)
	require.NotNil(t, c.Logger)
	require.Zero(t, given.MaxPools, "on a copy")
	require.NoError(t, c.validate())
}

// Every bad field is reported, and nothing opened: none of these hosts exists.
func TestBadConfig(t *testing.T) {
	t.Parallel()
	good := func() *pgxpool.Config {
		c, err := pgxpool.ParseConfig("host=no.such.host.invalid")
		require.NoError(t, err)
		return c
	}
	_, err := NewWithConfig(context.Background(), nil)
	require.ErrorContains(t, err, "ParseConfig")

	sized := good()
	sized.MaxConns, sized.HealthCheckPeriod, sized.MinConns = 0, -1, 5
	_, err = NewWithConfig(context.Background(), &Config{
		Shared: sized, Admin: &pgxpool.Config{}, Setting: "nodot", SharedSchemas: []string{"$user"},
		MaxPools: -1, MaxConns: 2, HeavyShare: math.NaN(), OpenTimeout: -1,
	})
	for _, want := range []string{
		"Config.Shared.MaxConns is 0", "Config.Shared.HealthCheckPeriod", "Config.Admin must come from pgxpool.ParseConfig",
		`the tenant setting is "nodot"`, `shared schema "$user"`, "Config.MaxPools is -1", "more connections than Config.MaxConns (2)", "Config.HeavyShare is NaN", "Config.OpenTimeout",
	} {
		require.ErrorContains(t, err, want)
	}
	require.Equal(t, strings.Count(err.Error(), "\n")+1, strings.Count(err.Error(), "pgxtenant: "), "each on a line of its own")
	_, err = NewWithConfig(context.Background(), &Config{Shared: good(), MaxConns: -1})
	require.ErrorContains(t, err, "Config.MaxConns is -1")

	for name, hand := range map[string]*pgxpool.Config{
		"nil":                  nil,
		"empty":                {},
		"hand-made":            {ConnConfig: good().ConnConfig, MaxConns: 1, HealthCheckPeriod: time.Minute},
		"hand-made inside":     with(good(), func(c *pgxpool.Config) { c.ConnConfig = &pgx.ConnConfig{} }),
		"nil inside":           with(good(), func(c *pgxpool.Config) { c.ConnConfig = nil }),
		"hand-made far inside": with(good(), func(c *pgxpool.Config) { c.ConnConfig.Config = (&pgx.ConnConfig{}).Config }),
	} {
		for _, config := range []*Config{{Shared: hand}, {Shared: good(), Admin: hand}} {
			if config.Admin == nil && config.Shared != hand {
				continue // nil is none
			}
			_, err := NewWithConfig(context.Background(), config)
			require.ErrorContains(t, err, "must come from pgxpool.ParseConfig", name)
		}
	}
}

func with(c *pgxpool.Config, f func(*pgxpool.Config)) *pgxpool.Config {
	f(c)
	return c
}

func TestPasswordsNeverAppear(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3tPw"
	check := func(t *testing.T, err error) {
		t.Helper()
		require.Error(t, err)
		for e := err; e != nil; e = errors.Unwrap(e) {
			for _, format := range []string{"%v", "%+v", "%#v", "%q"} {
				require.NotContains(t, fmt.Sprintf(format, e), secret)
			}
		}
	}
	malformed := []string{
		"postgres://user:" + secret + "@host:port/db",
		"postgres://user:a@" + secret + "@host/db",
		"postgres://user:1/" + secret + "@host/db",
		"postgres://user:" + secret + "/x@host/db",
		"postgres://user:" + secret + "%zz@host/db",
		"postgres://user:a@" + secret + "@host:port/db",
		"postgresql://user@host/db?password=" + secret + "&sslmode=nope",
		"postgres://user:" + secret + "@host/db?pool_max_conns=x",
		"postgres//user:" + secret + "@host/db",
		"user=u password=" + secret + " host",
		"user=u password='" + secret + " host=h",
		"user=u password = '" + secret + "' port=x",
		"user=u passwort:" + secret,
		secret,
		"host=h password=" + secret + " sslmode=verify-full sslrootcert=/nonexistent/" + secret,
		"host=h password=" + secret + " pool_max_conns=0",
		"host=h password=" + secret + " connect_timeout=" + secret,
	}
	d := pgtest.New(t)
	db := openDB(t, d.AppURL(), func(c *Config) { c.OpenRetry = -1 })
	for _, s := range malformed {
		_, err := ParseConfig(s)
		require.Error(t, err, s)
		check(t, err)
		err = db.Ping(isolated("a", s))
		require.ErrorContains(t, err, "invalid connection string", "%s", s)
		require.ErrorContains(t, err, `tenant "a": open pool`)
		check(t, err)
	}
	// Well-formed ones that fail to connect.
	u, err := url.Parse(d.AppURL())
	require.NoError(t, err)
	u.User = url.UserPassword(d.App, secret)
	err = db.Ping(isolated("a", u.String()))
	require.Equal(t, "28P01", pgCode(err), "%v", err)
	check(t, err)
	check(t, db.Ping(isolated("a", "postgres://u:"+secret+"@127.0.0.1:1/db?sslmode=disable")))
	check(t, db.Ping(isolated("a", "postgres://u:"+secret+"@127.0.0.1:1/db?tenant_max_conns=3")))
	_, err = New(context.Background(), "postgres://u:"+secret+"@127.0.0.1:1/db?tenant_max_pools=0&tenant_nope=1")
	check(t, err)
}
