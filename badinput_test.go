package pgxtenant

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Each bad input is a clear error at once, from every method, and nothing is sent to the server. What has a
// test elsewhere: no tenant (TestEveryMethodWantsATenant), use after Close (TestUseAfterClose), a cancelled
// context (TestACancelledContext), a bad Config (TestBadConfig).
func TestBadTenants(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	d.SuperExec("insert into note values ('acme', 1, 'secret'), ('*', 1, 'secret'), ('', 1, 'secret')")
	proxy := pgtest.NewProxy(t, d.Server().Addr())
	dir := newDirectory(Tenant{ID: "acme"}, Tenant{ID: "asleep", Status: StatusSuspended})
	db := openDB(t, d.Via(proxy.Addr()).AppURL(), func(c *Config) { c.Directory = dir })
	require.NoError(t, db.Ping(as("acme")))
	before := proxy.Stats()

	type testCase struct {
		name string
		ctx  context.Context
		want error
		says []string
	}
	var cases []testCase
	for name, id := range map[string]string{
		"empty": "", "too long": strings.Repeat("a", MaxIDLen+1), "much too long": strings.Repeat("a", 1<<20), "quote": "a'b", "double quote": `a"b`,
		"NUL": "a\x00b", "newline": "a\nb", "star": "*", "colon": "a:b", "dots and slash": "../a", "space": " acme", "case": "acmE\u0301",
		"injection": "acme'; drop table note; --", "not UTF-8": "a\xff",
	} {
		cases = append(cases,
			testCase{name, WithTenant(context.Background(), Tenant{ID: id}), ErrInvalidTenantID, nil},
			testCase{name + " by ID", WithTenantID(context.Background(), id), ErrInvalidTenantID, nil},
			testCase{name + " of a schema", WithTenant(context.Background(), Tenant{ID: id, Isolation: IsolationSchema}), ErrInvalidTenantID, nil},
			testCase{name + " of a database", isolated(id, d.Via(proxy.Addr()).AppURL()), ErrInvalidTenantID, nil})
	}
	tenant := func(t Tenant) context.Context { return WithTenant(context.Background(), t) }
	cases = append(cases,
		testCase{"unknown", WithTenantID(context.Background(), "nobody"), ErrTenantNotFound, []string{`"nobody"`, "look up"}},
		testCase{"suspended", tenant(Tenant{ID: "a", Status: StatusSuspended}), ErrTenantSuspended, []string{`"a"`}},
		testCase{"suspended by ID", WithTenantID(context.Background(), "asleep"), ErrTenantSuspended, []string{`"asleep"`}},
		testCase{"suspended of a database", tenant(Tenant{ID: "a", Status: StatusSuspended, Isolation: IsolationDatabase, ConnString: "host=x"}), ErrTenantSuspended, nil},
		testCase{"unknown status", tenant(Tenant{ID: "a", Status: 9}), ErrInvalidTenant, []string{"Status(9)"}},
		testCase{"unknown isolation", tenant(Tenant{ID: "a", Isolation: 9}), ErrInvalidTenant, []string{"Isolation(9)"}},
		testCase{"database without a string", tenant(Tenant{ID: "a", Isolation: IsolationDatabase}), ErrInvalidTenant, []string{"ConnString"}},
		testCase{"row with a string", tenant(Tenant{ID: "a", ConnString: "password=hush"}), ErrInvalidTenant, []string{"ConnString"}},
		testCase{"row with a schema", tenant(Tenant{ID: "a", Schema: "s"}), ErrInvalidTenant, []string{"Schema"}},
		testCase{"shared schema", tenant(Tenant{ID: "a", Isolation: IsolationSchema, Schema: "public"}), ErrInvalidTenant, nil},
		testCase{"system schema", tenant(Tenant{ID: "a", Isolation: IsolationSchema, Schema: "pg_catalog"}), ErrInvalidTenant, nil},
		testCase{"schema $user", tenant(Tenant{ID: "a", Isolation: IsolationSchema, Schema: "$user"}), ErrInvalidTenant, nil},
		testCase{"setting name", tenant(Tenant{ID: "a", Settings: map[string]string{"a b": "x"}}), ErrInvalidTenant, nil},
		testCase{"setting of the tenant", tenant(Tenant{ID: "a", Settings: map[string]string{DefaultSetting: "b"}}), ErrInvalidTenant, nil},
		testCase{"setting search_path", tenant(Tenant{ID: "a", Settings: map[string]string{"Search_Path": "b"}}), ErrInvalidTenant, nil},
		testCase{"setting with NUL", tenant(Tenant{ID: "a", Settings: map[string]string{"app.x": "a\x00"}}), ErrInvalidTenant, nil},
	)
	for _, c := range cases {
		expectAll(t, db, c.ctx, c.want)
		_, err := db.Query(c.ctx, "select body from note")
		var te *TenantError
		require.ErrorAs(t, err, &te, c.name)
		require.Less(t, len(err.Error()), 600, "%s: an ID is cut to a sane length", c.name)
		for _, r := range err.Error() {
			require.False(t, r < ' ' && r != '\n' || r == 0xfffd, "%s: %q", c.name, err.Error())
		}
		require.NotContains(t, err.Error(), "hush")
		for _, s := range c.says {
			require.ErrorContains(t, err, s, c.name)
		}
	}
	require.Equal(t, before, proxy.Stats(), "nothing was sent for any of them")
	require.Empty(t, db.Stat().Pools())
	require.Equal(t, []string{"secret"}, strs(t, db, as("acme"), "select body from note"), "and all is well for others")
	require.Equal(t, 1, count(t, db.Shared(), as("acme"), "select count(*) from note"))
}

// A schema that is not there fails each statement; names do not fall through to a shared schema.
func TestAMissingSchema(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	d.SuperExec("insert into note values ('acme', 1, 'of public')")
	db := openDB(t, d.AppURL("pool_max_conns=1"))
	ctx := WithTenant(context.Background(), Tenant{ID: "acme", Isolation: IsolationSchema})
	for range 3 {
		rows, err := db.Query(ctx, "select body from note")
		if err == nil {
			require.False(t, rows.Next())
			err = rows.Err()
		}
		require.Equal(t, "3F000", pgCode(err), "%v", err)
		require.ErrorContains(t, err, "tenant_acme")
		_, err = db.Exec(ctx, "delete from note")
		require.Equal(t, "3F000", pgCode(err), "%v", err)
		require.Equal(t, []string{"of public"}, strs(t, db, as("acme"), "select body from note"))
	}
}

func TestAWrongDatabase(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL(), func(c *Config) { c.OpenRetry, c.OpenTimeout = -1, patience })
	for _, c := range []struct{ name, url, code, says string }{
		{"unreachable", d.Via(nobody).AppURL(), "", "connection refused"},
		{"no such database", d.AppURL("dbname=nope"), "3D000", "nope"},
		{"no such role", d.AppURL("user=nope"), "28", "nope"},
		{"not a string", "this is not one", "", "invalid connection string"},
		{"a parameter of ours", d.AppURL("tenant_max_conns=1"), "", `parameter "tenant_max_conns" has no meaning`},
	} {
		ctx := isolated("acme", c.url)
		var err error
		ends(t, c.name, func() { err = db.Ping(ctx) })
		require.ErrorContains(t, err, `tenant "acme": open pool`)
		require.ErrorContains(t, err, c.says)
		require.True(t, strings.HasPrefix(pgCode(err), c.code), "%v", err)
	}
	eventually(t, "nothing stays", func() bool { return len(db.Stat().Pools()) == 0 })

	unreachable := openDB(t, d.Via(nobody).AppURL())
	err := unreachable.Ping(as("acme"))
	require.ErrorContains(t, err, `tenant "acme": acquire`)
	require.ErrorContains(t, err, "connection refused")
}
