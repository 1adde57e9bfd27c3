package pgxtenant

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// lifeline lets a process send so many messages over all of its connections, and then dies: every connection
// is cut, and none can be made. The last message is sent, or not.
type lifeline struct {
	left atomic.Int64
	sent bool
	dead atomic.Bool
}

var errDead = errors.New("the process has died")

func (l *lifeline) on(config *pgxpool.Config) *pgxpool.Config {
	if l == nil {
		return config
	}
	config = config.Copy()
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if l.dead.Load() {
			return nil, errDead
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &mortalConn{conn, l}, nil
	}
	return config
}

type mortalConn struct {
	net.Conn
	life *lifeline
}

func (c *mortalConn) Write(b []byte) (int, error) {
	if !c.life.dead.Load() && c.life.left.Add(-1) >= 0 {
		return c.Conn.Write(b)
	}
	if c.life.dead.CompareAndSwap(false, true) && c.life.sent {
		_, _ = c.Conn.Write(b)
	}
	_ = c.Conn.Close()
	return 0, errDead
}

// provisioner is a database with everything that provisioning needs, for tenants of all three kinds.
type provisioner struct {
	t     *testing.T
	d     *pgtest.DB
	admin *pgxpool.Config
	super *pgx.Conn
}

func newProvisioner(t *testing.T) *provisioner {
	d, admin := databasesAdmin(t)
	d.RLSTable("note")
	d.RLSTable("aa_line") // by name before the table that it refers to
	d.Exec("alter table aa_line add foreign key (tenant_id, id) references note",
		"create schema template",
		"create table template.note (id bigint generated always as identity, body text)",
		"grant usage on schema template to "+ident(d.App),
		"grant select, insert on template.note to "+ident(d.App))
	return &provisioner{t, d, admin.Config(), d.Connect(d.SuperURL())}
}

// open is another process each time.
func (p *provisioner) open(life *lifeline) *TenantDB {
	p.t.Helper()
	return openDB(p.t, p.d.AppURL(), func(c *Config) {
		c.Admin = life.on(p.admin)
		c.Template = "template"
		c.Registry = &RegistryConfig{TTL: 20 * time.Millisecond}
		c.RequireIdentity = true
		c.Servers = map[string]DatabaseServer{"here": {Admin: life.on(p.admin), ConnString: p.d.AppURL("pool_max_conns=2"),
			DatabaseOptions: DatabaseOptions{Grace: -1, Setup: func(ctx context.Context, conn *pgx.Conn, _ string) error {
				_, err := conn.Exec(ctx, "create table note (id bigint generated always as identity, body text);"+
					"grant select, insert on note to "+ident(p.d.App))
				return err
			}}}}
	})
}

// kinds are one tenant of each, in a provisioner.
func (p *provisioner) kinds() []Tenant {
	return []Tenant{
		{ID: uniqueID(p.d, "row"), Plan: "free"},
		{ID: uniqueID(p.d, "schema"), Isolation: IsolationSchema, Settings: map[string]string{"app.x": "y"}},
		{ID: uniqueID(p.d, "database"), Isolation: IsolationDatabase, Status: StatusReadOnly},
	}
}

// works checks that a tenant is whole: served, and by nothing but its own.
func (p *provisioner) works(db *TenantDB, t Tenant) {
	p.t.Helper()
	ctx := WithTenantID(context.Background(), t.ID)
	write := "insert into note (body) values ($1)"
	if t.Isolation == IsolationRow {
		write = "insert into note (id, body) values (1, $1)"
	}
	_, err := db.Exec(ctx, write, t.ID)
	if t.Status == StatusReadOnly {
		require.Equal(p.t, "25006", pgCode(err))
		require.Empty(p.t, strs(p.t, db, ctx, "select body from note"))
	} else {
		require.NoError(p.t, err)
		require.Equal(p.t, []string{t.ID}, strs(p.t, db, ctx, "select body from note"))
	}
	record, err := db.Registry().Get(ctx, t.ID)
	require.NoError(p.t, err)
	require.True(p.t, record.Tenant.equal(&t), "%+v", record)
}

// nothingOf checks that nothing of a tenant is left anywhere.
func (p *provisioner) nothingOf(db *TenantDB, id string) {
	p.t.Helper()
	ctx := context.Background()
	require.ErrorIs(p.t, db.Ping(WithTenantID(ctx, id)), ErrTenantNotFound)
	require.Empty(p.t, strs(p.t, p.super, ctx, `select tenant_id from note where tenant_id = $1 union all select tenant_id from aa_line where tenant_id = $1
		union all select nspname from pg_namespace where nspname = $2 union all select datname from pg_database where datname = any($3)
		union all select id from pgxtenant.tenant where id = $1 union all select alias from pgxtenant.tenant_alias where tenant_id = $1`,
		id, SchemaName(id), []string{DatabaseName(id), passingName(DatabaseName(id))}))
}

func TestProvisionedTenantsOfAllKindsAreServedAndRemoved(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	require.NoError(t, db.Registry().Install(ctx))
	for _, tenant := range p.kinds() {
		require.NoError(t, db.Provision(ctx, tenant, WithAliases(tenant.ID+".example.com")))
		p.works(db, tenant)
		require.NoError(t, db.Provision(ctx, tenant), "it is there")
		found, err := db.Registry().ByAlias(ctx, tenant.ID+".Example.com")
		require.NoError(t, err)
		require.Equal(t, tenant.ID, found.ID)
	}
	// The registry does not say how to reach a database that was made.
	require.Empty(t, strs(t, db.Admin(), ctx, "select conn from pgxtenant.tenant where conn <> ''"))
	// The service's role cannot list its tenants.
	_, err := db.Shared().Exec(WithoutTenant(ctx), "select from pgxtenant.tenant")
	require.Equal(t, "42501", pgCode(err))

	other := uniqueID(p.d, "other")
	require.NoError(t, db.Provision(ctx, Tenant{ID: other}))
	p.works(db, Tenant{ID: other})
	kinds := p.kinds()
	_, err = db.Exec(WithTenantID(ctx, kinds[0].ID), "insert into aa_line (id) values (1)")
	require.NoError(t, err)
	for _, tenant := range kinds {
		require.NoError(t, db.Deprovision(ctx, tenant.ID))
		p.nothingOf(db, tenant.ID)
		require.ErrorIs(t, db.Deprovision(ctx, tenant.ID), ErrTenantNotFound)
	}
	require.Equal(t, []string{other}, strs(t, db, WithTenantID(ctx, other), "select body from note"))
}

// Whatever message is the last one of a process, sent or not, another process completes the call.
func TestProvisioningSurvivesDeathAtAnyStep(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	require.NoError(t, db.Registry().Install(ctx))
	for _, tenant := range p.kinds() {
		// die runs f in processes of ever longer lives, until one outlives it.
		die := func(f func(*TenantDB) error, then func()) {
			for n := int64(1); ; n++ {
				life := &lifeline{sent: n%2 == 0}
				life.left.Store(n)
				mortal := p.open(life)
				err := f(mortal)
				mortal.Close()
				if !life.dead.Load() {
					require.NoError(t, err)
					require.Greater(t, n, int64(10), "messages")
					then()
					return
				}
				then()
			}
		}
		remove := func() {
			if err := db.Deprovision(ctx, tenant.ID); !errors.Is(err, ErrTenantNotFound) {
				require.NoError(t, err)
			}
			p.nothingOf(db, tenant.ID)
		}
		die(func(mortal *TenantDB) error { return mortal.Provision(ctx, tenant) }, func() {
			require.NoError(t, db.Provision(ctx, tenant))
			p.works(db, tenant)
			remove()
		})
		require.NoError(t, db.Provision(ctx, tenant))
		die(func(mortal *TenantDB) error { return mortal.Deprovision(ctx, tenant.ID) }, func() {
			remove()
			require.NoError(t, db.Provision(ctx, tenant))
		})
		remove()
	}
}
