package cli

import (
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestInitMakesAllThatIsMissing(t *testing.T) {
	t.Parallel()
	s := newShop(t)
	// A role that is not there yet, and one that may make it.
	role := s.App + "_new"
	u, err := url.Parse(s.AppURL())
	require.NoError(t, err)
	password, _ := u.User.Password()
	u.User = url.UserPassword(role, password)
	t.Cleanup(func() { s.SuperExec("drop owned by "+role, "drop role "+role) })
	s.env = append(s.env, "PGXTENANT_DATABASE="+u.String(), "PGXTENANT_TEMPLATE=the template", "PGXTENANT_SEAL_KEY="+strings.Repeat("c", 64))
	s.run("init").fails(exitFailed, "the role "+role+" is not there, and that of --admin may not make it; as a superuser, create role \""+role+"\" login")
	s.SuperExec("alter role " + s.Owner + " createrole")
	s.run("init", "--dry-run").fails(exitFailed, "cannot be planned without the role")

	out := s.ok("init")
	require.Contains(t, out, "Made role "+role)
	require.Contains(t, out, "Made schema the template")
	s.Connect(u.String()) // by its password
	s.SuperExec("revoke usage on schema \"the template\" from " + role)
	require.Contains(t, s.ok("init"), "Role "+role+" may use schema the template.")
	again := s.ok("init")
	require.NotContains(t, again, "Made")
	require.Equal(t, "The registry is in schema pgxtenant.\nThe seal's key is in schema pgxtenant.\n", again)
	require.NotContains(t, s.ok("init", "--dry-run"), "create")
	require.NotContains(t, s.ok("init", "--dry-run"), "grant usage on schema \"the template\"")
}

// A schema that the service's role may not use serves nobody, which is said when it is made.
func TestCreateTellsOfASchemaWithoutUsage(t *testing.T) {
	t.Parallel()
	s := installed(t)
	r := s.run("tenant", "create", "acme", "--isolation", "schema")
	require.Zero(t, r.code)
	require.Empty(t, r.err)
	s.Exec("drop schema tenant_acme cascade")
	require.Contains(t, s.ok("tenant", "create", "acme", "--isolation", "schema"), "is there already, and active, with all that it needs")
	s.Exec("select from tenant_acme.note") // made anew
	s.Exec("revoke usage on schema template from " + s.App)
	r = s.run("tenant", "create", "initech", "--isolation", "schema")
	require.Zero(t, r.code)
	require.Contains(t, r.err, "Role "+s.App+" may not use it, since it may not use the template: grant usage on schema \"tenant_initech\" to ")
}

func TestAPlanOfInitMakesTheRole(t *testing.T) {
	t.Parallel()
	s := newShop(t)
	s.env = append(s.env, "PGXTENANT_DATABASE=postgres://nobody_yet@127.0.0.1/d", "PGXTENANT_TEMPLATE=template")
	plan := s.ok("init", "--dry-run")
	require.True(t, strings.HasPrefix(plan, `create role "nobody_yet" login; -- and its password`), plan)
	require.True(t, strings.HasSuffix(plan, "create schema \"template\";\ngrant usage on schema \"template\" to \"nobody_yet\";\n"), plan)
	require.Contains(t, plan, "create table pgxtenant.tenant (")
}
