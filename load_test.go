package pgxtenant

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// used is what a tenant used within a minute, without what varies.
func used(db *TenantDB, id string) Usage {
	for _, t := range db.Load().Minute.Tenants {
		if t.TenantID == id {
			t.Time, t.SharedTime, t.WaitTime, t.Waits = 0, 0, 0, 0
			return t.Usage
		}
	}
	return Usage{}
}

// Each way to a connection is counted, and for the tenant that it was bound to.
func TestEveryStatementIsCounted(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	d.Exec("create table plain (id bigint)", "grant all on plain to "+pgx.Identifier{d.App}.Sanitize())
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		db := openDB(t, d.AppURL(), func(c *Config) { c.Shared.ConnConfig.DefaultQueryExecMode = m })
		batch := func() *pgx.Batch {
			b := &pgx.Batch{}
			b.Queue("select body from docs")
			b.Queue("update docs set body = body where id = $1", 1)
			return b
		}
		read := func(rows pgx.Rows, err error) error {
			if err == nil {
				_, err = pgx.CollectRows(rows, pgx.RowTo[string])
			}
			return err
		}
		ctx := func(id string) context.Context { return as(id) }
		for id, c := range map[string]struct {
			do   func(id string) error
			want Usage
		}{
			"a": {func(id string) error {
				return read(db.Query(ctx(id), "select body from docs where id < $1", 3))
			}, Usage{Queries: 1, Rows: 2}},
			"b": {func(id string) error {
				_, err := db.Exec(ctx(id), "update docs set body = body")
				return err
			}, Usage{Execs: 1, Rows: 2}},
			"failed": {func(id string) error {
				_, err := db.Exec(ctx(id), "select 1/0")
				require.Equal(t, "22012", pgCode(err))
				return nil
			}, Usage{Execs: 1, Errors: 1}},
			"row": {func(id string) error {
				return db.QueryRow(ctx(id), "select 'x'").Scan(new(string))
			}, Usage{Queries: 1, Rows: 1}},
			"pool": {func(id string) error {
				return read(db.Shared().Query(ctx(id), "select 'x'"))
			}, Usage{Queries: 1, Rows: 1}},
			"batch": {func(id string) error {
				return db.SendBatch(ctx(id), batch()).Close()
			}, Usage{Batched: 2}},
			"failedbatch": {func(id string) error {
				b := batch()
				b.Queue("select 1/0")
				require.Error(t, db.SendBatch(ctx(id), b).Close())
				return nil
			}, Usage{Batched: 3, Errors: 1}},
			"failedread": {func(id string) error {
				b := &pgx.Batch{}
				b.Queue("select 'x'")
				b.Queue("select (1/(length('x')-1))::text")
				results := db.SendBatch(ctx(id), b)
				require.NoError(t, read(results.Query()))
				require.Error(t, read(results.Query()))
				_ = results.Close()
				return nil
			}, Usage{Batched: 2, Rows: 1, Errors: 1}},
			"readbatch": {func(id string) error {
				b := &pgx.Batch{}
				b.Queue("select generate_series(1,5)::text")
				b.Queue("select 'x'")
				results := db.SendBatch(ctx(id), b)
				if err := read(results.Query()); err != nil {
					return err
				}
				if err := results.QueryRow().Scan(new(string)); err != nil {
					return err
				}
				return results.Close()
			}, Usage{Batched: 2, Rows: 6}},
			"tx": {func(id string) error {
				return pgx.BeginFunc(ctx(id), db, func(tx pgx.Tx) error {
					_, err := tx.Exec(context.Background(), "select 1")
					return err
				})
			}, Usage{Queries: 1, Execs: 2, Rows: 1}},
			"copy": {func(id string) error { // beside it, a look at the table
				_, err := db.CopyFrom(ctx(id), pgx.Identifier{"plain"}, []string{"id"}, rowsOf(7, func(i int) []any { return []any{i} }))
				return err
			}, Usage{Queries: 1, Copies: 1, Rows: 8}},
			"sql": {func(id string) error {
				db := stdlib.OpenDBFromPool(db.Shared())
				defer db.Close()
				return read2(db.QueryContext(ctx(id), "select 'x'"))
			}, Usage{Queries: 1, Rows: 1}},
			"database": {func(id string) error {
				return db.QueryRow(isolated(id, d.AppURL()), "select 'x'").Scan(new(string))
			}, Usage{Queries: 1, Rows: 1}},
			"abandoned": {func(id string) error { // its rows are never closed
				conn, err := db.Acquire(ctx(id))
				if err != nil {
					return err
				}
				defer conn.Release()
				_, err = conn.Query(ctx(id), "select generate_series(1,1000)")
				return err
			}, Usage{}},
		} {
			require.NoError(t, c.do(id), id)
			got := used(db, id)
			if id == "tx" && m == pgx.QueryExecModeSimpleProtocol {
				got.Rows = c.want.Rows
			}
			require.Equal(t, c.want, got, "%s in mode %v", id, m)
		}
		require.NoError(t, read(db.Query(WithoutTenant(context.Background()), "select 'x'")))
		require.Equal(t, Usage{Queries: 1, Rows: 1}, used(db, ""))

		load := db.Load()
		require.Empty(t, load.Held)
		for _, w := range []LoadWindow{load.Minute, load.FiveMinutes, load.Hour} {
			require.Equal(t, load.Total, w.Total)
			require.Equal(t, Usage{}, w.Other)
			require.True(t, w.Exact)
			require.Equal(t, 15, w.Active)
			var times, statements, shared float64
			for _, tenant := range w.Tenants {
				require.Positive(t, tenant.Time, tenant.TenantID)
				require.Zero(t, tenant.Missed)
				times += tenant.TimeShare
				statements += tenant.StatementShare
				shared += tenant.SharedShare
				if tenant.TenantID == "database" {
					require.Zero(t, tenant.SharedTime)
				} else {
					require.Equal(t, tenant.Time, tenant.SharedTime)
				}
			}
			require.InDelta(t, 1, times, 1e-9)
			require.InDelta(t, 1, statements, 1e-9)
			require.InDelta(t, 1, shared, 1e-9)
		}
	})
}

func read2(rows *sql.Rows, err error) error {
	if err != nil {
		return err
	}
	for rows.Next() {
	}
	return errors.Join(rows.Err(), rows.Close())
}

// Who is slow is seen before it is done.
func TestAStatementCountsWhileItRuns(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	db := openDB(t, d.AppURL())
	super := d.Connect(d.SuperURL())
	_, err := super.Exec(context.Background(), "begin; lock table docs")
	require.NoError(t, err)
	done := make(chan error)
	go func() {
		_, err := db.Exec(as("a"), "select from docs")
		done <- err
	}()
	timeOf := func() (d time.Duration) {
		for _, t := range db.Load().Minute.Tenants {
			d += t.Time
		}
		return d
	}
	eventually(t, "its time is counted", func() bool { return timeOf() > 0 })
	before := timeOf()
	eventually(t, "more of it is", func() bool { return timeOf() > before })
	require.Equal(t, map[string]int{"a": 1}, db.Load().Held)
	require.Zero(t, used(db, "a").Statements())
	_, err = super.Exec(context.Background(), "commit")
	require.NoError(t, err)
	require.NoError(t, <-done)
	require.EqualValues(t, 1, used(db, "a").Statements())
	require.Empty(t, db.Load().Held)
}

func TestHeldConnections(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	db := openDB(t, d.AppURL("pool_max_conns=4"), func(c *Config) {
		c.Shared.PrepareConn = func(ctx context.Context, _ *pgx.Conn) (bool, error) {
			if ctx.Value(refuseKey{}) != nil {
				return true, errors.New("refused")
			}
			return true, nil
		}
	})
	var conns []*pgxpool.Conn
	for _, ctx := range []context.Context{as("a"), as("a"), as("b"), isolated("c", d.AppURL())} {
		conn, err := db.Acquire(ctx)
		require.NoError(t, err)
		conns = append(conns, conn)
	}
	_, err := db.Acquire(context.WithValue(as("d"), refuseKey{}, 1))
	require.ErrorContains(t, err, "refused")
	require.Equal(t, map[string]int{"a": 2, "b": 1, "c": 1}, db.Load().Held)
	hijacked := conns[0].Hijack()
	conns[1].Release()
	require.Equal(t, map[string]int{"a": 1, "b": 1, "c": 1}, db.Load().Held)
	require.NoError(t, hijacked.Close(context.Background()))
	idle := db.AcquireAllIdle(as("e"))
	require.NotEmpty(t, idle)
	require.Equal(t, map[string]int{"b": 1, "c": 1, "e": len(idle)}, db.Load().Held)
	for _, conn := range append(idle, conns[2:]...) {
		conn.Release()
	}
	require.Empty(t, db.Load().Held)
}

type refuseKey struct{}

// Wherever a checkout waits, it is counted, and one that does not wait is none.
func TestWaitsAreCounted(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	for name, params := range map[string][]string{
		"pool": {"pool_max_conns=1"}, "budget": {"tenant_max_conns=1"}, "arrival": {"pool_max_conns=1", "tenant_arrival_order=true"},
		"arrival budget": {"tenant_max_conns=1", "tenant_arrival_order=true"}, "traced": {"pool_max_conns=1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := openDB(t, d.AppURL(params...), func(c *Config) {
				if name == "traced" {
					c.Shared.ConnConfig.Tracer = derivingTracer{}
				}
			})
			require.NoError(t, db.Ping(as("x"))) // waits until the connection is made
			waits := func(id string) (n int64, d time.Duration) {
				for _, t := range db.Load().Minute.Tenants {
					if t.TenantID == id {
						n, d = t.Waits, t.WaitTime
					}
				}
				return n, d
			}
			n, _ := waits("x")
			require.EqualValues(t, 1, n)
			conn, err := db.Acquire(as("a"))
			require.NoError(t, err)
			n, _ = waits("a")
			require.Zero(t, n)

			const waiters = 4
			results := make(chan error)
			ctx, cancel := context.WithCancel(as("b"))
			for i := range waiters {
				acquire := db.Acquire
				if i%2 == 1 {
					acquire = db.Shared().Acquire
				}
				go func() {
					conn, err := acquire(ctx)
					if err == nil {
						conn.Release()
					}
					results <- err
				}()
			}
			eventually(t, "they wait", func() bool { return waitingIn(db) == waiters })
			cancel()
			for range waiters {
				require.ErrorIs(t, <-results, context.Canceled)
			}
			n, took := waits("b")
			require.EqualValues(t, waiters, n)
			require.Positive(t, took)

			go func() { _, err := db.Exec(as("b"), "select 1"); results <- err }()
			eventually(t, "it waits", func() bool { return waitingIn(db) == 1 })
			conn.Release()
			require.NoError(t, <-results)
			n, more := waits("b")
			require.EqualValues(t, waiters+1, n)
			require.Greater(t, more, took)

			h := db.Stat().AcquireWaits()
			require.Len(t, h.Counts, len(h.Bounds)+1)
			var all int64
			for _, n := range h.Counts {
				all += n
			}
			require.EqualValues(t, 2+waiters+1, all, "those that did not wait included")
			require.GreaterOrEqual(t, h.Sum, more)
		})
	}
}

func TestClosingWakesWhoWaitsInTheSharedPool(t *testing.T) {
	t.Parallel()
	db := openDB(t, docsDB(t).AppURL("pool_max_conns=1"))
	conn, err := db.Acquire(as("a"))
	require.NoError(t, err)
	done := make(chan error)
	go func() { _, err := db.Shared().Acquire(as("a")); done <- err }()
	eventually(t, "it waits", func() bool { return waitingIn(db) == 1 })
	go db.Close()
	require.ErrorIs(t, <-done, ErrClosed)
	conn.Release()
}

func TestStatCounts(t *testing.T) {
	t.Parallel()
	d := docsDB(t)
	dir := newDirectory(Tenant{ID: "a"}, Tenant{ID: "b"})
	db := openDB(t, d.AppURL(), func(c *Config) { c.MaxPools, c.Directory = 1, dir })
	for range 3 {
		require.NoError(t, db.Ping(WithTenantID(context.Background(), "a")))
	}
	require.EqualValues(t, 3, db.Stat().DirectoryMissCount())
	require.Zero(t, db.Stat().DirectoryHitCount())
	bound := db.Stat().BoundCount()
	_, err := db.Exec(as("a"), "select $1::text", "x")
	require.NoError(t, err)
	require.EqualValues(t, bound+2, db.Stat().BoundCount(), "it is prepared, and executed")
	_, err = db.Exec(as("a"), "select $1::text", "x")
	require.NoError(t, err)
	require.EqualValues(t, bound+3, db.Stat().BoundCount())
	db.Reset()
	eventually(t, "the connection is closed", func() bool {
		db.load.mu.Lock()
		defer db.load.mu.Unlock()
		return len(db.load.conns) == 0
	})
	require.EqualValues(t, bound+3, db.Stat().BoundCount())

	require.NoError(t, db.Ping(isolated("c", d.AppURL())))
	require.NoError(t, db.Ping(isolated("e", d.AppURL())))
	require.Error(t, db.Ping(isolated("f", "postgres://127.0.0.1:1/x")))
	s := db.Stat()
	require.Equal(t, []int64{2, 1, 1}, []int64{s.OpenedPoolsCount(), s.EvictedPoolsCount(), s.FailedPoolsCount()})

	known := openDB(t, d.AppURL(), func(c *Config) { c.Directory = peeking{dir, map[string]Tenant{"a": {ID: "a"}}} })
	require.NoError(t, known.Ping(WithTenantID(context.Background(), "a")))
	require.Positive(t, known.Stat().DirectoryHitCount())
	require.Zero(t, known.Stat().DirectoryMissCount())
}

func TestLoadTurnedOff(t *testing.T) {
	t.Parallel()
	db := openDB(t, docsDB(t).AppURL("tenant_disable_load=true"))
	_, err := db.Exec(as("a"), "select 1")
	require.NoError(t, err)
	load := db.Load()
	require.Empty(t, load.Minute.Tenants)
	require.Zero(t, load.Total)
	require.Empty(t, db.Stat().AcquireWaits().Counts)
	require.Positive(t, db.Stat().BoundCount())
}

// A window never reaches back by more than its name says, nor by less than a slice less.
func TestWindowsForget(t *testing.T) {
	t.Parallel()
	l, clock := newTestMeter(t)
	began := clock.now
	step := func(d time.Duration) {
		for end := clock.now + d; clock.now < end; {
			clock.now = min(end, clock.now+sliceTime-(clock.now-began)%sliceTime)
			if (clock.now-began)%sliceTime == 0 {
				l.tick()
			}
		}
	}
	seen := func() (in []string) {
		load := l.snapshot()
		for name, w := range map[string]LoadWindow{"1": load.Minute, "5": load.FiveMinutes, "60": load.Hour} {
			if w.Total.Queries > 0 {
				in = append(in, name)
			}
		}
		return sorted(in)
	}
	step(time.Second)
	l.op("a", time.Second)
	require.Equal(t, time.Second, l.snapshot().Hour.Span)
	require.Equal(t, []string{"1", "5", "60"}, seen())
	step(49 * time.Second)
	require.Equal(t, []string{"1", "5", "60"}, seen())
	step(10 * time.Second)
	require.Equal(t, []string{"5", "60"}, seen())
	step(4*time.Minute - time.Second)
	require.Equal(t, []string{"5", "60"}, seen())
	step(time.Second)
	require.Equal(t, []string{"60"}, seen())
	step(55*time.Minute - time.Second)
	require.Equal(t, []string{"60"}, seen())
	step(time.Second)
	require.Empty(t, seen())
	require.EqualValues(t, 1, l.snapshot().Total.Queries)
	for i := range 2 * fineSlices * (coarseSlices + 1) {
		step(sliceTime)
		l.op("b", time.Second)
		if i < fineSlices*(coarseSlices+1) || i%7 != 0 {
			continue
		}
		load := l.snapshot()
		require.Greater(t, load.Minute.Span, 40*time.Second)
		require.LessOrEqual(t, load.Minute.Span, time.Minute)
		require.LessOrEqual(t, load.FiveMinutes.Span, 5*time.Minute)
		require.GreaterOrEqual(t, load.Hour.Span, 55*time.Minute)
		require.LessOrEqual(t, load.Hour.Span, time.Hour)
		for _, w := range []LoadWindow{load.Minute, load.FiveMinutes, load.Hour} {
			require.EqualValues(t, w.Span/sliceTime+1, w.Total.Queries, "each slice once")
		}
	}
}

// heavyTest tells of heavy tenants.
type heavyTest struct {
	*loadMeter
	clock *fakeTime
	mu    sync.Mutex
	told  []string
	log   lockedBuffer
}

func newHeavyTest(t *testing.T, adjust ...func(*Config)) *heavyTest {
	h := &heavyTest{}
	h.loadMeter, h.clock = newTestMeter(t, append(adjust, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&h.log, nil))
		c.OnHeavyTenant = func(t TenantLoad) {
			h.snapshot() // nothing is locked
			h.mu.Lock()
			defer h.mu.Unlock()
			h.told = append(h.told, fmt.Sprintf("%s %.0f%%", t.TenantID, 100*t.SharedShare))
		}
	})...)
	return h
}

// slice passes ten seconds, and returns who was called heavy.
func (h *heavyTest) slice(a, b time.Duration) []string {
	h.op("a", a)
	h.op("b", b)
	h.clock.now += sliceTime
	h.tick()
	h.callbacks.Wait()
	told := h.told
	h.told = nil
	return told
}

func TestAHeavyTenantIsToldOnce(t *testing.T) {
	t.Parallel()
	h := newHeavyTest(t)
	require.Empty(t, h.slice(20*time.Second, 9*time.Second), "less than HeavyMinTime")
	require.Equal(t, []string{"a 69%"}, h.slice(1*time.Second, time.Second/2))
	require.Contains(t, h.log.String(), "tenant=a")
	require.Contains(t, h.log.String(), "IsolationDatabase")
	for range 60 {
		require.Empty(t, h.slice(9*time.Second, time.Second))
	}
	require.Equal(t, []string{"b 40%"}, untilTold(h, time.Second, 9*time.Second), "both may be")
	for range 60 {
		require.Empty(t, h.slice(time.Second, 9*time.Second))
	}
	require.Equal(t, []string{"a 40%"}, untilTold(h, 9*time.Second, time.Second), "it had fallen back")
}

func untilTold(h *heavyTest, a, b time.Duration) []string {
	for range 60 {
		if told := h.slice(a, b); told != nil {
			return told
		}
	}
	return nil
}

// At the line a tenant is told once, and not at each crossing.
func TestAHeavyTenantAtTheLine(t *testing.T) {
	t.Parallel()
	h := newHeavyTest(t)
	told := 0
	for i := range 300 {
		a := 41 * time.Second / 10
		if i/30%2 == 1 {
			a = 39 * time.Second / 10
		}
		told += len(h.slice(a, 10*time.Second-a)) - len(h.slice(0, 0))
	}
	require.Equal(t, 2, told, "a and b, once each")
}

func TestWhoIsNotHeavy(t *testing.T) {
	t.Parallel()
	alone := newHeavyTest(t)
	none := newHeavyTest(t, func(c *Config) { c.HeavyShare = 1 })
	unbound := newHeavyTest(t)
	isolated := newHeavyTest(t)
	for range 60 {
		require.Empty(t, alone.slice(10*time.Second, 0), "nobody else is there")
		require.Empty(t, none.slice(99*time.Second, time.Second), "the share is 1")
		unbound.op("", time.Hour)
		require.Empty(t, unbound.slice(time.Second, time.Second), "no tenant is none")
		isolated.charge("c", &Usage{Time: time.Hour})
		isolated.op("d", 20*time.Second)
		isolated.op("e", 20*time.Second)
		require.Empty(t, isolated.slice(time.Second, time.Second*20), "it has a database of its own")
	}
}

// A callback that panics is told to the log, and Close waits for those that run.
func TestOnHeavyTenant(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	began, end := make(chan struct{}), make(chan struct{})
	db := openDB(t, pgtest.New(t).AppURL("tenant_heavy_share=0.5"), func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.OnHeavyTenant = func(TenantLoad) {
			close(began)
			<-end
			panic("x")
		}
	})
	db.load.op("a", time.Minute)
	db.load.op("b", time.Second)
	db.load.tick()
	<-began
	closed := make(chan struct{})
	go func() { db.Close(); close(closed) }()
	eventually(t, "pools are closed", func() bool { return errors.Is(db.Ping(as("a")), ErrClosed) })
	select {
	case <-closed:
		t.Fatal("Close did not wait")
	default:
	}
	close(end)
	<-closed
	require.Contains(t, log.String(), "OnHeavyTenant panicked")
}

// Everybody at once: sums stay right, and nothing is counted twice.
func TestLoadUnderStress(t *testing.T) {
	t.Parallel()
	db := openDB(t, docsDB(t).AppURL("pool_max_conns=4"))
	const workers, each = 16, 60
	stop := make(chan struct{})
	var watching, working sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				db.load.tick()
				db.Load()
			}
		}
	})
	for i := range workers {
		working.Go(func() {
			for n := range each {
				ctx, cancel := context.WithCancel(as(fmt.Sprint("t", (i+n)%8)))
				_, err := db.Exec(ctx, "select 1")
				cancel()
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	working.Wait()
	close(stop)
	watching.Wait()
	load := db.Load()
	require.EqualValues(t, workers*each, load.Total.Queries)
	require.Empty(t, load.Held)
	require.LessOrEqual(t, load.Total.Time, time.Since(load.At.Add(-load.Hour.Span))*4+time.Minute)
}

// Counts of a histogram only rise, although the pools' number of checkouts comes later than that of those who waited.
func TestWaitsOnlyRise(t *testing.T) {
	l, _ := newTestMeter(t)
	require.EqualValues(t, 10, l.histogram(10).Counts[0])
	l.served.Add(3)
	require.EqualValues(t, 10, l.histogram(11).Counts[0])
	require.EqualValues(t, 11, l.histogram(14).Counts[0])
}
