package pgxtenant

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// However a tenant's provisioning and a run fall together, the tenant ends at the right version.
func TestForEachProvisionsMeanwhile(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.New(t)
	d.Exec("create schema template create table item (id int) create table ledger (version text)", "insert into template.ledger values ('1')")
	fl := newFleetOn(t, d, 3, func(c *Config) { c.Template, c.TemplateReference = "template", []string{"ledger"} })
	db, registry := fl.db, fl.db.Registry()
	provisioning := func(id string) {
		_, err := registry.Create(ctx, Record{Tenant: Tenant{ID: id, Isolation: IsolationSchema, Status: StatusProvisioning}})
		require.NoError(t, err)
	}
	schemas, err := db.Schemas()
	require.NoError(t, err)
	// One whose provisioning died with the schema made, and one where it died before.
	provisioning("tdied")
	require.NoError(t, schemas.Provision(ctx, "tdied"))
	provisioning("tvoid")
	provision := func(id string) error { return db.Provision(ctx, Tenant{ID: id, Isolation: IsolationSchema}) }

	var once sync.Once
	var first []string
	told := make(chan error, 1)
	a := newAt(t)
	report, err := db.ForEach(ctx, ForEachOptions{Name: "v2", Versions: versionsOf(nil), Target: "2", SkipShared: true, Concurrency: 2},
		a.work(func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
			if tn.ID == "" {
				first = append(first, tn.Schema)
				// One that comes while the template is worked on waits for it.
				go func() { told <- provision("told") }()
				for {
					if _, err := registry.Get(ctx, "told"); err == nil {
						break
					}
				}
			} else {
				once.Do(func() {
					if err := provision("tnew"); err != nil {
						t.Error(err)
					}
					fl.add(100, 103) // by other means, and of before
				})
			}
			return upgrade(ctx, conn, tn)
		}))
	require.NoError(t, err)
	require.NoError(t, <-told)
	require.Equal(t, []string{"template"}, first)
	require.Equal(t, 1, a.done[""])
	require.Zero(t, a.done["tnew"])
	require.Zero(t, a.done["told"])
	require.Equal(t, 1, a.done["tdied"])
	require.Equal(t, 3+3+1+1, report.Done) // tdied, the template
	// tnew and tvoid, and told, which may not have come to its schema when it is looked at.
	require.Equal(t, 3, report.Current+report.Skipped)
	require.ErrorContains(t, resultOf(t, report, "tvoid").Err, "it is being provisioned, and will be made from the template, which is done")
	require.NoError(t, provision("tvoid"))
	require.NoError(t, provision("tdied"))
	require.NoError(t, provision("tlater"))
	require.Equal(t, 3+3+5, fl.upgraded())
	for _, id := range []string{"tdied", "told", "tnew", "tvoid", "tlater"} {
		lines, err := schemas.Diff(ctx, id)
		require.NoError(t, err)
		require.Empty(t, lines, id)
	}

	// Where the template is not part of the run, nobody knows what it will be made from.
	provisioning("tagain")
	_, err = db.ForEach(ctx, ForEachOptions{IDs: []string{"tagain"}}, upgrade)
	require.ErrorIs(t, err, errNotThere)
	require.ErrorContains(t, err, "Provision completes it, Deprovision removes it")

	// If the template cannot be done, no tenant is touched.
	d.Exec("alter table template.item drop column note")
	report, err = db.ForEach(ctx, ForEachOptions{SkipShared: true}, func(context.Context, *pgx.Conn, Tenant) error { return errTest })
	require.ErrorIs(t, err, ErrRunStopped)
	require.ErrorContains(t, err, `the template schema "template" could not be done; 0 done, 0 current, 1 failed, 0 unknown, 0 skipped, 13 left`)
	// The shared schemas come before it, and what is told of them has counted it already.
	for p, err := range db.ForEachProgress(ctx, ForEachOptions{}, func(context.Context, *pgx.Conn, Tenant) error { return nil }) {
		require.NoError(t, err)
		require.Equal(t, 14, p.Total)
		if p.Done == 1 {
			break
		}
	}
	require.ErrorContains(t, err, `template schema "template": run: as the test wants it`)
	require.Equal(t, 1, report.Failed)
	fl.quiet()
}

// A copy of the template that is under way when a run comes is whole: of the template as it was, with its ledger as it
// was, and so the tenant is brought to the right version.
func TestForEachCopyUnderWay(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.New(t)
	d.Exec("create schema template create table item (id int) create table ledger (version text)", "insert into template.ledger values ('1')")
	fl := newFleetOn(t, d, 0, func(c *Config) { c.Template, c.TemplateReference = "template", []string{"ledger"} })
	_, err := fl.db.Registry().Create(ctx, Record{Tenant: Tenant{ID: "tcopy", Isolation: IsolationSchema, Status: StatusProvisioning}})
	require.NoError(t, err)
	schemas, err := fl.db.Schemas()
	require.NoError(t, err)
	begun, ended := make(chan struct{}), make(chan error, 1)
	err = schemas.locked(ctx, "test", "tcopy", "", func(tx pgx.Tx, schema string) error {
		template, err := schemas.template(ctx, tx)
		if err != nil {
			return err
		}
		go func() {
			once := sync.OnceFunc(func() { close(begun) })
			_, err := fl.db.ForEach(ctx, ForEachOptions{Versions: versionsOf(nil), Target: "2", SkipShared: true, LockTimeout: 50 * time.Millisecond, Attempts: 10_000},
				func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
					_, err := conn.Exec(ctx, "create table more (id int); update ledger set version = '2'")
					once()
					return err
				})
			ended <- err
		}()
		select {
		case <-begun: // too early
		case <-time.After(300 * time.Millisecond):
		}
		return schemas.copy(ctx, tx, template, schema)
	})
	require.NoError(t, err)
	require.NoError(t, <-ended)
	for _, schema := range []string{"template", "tenant_tcopy"} {
		require.Equal(t, 1, count(t, fl.db.Admin(), ctx, "select count(*) from "+schema+".ledger where version = '2' and to_regclass('"+schema+".more') is not null"), schema)
	}
	fl.quiet()
}

// Database tenants are worked on in their databases, which must be theirs, and the template database first.
func TestForEachDatabases(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d, admin := databasesAdmin(t)
	tables := []string{"create table item (id int)", "create table ledger (version text)", "insert into ledger values ('1')"}
	template, own := d.Database(), d.Database()
	template.Exec(tables...)
	own.Exec(tables...)
	d.Exec("alter database " + ident(template.Name) + " allow_connections false")
	open := func() *TenantDB {
		return openDB(t, d.AppURL(), func(c *Config) {
			c.Admin = admin.Config()
			c.Registry = &RegistryConfig{Key: make([]byte, 32)}
			c.Servers = map[string]DatabaseServer{"here": {Admin: admin.Config(), ConnString: d.AppURL(), DatabaseOptions: DatabaseOptions{Template: template.Name, Grace: -1}}}
		})
	}
	db := open()
	require.NoError(t, db.Registry().Install(ctx))
	ids := map[string]string{}
	for _, name := range []string{"a", "b", "wrong", "gone"} {
		ids[name] = uniqueID(d, name)
		require.NoError(t, db.Provision(ctx, Tenant{ID: ids[name], Isolation: IsolationDatabase}))
	}
	ids["own"] = uniqueID(d, "own")
	require.NoError(t, db.Provision(ctx, Tenant{ID: ids["own"], Isolation: IsolationDatabase, ConnString: own.OwnerURL()}))
	d.Exec("alter database "+ident(DatabaseName(ids["wrong"]))+" set app.current_tenant_id = 'x'", "drop database "+ident(DatabaseName(ids["gone"])))

	places := make(map[string]string)
	var mu sync.Mutex
	o := ForEachOptions{Name: "v2", Target: "2", SkipShared: true, Versions: func(ctx context.Context, conn *pgx.Conn, tenants []Tenant) (map[string]string, error) {
		if len(tenants) != 1 {
			return nil, errors.New("more than one tenant is said to be in a database of its own")
		}
		return versionsOf(nil)(ctx, conn, tenants)
	}}
	migrate := func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		mu.Lock()
		places[tn.ID] = conn.Config().Database
		mu.Unlock()
		return upgrade(ctx, conn, tn)
	}
	report, err := db.ForEach(ctx, o, migrate)
	require.ErrorIs(t, err, ErrWrongTenant)
	require.Equal(t, []int{4, 2}, []int{report.Done, report.Failed}, "%v", err)
	require.Equal(t, map[string]string{"": template.Name, ids["a"]: DatabaseName(ids["a"]), ids["b"]: DatabaseName(ids["b"]), ids["own"]: own.Name}, places)
	require.ErrorContains(t, resultOf(t, report, ids["wrong"]).Err, `carries the mark of tenant "x"`)
	require.ErrorContains(t, resultOf(t, report, ids["gone"]).Err, "3D000")
	require.Equal(t, 1, count(t, admin, ctx, "select count(*) from pg_database where datname = $1 and not datallowconn", template.Name))

	d.Exec("alter database " + ident(DatabaseName(ids["wrong"])) + " set app.current_tenant_id = " + literal(ids["wrong"]))
	require.NoError(t, db.Registry().Delete(ctx, ids["gone"]))
	ids["late"] = uniqueID(d, "late")
	require.NoError(t, db.Provision(ctx, Tenant{ID: ids["late"], Isolation: IsolationDatabase}))
	clear(places)
	report, err = open().ForEach(ctx, o, migrate)
	require.NoError(t, err)
	require.Equal(t, []int{1, 1}, []int{report.Done, report.Current})
	require.Equal(t, map[string]string{ids["wrong"]: DatabaseName(ids["wrong"])}, places)

	_, err = db.Registry().Create(ctx, Record{Tenant: Tenant{ID: "begun", Isolation: IsolationDatabase, Status: StatusProvisioning}, Server: "here"})
	require.NoError(t, err)
	states := func() map[string]RunState {
		states := make(map[string]RunState)
		for res, err := range db.Pending(ctx, o) {
			require.NoError(t, err)
			if states[res.Tenant] = res.State; res.State == RunSkipped {
				require.ErrorContains(t, res.Err, map[string]string{"": "ALLOW_CONNECTIONS false", "begun": "it is being provisioned"}[res.Tenant])
			}
		}
		return states
	}
	want := map[string]RunState{"": RunSkipped, "begun": RunSkipped, ids["a"]: RunCurrent, ids["b"]: RunCurrent, ids["own"]: RunCurrent, ids["wrong"]: RunCurrent, ids["late"]: RunCurrent}
	require.Equal(t, want, states())
	d.Exec("alter database " + ident(template.Name) + " allow_connections true")
	want[""] = RunCurrent // which takes no more than to look
	require.Equal(t, want, states())
}

// What would be done is told without doing it.
func TestForEachPending(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 5)
	ctx := context.Background()
	fl.d.Exec("update tenant_t0002.ledger set version = '2'", "create table ledger (version text)", "insert into ledger values ('1')", "drop table tenant_t0004.ledger")
	o := ForEachOptions{Versions: versionsOf(nil), Target: "2", Plans: []string{"free"}}
	var got []RunResult
	for res, err := range fl.db.Pending(ctx, o) {
		require.NoError(t, err)
		got = append(got, res)
	}
	require.Len(t, got, 3)
	require.Equal(t, RunFailed, got[2].State)
	require.ErrorContains(t, got[2].Err, `tenant "t0004": run: pgxtenant: ForEachOptions.Versions: ERROR: relation "tenant_t0004.ledger" does not exist`)
	require.Equal(t, []RunResult{
		{Tenant: "t0000", Isolation: IsolationSchema, Place: "tenant_t0000", State: RunPending, Before: "1"},
		{Tenant: "t0002", Isolation: IsolationSchema, Place: "tenant_t0002", State: RunCurrent, Before: "2"},
	}, got[:2])
	// Nor does one without a ledger keep others from being worked on.
	report, err := fl.db.ForEach(ctx, o, upgrade)
	require.Equal(t, "42P01", pgCode(err))
	require.Equal(t, []int{1, 1, 1}, []int{report.Done, report.Current, report.Failed})
	require.NoError(t, fl.purge())
	runs, err := fl.db.Runs(ctx, 0)
	require.NoError(t, err)
	require.Empty(t, runs)
	for _, err := range fl.db.Pending(ctx, ForEachOptions{Concurrency: -1}) {
		require.ErrorContains(t, err, "Concurrency")
	}
	fl.quiet()
}

func (fl *fleet) purge() error {
	_, err := fl.db.PurgeRuns(context.Background(), 0)
	return err
}
