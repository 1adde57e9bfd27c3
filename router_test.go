package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// patience is how long a test waits before it calls a thing hung: far longer than the slowest machine takes, for
// a test that passes does not wait for it.
const patience = 2 * time.Minute

// eventually waits for what no signal tells, such as the server noticing that a client is gone.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// ends runs f and fails the test if it hangs, rather than hang with it.
func ends(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("not in %v: %s", patience, what)
	}
}

// nobody is an address that refuses connections. A port that was free a moment ago may be another test's by now.
const nobody = "127.0.0.1:1"

// isolated is the context of a tenant with a database of its own.
func isolated(id, connString string) context.Context {
	return isolatedFrom(context.Background(), id, connString)
}

func isolatedFrom(ctx context.Context, id, connString string) context.Context {
	return WithTenant(ctx, Tenant{ID: id, Isolation: IsolationDatabase, ConnString: connString})
}

// A new method of pgxpool.Pool is noticed here.
func TestTenantDBHasThePoolsMethods(t *testing.T) {
	t.Parallel()
	pool, db := reflect.TypeFor[*pgxpool.Pool](), reflect.TypeFor[*TenantDB]()
	for i := range pool.NumMethod() {
		want := pool.Method(i)
		got, ok := db.MethodByName(want.Name)
		require.True(t, ok, "TenantDB lacks %s", want.Name)
		switch want.Name {
		case "Config", "Stat": // of this package's own types
			continue
		}
		require.Equal(t, want.Type.NumIn(), got.Type.NumIn(), want.Name)
		for j := 1; j < want.Type.NumIn(); j++ {
			require.Equal(t, want.Type.In(j), got.Type.In(j), want.Name)
		}
		require.Equal(t, want.Type.NumOut(), got.Type.NumOut(), want.Name)
		for j := range want.Type.NumOut() {
			require.Equal(t, want.Type.Out(j), got.Type.Out(j), want.Name)
		}
		require.Equal(t, want.Type.IsVariadic(), got.Type.IsVariadic(), want.Name)
	}
	for i := range db.NumMethod() { // and the tests below reach all that could send something
		m := db.Method(i)
		if m.Type.NumIn() > 1 && m.Type.In(1) == reflect.TypeFor[context.Context]() && !slices.Contains(administrative, m.Name) {
			require.Contains(t, calls, m.Name)
		}
	}
	poolStat, stat := reflect.TypeFor[*pgxpool.Stat](), reflect.TypeFor[*Stat]()
	for i := range poolStat.NumMethod() {
		want := poolStat.Method(i)
		got, ok := stat.MethodByName(want.Name)
		require.True(t, ok, "Stat lacks %s", want.Name)
		require.Equal(t, want.Type.Out(0), got.Type.Out(0), want.Name)
	}
}

// administrative methods run as nobody's tenant, on the Admin pool if on any.
var administrative = []string{
	"Shutdown", "Audit", "InstallSeal", "RetireSealKeys", "EnableRLS", "PlanEnableRLS", "DisableRLS", "PlanDisableRLS", "Provision", "Deprovision",
	"PlanInstall", "PlanProvision", "PlanDeprovision", "PlanInstallSeal", "ForEach", "ForEachProgress", "Pending", "Runs", "RunResults", "PurgeRuns", "Ledgers",
}

// calls is every exported method that takes a context, as what it fails with.
var calls = map[string]func(db *TenantDB, ctx context.Context) error{
	"Acquire": func(db *TenantDB, ctx context.Context) error {
		c, err := db.Acquire(ctx)
		if err == nil {
			c.Release()
		}
		return err
	},
	"AcquireFunc": func(db *TenantDB, ctx context.Context) error {
		return db.AcquireFunc(ctx, func(*pgxpool.Conn) error { return nil })
	},
	"Begin": func(db *TenantDB, ctx context.Context) error { return endTx(db.Begin(ctx)) },
	"BeginTx": func(db *TenantDB, ctx context.Context) error {
		return endTx(db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.Serializable}))
	},
	"CopyFrom": func(db *TenantDB, ctx context.Context) error {
		_, err := db.CopyFrom(ctx, pgx.Identifier{"note"}, []string{"id"}, rowsOf(0, nil))
		return err
	},
	"Exec": func(db *TenantDB, ctx context.Context) error {
		_, err := db.Exec(ctx, "select 1")
		return err
	},
	"Lease": func(db *TenantDB, ctx context.Context) error {
		_, release, err := db.Lease(ctx)
		if err == nil {
			release()
		}
		return err
	},
	"Ping": func(db *TenantDB, ctx context.Context) error { return db.Ping(ctx) },
	"Query": func(db *TenantDB, ctx context.Context) error {
		rows, err := db.Query(ctx, "select 1")
		if err == nil {
			rows.Close()
			return rows.Err()
		}
		if !errors.Is(rows.Err(), err) || rows.Next() || rows.Scan() != rows.Err() || rows.Conn() != nil {
			return errors.New("the rows of a failed query do not carry its error")
		}
		return err
	},
	"QueryRow": func(db *TenantDB, ctx context.Context) error {
		var n int
		return db.QueryRow(ctx, "select 1").Scan(&n)
	},
	"SendBatch": func(db *TenantDB, ctx context.Context) error {
		b := &pgx.Batch{}
		b.Queue("select 1")
		return db.SendBatch(ctx, b).Close()
	},
	"Shared.Acquire": func(db *TenantDB, ctx context.Context) error {
		c, err := db.Shared().Acquire(ctx)
		if err == nil {
			c.Release()
		}
		return err
	},
	"AcquireAllIdle": func(db *TenantDB, ctx context.Context) error {
		conns := db.AcquireAllIdle(ctx)
		for _, c := range conns {
			c.Release()
		}
		if len(conns) == 0 {
			return errNothingIdle // it has no other way to say what is wrong
		}
		return nil
	},
}

var errNothingIdle = errors.New("AcquireAllIdle returned nothing")

func endTx(tx pgx.Tx, err error) error {
	if err != nil {
		return err
	}
	return tx.Rollback(context.Background())
}

// expectAll calls every method and wants target from each.
func expectAll(t *testing.T, db *TenantDB, ctx context.Context, target error, except ...string) {
	t.Helper()
	for name, call := range calls {
		if slices.Contains(except, name) {
			continue
		}
		ends(t, name, func() {
			err := call(db, ctx)
			if name == "AcquireAllIdle" {
				if err != errNothingIdle {
					t.Errorf("%s gave connections", name)
				}
			} else if !errors.Is(err, target) {
				t.Errorf("%s: %v; want %v", name, err, target)
			}
		})
	}
}

func TestEveryMethodWantsATenant(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	proxy := pgtest.NewProxy(t, d.Server().Addr())
	db := openDB(t, d.Via(proxy.Addr()).AppURL())

	expectAll(t, db, context.Background(), ErrNoTenant, "Shared.Acquire")
	require.Zero(t, proxy.Stats().Conns, "not even a connection")

	require.NoError(t, db.Ping(as("a")))
	before := proxy.Stats()
	expectAll(t, db, context.Background(), ErrNoTenant)
	require.Equal(t, before, proxy.Stats(), "nothing may be sent")

	for name, call := range calls { // and with one, all work
		require.NoError(t, call(db, as("a")), name)
	}
}

// One TenantDB serves three tenants at three levels of isolation, each of which sees its own rows.
func TestThreeLevelsOfIsolation(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	own := d.Database("app.current_tenant_id=dora")
	app := pgx.Identifier{d.App}.Sanitize()
	d.RLSTable("note")
	d.Exec("create schema tenant_sam", "grant usage on schema tenant_sam to "+app, "create table tenant_sam.note (tenant_id text, id int, body text)",
		"grant all on tenant_sam.note to "+app)
	own.Exec("create table note (tenant_id text, id int, body text)", "grant all on note to "+app)

	tenants := newDirectory(
		Tenant{ID: "rita"},
		Tenant{ID: "sam", Isolation: IsolationSchema},
		Tenant{ID: "dora", Isolation: IsolationDatabase, ConnString: own.AppURL()},
		Tenant{ID: "olaf"},
	)
	db := openDB(t, d.AppURL("pool_max_conns=2"), func(c *Config) { c.Directory = tenants; c.RequireIdentity = true })
	ctx := func(id string) context.Context { return WithTenantID(context.Background(), id) }
	ids := []string{"rita", "sam", "dora", "olaf"}
	for _, id := range ids {
		_, err := db.Exec(ctx(id), "insert into note values ($1, 1, $2)", id, id+"'s")
		require.NoError(t, err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 40 {
				id := ids[(i+j)%len(ids)]
				rows, err := db.Query(ctx(id), "select body from note")
				if err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				if got, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || len(got) != 1 || got[0] != id+"'s" {
					t.Errorf("%s: %q, %v", id, got, err)
				}
				b := &pgx.Batch{}
				b.Queue("select body from note")
				b.Queue("select current_setting('app.current_tenant_id')")
				br := db.SendBatch(ctx(id), b)
				var body, tenant string
				if err := errors.Join(br.QueryRow().Scan(&body), br.QueryRow().Scan(&tenant), br.Close()); err != nil || body != id+"'s" || tenant != id {
					t.Errorf("%s: batch: %q %q %v", id, body, tenant, err)
				}
			}
		})
	}
	wg.Wait()
	require.Equal(t, d.Name, strs(t, db, ctx("rita"), "select current_database()")[0])
	require.Equal(t, own.Name, strs(t, db, ctx("dora"), "select current_database()")[0])

	pools := db.Stat().Pools()
	require.Len(t, pools, 1)
	require.Equal(t, "dora", pools[0].TenantID)
	require.Equal(t, PoolOpen, pools[0].State)

	// The shared pool itself refuses the tenant whose data are elsewhere.
	_, err := db.Shared().Exec(ctx("dora"), "select 1")
	require.ErrorIs(t, err, ErrInvalidTenant)
	require.ErrorContains(t, err, "dora")
	require.ErrorContains(t, err, "Lease")
}

// A transaction begun by a batch keeps its connection until it ends.
func TestSendBatchWithATransaction(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	db := openDB(t, d.AppURL("pool_max_conns=1"))
	b := &pgx.Batch{}
	b.BeginTx(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	b.Queue("insert into note (id) values (1)")
	br := db.SendBatch(as("a"), b)
	tx := br.Tx()
	require.NotNil(t, tx)
	require.NoError(t, br.Close())
	require.EqualValues(t, 1, db.Stat().AcquiredConns())
	require.Equal(t, 1, count(t, tx, context.Background(), "select count(*) from note"))
	require.NoError(t, tx.Commit(context.Background()))
	require.ErrorIs(t, tx.Rollback(context.Background()), pgx.ErrTxClosed)
	require.Zero(t, db.Stat().AcquiredConns())
	require.Equal(t, 1, count(t, db, as("a"), "select count(*) from note"))
}

// Every result gives its connection back, however it ends: there is only one to be had.
func TestResultsReturnTheirConnection(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("pool_max_conns=1"))
	ctx, cancel := context.WithTimeout(as("a"), time.Minute)
	defer cancel()
	for name, use := range map[string]func(){
		"rows read": func() { _ = strs(t, db, ctx, "select 'x'") },
		"rows closed": func() {
			rows, _ := db.Query(ctx, "select generate_series(1,9)")
			rows.Next()
			rows.Close()
			rows.Close()
		},
		"rows misread": func() { rows, _ := db.Query(ctx, "select 'x'"); rows.Next(); _ = rows.Scan(new(int), new(int)) },
		"rows failed": func() {
			rows, _ := db.Query(ctx, "select 1/(i-2) from generate_series(1,3) i")
			for rows.Next() {
			}
			require.Error(t, rows.Err())
		},
		"query failed":  func() { _, err := db.Query(ctx, "select nope"); require.Error(t, err) },
		"row":           func() { _ = db.QueryRow(ctx, "select 1").Scan(new(int)) },
		"row none":      func() { require.ErrorIs(t, db.QueryRow(ctx, "select 1 where false").Scan(new(int)), pgx.ErrNoRows) },
		"row misread":   func() { _ = db.QueryRow(ctx, "select 'x'").Scan(new(int)) },
		"row panicked":  func() { defer func() { _ = recover() }(); _ = db.QueryRow(ctx, "select 1").Scan(panicScanner{}) },
		"begin refused": func() { _, err := db.BeginTx(ctx, pgx.TxOptions{BeginQuery: "begin nonsense"}); require.Error(t, err) },
		"batch":         func() { b := &pgx.Batch{}; b.Queue("select 1"); require.NoError(t, db.SendBatch(ctx, b).Close()) },
		"func failed":   func() { _ = db.AcquireFunc(ctx, func(*pgxpool.Conn) error { return errors.New("x") }) },
		"func panicked": func() {
			defer func() { _ = recover() }()
			_ = db.AcquireFunc(ctx, func(*pgxpool.Conn) error { panic("x") })
		},
		"commit refused": func() { tx, _ := db.Begin(ctx); _, _ = tx.Exec(ctx, "nonsense"); require.Error(t, tx.Commit(ctx)) },
	} {
		use()
		require.NoError(t, db.Ping(ctx), "after %s", name)
	}
}

type panicScanner struct{}

func (panicScanner) Scan(any) error { panic("x") }

// waitingIn is how many checkouts wait for a connection, wherever they do.
func waitingIn(db *TenantDB) int {
	db.checkouts.mu.Lock()
	inPool := len(db.checkouts.waiting)
	db.checkouts.mu.Unlock()
	before := int(db.Stat().WaitingAcquires())
	if db.budget != nil {
		before += db.budget.waiters()
	}
	return max(inPool, before)
}

func TestCloseWakesWhoWaits(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for name, params := range map[string]string{"": "pool_max_conns=1", "budget": "tenant_max_conns=1", "traced": "pool_max_conns=1"} {
		for _, iso := range []bool{false, true} {
			t.Run(fmt.Sprint("isolated=", iso, name), func(t *testing.T) {
				t.Parallel()
				db := openDB(t, d.AppURL(params), func(c *Config) {
					if name == "traced" {
						c.Shared.ConnConfig.Tracer = derivingTracer{}
					}
				})
				ctx := as("a")
				if iso {
					ctx = isolated("a", d.AppURL("pool_max_conns=1"))
				}
				conn, err := db.Acquire(ctx)
				require.NoError(t, err)
				const waiters = 20
				results := make(chan error, waiters)
				for range waiters {
					go func() {
						_, err := db.Acquire(ctx)
						results <- err
					}()
				}
				eventually(t, "all wait", func() bool {
					return waiters == waitingIn(db)
				})
				closed := make(chan struct{})
				go func() { db.Close(); close(closed) }()
				ends(t, "waiters woken", func() {
					for range waiters {
						if err := <-results; err != ErrClosed {
							t.Errorf("%v; want ErrClosed", err)
						}
					}
				})
				select {
				case <-closed:
					t.Fatal("Close did not wait for the connection")
				default:
				}
				var one int
				require.NoError(t, conn.QueryRow(context.Background(), "select 1").Scan(&one), "who has a connection keeps it")
				conn.Release()
				<-closed
			})
		}
	}
}

// derivingTracer makes a context of its own for each checkout.
type derivingTracer struct{}

func (derivingTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (derivingTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (derivingTracer) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	type key struct{}
	ctx, cancel := context.WithCancel(ctx)
	return context.WithValue(ctx, key{}, cancel)
}
func (derivingTracer) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {}
func (derivingTracer) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData)                        {}

func TestUseAfterClose(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	admin, err := pgxpool.ParseConfig(d.OwnerURL())
	require.NoError(t, err)
	db := openDB(t, d.AppURL(), func(c *Config) { c.Admin = admin })
	require.NoError(t, db.Ping(as("a")))
	require.NoError(t, db.Ping(isolated("b", d.AppURL())))
	require.NoError(t, db.Admin().Ping(context.Background()))
	ends(t, "Close", db.Close)
	ends(t, "second Close", db.Close)

	for _, ctx := range []context.Context{as("a"), isolated("b", d.AppURL()), isolated("new", d.AppURL()), context.Background(), WithoutTenant(context.Background())} {
		expectAll(t, db, ctx, ErrClosed, "Shared.Acquire")
	}
	require.Error(t, db.Shared().Ping(as("a")))
	require.Error(t, db.Admin().Ping(context.Background()))
	require.NoError(t, db.Shutdown(context.Background()))
	require.Zero(t, db.Stat().TotalConns())
	require.Empty(t, db.Stat().Pools())
	require.NotNil(t, db.Config())
	db.Reset()
	db.Evict("b")
}

func TestShutdownGivesUpAndNamesWhatIsInUse(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL())
	conn, err := db.Acquire(as("a"))
	require.NoError(t, err)
	own, err := db.Acquire(isolated("dora", d.AppURL()))
	require.NoError(t, err)
	_, release, err := db.Lease(isolated("lena", d.AppURL()))
	require.NoError(t, err)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err = db.Shutdown(ctx)
	require.ErrorIs(t, err, context.Canceled)
	for _, part := range []string{"shared pool (1 connections)", `pool of tenant "dora"`, `pool of tenant "lena"`, "1 leases"} {
		require.ErrorContains(t, err, part)
	}
	require.ErrorIs(t, db.Ping(as("a")), ErrClosed)
	conn.Release()
	own.Release()
	release()
	release()
	require.NoError(t, db.Shutdown(context.Background()), "it goes on in the background")
}

func TestACancelledContext(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	proxy := pgtest.NewProxy(t, d.Server().Addr())
	via := d.Via(proxy.Addr())
	for name, tenant := range map[string]func(context.Context) context.Context{
		"row": func(ctx context.Context) context.Context { return WithTenant(ctx, Tenant{ID: "a"}) },
		"database": func(ctx context.Context) context.Context {
			return isolatedFrom(ctx, "a", via.AppURL("pool_max_conns=1"))
		},
	} {
		db := openDB(t, via.AppURL("pool_max_conns=1"))
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		before := proxy.Stats()
		expectAll(t, db, tenant(ended), context.Canceled)
		require.Equal(t, before, proxy.Stats(), "%s: cancelled before: nothing is sent", name)
		require.Empty(t, db.Stat().Pools(), "nor any pool opened")

		conn, err := db.Acquire(tenant(context.Background()))
		require.NoError(t, err)
		during, cancel := context.WithCancel(context.Background())
		result := make(chan error)
		go func() { result <- db.Ping(tenant(during)) }()
		eventually(t, "it waits", func() bool { return waitingIn(db) == 1 })
		cancel()
		err = <-result
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorContains(t, err, `tenant "a": acquire`)
		conn.Release()
		require.NoError(t, db.Ping(tenant(context.Background())))

		after, cancel := context.WithCancel(context.Background())
		conn, err = db.Acquire(tenant(after))
		require.NoError(t, err)
		cancel()
		var one int
		require.NoError(t, conn.QueryRow(context.Background(), "select 1").Scan(&one), "the connection outlives the checkout's context")
		_, err = conn.Exec(tenant(after), "select 1")
		require.ErrorIs(t, err, context.Canceled)
		conn.Release()
		require.NoError(t, db.Ping(tenant(context.Background())), "safe or destroyed")
	}
}

func TestConfigIsACopy(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	config, err := ParseConfig(d.AppURL())
	require.NoError(t, err)
	config.SharedSchemas = []string{"public"}
	db, err := NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	defer db.Close()
	require.Nil(t, config.Shared.PrepareConn, "the caller's config is left alone")
	require.Nil(t, config.Shared.ConnConfig.AfterNetConnect)
	config.Shared.MaxConns, config.SharedSchemas[0] = 99, "x"
	got := db.Config()
	require.NotEqual(t, int32(99), got.Shared.MaxConns)
	require.Equal(t, []string{"public"}, got.SharedSchemas)
	got.Shared.ConnConfig.RuntimeParams["x"] = "y"
	require.NotContains(t, db.Config().Shared.ConnConfig.RuntimeParams, "x")
	require.Nil(t, got.Shared.PrepareConn, "nor are its own hooks shown")

	again, err := NewWithConfig(context.Background(), got)
	require.Error(t, again.Ping(as("a")), "x is no parameter")
	again.Close()
	require.NoError(t, err)
}

func TestAdminIsNotBound(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("note")
	require.Nil(t, openDB(t, d.AppURL()).Admin())
	admin, err := pgxpool.ParseConfig(d.SuperURL())
	require.NoError(t, err)
	db := openDB(t, d.AppURL(), func(c *Config) { c.Admin = admin })
	for _, id := range []string{"a", "b"} {
		_, err := db.Exec(as(id), "insert into note (id) values (1)")
		require.NoError(t, err)
	}
	require.Equal(t, 2, count(t, db.Admin(), context.Background(), "select count(*) from note"))
	require.Equal(t, 1, count(t, db, as("a"), "select count(*) from note"))
	_, err = db.Admin().Exec(context.Background(), "vacuum note")
	require.NoError(t, err)
}

func TestResetAndAcquireAllIdle(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL())
	iso := isolated("b", d.AppURL())
	require.Empty(t, db.AcquireAllIdle(iso), "no pool is opened for it")
	require.Empty(t, db.Stat().Pools())
	for _, ctx := range []context.Context{as("a"), iso} {
		pid := strs(t, db, ctx, "select pg_backend_pid()::text")
		conns := db.AcquireAllIdle(ctx)
		require.Len(t, conns, 1)
		require.Equal(t, pid, strs(t, conns[0], context.Background(), "select pg_backend_pid()::text"))
		require.Equal(t, []string{carried(ctx).tenant.ID}, strs(t, conns[0], context.Background(), readTenant))
		conns[0].Release()
		db.Reset()
		require.NotEqual(t, pid, strs(t, db, ctx, "select pg_backend_pid()::text"))
	}
}

// Hooks on Shared that see a checkout's context may keep it.
func TestHooksMayKeepTheContext(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	var kept []context.Context
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.Shared.PrepareConn = func(ctx context.Context, _ *pgx.Conn) (bool, error) {
			kept = append(kept, ctx)
			return true, nil
		}
	})
	for _, id := range []string{"a", "b", "c"} {
		require.NoError(t, db.Ping(as(id)))
	}
	for i, id := range []string{"a", "b", "c"} {
		got, ok := FromContext(kept[i])
		require.True(t, ok)
		require.Equal(t, id, got.ID)
	}
}
