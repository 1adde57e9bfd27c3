package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// held is how many tokens are out, waiting how many callers wait, and idle how many connections of each
// share are idle by the budget's own count.
func (b *budget) held() int { b.mu.Lock(); defer b.mu.Unlock(); return b.limit - b.free }

func (b *budget) waiters() int { b.mu.Lock(); defer b.mu.Unlock(); return b.waiting }

// settled reports whether all counts are those of a budget where nobody uses or wants anything.
func (b *budget) settled() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	conns := 0
	for _, s := range b.shares {
		if s.busy != 0 || s.reserved != 0 || s.queue.Len() != 0 {
			return fmt.Errorf("a share has busy %d, reserved %d, queue %d", s.busy, s.reserved, s.queue.Len())
		}
		if total := int(s.pool.Stat().TotalConns()); s.conns != total {
			return fmt.Errorf("a share counts %d connections, its pool has %d", s.conns, total)
		}
		conns += s.conns
	}
	if b.waiting != 0 || b.reclaiming != 0 || b.limit-b.free != conns {
		return fmt.Errorf("waiting %d, reclaiming %d, %d of %d tokens free, %d connections", b.waiting, b.reclaiming, b.free, b.limit, conns)
	}
	return nil
}

// expectSettled is the end of every test of the budget.
func expectSettled(t *testing.T, db *TenantDB) {
	t.Helper()
	var err error
	eventually(t, "the budget settles", func() bool {
		if err = db.budget.settled(); err != nil {
			t.Logf("not settled: %v", err)
			time.Sleep(20 * time.Millisecond)
		}
		return err == nil
	})
	db.Close()
	require.Zero(t, db.budget.held(), "no token is lost")
}

// sample watches the number of the role's connections to all databases, and returns the most it saw.
func sample(t *testing.T, super *pgx.Conn, role string) (most func() int) {
	quit, done, n := make(chan struct{}), make(chan struct{}), 0
	stop := sync.OnceFunc(func() { close(quit); <-done })
	t.Cleanup(stop)
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			default:
			}
			var now int
			if err := super.QueryRow(context.Background(), "select count(*) from pg_stat_activity where usename = $1", role).Scan(&now); err != nil {
				t.Error(err)
				return
			}
			n = max(n, now)
		}
	}()
	return func() int { stop(); return n }
}

func TestBudgetGivesUpTheLeastRecentlyUsedIdleConnection(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=3"))
	ctx := func(id string) context.Context { return isolated(id, d.AppURL()) }
	idle := func() (out []string) {
		for _, p := range db.Stat().Pools() {
			out = append(out, fmt.Sprint(p.TenantID, p.IdleConns))
		}
		return append(out, fmt.Sprint("shared", db.Shared().Stat().IdleConns()))
	}
	is := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint(want), func() bool { return slices.Equal(idle(), want) })
	}
	require.NoError(t, db.Ping(as("x")))
	require.NoError(t, db.Ping(ctx("a")))
	require.NoError(t, db.Ping(ctx("b")))
	is("a1", "b1", "shared1")
	require.NoError(t, db.Ping(ctx("a")))
	require.NoError(t, db.Ping(ctx("c")))
	is("a1", "b0", "c1", "shared1")
	require.NoError(t, db.Ping(ctx("b")))
	is("a0", "b1", "c1", "shared1")
	c, err := db.Acquire(ctx("c"))
	require.NoError(t, err)
	b, err := db.Acquire(ctx("b"))
	require.NoError(t, err)
	require.NoError(t, db.Ping(ctx("a")), "only the shared pool has an idle one")
	is("a1", "b0", "c0", "shared0")
	b.Release()
	c.Release()
	require.NoError(t, db.Ping(as("x")))
	require.Equal(t, 3, db.budget.held())
	expectSettled(t, db)
}

// With Config.ArrivalOrder callers wait in the order in which they came, whichever pool they want.
func TestBudgetWaitsInOrder(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	super := d.Connect(d.SuperURL())
	db := openDB(t, d.AppURL("tenant_max_conns=1", "tenant_arrival_order=true"))
	most := sample(t, super, d.App)
	first, err := db.Acquire(as("x"))
	require.NoError(t, err)
	ctxs := []context.Context{isolated("a", d.AppURL()), as("x"), isolated("b", d.AppURL()), as("y"), isolated("c", d.AppURL()), as("x")}
	order := make(chan int, len(ctxs))
	var wg sync.WaitGroup
	for i, ctx := range ctxs {
		wg.Go(func() {
			conn, err := db.Acquire(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			order <- i
			conn.Release()
		})
		eventually(t, "it waits", func() bool { return db.budget.waiters() == i+1 })
	}
	first.Release()
	wg.Wait()
	for i := range ctxs {
		require.Equal(t, i, <-order)
	}
	expectSettled(t, db)
	t.Logf("at most %d backends seen", most())
}

func TestBudgetCancelledWaitersLeaveNoTrace(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=1"))
	held, err := db.Acquire(as("x"))
	require.NoError(t, err)
	made := db.Stat().NewConnsCount()
	var wg sync.WaitGroup
	for i := range 60 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(20+rand.IntN(100))*time.Millisecond)
		defer cancel()
		wg.Go(func() {
			var err error
			switch i % 3 {
			case 0:
				err = db.Ping(WithTenant(ctx, Tenant{ID: "y"}))
			case 1:
				err = db.Ping(isolatedFrom(ctx, fmt.Sprint("t", i%7), d.AppURL()))
			case 2:
				err = db.Shared().Ping(WithTenant(ctx, Tenant{ID: "y"}))
			}
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v; want deadline exceeded", err)
			}
		})
	}
	wg.Wait()
	eventually(t, "nothing waits, nor is being opened", func() bool { return waitingIn(db) == 0 && len(states(db)) == 0 })
	require.Equal(t, 1, db.budget.held())
	require.Equal(t, made, db.Stat().NewConnsCount(), "no connection was made for them")
	require.Empty(t, db.isolated.failed, "nor was their waiting taken for a failure")
	held.Release()
	require.NoError(t, db.Ping(as("x")))
	require.Equal(t, made, db.Stat().NewConnsCount(), "and the one there is was kept")
	expectSettled(t, db)
}

// Time spent waiting for room is the caller's to limit, not OpenTimeout's.
func TestBudgetWaitIsNoOpenTimeout(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=1", "tenant_open_timeout=3s"))
	held, err := db.Acquire(as("x"))
	require.NoError(t, err)
	result := make(chan error)
	go func() { result <- db.Ping(isolated("t", d.AppURL())) }()
	select {
	case err := <-result:
		t.Fatal(err)
	case <-time.After(3500 * time.Millisecond):
	}
	held.Release()
	require.NoError(t, <-result)
	expectSettled(t, db)
}

// A busy pool within its own limit does not lose its connections to its own waiters, nor two busy pools
// theirs to each other at every release.
func TestBudgetDoesNotThrash(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	const callers, each = 16, 60
	// made is how many connections it takes to run all statements.
	made := func(direct bool, ctxs []context.Context) int64 {
		db := openDB(t, d.AppURL("tenant_max_conns=4", "pool_max_conns=20"))
		var wg sync.WaitGroup
		var done atomic.Int64
		for i := range callers {
			wg.Go(func() {
				ctx := ctxs[i%len(ctxs)]
				for range each {
					var err error
					if direct && len(ctxs) == 1 {
						_, err = db.Shared().Exec(ctx, "select 1")
					} else {
						_, err = db.Exec(ctx, "select 1")
					}
					if err != nil {
						t.Error(err)
						return
					}
					done.Add(1)
				}
			})
		}
		wg.Wait()
		require.EqualValues(t, callers*each, done.Load())
		expectSettled(t, db)
		return db.Stat().NewConnsCount()
	}
	for name, ctxs := range map[string][]context.Context{
		"one pool":  {as("x")},
		"two pools": {isolated("a", d.AppURL("pool_max_conns=20")), isolated("b", d.AppURL("pool_max_conns=20"))},
	} {
		for _, direct := range []bool{false, true} {
			// 4 to 90 mostly, and 140 now and then, as goroutines happen to run; 250 and more where pools take from each other.
			least := int64(math.MaxInt64)
			for try := 0; try < 6 && least >= callers*each/10; try++ {
				least = min(least, made(direct, ctxs))
			}
			require.Less(t, least, int64(callers*each/10), "%s, direct %v", name, direct)
		}
	}
}

// A pool at its own limit is not the budget's business, and neither are connections that left the pool,
// but for their tokens.
func TestBudgetAndHijackedConnections(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=4", "pool_max_conns=2"))
	ctx, cancel := context.WithTimeout(as("x"), time.Minute)
	defer cancel()
	var hijacked []*pgx.Conn
	for range 2 {
		conn, err := db.Acquire(ctx)
		require.NoError(t, err)
		hijacked = append(hijacked, conn.Hijack())
	}
	require.Equal(t, 2, db.budget.held())
	conn, err := db.Acquire(ctx)
	require.NoError(t, err, "the pool itself has room again")
	other, err := db.Acquire(ctx)
	require.NoError(t, err)

	// One that waits because its pool is full learns of a hijacking in time.
	require.NoError(t, hijacked[0].Close(context.Background()))
	result := make(chan error)
	go func() { result <- db.Ping(ctx) }()
	eventually(t, "it waits", func() bool { return waitingIn(db) == 1 })
	hijacked[0] = conn.Hijack()
	require.NoError(t, <-result)

	require.NoError(t, hijacked[0].Close(context.Background()))
	require.NoError(t, hijacked[1].Close(context.Background()))
	other.Release()
	expectSettled(t, db)
}

// Connections for MinConns are made in the background if there is room, and nobody waits for them.
func TestBudgetAndMinConns(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=3", "pool_min_conns=2"))
	eventually(t, "they are made", func() bool { return db.Shared().Stat().IdleConns() == 2 })
	require.NoError(t, db.Ping(isolated("a", d.AppURL("pool_min_conns=3"))))
	require.NoError(t, db.Ping(isolated("b", d.AppURL("pool_min_conns=3"))))
	require.NoError(t, db.Ping(as("x")))
	require.LessOrEqual(t, db.budget.held(), 3)
	db.Close()
	require.Zero(t, db.budget.held())
}

func TestBudgetAndLeases(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=1"))
	pool, release, err := db.Lease(isolated("a", d.AppURL()))
	require.NoError(t, err)
	require.NoError(t, db.Ping(as("x")), "a lease holds no connection")
	require.NoError(t, pool.Ping(isolated("a", d.AppURL())))
	require.NoError(t, db.Ping(as("x")))
	release()
	expectSettled(t, db)
}

// Every way in which the making of a connection can fail returns its token.
func TestBudgetAfterFailedConnections(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	_, deadPort, _ := net.SplitHostPort(nobody)
	host, port, _ := net.SplitHostPort(d.Server().Addr())
	boom := errors.New("boom")
	fail := func(f func(c *pgxpool.Config)) func(Tenant, *pgxpool.Config) error {
		return func(_ Tenant, c *pgxpool.Config) error { f(c); return nil }
	}
	for name, test := range map[string]struct {
		url    string
		adjust func(c *pgxpool.Config)
		works  bool
	}{
		"refused":        {url: d.Via(nobody).AppURL()},
		"wrong password": {url: d.AppURL("password=x")},
		"wrong database": {url: d.AppURL("dbname=nope")},
		"bad parameter":  {url: d.AppURL("nonsense=x")},
		"unknown host":   {url: d.AppURL("host=no..such..host")},
		"BeforeConnect": {url: d.AppURL(), adjust: func(c *pgxpool.Config) {
			c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { return boom }
		}},
		"AfterConnect":    {url: d.AppURL(), adjust: func(c *pgxpool.Config) { c.AfterConnect = func(context.Context, *pgx.Conn) error { return boom } }},
		"AfterNetConnect": {url: d.AppURL(), adjust: func(c *pgxpool.Config) { c.ConnConfig.MaxProtocolVersion = "nonsense" }},
		"LookupFunc": {url: d.AppURL("host=x"), adjust: func(c *pgxpool.Config) {
			c.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) { return nil, boom }
		}},
		"no address": {url: d.AppURL("host=x"), adjust: func(c *pgxpool.Config) {
			c.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) { return nil, nil }
		}},
		"second host":  {url: d.AppURL("host=127.0.0.1,"+host, "port="+deadPort+","+port), works: true},
		"second login": {url: d.AppURL("host="+host+","+host, "port="+port+","+port, "target_session_attrs=prefer-standby"), works: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := openDB(t, d.AppURL("tenant_max_conns=1"), func(c *Config) {
				c.OpenRetry = -1
				if test.adjust != nil {
					c.AdjustPool = fail(test.adjust)
				}
			})
			for range 3 {
				ctx, cancel := context.WithTimeout(isolated("t", test.url), time.Minute)
				err := db.Ping(ctx)
				cancel()
				require.Equal(t, test.works, err == nil, "%v", err)
				require.NotErrorIs(t, err, context.DeadlineExceeded)
			}
			require.NoError(t, db.Ping(as("x")), "the one token is there")
			expectSettled(t, db)
		})
	}
}

// A request to cancel goes over a connection of its own, which counts for nothing.
func TestBudgetLetsCancelRequestsPass(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_conns=1"))
	conn, err := db.Acquire(as("x"))
	require.NoError(t, err)
	result := make(chan error)
	go func() {
		_, err := conn.Exec(context.Background(), "select pg_sleep(60)")
		result <- err
	}()
	eventually(t, "cancelled", func() bool {
		require.NoError(t, conn.Conn().PgConn().CancelRequest(context.Background()))
		select {
		case err := <-result:
			require.Equal(t, "57014", pgCode(err))
			return true
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
	conn.Release()

	// A statement whose context ends is cancelled that way too, and its connection closed.
	ctx, cancel := context.WithTimeout(as("x"), 100*time.Millisecond)
	defer cancel()
	_, err = db.Exec(ctx, "select pg_sleep(60)")
	require.Error(t, err)
	require.NoError(t, db.Ping(as("x")))
	expectSettled(t, db)
}

func TestBudgetWithTLSAndTracers(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	tracer := &poolTracer{}
	db := openDB(t, d.AppURL("tenant_max_conns=2", "sslmode=require"), func(c *Config) { c.Shared.ConnConfig.Tracer = tracer })
	require.NoError(t, db.Ping(as("x")))
	require.Equal(t, []string{"true"}, strs(t, db, as("x"), "select ssl::text from pg_stat_ssl where pid = pg_backend_pid()"))
	for i := range 4 {
		require.NoError(t, db.Ping(isolated(fmt.Sprint("t", i), d.AppURL("sslmode=require"))))
	}
	expectSettled(t, db)
	require.EqualValues(t, tracer.starts.Load(), tracer.ends.Load())
	require.EqualValues(t, tracer.starts.Load(), tracer.releases.Load())
	require.GreaterOrEqual(t, tracer.starts.Load(), int64(6))
	require.Positive(t, tracer.queries.Load(), "queries are traced as well")
}

type poolTracer struct{ starts, ends, releases, queries atomic.Int64 }

func (t *poolTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	t.queries.Add(1)
	return ctx
}
func (t *poolTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (t *poolTracer) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	t.starts.Add(1)
	return ctx
}
func (t *poolTracer) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {
	t.ends.Add(1)
}
func (t *poolTracer) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData) { t.releases.Add(1) }

// TestBudgetStress does everything at once, with connections that break, and watches the server. What it allows
// are the documented errors.
func TestBudgetStress(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	super := d.Connect(d.SuperURL())
	const limit, tenants, workers = 6, 9, 24
	length := 8 * time.Second
	if testing.Short() {
		length = 2 * time.Second
	}
	db := openDB(t, d.AppURL(fmt.Sprint("tenant_max_conns=", limit), "tenant_max_pools=4", "pool_max_conns=4"))
	var most atomic.Int64
	backends := sample(t, super, d.App)
	until := time.Now().Add(length)
	var done, busy, late, killed, other atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for time.Now().Before(until) {
				id := fmt.Sprintf("t%d", r.IntN(tenants))
				base, cancel := context.WithTimeout(context.Background(), time.Duration(1+r.IntN(2000))*time.Millisecond)
				ctx := isolatedFrom(base, id, d.AppURL("pool_max_conns=3"))
				if r.IntN(3) == 0 {
					ctx = WithTenant(base, Tenant{ID: id})
				}
				var got string
				var err error
				switch r.IntN(12) {
				case 0:
					db.Evict(id)
				case 1:
					err = db.Shared().QueryRow(WithTenant(base, Tenant{ID: id}), readTenant).Scan(&got)
				case 2:
					for _, c := range db.AcquireAllIdle(ctx) {
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
						killed.Add(1)
					}
				case 5:
					if r.IntN(10) == 0 {
						db.Reset()
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
				case errors.Is(err, ErrPoolsBusy):
					busy.Add(1)
				case errors.Is(err, context.DeadlineExceeded):
					late.Add(1)
				default:
					other.Add(1)
					t.Errorf("%s: %v", id, err)
				}
				most.Store(max(most.Load(), int64(db.budget.held())))
			}
		})
	}
	wg.Wait()
	seen := backends()
	t.Logf("%d done, %d busy, %d late, %d killed; at most %d tokens and %d backends; %d connections made",
		done.Load(), busy.Load(), late.Load(), killed.Load(), most.Load(), seen, db.Stat().NewConnsCount())
	require.Positive(t, done.Load())
	require.LessOrEqual(t, most.Load(), int64(limit))
	require.LessOrEqual(t, seen, limit)
	expectSettled(t, db)
}
