package pgxtenant

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// at notes who is at work on which tenant, and fails the test if two are.
type at struct {
	t    testing.TB
	mu   sync.Mutex
	now  map[string]bool
	done map[string]int
}

func newAt(t testing.TB) *at {
	return &at{t: t, now: make(map[string]bool), done: make(map[string]int)}
}

func (a *at) work(f ForEachFunc) ForEachFunc {
	return func(ctx context.Context, conn *pgx.Conn, t Tenant) error {
		a.mu.Lock()
		if a.now[t.ID] {
			a.t.Errorf("two at once at work on %q", t.ID)
		}
		a.now[t.ID] = true
		a.done[t.ID]++
		a.mu.Unlock()
		defer func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.now[t.ID] = false
		}()
		return f(ctx, conn, t)
	}
}

// throughBouncer makes a TenantDB whose admin pool goes through a pooler.
func (fl *fleet) throughBouncer(bouncer *pgtest.DB) *TenantDB {
	fl.t.Helper()
	admin, err := pgxpool.ParseConfig(bouncer.OwnerURL("pool_max_conns=4", "default_query_exec_mode=exec"))
	require.NoError(fl.t, err)
	return fl.open(func(c *Config) { c.Admin = admin })
}

// Two operators at once share a run, or do the same one after the other, and are never at work on one tenant both:
// directly, and behind a pooler that gives each transaction another session.
func TestForEachTwoOperators(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"direct", "pooled", "one of each"} {
		for _, names := range [][2]string{{"one", "one"}, {"one", "two"}} {
			if way == "direct" && names[1] == "one" {
				continue // as one of each
			}
			t.Run(way+" "+names[1], func(t *testing.T) {
				t.Parallel()
				fl := newFleet(t, 40)
				dbs := []*TenantDB{fl.open(), fl.open()}
				if way != "direct" {
					bouncer := pgtest.PgBouncer(t, fl.d, "default_pool_size=6")
					dbs[1] = fl.throughBouncer(bouncer)
					if way == "pooled" {
						dbs[0] = fl.throughBouncer(bouncer)
					}
				}
				a := newAt(t)
				var wg sync.WaitGroup
				var reports [2]*RunReport
				for i, db := range dbs {
					wg.Go(func() {
						o := ForEachOptions{Name: names[i], Versions: versionsOf(nil), Target: "2", SkipShared: true, Lease: patience, Patience: patience}
						var err error
						if reports[i], err = db.ForEach(context.Background(), o, a.work(upgrade)); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				if t.Failed() {
					return
				}
				require.Equal(t, 40, fl.upgraded())
				require.Equal(t, 40, reports[0].Done+reports[1].Done)
				require.Len(t, a.done, 40)
				for id, n := range a.done {
					require.Equal(t, 1, n, id)
				}
				fl.quiet()
			})
		}
	}
}

// Behind a pooler each transaction is placed in its tenant, and what runs in none says so, unless it is led past.
func TestForEachBehindAPooler(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 30)
	ctx := context.Background()
	db := fl.throughBouncer(pgtest.PgBouncer(t, fl.d))
	var placed atomic.Int32
	report, err := db.ForEach(ctx, ForEachOptions{LockTimeout: 700 * time.Millisecond, StatementTimeout: time.Minute, Concurrency: 8, Lease: patience, Patience: patience},
		func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
			for range 3 {
				var path, lock, statement string
				if err := conn.QueryRow(ctx, "select current_setting('search_path'), current_setting('lock_timeout'), current_setting('statement_timeout')").
					Scan(&path, &lock, &statement); err != nil {
					return err
				}
				want := `"tenant_` + tn.ID + `", "public", pg_temp`
				if tn.ID == "" {
					want = `"public", pg_temp`
				}
				if path != want || lock != "700ms" || statement != "1min" {
					return fmt.Errorf("%s: got %q, %q, %q", tn.ID, path, lock, statement)
				}
				placed.Add(1)
			}
			if tn.ID == "" {
				return nil
			}
			return upgrade(ctx, conn, tn)
		})
	require.NoError(t, err)
	require.Equal(t, []int{31, 93, 30}, []int{report.Done, int(placed.Load()), fl.upgraded()})

	index := func(ctx context.Context, conn *pgx.Conn, _ Tenant) error {
		_, err := conn.Exec(ctx, "create index concurrently on item (id)")
		return err
	}
	o := ForEachOptions{SkipShared: true, IDs: []string{"t0003"}}
	_, err = db.ForEach(ctx, o, index)
	require.ErrorContains(t, err, "a pooler is between, so each statement is in a transaction; ForEachOptions.AdjustConn may lead past it")
	o.AdjustConn = func(_ Tenant, c *pgx.ConnConfig) error {
		host, port, err := net.SplitHostPort(fl.d.Server().Addr())
		require.NoError(t, err)
		n, err := strconv.ParseUint(port, 10, 16)
		c.Host, c.Port = host, uint16(n)
		return err
	}
	_, err = db.ForEach(ctx, o, index)
	require.NoError(t, err)

	fl.d.Exec("drop schema tenant_t0003 cascade")
	_, err = db.ForEach(ctx, ForEachOptions{SkipShared: true, IDs: []string{"t0003"}}, upgrade)
	require.ErrorContains(t, err, `schema "tenant_t0003" is missing`)
	fl.quiet()
}

const (
	childURL   = "PGXTENANT_TEST_RUN_URL"
	childAdmin = "PGXTENANT_TEST_RUN_ADMIN"
	childSleep = "PGXTENANT_TEST_RUN_SLEEP" // the tenant whose statement takes long
)

// startChild starts a process that is to be killed.
func (fl *fleet) startChild(admin, sleeps string) *exec.Cmd {
	fl.t.Helper()
	child := exec.Command(os.Args[0], "-test.run=^TestForEachKilled$")
	child.Env = append(os.Environ(), childURL+"="+fl.d.AppURL(), childAdmin+"="+admin, childSleep+"="+sleeps)
	require.NoError(fl.t, child.Start())
	return child
}

// runChild is that process.
func runChild(t *testing.T) {
	config, err := ParseConfig(os.Getenv(childURL))
	require.NoError(t, err)
	config.Admin, err = pgxpool.ParseConfig(os.Getenv(childAdmin))
	require.NoError(t, err)
	config.Registry = &RegistryConfig{}
	db, err := NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	_, _ = db.ForEach(context.Background(), killedRun(), func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		if tn.ID == os.Getenv(childSleep) {
			_, err := conn.Exec(ctx, "select 'of the dead', pg_sleep(4)")
			return err
		}
		return slowUpgrade(ctx, conn, tn)
	})
}

func slowUpgrade(ctx context.Context, conn *pgx.Conn, t Tenant) error {
	_, err := conn.Exec(ctx, "select pg_sleep(0.03)")
	if err == nil {
		err = upgrade(ctx, conn, t)
	}
	return err
}

// killedRun is what is killed; whoever lives through it has more patience, or a slow machine would have it lose its claims.
func killedRun() ForEachOptions {
	return ForEachOptions{Name: "killed", Versions: versionsOf(nil), Target: "2", SkipShared: true, Lease: time.Second, Concurrency: 1}
}

// A process that is killed at work frees its tenants soon, but not before its statement has ended on the server, and
// another completes the run: directly, and behind a pooler.
func TestForEachKilled(t *testing.T) {
	if os.Getenv(childURL) != "" {
		runChild(t)
		return
	}
	t.Parallel()
	for _, way := range []string{"direct", "pooled"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			fl := newFleet(t, 10)
			ctx := context.Background()
			db, admin := fl.db, fl.d.OwnerURL("application_name=child")
			if way == "pooled" {
				bouncer := pgtest.PgBouncer(t, fl.d, "default_pool_size=6")
				db, admin = fl.throughBouncer(bouncer), bouncer.OwnerURL("default_query_exec_mode=exec")
			}
			child := fl.startChild(admin, "t0005")
			super := fl.d.Connect(fl.d.SuperURL())
			const dead = "select count(*) from pg_stat_activity where query like '%of the dead%' and state = 'active' and pid <> pg_backend_pid() and datname = current_database()"
			eventually(t, "it is at work", func() bool { return count(t, super, ctx, dead) == 1 })
			asleep := time.Now()
			require.NoError(t, child.Process.Kill())
			_ = child.Wait()

			var freed time.Time
			o := killedRun()
			o.Lease, o.Patience = patience, patience
			report, err := db.ForEach(ctx, o, func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
				if tn.ID == "t0005" {
					freed = time.Now()
					if n := count(t, super, ctx, dead); n > 0 {
						t.Error("the dead process's statement still runs")
					}
				}
				return upgrade(ctx, conn, tn)
			})
			require.NoError(t, err)
			require.True(t, report.Resumed)
			require.Equal(t, 5, report.Done)
			require.Equal(t, 10, fl.upgraded())
			require.Less(t, freed.Sub(asleep), patience)
			fl.quiet()
		})
	}
}

// Processes are killed at any moment, and others are at work beside them, in both ways: each tenant is done once.
func TestForEachKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	const n = 120
	fl := newFleet(t, n)
	bouncer := pgtest.PgBouncer(t, fl.d, "default_pool_size=6").OwnerURL("default_query_exec_mode=exec")
	ctx := context.Background()
	o := killedRun()
	o.Concurrency, o.Lease, o.Patience = 2, patience, patience
	var report *RunReport
	ended := make(chan error, 1)
	go func() {
		var err error
		report, err = fl.db.ForEach(ctx, o, slowUpgrade)
		ended <- err
	}()
	for i := range 4 {
		child := fl.startChild([]string{fl.d.OwnerURL(), bouncer}[i%2], "")
		time.Sleep(time.Duration(200+rand.IntN(300)) * time.Millisecond)
		_ = child.Process.Kill()
		_ = child.Wait()
	}
	require.NoError(t, <-ended) // what is done twice fails: the column is there
	require.Equal(t, n, fl.upgraded())
	runs, err := fl.db.Runs(ctx, 0)
	require.NoError(t, err)
	first := runs[len(runs)-1]
	require.True(t, first.Complete)
	require.Equal(t, n, first.Counts[RunDone]+first.Counts[RunCurrent], "%v", first.Counts)
	t.Logf("%d by those that were killed, %d of which had not said so", n-report.Done, first.Counts[RunCurrent])
}

// While the registry cannot be reached, another may take a tenant over: then the lock on its database, which its
// session has kept, is in the way.
func TestForEachTakenOver(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 1)
	a := newAt(t)
	var second sync.WaitGroup
	o := ForEachOptions{Name: "over", Versions: versionsOf(nil), Target: "2", SkipShared: true}
	_, err := fl.db.ForEach(context.Background(), o, a.work(func(ctx context.Context, conn *pgx.Conn, tn Tenant) error {
		fl.d.Exec("delete from pgxtenant.run_claim")
		tried := make(chan struct{})
		second.Go(func() {
			o := o
			once := sync.OnceFunc(func() { close(tried) })
			o.OnProgress = func(p RunProgress) {
				if p.Running == 0 { // it has found the lock
					once()
				}
			}
			report, err := fl.open().ForEach(context.Background(), o, a.work(upgrade))
			if err != nil || report.Done != 0 {
				t.Errorf("%+v %v", report, err)
			}
		})
		<-tried
		return upgrade(ctx, conn, tn)
	}))
	require.NoError(t, err)
	second.Wait()
	require.Equal(t, 1, fl.upgraded())
}

// A process that dies between the commit of a tenant and the note of it leaves nothing to do.
func TestForEachDiedBeforeTheNote(t *testing.T) {
	t.Parallel()
	fl := newFleet(t, 3)
	ctx := context.Background()
	o := ForEachOptions{Name: "v2", Versions: versionsOf(nil), Target: "2", SkipShared: true, StopAfter: 1, Concurrency: 1}
	report, err := fl.db.ForEach(ctx, o, func(context.Context, *pgx.Conn, Tenant) error { return errTest })
	require.ErrorIs(t, err, errTest)
	fl.d.Exec(fmt.Sprintf("update pgxtenant.run_result set state = 'running', ended = null where run = %d", report.Run),
		fmt.Sprintf("insert into pgxtenant.run_claim values ('tenant', 't0000', 'dead', %d, now())", report.Run),
		"alter table tenant_t0000.item add note text", "update tenant_t0000.ledger set version = '2'")
	require.Equal(t, RunInterrupted, resultOf(t, report, "t0000").State)
	report, err = fl.db.ForEach(ctx, o, upgrade)
	require.NoError(t, err)
	require.Equal(t, []int{2, 1, 0}, []int{report.Done, report.Current, report.LeftOver})
	require.NoError(t, fl.purge())
	fl.quiet()
}

// A registry of before there were runs is brought up to date by Install.
func TestForEachOldRegistry(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	ctx := context.Background()
	conn := d.Connect(d.OwnerURL())
	require.NoError(t, install(ctx, conn, "registry", registrySteps[:1]))
	_, err := conn.Exec(ctx, "insert into pgxtenant.tenant values ('a', '', 'row', '', '', '', '', 'active', '{}')")
	require.NoError(t, err)
	fl := newFleetOn(t, d, 1)
	report, err := fl.db.ForEach(ctx, ForEachOptions{IDs: []string{"a"}}, (&order{}).note)
	require.NoError(t, err)
	require.Equal(t, 1, report.Done)
}

// Behind a pooler, one who may have lost his claims stops, and goes on with others once he has the registry again.
func TestForEachLeaseLost(t *testing.T) {
	t.Parallel()
	r := &tenantRun{}
	pooled, direct := &runPlace{pooled: &binder{}}, &runPlace{}
	const lease = 10 * time.Second
	now := time.Now()
	r.lease.renewed(true, now.Add(-lease/4), lease)
	held, cancel := r.fenced(context.Background(), pooled)
	defer cancel()
	locked, cancel := r.fenced(context.Background(), direct)
	defer cancel()
	r.lease.renewed(false, now, lease)
	require.NoError(t, held.Err())
	r.lease.until = now.Add(lease / 3) // some time later
	r.lease.renewed(false, now, lease)
	require.Equal(t, errLeaseLost, context.Cause(held))
	require.NoError(t, locked.Err())
	late, cancel := r.fenced(context.Background(), pooled)
	defer cancel()
	require.Equal(t, errLeaseLost, context.Cause(late))
	r.lease.renewed(true, now, lease)
	again, cancel := r.fenced(context.Background(), pooled)
	require.NoError(t, again.Err())
	require.Len(t, r.lease.holds, 2)
	cancel()
	require.Len(t, r.lease.holds, 1) // the late one's
}
