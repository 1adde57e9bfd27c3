package pgxtenant

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

var badIDs = []string{
	"", strings.Repeat("a", 129), "a'b", `a"b`, "a\x00b", "a\nb", "*", "a:b", "../a", "_a", "-a", ".a", " a", "a ", "a b",
	"é", "a\u0301", "а", "$user", "a,b", "a;b", "a%b", "a/b", "a\\b", "{a}", "[a]", "a\r\nb", "\xff", "a\u200bb", "a\u202eb",
}

func TestValidateID(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"a", "A", "0", "acme", "a_b.c-d", strings.Repeat("a", 128), "550e8400-e29b-41d4-a716-446655440000"} {
		require.NoError(t, ValidateID(id), id)
	}
	for _, id := range badIDs {
		require.ErrorIs(t, ValidateID(id), ErrInvalidTenantID, "%q", id)
	}
}

func TestSchemaNameIsInjective(t *testing.T) {
	t.Parallel()
	require.Equal(t, "tenant_acme", SchemaName("acme"))
	require.Equal(t, "tenant_550e8400-e29b-41d4-a716-446655440000", SchemaName("550e8400-e29b-41d4-a716-446655440000"))
	// Every valid ID of up to four characters of a mean alphabet.
	const alphabet = "abA0-_."
	seen := map[string]string{}
	var walk func(id string)
	walk = func(id string) {
		if ValidateID(id) == nil {
			name := SchemaName(id)
			require.NotContains(t, seen, name)
			require.LessOrEqual(t, len(name), 63)
			require.Equal(t, strings.ToLower(name), name, "a name without quotes would be folded")
			require.NoError(t, validSchema(name))
			seen[name] = id
		}
		if len(id) < 4 {
			for _, c := range alphabet {
				walk(id + string(c))
			}
		}
	}
	walk("")
	require.Greater(t, len(seen), 1000)
}

// FuzzSchemaName looks for two IDs that share a schema, and for names the server would cut off.
func FuzzSchemaName(f *testing.F) {
	f.Add("a-b", "a_b")
	f.Add("Acme", "acme")
	f.Add("_"+strings.Repeat("0", 52), strings.Repeat("x", 128))
	f.Add(strings.Repeat("x", 56), strings.Repeat("x", 57))
	f.Fuzz(func(t *testing.T, a, b string) {
		if ValidateID(a) != nil || ValidateID(b) != nil {
			return
		}
		if (SchemaName(a) == SchemaName(b)) != (a == b) {
			t.Fatalf("%q and %q are in %q and %q", a, b, SchemaName(a), SchemaName(b))
		}
		if n := SchemaName(a); len(n) > 63 || validSchema(n) != nil {
			t.Fatalf("%q is in %q", a, n)
		}
	})
}

func TestContext(t *testing.T) {
	t.Parallel()
	type key struct{}
	base := context.WithValue(context.Background(), key{}, "v")
	_, ok := FromContext(base)
	require.False(t, ok)

	ctx := WithTenant(base, Tenant{ID: "a", Plan: "pro"})
	got, ok := FromContext(ctx)
	require.True(t, ok)
	require.Equal(t, Tenant{ID: "a", Plan: "pro"}, got)
	require.Equal(t, "v", ctx.Value(key{}))

	inner, cancel := context.WithTimeout(WithTenantID(ctx, "b"), time.Hour)
	got, ok = FromContext(inner)
	require.True(t, ok)
	require.Equal(t, Tenant{ID: "b"}, got, "the innermost tenant counts")
	_, ok = FromContext(WithoutTenant(inner))
	require.False(t, ok)

	detached := Detach(inner)
	cancel()
	require.Error(t, inner.Err())
	require.NoError(t, detached.Err())
	_, ok = detached.Deadline()
	require.False(t, ok)
	require.Nil(t, detached.Value(key{}))
	got, ok = FromContext(detached)
	require.True(t, ok)
	require.Equal(t, "b", got.ID)
	_, ok = FromContext(Detach(base))
	require.False(t, ok)
	require.Equal(t, kindWithout, carried(Detach(WithoutTenant(ctx))).kind)

	child, cancel := context.WithCancel(ctx)
	cancel()
	require.Error(t, child.Err())
	require.NoError(t, ctx.Err())
}

func TestTenantsThatCannotBeBound(t *testing.T) {
	t.Parallel()
	b, err := newBinder(binderOptions{})
	require.NoError(t, err)
	for name, tn := range map[string]Tenant{
		"schema of a row tenant":          {ID: "a", Schema: "s"},
		"connection of a row tenant":      {ID: "a", ConnString: "postgres://u:secret@h/d"},
		"no connection":                   {ID: "a", Isolation: IsolationDatabase},
		"schema of a database tenant":     {ID: "a", Isolation: IsolationDatabase, ConnString: "x", Schema: "s"},
		"unknown isolation":               {ID: "a", Isolation: 9},
		"shared schema":                   {ID: "a", Isolation: IsolationSchema, Schema: "public"},
		"$user":                           {ID: "a", Isolation: IsolationSchema, Schema: "$user"},
		"pg_temp":                         {ID: "a", Isolation: IsolationSchema, Schema: "pg_temp"},
		"PG_toast":                        {ID: "a", Isolation: IsolationSchema, Schema: "PG_toast"},
		"information_schema":              {ID: "a", Isolation: IsolationSchema, Schema: "information_schema"},
		"schema of 64 bytes":              {ID: "a", Isolation: IsolationSchema, Schema: strings.Repeat("s", 64)},
		"schema with NUL":                 {ID: "a", Isolation: IsolationSchema, Schema: "a\x00b"},
		"the tenant setting":              {ID: "a", Settings: map[string]string{"APP.current_tenant_id": "b"}},
		"the search path":                 {ID: "a", Settings: map[string]string{"Search_Path": "b"}},
		"a setting name with a quote":     {ID: "a", Settings: map[string]string{"app.x'": "b"}},
		"a setting name of three parts":   {ID: "a", Settings: map[string]string{"a.b.c": "b"}},
		"an empty setting name":           {ID: "a", Settings: map[string]string{"": "b"}},
		"a setting value with NUL":        {ID: "a", Settings: map[string]string{"app.x": "a\x00b"}},
		"a setting value that is no text": {ID: "a", Settings: map[string]string{"app.x": "\xff"}},
	} {
		_, err := b.bind(nil, &tn)
		require.ErrorIs(t, err, ErrInvalidTenant, name)
		require.NotContains(t, err.Error(), "secret", name)
	}
	for _, setting := range []string{"tenant", "app.", ".x", "app.x.y", "app.x y", "app.x'", "1app.x", strings.Repeat("a", 60) + ".abc", "app.x\x00"} {
		_, err := newBinder(binderOptions{setting: setting})
		require.ErrorContains(t, err, "prefix.name", setting)
		config, err := pgxpool.ParseConfig("")
		require.NoError(t, err)
		require.Error(t, Bind(config, setting))
	}
	require.Error(t, Bind(nil, ""))
	require.Error(t, Bind(&pgxpool.Config{}, ""))
}

func TestErrorsNameTheTenant(t *testing.T) {
	t.Parallel()
	err := error(&TenantError{Tenant: "acme", Op: "acquire", Err: ErrTenantSuspended})
	require.EqualError(t, err, `tenant "acme": acquire: pgxtenant: tenant suspended`)
	require.True(t, errors.Is(err, ErrTenantSuspended))
}
