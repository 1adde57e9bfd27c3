package pgxtenant

import (
	"context"
	"errors"
	"net"
	"sync"
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
	for kind, name := range []string{"row", "schema", "database"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProvisioner(t)
			p.survivesDeath(p.kinds()[kind])
		})
	}
}

func (p *provisioner) survivesDeath(tenant Tenant) {
	p.t.Helper()
	ctx := context.Background()
	db := p.open(nil)
	require.NoError(p.t, db.Registry().Install(ctx))
	// die runs f in processes of ever longer lives, until one outlives it.
	die := func(f func(*TenantDB) error, then func()) {
		for n := int64(1); ; n++ {
			life := &lifeline{sent: n%2 == 0}
			life.left.Store(n)
			mortal := p.open(life)
			err := f(mortal)
			mortal.Close()
			if !life.dead.Load() {
				require.NoError(p.t, err)
				require.Greater(p.t, n, int64(10), "messages")
				then()
				return
			}
			then()
		}
	}
	remove := func() {
		if err := db.Deprovision(ctx, tenant.ID); !errors.Is(err, ErrTenantNotFound) {
			require.NoError(p.t, err)
		}
		p.nothingOf(db, tenant.ID)
	}
	die(func(mortal *TenantDB) error { return mortal.Provision(ctx, tenant) }, func() {
		require.NoError(p.t, db.Provision(ctx, tenant))
		p.works(db, tenant)
		remove()
	})
	require.NoError(p.t, db.Provision(ctx, tenant))
	die(func(mortal *TenantDB) error { return mortal.Deprovision(ctx, tenant.ID) }, func() {
		remove()
		require.NoError(p.t, db.Provision(ctx, tenant))
	})
	remove()
}

// The last message of a process that died may be answered late: it does not remove a tenant made since.
func TestALateRemovalLeavesTheNextOfTheName(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	r := db.Registry()
	require.NoError(t, r.Install(ctx))
	require.NoError(t, db.Provision(ctx, Tenant{ID: "a"}))
	old, err := r.Get(ctx, "a")
	require.NoError(t, err)
	require.NoError(t, db.Deprovision(ctx, "a"))
	require.NoError(t, db.Provision(ctx, Tenant{ID: "a"}))
	require.ErrorIs(t, r.remove(ctx, r.write, "a", &old.Generation), ErrTenantNotFound)
	_, err = r.Get(ctx, "a")
	require.NoError(t, err)
}

// Retiring is no less resumable, and what was retired comes back with its rows, under whatever name it had.
func TestRetiringSurvivesDeathAtAnyStep(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	require.NoError(t, db.Registry().Install(ctx))
	schemas, err := db.Schemas()
	require.NoError(t, err)
	databases, err := db.Databases("here")
	require.NoError(t, err)
	for _, tenant := range []Tenant{
		{ID: uniqueID(p.d, "schema"), Isolation: IsolationSchema, Schema: "Its own name"},
		{ID: uniqueID(p.d, "database"), Isolation: IsolationDatabase},
	} {
		restore, exists := schemas.Restore, schemas.Exists
		if tenant.Isolation == IsolationDatabase {
			restore, exists = databases.Restore, databases.Exists
		}
		require.NoError(t, db.Provision(ctx, tenant))
		p.works(db, tenant)
		kept := strs(t, db, WithTenantID(ctx, tenant.ID), "select id::text from note")
		for n, dead := int64(1), true; dead; n++ {
			life := &lifeline{sent: n%2 == 0}
			life.left.Store(n)
			mortal := p.open(life)
			err := mortal.Deprovision(ctx, tenant.ID, Retire())
			mortal.Close()
			if dead = life.dead.Load(); !dead {
				require.NoError(t, err)
			}
			if err := db.Deprovision(ctx, tenant.ID, Retire()); !errors.Is(err, ErrTenantNotFound) {
				require.NoError(t, err)
			}
			p.nothingOf(db, tenant.ID)
			there, err := exists(ctx, tenant.ID)
			require.NoError(t, err)
			require.False(t, there)

			require.NoError(t, restore(ctx, tenant.ID))
			there, err = exists(ctx, tenant.ID)
			require.NoError(t, err)
			require.True(t, there)
			require.NoError(t, db.Provision(ctx, tenant), "what is there again is the tenant's")
			require.Equal(t, kept, strs(t, db, WithTenantID(ctx, tenant.ID), "select id::text from note"))
		}
		require.NoError(t, db.Deprovision(ctx, tenant.ID))
		p.nothingOf(db, tenant.ID)
	}
}

// Several processes that provision the same tenants at the same time make each once, and remove each once.
func TestProvisioningByManyAtOnce(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	var dbs []*TenantDB
	for range 3 {
		dbs = append(dbs, p.open(nil))
	}
	require.NoError(t, dbs[0].Registry().Install(ctx))
	atOnce := func(f func(db *TenantDB, tenant Tenant) error) {
		var wg sync.WaitGroup
		for _, db := range dbs {
			for _, tenant := range p.kinds() {
				wg.Go(func() {
					if err := f(db, tenant); err != nil {
						t.Errorf("%s: %v", tenant.ID, err)
					}
				})
			}
		}
		wg.Wait()
	}
	atOnce(func(db *TenantDB, tenant Tenant) error { return db.Provision(ctx, tenant) })
	for _, tenant := range p.kinds() {
		p.works(dbs[1], tenant)
	}
	atOnce(func(db *TenantDB, tenant Tenant) error {
		if err := db.Deprovision(ctx, tenant.ID); !errors.Is(err, ErrTenantNotFound) {
			return err
		}
		return nil
	})
	for _, tenant := range p.kinds() {
		p.nothingOf(dbs[2], tenant.ID)
	}
}

func TestProvisionBadInput(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	ctx := context.Background()
	db := p.open(nil)
	require.ErrorContains(t, db.Provision(ctx, Tenant{ID: "a"}), "call Registry.Install")
	require.NoError(t, db.Registry().Install(ctx))
	require.NoError(t, db.Provision(ctx, Tenant{ID: "first"}, WithAliases("taken.example.com")))
	p.d.Exec("create schema not_ours", "create table not_ours.precious ()")
	for name, c := range map[string]struct {
		tenant  Tenant
		options []ProvisionOption
		target  error
		says    string
	}{
		"invalid ID":          {tenant: Tenant{ID: "a b"}, target: ErrInvalidTenantID},
		"alias taken":         {tenant: Tenant{ID: "x"}, options: []ProvisionOption{WithAliases("free", "Taken.example.com")}, target: ErrAliasTaken, says: `"taken.example.com"`},
		"alias invalid":       {tenant: Tenant{ID: "x"}, options: []ProvisionOption{WithAliases("a b")}, target: ErrInvalidAlias},
		"status":              {tenant: Tenant{ID: "x", Status: StatusDeleting}, target: ErrInvalidTenant, says: "deleting"},
		"unknown server":      {tenant: Tenant{ID: "x", Isolation: IsolationDatabase}, options: []ProvisionOption{OnServer("mars")}, says: `no server "mars", only ["here"]`},
		"server of a row":     {tenant: Tenant{ID: "x"}, options: []ProvisionOption{OnServer("here")}, target: ErrInvalidTenant},
		"another's schema":    {tenant: Tenant{ID: "x", Isolation: IsolationSchema, Schema: "not_ours"}, target: ErrWrongTenant, says: `schema "not_ours"`},
		"the template":        {tenant: Tenant{ID: "x", Isolation: IsolationSchema, Schema: "template"}, target: ErrWrongTenant, says: "is the template"},
		"a shared schema":     {tenant: Tenant{ID: "x", Isolation: IsolationSchema, Schema: "public"}, target: ErrInvalidTenant},
		"elsewhere":           {tenant: Tenant{ID: "first", Isolation: IsolationSchema}, target: ErrTenantExists, says: "row isolation"},
		"password in clear":   {tenant: Tenant{ID: "x", Isolation: IsolationDatabase, ConnString: "postgres://u:hush@h/d"}, target: ErrInvalidTenant},
		"settings of its own": {tenant: Tenant{ID: "x", Settings: map[string]string{"search_path": "y"}}, target: ErrInvalidTenant},
		"two databases":       {tenant: Tenant{ID: "x", Isolation: IsolationDatabase, ConnString: "host=h"}, options: []ProvisionOption{OnServer("here")}, target: ErrInvalidTenant, says: "ConnString"},
	} {
		err := db.Provision(ctx, c.tenant, c.options...)
		var te *TenantError
		require.ErrorAs(t, err, &te, name)
		if c.target != nil {
			require.ErrorIs(t, err, c.target, name)
		}
		require.ErrorContains(t, err, c.says, name)
		require.NotContains(t, err.Error(), "hush")
		// What fails after the row was made is completed or removed by the next call.
		if err := db.Deprovision(ctx, "x"); !errors.Is(err, ErrTenantNotFound) {
			require.ErrorIs(t, err, ErrWrongTenant, name)
			require.NoError(t, db.Registry().Delete(ctx, "x"), name)
		}
	}
	require.Zero(t, count(t, p.super, ctx, "select count(*) from not_ours.precious"))
	require.ErrorIs(t, db.Deprovision(ctx, "a b"), ErrInvalidTenantID)
	require.ErrorIs(t, db.Deprovision(ctx, "first", Retire()), ErrInvalidTenant)

	require.ErrorIs(t, openDB(t, p.d.AppURL()).Provision(ctx, Tenant{ID: "a"}), ErrNoRegistry)
	require.ErrorIs(t, openDB(t, p.d.AppURL()).Deprovision(ctx, "a"), ErrNoRegistry)
	withoutAdmin := openDB(t, p.d.AppURL(), func(c *Config) {
		pool, err := pgxpool.ParseConfig(p.d.OwnerURL())
		require.NoError(t, err)
		c.Registry = &RegistryConfig{Pool: pool}
	})
	require.ErrorIs(t, withoutAdmin.Provision(ctx, Tenant{ID: "a"}), ErrNoAdmin)
	require.ErrorIs(t, withoutAdmin.Deprovision(ctx, "first"), ErrNoAdmin)
	closed := p.open(nil)
	closed.Close()
	require.ErrorIs(t, closed.Provision(ctx, Tenant{ID: "a"}), ErrClosed)
	require.ErrorIs(t, closed.Deprovision(ctx, "a"), ErrClosed)
	noTemplate := adminDB(t, p.d, func(c *Config) { c.Registry = &RegistryConfig{} })
	require.ErrorContains(t, noTemplate.Provision(ctx, Tenant{ID: "a", Isolation: IsolationSchema}), "Config.Template is not set")

	// Which right the admin's role lacks, and for which table.
	p.d.SuperExec("create table theirs (tenant_id text not null, id int); alter table theirs enable row level security, force row level security;" +
		"create policy tenant on theirs using (tenant_id = nullif(current_setting('app.current_tenant_id', true), ''))")
	err := db.Deprovision(ctx, "first")
	require.Equal(t, "42501", pgCode(err))
	require.ErrorContains(t, err, `tenant "first": deprovision: delete from public.theirs: the role of Config.Admin lacks a right`)
	require.ErrorIs(t, db.Ping(WithTenantID(ctx, "first")), ErrTenantUnavailable)
	p.d.SuperExec("drop table theirs")
	require.NoError(t, db.Deprovision(ctx, "first"))
}

// An admin whom no policy holds deletes what the tenant's policy shows, and nothing that only looks like it.
func TestDeprovisionDeletesTheTenantsRowsOnly(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.New(t)
	d.Exec("create table cut (tenant_id varchar(8) not null, id serial)", "create table padded (tenant_id char(8) not null, id serial)", "create table number (tenant_id integer not null, id serial)")
	for _, table := range []string{"cut", "padded"} {
		d.Exec("alter table "+table+" enable row level security, force row level security",
			"create policy tenant on "+table+" using (tenant_id = nullif(current_setting('app.current_tenant_id', true), ''))")
	}
	db := openDB(t, d.AppURL(), func(c *Config) {
		admin, err := pgxpool.ParseConfig(d.SuperURL())
		require.NoError(t, err)
		c.Admin = admin
		c.Registry = &RegistryConfig{TTL: time.Millisecond}
	})
	require.NoError(t, db.Registry().Install(ctx))
	require.NoError(t, db.EnableRLS(ctx, Tables("number")...))
	d.SuperExec("insert into cut (tenant_id) values ('acme-cor')", "insert into padded (tenant_id) values ('acme-cor')", "insert into number (tenant_id) values (7)")
	left := func() []string {
		return strs(t, db.Admin(), ctx, "select tenant_id::text from cut union all select tenant_id::text from padded union all select tenant_id::text from number")
	}
	for _, id := range []string{"acme-corp-2", "007", "7.0", "Acme-cor"} {
		require.NoError(t, db.Provision(ctx, Tenant{ID: id}))
		require.NoError(t, db.Deprovision(ctx, id))
		require.Len(t, left(), 3, id)
	}
	for _, id := range []string{"acme-cor", "7"} {
		require.NoError(t, db.Provision(ctx, Tenant{ID: id}))
		require.NoError(t, db.Deprovision(ctx, id))
	}
	require.Empty(t, left())
}
