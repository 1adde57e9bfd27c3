package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

var errTest = errors.New("as the test wants it")

// order notes in which order tenants were come to.
type order struct {
	mu  sync.Mutex
	ids []string
}

func (o *order) note(context.Context, *pgx.Conn, Tenant) error { return nil }

func (o *order) fails(these ...string) ForEachFunc {
	return func(_ context.Context, _ *pgx.Conn, t Tenant) error {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.ids = append(o.ids, t.ID)
		if slices.Contains(these, t.ID) {
			return errTest
		}
		return nil
	}
}

// Selections, canaries, waves and limits: who is come to, and in which order.
func TestForEachOrder(t *testing.T) {
	t.Parallel()
	const n = 60
	fl := newFleet(t, n)
	fl.addRow("row")
	ctx := context.Background()
	run := func(o ForEachOptions, fails ...string) (*RunReport, []string, error) {
		var seen order
		o.SkipShared = o.SkipShared || o.IDs == nil
		report, err := fl.db.ForEach(ctx, o, seen.fails(fails...))
		return report, seen.ids, err
	}
	for name, c := range map[string]struct {
		o    ForEachOptions
		want int
	}{
		"plan":      {ForEachOptions{Plans: []string{"gold"}}, n / 2},
		"isolation": {ForEachOptions{Isolations: []Isolation{IsolationSchema}}, n},
		"IDs":       {ForEachOptions{IDs: []string{"t0003", "t0001", "t0003"}}, 2},
		"a row tenant stands for the shared schemas": {ForEachOptions{IDs: []string{"row", "t0001"}}, 2},
		"predicate": {ForEachOptions{Select: func(t Tenant) bool { return t.Plan == "free" && t.ID < "t0010" }}, 5},
	} {
		t.Run(name, func(t *testing.T) {
			report, ids, err := run(c.o)
			require.NoError(t, err)
			require.Len(t, ids, c.want)
			require.Equal(t, c.want, report.Done)
			require.Equal(t, c.want, report.Total)
		})
	}
	// A list that was made, and has nothing in it, is not taken for all.
	for name, o := range map[string]ForEachOptions{"Isolations": {Isolations: []Isolation{}}, "Plans": {Plans: []string{}}, "IDs": {IDs: []string{}}} {
		_, ids, err := run(o)
		require.ErrorIs(t, err, ErrNothingSelected, name)
		require.Empty(t, ids, name)
	}
	t.Run("percent", func(t *testing.T) {
		_, ten, err := run(ForEachOptions{Percent: 20})
		require.NoError(t, err)
		_, half, err := run(ForEachOptions{Percent: 50})
		require.NoError(t, err)
		require.Subset(t, half, ten)
		require.Greater(t, len(half), len(ten))
		for _, id := range half {
			require.Less(t, StablePercent(id), 50.0)
		}
	})
	t.Run("canaries and waves", func(t *testing.T) {
		report, ids, err := run(ForEachOptions{Canaries: []string{"t0042", "t0007", "t0059"}, Waves: []float64{10, 50}, Concurrency: 8})
		require.NoError(t, err)
		require.Equal(t, n, report.Done)
		require.ElementsMatch(t, []string{"t0007", "t0042", "t0059"}, ids[:3])
		wave := func(id string) int {
			switch p := StablePercent(id); {
			case p < 10:
				return 1
			case p < 50:
				return 2
			}
			return 3
		}
		var waves []int
		for _, id := range ids[3:] {
			waves = append(waves, wave(id))
		}
		require.True(t, slices.IsSorted(waves), "%v", waves)
		require.Equal(t, 3, waves[len(waves)-1])
	})
	t.Run("a canary fails", func(t *testing.T) {
		o := ForEachOptions{Name: "canary", Canaries: []string{"t0042", "t0007"}}
		report, ids, err := run(o, "t0007")
		require.ErrorIs(t, err, ErrRunStopped)
		require.ErrorIs(t, err, errTest)
		require.ElementsMatch(t, []string{"t0042", "t0007"}, ids)
		require.Equal(t, []int{1, 1, n - 1}, []int{report.Done, report.Failed, report.LeftOver})
		require.ErrorContains(t, err, "1 of the canaries failed")

		o.Canaries = nil // a resumed run may have others
		report, ids, err = run(o, "t0007")
		require.NotErrorIs(t, err, ErrRunStopped)
		require.ErrorIs(t, err, errTest)
		require.Contains(t, ids, "t0007")
		require.Equal(t, []int{n - 2, 1}, []int{report.Done, report.Failed})

		_, ids, err = run(ForEachOptions{Name: "canary", FailedOnly: true})
		require.NoError(t, err)
		require.Equal(t, []string{"t0007"}, ids)
	})
	t.Run("only what failed", func(t *testing.T) {
		o := ForEachOptions{Name: "some", StopAfter: 1, Concurrency: 1}
		_, ids, err := run(o, "t0002")
		require.ErrorIs(t, err, ErrRunStopped)
		require.Len(t, ids, 3)
		o.FailedOnly = true
		report, ids, err := run(o)
		require.NoError(t, err)
		require.Equal(t, []string{"t0002"}, ids)
		require.False(t, report.Complete)
		require.Equal(t, n-3, report.LeftOver)
		o.FailedOnly, o.Target = false, "3"
		o.Versions = func(context.Context, *pgx.Conn, []Tenant) (map[string]string, error) { return nil, nil }
		_, _, err = run(o)
		require.ErrorContains(t, err, `run "some" was begun with other options, {}, not {"target":"3"}`)
		o = ForEachOptions{Name: "some", Fresh: true, StopAfter: 2, Concurrency: 1}
		report, ids, err = run(o, "t0001", "t0004")
		require.ErrorContains(t, err, "the run was stopped after 2 failures; 3 done, 0 current, 2 failed")
		require.False(t, report.Resumed)
		require.Len(t, ids, 5)
		_, _, err = run(ForEachOptions{Name: "no such", FailedOnly: true})
		require.ErrorContains(t, err, `there is no run "no such" that was not completed`)
	})
	t.Run("a rate of failures", func(t *testing.T) {
		var some []string
		for i := range 10 {
			some = append(some, fmt.Sprintf("t%04d", 3*i))
		}
		report, ids, err := run(ForEachOptions{StopRate: 0.2, Concurrency: 1}, some...)
		require.ErrorContains(t, err, "7 of 20 failed, more than 20 %")
		require.Len(t, ids, StopRateSamples)
		require.Equal(t, 7, report.Failed)
		_, ids, err = run(ForEachOptions{StopRate: 0.5}, some...)
		require.NotErrorIs(t, err, ErrRunStopped)
		require.Len(t, ids, n)
	})
	t.Run("nothing", func(t *testing.T) {
		report, ids, err := run(ForEachOptions{Name: "void", Plans: []string{"platinum"}})
		require.ErrorIs(t, err, ErrNothingSelected)
		require.EqualError(t, err, `pgxtenant: run "void": pgxtenant: no tenant is selected`)
		require.Empty(t, ids)
		require.Zero(t, report.Total)
		report, _, err = run(ForEachOptions{IDs: []string{"t0001", "nobody"}})
		require.Nil(t, report)
		require.ErrorIs(t, err, ErrTenantNotFound)
		require.ErrorContains(t, err, `tenant "nobody"`)
	})
	t.Run("stopped by request", func(t *testing.T) {
		stop := make(chan struct{})
		var did atomic.Int32
		o := ForEachOptions{Name: "asked", Stop: stop, Concurrency: 2, SkipShared: true}
		report, err := fl.db.ForEach(ctx, o, func(context.Context, *pgx.Conn, Tenant) error {
			if did.Add(1) == 2 {
				close(stop)
			}
			return nil
		})
		require.ErrorIs(t, err, ErrRunStopped)
		require.ErrorContains(t, err, "as it was asked to; ")
		require.Equal(t, int(did.Load()), report.Done)
		require.LessOrEqual(t, report.Done, 4)
		require.Equal(t, n-report.Done, report.LeftOver)
	})
	fl.quiet()
}

// All that is wrong with options is said at once, before anything is opened.
func TestForEachOptions(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 0)
	ctx := context.Background()
	_, err := fl.db.ForEach(ctx, ForEachOptions{
		Name: "a\x00b", Fresh: true, FailedOnly: true, Isolations: []Isolation{7}, IDs: []string{"no good"}, Percent: 101, Target: "1", Waves: []float64{10, 10},
		StopAfter: -1, StopRate: 2, Concurrency: -1, PerServer: -1, Attempts: -1, Timeout: -1, Lease: time.Millisecond,
	}, nil)
	for _, field := range []string{"Name", "Fresh", "Isolations", "IDs", "Percent", "Target", "Waves[1]", "StopAfter", "StopRate", "Concurrency", "PerServer", "Attempts", "Timeout", "Lease"} {
		require.ErrorContains(t, err, "ForEachOptions."+field+" ")
	}
	require.ErrorContains(t, err, "no function")

	var none order
	db := openDB(t, fl.d.AppURL())
	_, err = db.ForEach(ctx, ForEachOptions{}, none.fails())
	require.ErrorIs(t, err, ErrNoRegistry)
	require.ErrorIs(t, err, ErrNoAdmin)
	_, err = db.Runs(ctx, 1)
	require.ErrorIs(t, err, ErrNoRegistry)
	db = fl.open()
	db.Close()
	_, err = db.ForEach(ctx, ForEachOptions{}, none.fails())
	require.ErrorIs(t, err, ErrClosed)

	// Without a tenant the shared schemas are all there is to do.
	report, err := fl.db.ForEach(ctx, ForEachOptions{}, none.fails())
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)

	fl.d.Exec("drop table pgxtenant.run_claim")
	_, err = fl.db.ForEach(ctx, ForEachOptions{}, none.fails())
	require.ErrorContains(t, err, "call Registry.Install")
}

// Progress is told one at a time, adds up, and can drive the run, which ends with the loop.
func TestForEachProgress(t *testing.T) {
	t.Parallel()
	const n = 30
	fl := newFleet(t, n)
	ctx := context.Background()
	var inside, most, told atomic.Int32
	last := 0
	o := ForEachOptions{SkipShared: true, OnProgress: func(p RunProgress) {
		if inside.Add(1) != 1 {
			t.Error("told twice at once")
		}
		defer inside.Add(-1)
		told.Add(1)
		most.Store(max(most.Load(), int32(p.Running)))
		if p.Total != n || p.Ended() < last || p.Ended()+p.Running > n || p.Run == 0 {
			t.Errorf("%+v", p)
		}
		last = p.Ended()
	}}
	var together sync.WaitGroup // the first ones wait for each other
	together.Add(DefaultRunConcurrency)
	var begun atomic.Int32
	report, err := fl.db.ForEach(ctx, o, func(context.Context, *pgx.Conn, Tenant) error {
		if begun.Add(1) <= DefaultRunConcurrency {
			together.Done()
			together.Wait()
		}
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, n, last)
	require.GreaterOrEqual(t, told.Load(), int32(2*n), "and as time passes")
	require.Equal(t, int32(DefaultRunConcurrency), most.Load())
	require.Positive(t, report.Rate)
	require.Zero(t, report.Left)

	var final *RunReport
	for p, err := range fl.db.ForEachProgress(ctx, ForEachOptions{SkipShared: true}, (&order{}).note) {
		require.NoError(t, err)
		require.Nil(t, final)
		final = p.Report
	}
	require.True(t, final.Complete)

	var seen order
	for range fl.db.ForEachProgress(ctx, ForEachOptions{Name: "left", SkipShared: true}, seen.fails()) {
		break
	}
	require.Less(t, len(seen.ids), n)
	runs, err := fl.db.Runs(ctx, 1)
	require.NoError(t, err)
	require.Equal(t, []any{"left", false, len(seen.ids)}, []any{runs[0].Name, runs[0].Complete, runs[0].Counts[RunDone]})
	require.False(t, runs[0].Ended.IsZero())
	require.Contains(t, runs[0].By, "@")
	named, err := fl.db.Runs(ctx, 0, "left", "nobody's")
	require.NoError(t, err)
	require.Equal(t, runs, named)
	purged, err := fl.db.PurgeRuns(ctx, 0)
	require.NoError(t, err)
	require.Equal(t, 3, purged)
	fl.quiet()
}

// addRow makes a row tenant.
func (fl *fleet) addRow(id string) {
	fl.t.Helper()
	_, err := fl.db.Registry().Create(context.Background(), Record{Tenant: Tenant{ID: id}})
	require.NoError(fl.t, err)
}
