package pgxtenant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// expectFairlySettled is the end of a test of the shared pool's gate.
func expectFairlySettled(t *testing.T, db *TenantDB) {
	t.Helper()
	var err error
	eventually(t, "the gate settles", func() bool { err = db.gate.settled(); return err == nil })
	db.Close()
	require.NoError(t, db.gate.settled())
}

// acquiring acquires in the background, by the TenantDB and by the shared pool in turn, and returns once all wait.
func acquiring(t *testing.T, db *TenantDB, ctx context.Context, n int) <-chan *pgxpool.Conn {
	t.Helper()
	conns := make(chan *pgxpool.Conn, n)
	before := waitingIn(db)
	for i := range n {
		go func() {
			acquire := db.Acquire
			if i%2 == 1 {
				acquire = db.Shared().Acquire
			}
			conn, err := acquire(ctx)
			if err != nil {
				t.Error(err)
			}
			conns <- conn
		}()
		eventually(t, "it waits", func() bool { return waitingIn(db) == before+i+1 })
	}
	return conns
}

func TestWhoComesLaterIsServedBeforeAFlood(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=4"))
	var held []*pgxpool.Conn
	for range 4 {
		conn, err := db.Acquire(as("a"))
		require.NoError(t, err)
		held = append(held, conn)
	}
	flood := acquiring(t, db, as("a"), 50)
	other := acquiring(t, db, as("b"), 1)
	require.EqualValues(t, 51, db.Stat().WaitingAcquires())
	held[0].Release()
	b := <-other
	require.Empty(t, flood)

	// Three of four is as much as a may have while b has one.
	held[1].Release()
	a := <-flood // b's came first, so a has 3 again
	a.Release()
	b.Release()
	held[2].Release()
	held[3].Release()
	for range 49 {
		(<-flood).Release()
	}
	expectFairlySettled(t, db)
}

// While another tenant comes and goes, one may have its share of the pool and no more, though the rest is idle;
// alone it has all of it.
func TestATenantsShareOfThePool(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=4", "tenant_max_share=0.5"))
	var mine []*pgxpool.Conn
	for range 4 {
		conn, err := db.Acquire(as("a"))
		require.NoError(t, err, "it is alone")
		mine = append(mine, conn)
	}
	more := acquiring(t, db, as("a"), 4)
	other := acquiring(t, db, as("b"), 1)
	mine[0].Release()
	b := <-other
	for _, conn := range mine[1:] { // a is left with none, and gets two
		conn.Release()
	}
	mine = []*pgxpool.Conn{<-more, <-more}
	require.EqualValues(t, 2, db.Stat().WaitingAcquires())
	require.EqualValues(t, 3, db.Shared().Stat().AcquiredConns(), "one is idle, for who comes next")
	c, err := db.Acquire(as("c"))
	require.NoError(t, err)
	c.Release()
	b.Release()
	mine = append(mine, <-more, <-more) // nobody else is left
	for _, conn := range mine {
		conn.Release()
	}
	expectFairlySettled(t, db)
}

// No connection is idle while anyone waits: each that is returned is taken by the next, to the last.
func TestNoConnectionIsIdleWhileAnyoneWaits(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=2", "tenant_max_share=1"))
	var held []*pgxpool.Conn
	for range 2 {
		conn, err := db.Acquire(as("a"))
		require.NoError(t, err)
		held = append(held, conn)
	}
	served := make(chan *pgxpool.Conn)
	for i := range 20 {
		go func() {
			conn, err := db.Acquire(as(fmt.Sprint("t", i%5)))
			if err != nil {
				t.Error(err)
			}
			served <- conn
		}()
	}
	eventually(t, "they wait", func() bool { return waitingIn(db) == 20 })
	for i := range 20 {
		require.EqualValues(t, 20-i, db.Stat().WaitingAcquires())
		require.EqualValues(t, 2, db.Shared().Stat().AcquiredConns())
		held[0].Release()
		held = append(held[1:], <-served)
	}
	for _, conn := range held {
		conn.Release()
	}
	expectFairlySettled(t, db)
}

func TestATenantsQueueIsBounded(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("pool_max_conns=1"), func(c *Config) {
		c.Limits = func(tenant Tenant) Limits {
			if tenant.Plan == "free" {
				return Limits{MaxWaiting: 2, MaxWait: time.Hour}
			}
			return Limits{MaxWait: 50 * time.Millisecond}
		}
	})
	for name, free := range map[string]Tenant{
		"shared":   {ID: "a", Plan: "free"},
		"isolated": {ID: "b", Plan: "free", Isolation: IsolationDatabase, ConnString: d.AppURL("pool_max_conns=1")},
	} {
		ctx := WithTenant(context.Background(), free)
		held, err := db.Acquire(ctx)
		require.NoError(t, err, name)
		results := make(chan error)
		for range 2 {
			go func() { results <- db.Ping(ctx) }()
		}
		eventually(t, "they wait", func() bool { return db.Stat().WaitingAcquires() == 2 })
		refused := db.Stat().RefusedAcquireCount()
		for _, ping := range []func(context.Context) error{db.Ping, func(ctx context.Context) error {
			pool, release, err := db.Lease(ctx)
			require.NoError(t, err)
			defer release()
			return pool.Ping(ctx)
		}} {
			err = ping(ctx)
			var overload *OverloadError
			require.ErrorAs(t, err, &overload)
			require.ErrorIs(t, err, ErrTenantOverloaded)
			require.Equal(t, 2, overload.Waiting)
			require.Positive(t, overload.RetryAfter)
			var of *TenantError
			require.ErrorAs(t, err, &of)
			require.Equal(t, free.ID, of.Tenant)
			require.Equal(t, 1, strings.Count(err.Error(), "acquire"), "said once: %v", err)
		}
		require.Equal(t, refused+2, db.Stat().RefusedAcquireCount())
		if name == "shared" { // another tenant's queue is its own
			err := db.Ping(as("c"))
			var overload *OverloadError
			require.ErrorAs(t, err, &overload)
			require.Equal(t, 50*time.Millisecond, overload.Waited)
			require.ErrorIs(t, err, ErrTenantOverloaded)
			require.NotErrorIs(t, err, context.DeadlineExceeded)
		}
		held.Release()
		require.NoError(t, <-results)
		require.NoError(t, <-results)
	}
	require.EqualValues(t, 5, db.Stat().RefusedAcquireCount())
	require.Zero(t, db.Stat().CanceledAcquireCount(), "whoever was refused did not go away")
	expectFairlySettled(t, db)
	require.EqualValues(t, 5, db.Stat().RefusedAcquireCount(), "those of closed pools go on counting")
}

// Waiters that give up are forgotten, and a context that has ended does not even wait.
func TestWaitersThatGiveUpLeaveNoTrace(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=1"))
	held, err := db.Acquire(as("a"))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	results := make(chan error)
	for i := range 30 {
		go func() { results <- db.Ping(WithTenant(ctx, Tenant{ID: fmt.Sprint("t", i%7)})) }()
	}
	eventually(t, "they wait", func() bool { return db.Stat().WaitingAcquires() == 30 })
	cancel()
	for range 30 {
		require.ErrorIs(t, <-results, context.Canceled)
	}
	require.ErrorIs(t, db.Ping(WithTenant(ctx, Tenant{ID: "a"})), context.Canceled)
	require.ErrorIs(t, db.Shared().Ping(WithTenant(ctx, Tenant{ID: "a"})), context.Canceled)
	require.ErrorIs(t, db.Shared().Ping(context.Background()), ErrNoTenant, "who may not be served is told at once")
	require.Empty(t, db.gate.queue.flows)
	require.EqualValues(t, permitOut, db.gate.state.Load())
	held.Release()
	require.NoError(t, db.Ping(as("a")))
	expectFairlySettled(t, db)
}

// Who waits in Acquire of the shared pool itself is woken by Close as well.
func TestCloseWakesWhoWaitsInTheSharedPool(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=1"))
	held, err := db.Acquire(as("a"))
	require.NoError(t, err)
	result := make(chan error)
	go func() { result <- db.Shared().Ping(as("b")) }()
	eventually(t, "it waits", func() bool { return waitingIn(db) == 1 })
	closed := make(chan struct{})
	go func() { db.Close(); close(closed) }()
	require.ErrorIs(t, <-result, ErrClosed)
	held.Release()
	<-closed
	require.NoError(t, db.gate.settled())
}

// A hijacked connection is no longer the pool's: another is let in, at once or before long.
func TestHijackedConnectionsLeaveTheirPlace(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=2"))
	hijack := func() *pgx.Conn {
		conn, err := db.Acquire(as("a"))
		require.NoError(t, err)
		return conn.Hijack()
	}
	hijacked := []*pgx.Conn{hijack(), hijack(), hijack()}
	first, err := db.Acquire(as("a"))
	require.NoError(t, err)
	second, err := db.Acquire(as("b"))
	require.NoError(t, err)
	waiting := acquiring(t, db, as("b"), 1)
	hijacked = append(hijacked, first.Hijack()) // nobody is told
	third := <-waiting
	for _, conn := range hijacked {
		require.NoError(t, conn.Close(context.Background()))
	}
	waiting = acquiring(t, db, as("a"), 1)
	second.Release()
	(<-waiting).Release()
	third.Release()
	expectFairlySettled(t, db)
}

func TestAcquireAllIdleTakesPlaces(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL("pool_max_conns=2"))
	conn, err := db.Acquire(as("a"))
	require.NoError(t, err)
	require.NoError(t, db.Ping(as("a")))
	idle := db.AcquireAllIdle(as("b"))
	require.Len(t, idle, 1)
	waiting := acquiring(t, db, as("c"), 1)
	idle[0].Release()
	(<-waiting).Release()
	conn.Release()
	for _, conn := range db.Shared().AcquireAllIdle(as("b")) { // is not seen, and harms nothing
		conn.Release()
	}
	expectFairlySettled(t, db)
}

// The plan's time limits are bound with the tenant, in every protocol, and the server keeps them.
func TestPlansTimeLimits(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	super := d.Connect(d.SuperURL())
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		t.Run(mode.String(), func(t *testing.T) {
			db := openDB(t, d.AppURL(), func(c *Config) {
				c.Shared.ConnConfig.DefaultQueryExecMode = mode
				c.Limits = func(tenant Tenant) Limits {
					return map[string]Limits{
						"free":      {StatementTimeout: 300*time.Second + time.Microsecond, LockTimeout: 100 * time.Second, IdleInTransactionTimeout: 100 * time.Second},
						"statement": {StatementTimeout: 100 * time.Millisecond},
						"lock":      {LockTimeout: 100 * time.Millisecond},
						"idle":      {IdleInTransactionTimeout: 100 * time.Millisecond},
					}[tenant.Plan]
				}
			})
			on := func(plan string) context.Context {
				return WithTenant(context.Background(), Tenant{ID: "a", Plan: plan})
			}
			free := on("free")
			show := "select current_setting('statement_timeout') || ' ' || current_setting('lock_timeout') || ' ' || current_setting('idle_in_transaction_session_timeout')"
			require.Equal(t, []string{"300001ms 100s 100s"}, strs(t, db, free, show))
			require.Equal(t, []string{"0 0 0"}, strs(t, db, as("b"), show), "no other tenant's")
			own := WithTenant(context.Background(), Tenant{ID: "a", Plan: "free", Settings: map[string]string{"Statement_Timeout": "7s"}})
			require.Equal(t, []string{"7s 100s 100s"}, strs(t, db, own, show), "the tenant's own settings go before")

			_, err := db.Exec(on("statement"), "select pg_sleep(600)")
			require.Equal(t, "57014", pgCode(err), "statement_timeout: %v", err)

			lock, err := super.Begin(context.Background())
			require.NoError(t, err)
			_, err = lock.Exec(context.Background(), "select pg_advisory_xact_lock(1)")
			require.NoError(t, err)
			_, err = db.Exec(on("lock"), "select pg_advisory_xact_lock(1)")
			require.Equal(t, "55P03", pgCode(err), "lock_timeout: %v", err)
			require.NoError(t, lock.Rollback(context.Background()))

			tx, err := db.Begin(on("idle"))
			require.NoError(t, err)
			pid := tx.Conn().PgConn().PID()
			_, err = tx.Exec(on("idle"), "select 1") // the limit comes with it, so that it cannot come too late
			require.NoError(t, err)
			eventually(t, "the server ends the idle transaction", func() bool {
				return count(t, super, context.Background(), "select count(*) from pg_stat_activity where pid = $1", pid) == 0
			})
			_, err = tx.Exec(on("idle"), "select 1")
			require.Error(t, err)
			require.Error(t, tx.Commit(on("idle")))
		})
	}
}

// lockedBuffer is what a log is written to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *lockedBuffer) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

func TestAConnectionHeldTooLongIsReported(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	db := openDB(t, pgtest.New(t).AppURL(), func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.Limits = func(tenant Tenant) Limits {
			if tenant.ID == "a" {
				return Limits{HoldLimit: 20 * time.Millisecond}
			}
			return Limits{}
		}
	})
	other, err := db.Acquire(as("b"))
	require.NoError(t, err)
	conn, err := db.Acquire(as("a"))
	require.NoError(t, err)
	reported := func(what string) bool {
		for line := range strings.Lines(log.String()) {
			if strings.Contains(line, what) {
				require.Contains(t, line, "tenant=a ")
				require.Contains(t, line, "limit=20ms")
				require.Contains(t, line, ".TestAConnectionHeldTooLongIsReported ")
				require.Contains(t, line, "fair_test.go:")
				return true
			}
		}
		return false
	}
	eventually(t, "it is reported", func() bool { return reported(`msg="connection held too long"`) })
	require.False(t, reported("returned"))
	conn.Release()
	require.True(t, reported(`msg="connection held too long has been returned"`))
	other.Release()
	require.NotContains(t, log.String(), "tenant=b", "another tenant is not")
	expectFairlySettled(t, db)
}

// The budget of all pools goes by turns too: tenants with pools of their own who want all of it get the same.
func TestBudgetIsSharedFairly(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=4", "pool_max_conns=8"))
	var held []*pgxpool.Conn
	for range 4 {
		conn, err := db.Acquire(isolated("flood", d.AppURL("pool_max_conns=8")))
		require.NoError(t, err)
		held = append(held, conn)
	}
	flood := make(chan *pgxpool.Conn, 20)
	for range 20 {
		go func() {
			conn, err := db.Acquire(isolated("flood", d.AppURL("pool_max_conns=8")))
			if err != nil {
				t.Error(err)
			}
			flood <- conn
		}()
	}
	eventually(t, "they wait", func() bool { return waitingIn(db) == 20 })
	got := make(chan *pgxpool.Conn)
	go func() {
		conn, err := db.Acquire(as("x"))
		if err != nil {
			t.Error(err)
		}
		got <- conn
	}()
	eventually(t, "it waits", func() bool { return waitingIn(db) == 21 })
	held[0].Release()
	x := <-got
	x.Release()
	for _, conn := range held[1:] {
		conn.Release()
	}
	for range 20 {
		(<-flood).Release()
	}
	expectSettled(t, db)
}

// TestBudgetIsSharedByWeight has two pools that want more than there is, and gives back one connection
// after the other.
func TestBudgetIsSharedByWeight(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=6"), func(c *Config) {
		c.Limits = func(t Tenant) Limits {
			if t.ID == "heavy" {
				return Limits{Weight: 2}
			}
			return Limits{}
		}
	})
	type grant struct {
		id   string
		conn *pgxpool.Conn
	}
	const each = 8
	grants := make(chan grant, 2*each)
	want := func(id string) {
		for range each {
			go func() {
				conn, err := db.Acquire(isolated(id, d.AppURL("pool_max_conns=8")))
				if err != nil {
					t.Error(err)
				}
				grants <- grant{id, conn}
			}()
		}
	}
	var light, heavy []grant
	next := func() string {
		g := <-grants
		if g.id == "light" {
			light = append(light, g)
		} else {
			heavy = append(heavy, g)
		}
		return g.id
	}
	giveBack := func(held *[]grant) string {
		(*held)[0].conn.Release()
		*held = (*held)[1:]
		return next()
	}
	want("light")
	for range 6 {
		require.Equal(t, "light", next())
	}
	want("heavy")
	eventually(t, "they wait", func() bool { return waitingIn(db) == each-6+1 }) // for heavy, who opens its pool
	require.Equal(t, "heavy", giveBack(&light))
	eventually(t, "all wait", func() bool { return waitingIn(db) == 2*each-6-1 })
	for range 3 {
		require.Equal(t, "heavy", giveBack(&light), "up to two thirds")
	}
	require.Equal(t, "light", giveBack(&light), "and no more")
	require.Equal(t, "heavy", giveBack(&heavy), "and no less")

	for left := 2*each - 12; left > 0; left-- {
		if len(light) > 0 {
			giveBack(&light)
		} else {
			giveBack(&heavy)
		}
	}
	for _, g := range append(light, heavy...) {
		g.conn.Release()
	}
	expectSettled(t, db)
}

// TestFairStress does everything at once on a small pool, with connections that break, and ends with every
// place where it belongs. What it allows are the documented errors.
func TestFairStress(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for _, params := range []string{"pool_max_conns=4", "tenant_max_conns=4"} {
		db := openDB(t, d.AppURL(params), func(c *Config) {
			c.Limits = func(t Tenant) Limits {
				return Limits{MaxWaiting: 6, Weight: float64(t.ID[0] - 'a'), HoldLimit: time.Minute}
			}
		})
		length := 2 * time.Second
		if testing.Short() {
			length = time.Second
		}
		until, last := time.Now().Add(length), time.Now().Add(patience)
		var done, overloaded, late atomic.Int64
		var wg sync.WaitGroup
		for w := range 24 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 12))
				// On a slow machine it may take longer until each kind of outcome was seen.
				for time.Now().Before(until) || (done.Load() == 0 || overloaded.Load() == 0) && time.Now().Before(last) {
					id := string(rune('a' + r.IntN(6)))
					ctx, cancel := context.WithTimeout(as(id), time.Duration(1+r.IntN(500))*time.Millisecond)
					var got string
					var err error
					switch r.IntN(12) {
					case 0:
						err = db.Shared().QueryRow(ctx, readTenant).Scan(&got)
					case 1:
						for _, c := range db.AcquireAllIdle(ctx) {
							c.Release()
						}
					case 2:
						for _, c := range db.Shared().AcquireAllIdle(ctx) {
							c.Release()
						}
					case 3:
						var conn *pgxpool.Conn
						if conn, err = db.Acquire(ctx); err == nil {
							h := conn.Hijack()
							err = h.QueryRow(context.Background(), readTenant).Scan(&got)
							_ = h.Close(context.Background())
						}
					case 4: // dies in use
						_, err = db.Exec(ctx, "select pg_terminate_backend(pg_backend_pid())")
						if pgCode(err) == "57P01" {
							err = nil
						}
					case 5:
						if r.IntN(10) == 0 {
							db.Reset()
						}
					case 6:
						if err := db.Shared().Ping(context.Background()); !errors.Is(err, ErrNoTenant) {
							t.Error(err)
						}
					default:
						err = db.QueryRow(ctx, readTenant).Scan(&got)
					}
					cancel()
					switch {
					case err == nil:
						if got != "" && got != id {
							t.Errorf("%s got %s", id, got)
						}
						done.Add(1)
					case errors.Is(err, ErrTenantOverloaded):
						overloaded.Add(1)
					case errors.Is(err, context.DeadlineExceeded):
						late.Add(1)
					default:
						t.Errorf("%s: %v", id, err)
					}
				}
			})
		}
		wg.Wait()
		t.Logf("%s: %d done, %d overloaded, %d late", params, done.Load(), overloaded.Load(), late.Load())
		require.Positive(t, done.Load())
		require.Positive(t, overloaded.Load())
		expectFairlySettled(t, db)
	}
}

func TestFairnessInTheConfig(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	c, err := ParseConfig(d.AppURL("tenant_max_share=0.5", "tenant_arrival_order=true"))
	require.NoError(t, err)
	require.Equal(t, 0.5, c.MaxShare)
	require.True(t, c.ArrivalOrder)
	for _, bad := range []string{"0", "-1", "1.01", "NaN"} {
		c, err := ParseConfig(d.AppURL("tenant_max_share=" + bad))
		if err == nil {
			_, err = NewWithConfig(t.Context(), c)
		}
		require.ErrorContains(t, err, "want", "share %s", bad)
	}
	db := openDB(t, d.AppURL("tenant_arrival_order=true"), func(c *Config) {
		c.Limits = func(Tenant) Limits { return Limits{MaxWaiting: 1, StatementTimeout: time.Second} }
	})
	require.Nil(t, db.gate)
	require.Equal(t, []string{"1s"}, strs(t, db, as("a"), "select current_setting('statement_timeout')"))
	require.Zero(t, db.Stat().WaitingAcquires())
	for _, conn := range db.AcquireAllIdle(as("a")) {
		conn.Release()
	}
}
