package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// backends counts the connections of the application's role to a database, as the server sees them.
func backends(t testing.TB, super *pgx.Conn, d *pgtest.DB) int {
	return count(t, super, context.Background(), "select count(*) from pg_stat_activity where usename = $1 and datname = $2", d.App, d.Name)
}

// states are the isolated pools as "tenant state" lines.
func states(db *TenantDB) (out []string) {
	for _, p := range db.Stat().Pools() {
		out = append(out, p.TenantID+" "+string(p.State))
	}
	return out
}

// A thousand callers of one cold tenant make one pool and, before that is open, one connection.
func TestThunderingHerd(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	proxy := pgtest.NewProxy(t, d.Server().Addr())
	var pools, conns atomic.Int64
	release := make(chan struct{})
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.AdjustPool = func(_ Tenant, c *pgxpool.Config) error {
			pools.Add(1)
			c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
				if conns.Add(1) == 1 {
					<-release
				}
				return nil
			}
			return nil
		}
	})
	const n = 1000
	results := make(chan error, n)
	first, cancelFirst := context.WithCancel(context.Background())
	ctx := isolated("t", d.Via(proxy.Addr()).AppURL())
	go func() { results <- db.Ping(isolatedFrom(first, "t", d.Via(proxy.Addr()).AppURL())) }()
	eventually(t, "the opening began", func() bool { return conns.Load() == 1 })
	for range n - 1 {
		go func() { results <- db.Ping(ctx) }()
	}
	eventually(t, "all wait", func() bool {
		db.isolated.mu.Lock()
		defer db.isolated.mu.Unlock()
		return db.isolated.opening["t"].refs.Load() == n
	})
	require.Equal(t, []string{"t opening"}, states(db))
	require.EqualValues(t, 1, conns.Load())

	cancelFirst()
	require.ErrorIs(t, <-results, context.Canceled, "who began it may leave")
	close(release)
	for range n - 1 {
		require.NoError(t, <-results)
	}
	require.EqualValues(t, 1, pools.Load())
	require.LessOrEqual(t, proxy.Stats().Conns, int64(DefaultPoolMaxConns))
	require.Equal(t, []string{"t open"}, states(db))
}

// Fifty tenants pass through eight places while their queries are in flight.
func TestChurn(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	super := d.Connect(d.SuperURL())
	const tenants, places, workers = 50, 8, 16
	length := 10 * time.Second
	if testing.Short() {
		length = 2 * time.Second
	}
	config, err := ParseConfig(d.AppURL(fmt.Sprint("tenant_max_pools=", places)))
	require.NoError(t, err)
	db, err := NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	stop := time.Now().Add(length)
	var queries, busy, evicted atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for time.Now().Before(stop) {
				id := fmt.Sprintf("t%d", rand.IntN(tenants))
				ctx := isolated(id, d.AppURL("pool_max_conns=2"))
				switch rand.IntN(10) {
				case 0:
					db.Evict(id)
					evicted.Add(1)
				case 1:
					pool, release, err := db.Lease(ctx)
					if err == nil {
						var got string
						if err = pool.QueryRow(ctx, readTenant).Scan(&got); err == nil && got != id {
							t.Errorf("%s got %s", id, got)
						}
						release()
					}
					if errors.Is(err, ErrPoolsBusy) {
						busy.Add(1)
					} else if err != nil {
						t.Errorf("lease: %v", err)
					}
				default:
					var got string
					err := db.QueryRow(ctx, readTenant).Scan(&got)
					switch {
					case errors.Is(err, ErrPoolsBusy):
						busy.Add(1)
					case err != nil:
						t.Errorf("query: %v", err)
					case got != id:
						t.Errorf("%s got %s", id, got)
					default:
						queries.Add(1)
					}
				}
			}
		})
	}
	open := 0
	for time.Now().Before(stop) {
		n := 0
		for _, p := range db.Stat().Pools() {
			if p.State == PoolOpen {
				n++
			}
		}
		open = max(open, n)
		time.Sleep(10 * time.Millisecond)
	}
	wg.Wait()
	t.Logf("%d queries, %d busy, %d evictions, at most %d pools open, %d connections made", queries.Load(), busy.Load(), evicted.Load(), open, db.Stat().NewConnsCount())
	require.Positive(t, queries.Load())
	require.LessOrEqual(t, open, places)
	ends(t, "Close", db.Close)
	require.Empty(t, db.Stat().Pools())
	require.Zero(t, db.Stat().TotalConns())
	eventually(t, "the server has no connection left", func() bool { return backends(t, super, d) == 0 })
}

// A server that does not answer is asked once, and again when OpenRetry is over; who waits meanwhile is told.
func TestADeadDatabase(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	var attempts atomic.Int64
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.OpenRetry = time.Hour
		c.MaxPools = 1
		c.AdjustPool = func(Tenant, *pgxpool.Config) error { attempts.Add(1); return nil }
	})
	gone := isolated("t", d.Via(nobody).AppURL())
	good := isolated("good", d.AppURL())
	require.NoError(t, db.Ping(good))

	const n = 50
	results := make(chan error, n)
	for range n {
		go func() { results <- db.Ping(gone) }()
	}
	for range n {
		err := <-results
		require.ErrorContains(t, err, `tenant "t": open pool`)
		require.ErrorContains(t, err, "connection refused")
		require.ErrorContains(t, err, "the next attempt is made in")
		var te *TenantError
		require.ErrorAs(t, err, &te)
		require.Equal(t, "t", te.Tenant)
	}
	require.EqualValues(t, 2, attempts.Load(), "one for each tenant")
	require.Equal(t, []string{"good open"}, states(db), "it took nobody's place")

	// Evict forgets it; so does a new connection string.
	db.Evict("t")
	require.Error(t, db.Ping(gone))
	require.EqualValues(t, 3, attempts.Load())
	require.Error(t, db.Ping(gone))
	require.EqualValues(t, 3, attempts.Load())
	require.NoError(t, db.Ping(isolated("t", d.AppURL())))
	require.EqualValues(t, 4, attempts.Load())
	require.Equal(t, "t open", states(db)[len(states(db))-1])
}

func TestAFailureIsForgottenInTime(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	for _, retry := range []time.Duration{-1, 50 * time.Millisecond} {
		var attempts atomic.Int64
		db := openDB(t, d.AppURL(), func(c *Config) {
			c.OpenRetry = retry
			c.AdjustPool = func(Tenant, *pgxpool.Config) error {
				if attempts.Add(1) < 3 {
					return errors.New("not yet")
				}
				return nil
			}
		})
		err := db.Ping(isolated("t", d.AppURL()))
		require.ErrorContains(t, err, "not yet")
		if retry < 0 {
			require.NotContains(t, err.Error(), "next attempt")
			require.Error(t, db.Ping(isolated("t", d.AppURL())))
			require.NoError(t, db.Ping(isolated("t", d.AppURL())))
			continue
		}
		eventually(t, "tried again", func() bool { return db.Ping(isolated("t", d.AppURL())) == nil })
		require.EqualValues(t, 3, attempts.Load())
	}
}

// A server that accepts and says nothing holds up its own tenant only, and not for ever.
func TestAStalledDatabase(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	proxy := pgtest.NewProxy(t, d.Server().Addr())
	proxy.Stall()
	db := openDB(t, d.AppURL(), func(c *Config) { c.OpenTimeout = 3 * time.Second; c.OpenRetry = -1 })
	ctx := isolated("t", d.Via(proxy.Addr()).AppURL())
	err := db.Ping(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "no connection within 3s (Config.OpenTimeout)")
	require.NoError(t, db.Ping(as("a")))
	proxy.Resume()
	eventually(t, "it is opened", func() bool { return db.Ping(ctx) == nil })
}

func TestAPanicWhileOpening(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.OpenRetry = -1
		c.AdjustPool = func(t Tenant, c *pgxpool.Config) error {
			switch t.Plan {
			case "panic":
				panic("oh no")
			case "bad":
				*c = pgxpool.Config{}
			}
			return nil
		}
	})
	for plan, want := range map[string]string{"panic": "oh no", "bad": "must come from pgxpool.ParseConfig"} {
		err := db.Ping(WithTenant(context.Background(), Tenant{ID: "t", Plan: plan, Isolation: IsolationDatabase, ConnString: d.AppURL()}))
		require.ErrorContains(t, err, want)
	}
	require.NoError(t, db.Ping(isolated("t", d.AppURL())))
}

// The directory's new connection string is used at the next checkout; who is connected stays so.
func TestARotatedPassword(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	role := d.Name + "_rot"
	d.SuperExec("create role "+role+" login password 'one'", "grant connect on database "+d.Name+" to "+role)
	t.Cleanup(func() { d.SuperExec("drop owned by "+role, "drop role "+role) })
	dsn := func(password string) string { return d.AppURL("user="+role, "password="+password) }
	dir := newDirectory(Tenant{ID: "t", Isolation: IsolationDatabase, ConnString: dsn("one")})
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir })
	ctx := WithTenantID(context.Background(), "t")
	require.Equal(t, []string{role}, strs(t, db, ctx, "select current_user::text"))
	held, err := db.Acquire(ctx)
	require.NoError(t, err)
	require.NoError(t, db.Ping(ctx)) // on a second connection

	d.SuperExec("alter role " + role + " password 'two'")
	require.NoError(t, db.Ping(ctx), "open connections are still good")
	db.Reset()
	require.Equal(t, "28P01", pgCode(db.Ping(ctx)), "new ones are not")

	dir.put(Tenant{ID: "t", Isolation: IsolationDatabase, ConnString: dsn("two")})
	require.NoError(t, db.Ping(ctx))
	require.Equal(t, []string{"t draining", "t open"}, sorted(states(db)))
	var one int
	require.NoError(t, held.QueryRow(ctx, "select 1").Scan(&one))
	held.Release()
	eventually(t, "the old pool is gone", func() bool { return len(states(db)) == 1 })

	// Other changes keep the pool: bindings carry them.
	pid := strs(t, db, ctx, "select pg_backend_pid()::text")
	dir.put(Tenant{ID: "t", Plan: "gold", Isolation: IsolationDatabase, ConnString: dsn("two"), Settings: map[string]string{"app.plan": "gold"}})
	require.Equal(t, pid, strs(t, db, ctx, "select pg_backend_pid()::text"))
	require.Equal(t, []string{"gold"}, strs(t, db, ctx, "select current_setting('app.plan')"))
}

func sorted(s []string) []string {
	out := append([]string(nil), s...)
	for i := range out {
		for j := i; j > 0 && out[j] < out[j-1]; j-- {
			out[j], out[j-1] = out[j-1], out[j]
		}
	}
	return out
}

// Nothing that evicts a pool disturbs who uses it, or waits for them.
func TestEvictedWhileBorrowed(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	super := d.Connect(d.SuperURL())
	db := openDB(t, d.AppURL())
	ctx := isolated("t", d.AppURL())
	conn, err := db.Acquire(ctx)
	require.NoError(t, err)
	pid := func(q querier) string { return strs(t, q, ctx, "select pg_backend_pid()::text")[0] }
	first := pid(conn)
	leased, release, err := db.Lease(ctx)
	require.NoError(t, err)
	require.NoError(t, leased.Ping(ctx))

	ends(t, "Evict", func() { db.Evict("t") })
	require.Equal(t, []string{"t draining"}, states(db))
	require.Equal(t, 1, db.Stat().Pools()[0].Leases)
	require.Equal(t, first, pid(conn), "a connection that is out goes on")
	require.NoError(t, leased.Ping(ctx), "so does a lease")

	require.NoError(t, db.Ping(ctx), "who comes now gets a new pool")
	require.Equal(t, []string{"t draining", "t open"}, sorted(states(db)))
	db.Evict("t")
	eventually(t, "an unused one ends at once", func() bool { return len(states(db)) == 1 })

	release()
	release()
	require.Equal(t, []string{"t draining"}, states(db), "visible until its last connection is gone")
	eventually(t, "the lease has ended", func() bool { return leased.Ping(ctx) != nil })
	require.Equal(t, first, pid(conn))
	made := db.Stat().NewConnsCount()
	conn.Release()
	eventually(t, "it is gone", func() bool { return len(states(db)) == 0 })
	require.GreaterOrEqual(t, db.Stat().NewConnsCount(), made, "its counts are kept")
	eventually(t, "on the server too", func() bool { return backends(t, super, d) == 0 })
}

func TestEvictedWhileBeingOpened(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	begun, goOn := make(chan struct{}), make(chan struct{})
	var opened atomic.Int64
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.AdjustPool = func(Tenant, *pgxpool.Config) error {
			if opened.Add(1) == 1 {
				close(begun)
				<-goOn
			}
			return nil
		}
	})
	ctx := isolated("t", d.AppURL())
	result := make(chan error)
	go func() { result <- db.Ping(ctx) }()
	<-begun
	db.Evict("t")
	require.NoError(t, db.Ping(ctx), "another is opened meanwhile")
	close(goOn)
	require.NoError(t, <-result, "who waited for the first is served by it")
	eventually(t, "the first is gone", func() bool { return len(states(db)) == 1 })
	require.Equal(t, []string{"t open"}, states(db))
}

// At the limit a new pool takes the place of the one that was not used for longest and is not in use;
// if there is none, the checkout fails at once.
func TestMaxPools(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_max_pools=2"))
	ctx := func(id string) context.Context { return isolated(id, d.AppURL()) }
	a, err := db.Acquire(ctx("a"))
	require.NoError(t, err)
	b, err := db.Acquire(ctx("b"))
	require.NoError(t, err)
	ends(t, "refusal", func() { err = db.Ping(ctx("c")) })
	require.ErrorIs(t, err, ErrPoolsBusy)
	require.ErrorContains(t, err, `tenant "c"`)
	require.ErrorContains(t, err, "all 2 that Config.MaxPools allows")
	require.Equal(t, []string{"a open", "b open"}, states(db))

	b.Release()
	require.NoError(t, db.Ping(ctx("c")))
	eventually(t, "b went", func() bool { s := states(db); return len(s) == 2 && s[1] == "c open" })
	a.Release()
	require.NoError(t, db.Ping(ctx("a")))
	require.NoError(t, db.Ping(ctx("d")))
	eventually(t, "c went, used before a", func() bool { s := states(db); return len(s) == 2 && s[0] == "a open" && s[1] == "d open" })

	// A lease is use.
	_, releaseA, err := db.Lease(ctx("a"))
	require.NoError(t, err)
	_, releaseD, err := db.Lease(ctx("d"))
	require.NoError(t, err)
	require.ErrorIs(t, db.Ping(ctx("e")), ErrPoolsBusy)
	releaseA()
	require.NoError(t, db.Ping(ctx("e")))
	releaseD()
}

func TestIdlePoolsAreClosed(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("tenant_idle_timeout=100ms"))
	held, err := db.Acquire(isolated("held", d.AppURL()))
	require.NoError(t, err)
	_, release, err := db.Lease(isolated("leased", d.AppURL()))
	require.NoError(t, err)
	require.NoError(t, db.Ping(isolated("idle", d.AppURL())))
	eventually(t, "the idle one is closed", func() bool { return len(states(db)) == 2 })
	require.Equal(t, []string{"held open", "leased open"}, states(db))
	held.Release()
	release()
	eventually(t, "the others too", func() bool { return len(states(db)) == 0 })
	require.NoError(t, db.Ping(isolated("idle", d.AppURL())))

	never := openDB(t, d.AppURL("tenant_idle_timeout=-1s"))
	require.NoError(t, never.Ping(isolated("idle", d.AppURL())))
	set := &never.isolated
	before := set.clock.Load()
	set.mu.Lock()
	set.open["idle"].lastUsed.Store(-int64(time.Hour))
	set.mu.Unlock()
	eventually(t, "the second look", func() bool { return set.clock.Load() > before+int64(3*maxClockStep/2) })
	set.mu.Lock()
	defer set.mu.Unlock()
	require.Contains(t, set.open, "idle")
}

// A leased pool serves its own tenant only.
func TestALeasedPoolKnowsItsTenant(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL())
	own, release, err := db.Lease(isolated("a", d.AppURL()))
	require.NoError(t, err)
	defer release()
	require.NoError(t, own.Ping(isolated("a", d.AppURL())))
	err = own.Ping(isolated("b", d.AppURL()))
	require.ErrorIs(t, err, ErrWrongTenant)
	require.ErrorContains(t, err, `"a"`)
	require.ErrorContains(t, err, `"b"`)
	require.ErrorIs(t, own.Ping(as("b")), ErrWrongTenant)
	require.ErrorIs(t, own.Ping(as("a")), ErrInvalidTenant)
	require.ErrorIs(t, own.Ping(WithoutTenant(context.Background())), ErrWrongTenant)
	require.ErrorIs(t, own.Ping(context.Background()), ErrNoTenant)
	suspended := Tenant{ID: "a", Isolation: IsolationDatabase, ConnString: d.AppURL(), Status: StatusSuspended}
	require.ErrorIs(t, own.Ping(WithTenant(context.Background(), suspended)), ErrTenantSuspended)

	shared, releaseShared, err := db.Lease(as("b"))
	require.NoError(t, err)
	require.Same(t, db.Shared(), shared)
	releaseShared()
	releaseShared()
	require.NoError(t, shared.Ping(as("b")))
}

// An isolated connection proves that it is in the database meant for its tenant.
func TestIdentity(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	marked, bare := d.Database("app.current_tenant_id=alice"), d.Database()
	var hooks atomic.Int64
	open := func(strict bool) *TenantDB {
		return openDB(t, d.AppURL(), func(c *Config) {
			c.RequireIdentity, c.OpenRetry = strict, -1
			c.Shared.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				hooks.Add(1)
				_, err := conn.Exec(ctx, "set app.current_tenant_id = 'bob'") // too late to deceive
				return err
			}
		})
	}
	loose, strict := open(false), open(true)
	for _, db := range []*TenantDB{loose, strict} {
		require.NoError(t, db.Ping(isolated("alice", marked.AppURL())))
		before := hooks.Load()
		err := db.Ping(isolated("bob", marked.AppURL()))
		require.ErrorIs(t, err, ErrWrongTenant)
		require.ErrorContains(t, err, `"alice"`)
		require.ErrorContains(t, err, `"bob"`)
		require.ErrorContains(t, err, marked.Name)
		require.Equal(t, before, hooks.Load(), "nothing else may run there")
	}
	require.NoError(t, loose.Ping(isolated("bob", bare.AppURL())))
	err := strict.Ping(isolated("bob", bare.AppURL()))
	require.ErrorIs(t, err, ErrWrongTenant)
	require.ErrorContains(t, err, "RequireIdentity")

	// The check is of each connection, not of the first only.
	ctx := isolated("bob", bare.AppURL())
	held, err := loose.Acquire(ctx)
	require.NoError(t, err)
	d.SuperExec("alter database " + bare.Name + " set app.current_tenant_id = 'carol'")
	err = loose.Ping(ctx)
	require.ErrorIs(t, err, ErrWrongTenant)
	require.ErrorContains(t, err, `"carol"`)
	held.Release()
}

// What an isolated pool is made of, unless its connection string or AdjustPool says otherwise.
func TestIsolatedPoolsConfig(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	tracer := &copyTracer{}
	var got *pgxpool.Config
	db := openDB(t, d.AppURL("pool_max_conns=3", "default_query_exec_mode=exec", "statement_cache_capacity=7"), func(c *Config) {
		c.Shared.ConnConfig.Tracer = tracer
		c.Shared.AfterConnect = func(context.Context, *pgx.Conn) error { return nil }
		c.Shared.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { return nil }
		c.AdjustPool = func(t Tenant, c *pgxpool.Config) error {
			got = c.Copy()
			if t.Plan == "gold" {
				c.MaxConns = 42
			}
			return nil
		}
	})
	require.NoError(t, db.Ping(WithTenant(context.Background(), Tenant{ID: "a", Plan: "gold", Isolation: IsolationDatabase, ConnString: d.AppURL()})))
	require.EqualValues(t, DefaultPoolMaxConns, got.MaxConns)
	require.Zero(t, got.MinConns)
	require.Equal(t, time.Hour, got.MaxConnLifetime)
	require.Equal(t, DefaultPoolMaxConnLifetimeJitter, got.MaxConnLifetimeJitter)
	require.Same(t, tracer, got.ConnConfig.Tracer)
	require.NotNil(t, got.AfterConnect)
	require.Nil(t, got.BeforeConnect)
	require.Equal(t, pgx.QueryExecModeExec, got.ConnConfig.DefaultQueryExecMode)
	require.Equal(t, 7, got.ConnConfig.StatementCacheCapacity)
	require.EqualValues(t, 42, db.Stat().Pools()[0].MaxConns)

	require.NoError(t, db.Ping(isolated("b", d.AppURL("pool_max_conns=5", "pool_max_conn_lifetime_jitter=1s", "default_query_exec_mode=cache_describe"))))
	require.EqualValues(t, 5, got.MaxConns)
	require.Equal(t, time.Second, got.MaxConnLifetimeJitter)
	require.Equal(t, pgx.QueryExecModeCacheDescribe, got.ConnConfig.DefaultQueryExecMode)
}

func TestStatAddsUp(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL("pool_max_conns=3"))
	conn, err := db.Acquire(isolated("a", d.AppURL()))
	require.NoError(t, err)
	require.NoError(t, db.Ping(as("x")))
	s := db.Stat()
	require.EqualValues(t, 1, s.AcquiredConns())
	require.EqualValues(t, 2, s.TotalConns())
	require.EqualValues(t, 1, s.IdleConns())
	require.EqualValues(t, 3+DefaultPoolMaxConns, s.MaxConns())
	require.EqualValues(t, 2, s.NewConnsCount())
	acquired := s.AcquireCount()
	row := s.Pools()[0]
	require.Equal(t, "a", row.TenantID)
	require.WithinDuration(t, time.Now(), row.LastUsed, patience)
	require.EqualValues(t, 1, row.AcquiredConns)

	conn.Release()
	db.Evict("a")
	eventually(t, "gone", func() bool { return len(states(db)) == 0 })
	s = db.Stat()
	require.EqualValues(t, acquired, s.AcquireCount(), "counts over time do not go back")
	require.EqualValues(t, 2, s.NewConnsCount())
	require.EqualValues(t, 3, s.MaxConns())
	require.EqualValues(t, 1, s.TotalConns())
}

// Close while pools are being opened.
func TestCloseWhileOpening(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	proxy := pgtest.NewProxy(t, d.Server().Addr())
	proxy.Stall()
	db := openDB(t, d.AppURL(), func(c *Config) { c.OpenTimeout = time.Hour })
	result := make(chan error)
	go func() { result <- db.Ping(isolated("t", d.Via(proxy.Addr()).AppURL())) }()
	eventually(t, "it connects", func() bool { return proxy.Stats().Conns == 1 })
	ends(t, "Close", db.Close)
	require.Equal(t, ErrClosed, <-result)
}
