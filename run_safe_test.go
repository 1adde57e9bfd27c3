package pgxtenant

import (
	"context"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A canary that has failed in one process holds up the waves of another that has come to the same run before.
func TestForEachCanaryOfAnother(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 3)
	ctx := context.Background()
	o := ForEachOptions{Name: "v2", Canaries: []string{"t0001"}}
	second := fl.open()
	ofOne := func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		if tn.ID == "" {
			return nil
		}
		return errTest
	}
	var first error
	_, err := second.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		switch tn.ID {
		case "": // the other does its canaries meanwhile
			o := o
			o.SkipShared = true
			_, first = fl.db.ForEach(ctx, o, ofOne)
			return nil
		case "t0001":
			return errTest
		}
		t.Errorf("called for %q", tn.ID)
		return nil
	})
	require.ErrorContains(t, first, "1 of the canaries failed")
	require.ErrorContains(t, err, "1 of the canaries failed")
}

// What a function leaves unread may be an error, or not be done at all once the connection is closed.
func TestForEachUnreadRows(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 1)
	report, err := fl.db.ForEach(context.Background(), ForEachOptions{SkipShared: true, Versions: versionsOf(nil), Target: "2"},
		func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
			_, err := conn.Query(ctx, "update ledger set version = '2' returning 1 / 0")
			return err
		})
	require.ErrorContains(t, err, "before it had read, or closed, the rows of a query")
	require.Equal(t, []int{0, 1, 1}, []int{report.Done, report.Unknown, report.LeftOver})
	fl.quiet()
}

// A schema is not dropped from under a run, whose next transaction would go on in the shared schemas.
func TestForEachBesideDeprovision(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.Exec("create schema template create table item (id int)")
	fl := newFleetOn(t, d, 0, func(c *Config) {
		c.Template = "template"
		c.Registry = &RegistryConfig{TTL: time.Millisecond}
	})
	ctx := context.Background()
	require.NoError(t, fl.db.Provision(ctx, Tenant{ID: "acme", Isolation: IsolationSchema}))
	gone := make(chan error, 1)
	_, err := fl.db.ForEach(ctx, ForEachOptions{IDs: []string{"acme"}}, func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
		go func() { gone <- fl.db.Deprovision(context.Background(), "acme") }()
		select {
		case err := <-gone:
			gone <- err
			t.Errorf("it was removed: %v", err)
		case <-time.After(200 * time.Millisecond):
		}
		_, err := conn.Exec(ctx, "create table invoice (id int)")
		return err
	})
	require.NoError(t, err)
	require.NoError(t, <-gone)
	require.Zero(t, count(t, fl.db.Admin(), ctx, "select count(*) from pg_class where relname = 'invoice'"))
	_, err = fl.db.Registry().Get(ctx, "acme")
	require.ErrorIs(t, err, ErrTenantNotFound)
	fl.quiet()
}

func TestForEachTooManyAtOnce(t *testing.T) {
	t.Parallel()
	_, err := newFleet(t, 0).db.ForEach(context.Background(), ForEachOptions{Concurrency: math.MaxInt}, upgrade)
	require.ErrorContains(t, err, "Concurrency is 9223372036854775807; want 10000 at most")
}

// While a call is between two tenants its run is neither purged nor begun anew.
func TestForEachBetweenTwoTenants(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 2)
	ctx := context.Background()
	o := ForEachOptions{Name: "v2", SkipShared: true, Concurrency: 1}
	looks := 0
	fresh := o
	fresh.Fresh = true
	o.OnProgress = func(p RunProgress) {
		if p.Done != 1 || p.Running != 0 {
			return
		}
		looks++
		purged, err := fl.db.PurgeRuns(ctx, 0)
		require.NoError(t, err)
		require.Zero(t, purged)
		_, err = fl.db.ForEach(ctx, fresh, upgrade)
		require.ErrorContains(t, err, `a process is at work in run "v2"`)
	}
	_, err := fl.db.ForEach(ctx, o, upgrade)
	require.NoError(t, err)
	require.NotZero(t, looks)
	require.Equal(t, 2, fl.upgraded())
	fl.quiet()
}

// Rows of the registry that were written by hand: a schema's name that the server takes for another's, and a connection
// string that is no form of ours, which no error repeats.
func TestForEachRowsWrittenByHand(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 1)
	ctx := context.Background()
	fl.d.Exec(`create schema "$user"`, `insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings) values
		('user', '', 'schema', '$user', '$user', '', '', 'active', '{}'), ('plain', '', 'database', '', '', 'host=h password=sEcret', '', 'active', '{}')`)
	report, err := fl.db.ForEach(ctx, ForEachOptions{SkipShared: true}, upgrade)
	require.ErrorIs(t, err, ErrInvalidTenant)
	require.Equal(t, []int{1, 2}, []int{report.Done, report.Failed})
	require.ErrorContains(t, resultOf(t, report, "user").Err, "the server replaces it by the role's name")
	require.ErrorContains(t, resultOf(t, report, "plain").Err, "stored in a form")
	require.NotContains(t, err.Error()+resultOf(t, report, "plain").Err.Error(), "sEcret")
}

// No run goes without a canary that was asked for: one that is misspelt, not selected, or not there yet, in a run that is resumed too.
func TestForEachCanariesMustBeSelected(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 4)
	fl.addRow("row")
	ctx := context.Background()
	none := func(context.Context, *pgx.Conn, Tenant) error { t.Error("called"); return nil }
	_, err := fl.db.Registry().Create(ctx, Record{Tenant: Tenant{ID: "begun", Isolation: IsolationSchema, Status: StatusProvisioning}})
	require.NoError(t, err)
	fl.d.Exec(`update pgxtenant.tenant set settings = '{"a": 1}' where id = 't0003'`)
	for canary, c := range map[string]struct {
		o    ForEachOptions
		says string
	}{
		"T0000": {ForEachOptions{}, "tenant not found"},
		"begun": {ForEachOptions{}, "it is being provisioned"},
		"t0003": {ForEachOptions{}, "settings are not all text"},
		"t0000": {ForEachOptions{Plans: []string{"gold"}}, "it is not among the tenants that are selected"},
		"t0001": {ForEachOptions{IDs: []string{"t0000"}}, "it is not among the tenants that are selected"},
		"t0002": {ForEachOptions{Select: func(t Tenant) bool { return t.ID != "t0002" }}, "it is not among the tenants that are selected"},
		"row":   {ForEachOptions{SkipShared: true}, "it is not among the tenants that are selected"},
	} {
		c.o.Canaries = []string{"t0000", canary}
		report, err := fl.db.ForEach(ctx, c.o, none)
		require.ErrorContains(t, err, c.says, canary)
		require.ErrorContains(t, err, `tenant "`+canary+`": canary: `)
		require.Nil(t, report)
	}
	require.NoError(t, fl.db.Registry().Delete(ctx, "t0003"))
	runs, err := fl.db.Runs(ctx, 0)
	require.NoError(t, err)
	require.Empty(t, runs)

	o := ForEachOptions{Name: "v2", Canaries: []string{"t0001", "row"}, IDs: []string{"t0000", "t0001", "t0002", "row"}}
	_, err = fl.db.ForEach(ctx, o, func(_ context.Context, _ *pgx.Conn, tn Tenant) error {
		if tn.ID == "t0001" {
			return errTest
		}
		return nil
	})
	require.ErrorContains(t, err, "1 of the canaries failed")
	require.NoError(t, fl.db.Registry().Delete(ctx, "t0001"))
	_, err = fl.db.ForEach(ctx, o, none)
	require.ErrorContains(t, err, `tenant "t0001": canary: pgxtenant: tenant not found`)
	o.Canaries = []string{"t0000"}
	report, err := fl.db.ForEach(ctx, o, (&order{}).note)
	require.NoError(t, err)
	require.Equal(t, []any{2, true}, []any{report.Done, report.Complete})
}

// A tenant that is deleted and made again while a run is open is another one: nothing was done for it yet.
func TestForEachTenantMadeAgain(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 4)
	ctx := context.Background()
	remake := func(id string, n int) {
		require.NoError(t, fl.db.Registry().Delete(ctx, id))
		fl.d.Exec("drop schema tenant_" + id + " cascade")
		fl.add(n, n+1)
	}
	for _, versions := range []bool{false, true} { // who is current is noted another way
		o := ForEachOptions{Name: "v2", SkipShared: true}
		if versions {
			o = ForEachOptions{Name: "v3", SkipShared: true, Versions: versionsOf(nil), Target: "2"}
		}
		report, err := fl.db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
			if tn.ID == "t0003" {
				return errTest
			}
			return upgrade(ctx, conn, tn)
		})
		require.ErrorIs(t, err, errTest)
		require.Equal(t, 1, report.LeftOver)
		remake("t0000", 0)
		remake("t0003", 3)
		o.FailedOnly = true
		report, err = fl.db.ForEach(ctx, o, upgrade)
		require.NoError(t, err)
		require.Equal(t, []any{0, 2, false}, []any{report.Ended(), report.LeftOver, report.Complete}, "it is another than that which failed")
		o.FailedOnly = false
		report, err = fl.db.ForEach(ctx, o, upgrade)
		require.NoError(t, err)
		require.Equal(t, []any{2, true, true}, []any{report.Done, report.Resumed, report.Complete})
		require.Equal(t, 4, fl.upgraded())
		require.Equal(t, RunDone, resultOf(t, report, "t0000").State)
		for i := range 4 {
			remake(fmt.Sprintf("t%04d", i), i)
		}
	}
	// In the same call too, in which it was skipped.
	once := false
	report, err := fl.db.ForEach(ctx, ForEachOptions{SkipShared: true, Concurrency: 1}, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		if tn.ID == "t0000" && !once {
			once = true
			remake("t0000", 0)
			return errTest
		}
		return upgrade(ctx, conn, tn)
	})
	require.NoError(t, err)
	require.Equal(t, 4, report.Done)
	require.Equal(t, 4, fl.upgraded())
}

// One that is made again from a template that the run has done is where it should be.
func TestForEachTenantMadeAgainFromTheTemplate(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.New(t)
	d.Exec("create schema template create table item (id int) create table ledger (version text)", "insert into template.ledger values ('1')")
	fl := newFleetOn(t, d, 1, func(c *Config) {
		c.Template, c.TemplateReference = "template", []string{"ledger"}
		c.Registry = &RegistryConfig{TTL: time.Millisecond}
	})
	made := Tenant{ID: "tmade", Isolation: IsolationSchema}
	require.NoError(t, fl.db.Provision(ctx, made))
	a := newAt(t)
	o := ForEachOptions{Name: "v2", SkipShared: true, Versions: versionsOf(nil), Target: "2"}
	_, err := fl.db.ForEach(ctx, o, a.work(func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		if tn.ID == "t0000" {
			return errTest
		}
		return upgrade(ctx, conn, tn)
	}))
	require.ErrorIs(t, err, errTest)
	require.NoError(t, fl.db.Deprovision(ctx, "tmade"))
	require.NoError(t, fl.db.Provision(ctx, made))
	report, err := fl.db.ForEach(ctx, o, a.work(upgrade))
	require.NoError(t, err)
	require.Equal(t, []any{1, 1, true}, []any{report.Done, report.Current, report.Complete})
	require.Equal(t, 1, a.done["tmade"])
	require.Equal(t, 2, fl.upgraded())
}
