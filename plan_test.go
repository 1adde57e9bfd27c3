package pgxtenant

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// psql runs a plan as an operator would.
func (p *provisioner) psql(plan string) {
	p.t.Helper()
	cmd := exec.Command("psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", "--dbname="+p.d.OwnerURL())
	cmd.Env = append(os.Environ(), "PGOPTIONS=-c client_min_messages=warning",
		"LC_ALL=C", "PGCLIENTENCODING=UTF8") // Debian's psql warns of a locale that the machine lacks
	cmd.Stdin = strings.NewReader(plan)
	out, err := cmd.CombinedOutput()
	require.NoError(p.t, err, "%s\n%s", out, plan)
	require.Empty(p.t, string(out))
}

// everything is what a plan must leave as it was.
func (p *provisioner) everything() []string {
	p.t.Helper()
	return strs(p.t, p.super, context.Background(), `select format('%s %s', xmin, t) from pgxtenant.tenant t union all select a::text from pgxtenant.tenant_alias a
		union all select nspname from pg_namespace where nspname !~ '^pg_(toast_)?temp' union all select format('%s %s %s', oid, relname, relacl) from pg_class
		union all select datname from pg_database where datdba = (select oid from pg_roles where rolname = '`+p.d.Owner+`')
		union all select body from note order by 1`)
}

// A plan changes nothing, and its text does what the call does.
func TestAPlanIsWhatTheCallRuns(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	plan, err := db.PlanInstall(ctx)
	require.NoError(t, err)
	require.Empty(t, strs(t, p.super, ctx, "select nspname from pg_namespace where nspname = 'pgxtenant'"))
	p.psql(plan)
	require.NoError(t, db.Registry().Install(ctx))
	p.d.Exec("create table numbered (id int)") // no tenant here has an ID that it could hold
	require.NoError(t, db.EnableRLS(ctx, RLSTable{Name: "numbered", Type: "bigint"}))
	require.NoError(t, db.Provision(ctx, Tenant{ID: uniqueID(p.d, "called"), Isolation: IsolationSchema}))

	for _, tenant := range p.kinds() {
		before := p.everything()
		plan, err := db.PlanProvision(ctx, tenant, WithAliases(tenant.ID+".example.com"))
		require.NoError(t, err)
		require.Equal(t, before, p.everything())
		_, err = db.Registry().Get(ctx, tenant.ID)
		require.ErrorIs(t, err, ErrTenantNotFound)
		p.psql(plan)
		if tenant.Isolation == IsolationDatabase {
			require.Contains(t, plan, "-- DatabaseOptions.Setup fills database")
			inside := p.d.Connect(inDatabaseOf(t, p.d, tenant.ID))
			require.NoError(t, db.servers["here"].o.Setup(ctx, inside, tenant.ID))
			require.NoError(t, inside.Close(ctx))
		}
		p.works(db, tenant)
		found, err := db.Registry().ByAlias(ctx, tenant.ID+".example.com")
		require.NoError(t, err)
		require.Equal(t, tenant.ID, found.ID)
		require.NoError(t, db.Provision(ctx, tenant))
	}
	kinds := p.kinds()
	require.Equal(t, schemaText(t, p.d, SchemaName(uniqueID(p.d, "called"))), schemaText(t, p.d, SchemaName(kinds[1].ID)))

	_, err = db.Exec(WithTenantID(ctx, kinds[0].ID), "insert into aa_line (id) values (1)")
	require.NoError(t, err)
	for _, tenant := range kinds {
		if tenant.Isolation == IsolationDatabase {
			db.Evict(tenant.ID)
		}
		before := p.everything()
		plan, err := db.PlanDeprovision(ctx, tenant.ID)
		require.NoError(t, err)
		require.Contains(t, plan, "-- here 20ms pass")
		require.Equal(t, before, p.everything())
		p.psql(plan)
		eventually(t, "it is gone", func() bool { return db.Ping(WithTenantID(ctx, tenant.ID)) != nil })
		p.nothingOf(db, tenant.ID)
	}
}

// What fails the call fails its plan; and a plan holds no secret.
func TestAPlanFailsAsTheCallDoes(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	_, err := db.PlanProvision(ctx, Tenant{ID: "a"})
	require.ErrorContains(t, err, "call Registry.Install")
	require.NoError(t, db.Registry().Install(ctx))
	require.NoError(t, db.Provision(ctx, Tenant{ID: "a"}))
	for want, call := range map[string]func() error{
		"exists already":    func() error { _, err := db.PlanProvision(ctx, Tenant{ID: "a", Isolation: IsolationSchema}); return err },
		"not found":         func() error { _, err := db.PlanDeprovision(ctx, "b"); return err },
		"invalid tenant ID": func() error { _, err := db.PlanProvision(ctx, Tenant{ID: "'"}); return err },
		"Retire is not for": func() error { _, err := db.PlanDeprovision(ctx, "a", Retire()); return err },
		"invalid alias":     func() error { _, err := db.PlanProvision(ctx, Tenant{ID: "c"}, WithAliases("'")); return err },
		"names no server": func() error {
			_, err := db.PlanProvision(ctx, Tenant{ID: "c", Isolation: IsolationDatabase}, OnServer("x"))
			return err
		},
		"Config.Admin is not s": func() error { _, err := openDB(t, p.d.AppURL()).PlanProvision(ctx, Tenant{ID: "c"}); return err },
	} {
		require.ErrorContains(t, call(), want)
	}
	url := "host=elsewhere.example.com user=app dbname=d"
	plan, err := db.PlanProvision(ctx, Tenant{ID: `d`, Isolation: IsolationDatabase, ConnString: url, Settings: map[string]string{"app.x": `it's a \`}})
	require.NoError(t, err)
	require.NotContains(t, plan, "elsewhere")
	require.Contains(t, plan, "To be read, and not to be run")
	require.Contains(t, plan, `E'{"app.x":"it''s a \\\\"}'`)
}

// A plan of sealed tenants has neither the keys nor a signature.
func TestAPlanHoldsNoSeal(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	_, db := sealedDB(t, func(c *Config) { c.Registry = &RegistryConfig{} })
	plan, err := db.PlanInstall(ctx)
	require.NoError(t, err)
	require.Contains(t, plan, "insert into pgxtenant.seal_key (name, inner_block, outer_block) values ('"+db.binder.sealer.key.name+"', '…', '…')")
	require.NoError(t, db.Registry().Install(ctx))
	require.NoError(t, db.Provision(ctx, Tenant{ID: "a"}))
	plan, err = db.PlanDeprovision(ctx, "a")
	require.NoError(t, err)
	require.Contains(t, plan, "pg_catalog.set_config('pgxtenant.seal','…',true)")
	require.Contains(t, plan, "delete from public.note where")
	require.Equal(t, []string{"a1", "a2"}, strs(t, db, as("a"), readNotes))
}
