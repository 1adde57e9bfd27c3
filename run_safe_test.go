package pgxtenant

import (
	"context"
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
// string that is no form of ours, which no error repeats. And a canary that is misspelt is no run without one.
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

	_, err = fl.db.ForEach(ctx, ForEachOptions{Canaries: []string{"T0000"}}, upgrade)
	require.ErrorIs(t, err, ErrTenantNotFound)
	require.ErrorContains(t, err, "T0000")
}
