package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"runtime"
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

// openRegistry opens a registry, as a process of its own would.
func openRegistry(t testing.TB, url string, adjust ...func(*RegistryConfig)) *Registry {
	t.Helper()
	pool, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	c := RegistryConfig{Pool: pool}
	for _, f := range adjust {
		f(&c)
	}
	r, err := NewRegistry(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(r.Close)
	return r
}

// newRegistryDB is a database with a registry in it.
func newRegistryDB(t testing.TB, adjust ...func(*RegistryConfig)) (*pgtest.DB, *Registry) {
	t.Helper()
	d := pgtest.New(t)
	r := openRegistry(t, d.OwnerURL(), adjust...)
	require.NoError(t, r.Install(t.Context()))
	return d, r
}

func listening(t testing.TB, rs ...*Registry) {
	t.Helper()
	for _, r := range rs {
		eventually(t, "the registry listens", r.listener.listening.Load)
	}
}

func create(t testing.TB, r *Registry, rec Record) Record {
	t.Helper()
	rec, err := r.Create(context.Background(), rec)
	require.NoError(t, err)
	return rec
}

// queryCounter counts the queries that contain a text.
type queryCounter struct {
	text   string
	n      atomic.Int64
	before func()
}

func (q *queryCounter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	if strings.Contains(d.SQL, q.text) {
		q.n.Add(1)
		if q.before != nil {
			q.before()
		}
	}
	return ctx
}
func (*queryCounter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func TestTheRegistryKeepsWhatItIsGiven(t *testing.T) {
	t.Parallel()
	d, r := newRegistryDB(t)
	ctx := t.Context()
	require.NoError(t, r.Install(ctx), "again")
	in := Record{Tenant: Tenant{ID: "acme", Plan: "gold", Isolation: IsolationSchema, Schema: "acme_s", Settings: map[string]string{"app.x": `"'\`}},
		Aliases: []string{"Acme.Example.COM", "acme", "acme"}, Server: "eu-1"}
	made := create(t, r, in)
	require.Equal(t, []string{"acme", "acme.example.com"}, made.Aliases)
	got, err := r.Get(ctx, "acme")
	require.NoError(t, err)
	require.Equal(t, made.Created.UTC(), got.Created.UTC())
	require.Equal(t, in.Tenant, got.Tenant)
	require.Equal(t, made.Aliases, got.Aliases)
	require.Equal(t, "eu-1", got.Server)
	for _, alias := range []string{"acme", "ACME.example.com"} {
		for range 2 {
			tenant, err := r.ByAlias(ctx, alias)
			require.NoError(t, err)
			require.Equal(t, in.Tenant, tenant)
		}
	}
	_, err = r.Create(ctx, Record{Tenant: Tenant{ID: "acme"}})
	require.ErrorIs(t, err, ErrTenantExists)

	up, err := r.Update(ctx, "acme", func(rec *Record) error {
		rec.Plan, rec.Aliases = "silver", []string{"acme", "new"}
		return nil
	})
	require.NoError(t, err)
	require.True(t, up.Changed.After(got.Changed))
	_, err = r.ByAlias(ctx, "acme.example.com")
	require.ErrorIs(t, err, ErrTenantNotFound)
	tenant, err := r.ByAlias(ctx, "new")
	require.NoError(t, err)
	require.Equal(t, "silver", tenant.Plan, "one's own changes are seen at once")

	oops := errors.New("oops")
	_, err = r.Update(ctx, "acme", func(rec *Record) error { rec.Plan = "x"; return oops })
	require.Equal(t, oops, err)
	_, err = r.Update(ctx, "acme", func(rec *Record) error { rec.ID = "other"; return nil })
	require.ErrorIs(t, err, ErrInvalidTenant)
	_, err = r.Update(ctx, "nobody", func(*Record) error { return nil })
	require.ErrorIs(t, err, ErrTenantNotFound)

	require.NoError(t, r.Delete(ctx, "acme"))
	require.ErrorIs(t, r.Delete(ctx, "acme"), ErrTenantNotFound)
	_, err = r.ByAlias(ctx, "new")
	require.ErrorIs(t, err, ErrTenantNotFound)
	again := create(t, r, in)
	require.NotEqual(t, made.Generation, again.Generation, "it is another tenant of the same name")
	require.Equal(t, 1, count(t, d.Connect(d.SuperURL()), ctx, "select count(*) from pgxtenant.tenant"))
}

func TestTheRegistryRefusesWhatContradicts(t *testing.T) {
	t.Parallel()
	_, r := newRegistryDB(t)
	ctx := t.Context()
	create(t, r, Record{Tenant: Tenant{ID: "a", Isolation: IsolationSchema}, Aliases: []string{"one"}})
	for name, c := range map[string]struct {
		rec    Record
		target error
	}{
		"id":            {Record{Tenant: Tenant{ID: "-x"}}, ErrInvalidTenantID},
		"alias taken":   {Record{Tenant: Tenant{ID: "b"}, Aliases: []string{"free", "ONE"}}, ErrAliasTaken},
		"alias invalid": {Record{Tenant: Tenant{ID: "b"}, Aliases: []string{"a b"}}, ErrInvalidAlias},
		"schema taken":  {Record{Tenant: Tenant{ID: "b", Isolation: IsolationSchema, Schema: "tenant_a"}}, ErrInvalidTenant},
		"no database":   {Record{Tenant: Tenant{ID: "b", Isolation: IsolationDatabase}}, ErrInvalidTenant},
		"password":      {Record{Tenant: Tenant{ID: "b", Isolation: IsolationDatabase, ConnString: "postgres://u:hush@h/d"}}, ErrInvalidTenant},
		"password kv":   {Record{Tenant: Tenant{ID: "b", Isolation: IsolationDatabase, ConnString: "host=h password = hush"}}, ErrInvalidTenant},
		"password arg":  {Record{Tenant: Tenant{ID: "b", Isolation: IsolationDatabase, ConnString: "postgres://h/d?pass%77ord=hush"}}, ErrInvalidTenant},
		"status":        {Record{Tenant: Tenant{ID: "b", Status: 77}}, ErrInvalidTenant},
	} {
		_, err := r.Create(ctx, c.rec)
		require.ErrorIs(t, err, c.target, name)
		require.NotContains(t, err.Error(), "hush", name)
		require.NotContains(t, err.Error(), `"a"`, "whose it is, is not told")
		_, err = r.Get(ctx, "b")
		require.ErrorIs(t, err, ErrTenantNotFound, "%s: nothing is left behind", name)
	}
	_, err := r.ByAlias(ctx, "free")
	require.ErrorIs(t, err, ErrTenantNotFound)
	for _, alias := range []string{"", ".", "a.", ".a", "a..b", "-a", "a-", "a-.b", "a._b", "ä", "\u212a", "a/b", "a:80", "a\x00", strings.Repeat("a", 254)} {
		_, err := r.ByAlias(ctx, alias)
		require.ErrorIs(t, err, ErrInvalidAlias, "%q", alias)
		require.ErrorIs(t, err, ErrTenantNotFound, "%q", alias)
	}
	create(t, r, Record{Tenant: Tenant{ID: "p", Isolation: IsolationDatabase, Status: StatusProvisioning}})
	require.ErrorIs(t, r.Resume(ctx, "p"), ErrTenantStatus)
	require.ErrorIs(t, r.setStatus(ctx, "p", []Status{StatusProvisioning}, StatusActive), ErrInvalidTenant, "not without a database")
	require.NoError(t, r.setStatus(ctx, "p", []Status{StatusProvisioning}, StatusDeleting))
}

func TestConnectionStringsAreNotStoredInClear(t *testing.T) {
	t.Parallel()
	key, other := []byte(strings.Repeat("k", 32)), []byte(strings.Repeat("o", 32))
	d, r := newRegistryDB(t, func(c *RegistryConfig) { c.Key = key })
	ctx := t.Context()
	const secret = "postgres://u:hush@h/d"
	for _, id := range []string{"a", "b"} {
		create(t, r, Record{Tenant: Tenant{ID: id, Isolation: IsolationDatabase, ConnString: secret}})
	}
	super := d.Connect(d.SuperURL())
	require.Zero(t, count(t, super, ctx, "select count(*) from pgxtenant.tenant t where t::text like '%hush%'"))
	tenant, err := r.Lookup(ctx, "a")
	require.NoError(t, err)
	require.Equal(t, secret, tenant.ConnString)

	wrong := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.Key = other })
	_, err = wrong.Lookup(ctx, "a")
	require.ErrorContains(t, err, "neither RegistryConfig.Key nor one of OldKeys")
	require.NotErrorIs(t, err, ErrTenantNotFound)

	rotated := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.Key, c.OldKeys = other, [][]byte{key} })
	tenant, err = rotated.Lookup(ctx, "a")
	require.NoError(t, err)
	require.Equal(t, secret, tenant.ConnString)
	n, err := rotated.Reseal(ctx)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	n, err = rotated.Reseal(ctx)
	require.NoError(t, err)
	require.Zero(t, n)
	eventually(t, "the new key alone reads", func() bool { _, err := wrong.Lookup(ctx, "a"); return err == nil })

	d.SuperExec("update pgxtenant.tenant set conn = (select conn from pgxtenant.tenant where id = 'b') where id = 'a'")
	_, err = rotated.Get(ctx, "a")
	require.ErrorContains(t, err, "made for another tenant")
	require.NotContains(t, err.Error(), "hush")

	refs := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) {
		c.Resolve = func(_ context.Context, ref string, t Tenant) (string, error) { return "host=" + ref + "." + t.ID, nil }
	})
	create(t, refs, Record{Tenant: Tenant{ID: "r", Isolation: IsolationDatabase, ConnString: "vault:kv"}})
	tenant, err = refs.Lookup(ctx, "r")
	require.NoError(t, err)
	require.Equal(t, "host=vault:kv.r", tenant.ConnString)
	rec, err := refs.Get(ctx, "r")
	require.NoError(t, err)
	require.Equal(t, "vault:kv", rec.ConnString)
	_, err = NewRegistry(ctx, RegistryConfig{Key: []byte("short"), TTL: -1})
	for _, says := range []string{"Key has 5 bytes", "TTL is -1ns", "Pool is nil"} {
		require.ErrorContains(t, err, says)
	}
}

func TestChangesReachOtherProcesses(t *testing.T) {
	t.Parallel()
	d, a := newRegistryDB(t, func(c *RegistryConfig) { c.TTL = time.Hour })
	b := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.TTL, c.NegativeTTL = time.Hour, time.Hour })
	listening(t, a, b)
	ctx := t.Context()
	_, err := b.Lookup(ctx, "x")
	require.ErrorIs(t, err, ErrTenantNotFound)
	_, err = b.ByAlias(ctx, "x.example.com")
	require.ErrorIs(t, err, ErrTenantNotFound)
	// Without being told b would know nothing for an hour.
	status := func(want Status) func() bool {
		return func() bool { t, err := b.Lookup(ctx, "x"); return err == nil && t.Status == want }
	}
	create(t, a, Record{Tenant: Tenant{ID: "x"}, Aliases: []string{"x.example.com"}})
	eventually(t, "created", status(StatusActive))
	eventually(t, "alias", func() bool { _, err := b.ByAlias(ctx, "x.example.com"); return err == nil })
	require.NoError(t, a.Suspend(ctx, "x"))
	eventually(t, "suspended", status(StatusSuspended))
	require.NoError(t, a.MakeReadOnly(ctx, "x"))
	eventually(t, "read-only", status(StatusReadOnly))
	require.NoError(t, a.Resume(ctx, "x"))
	eventually(t, "resumed", status(StatusActive))
	d.Exec("update pgxtenant.tenant set status = 'suspended'") // by hand
	eventually(t, "by hand", status(StatusSuspended))
	d.Exec("insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings) select 'bulk'||i, '', 'row', '', '', '', '', 'active', '{}' from generate_series(1, 500) i",
		"update pgxtenant.tenant set status = 'active'")
	eventually(t, "in bulk", status(StatusActive))
	require.NoError(t, a.Delete(ctx, "x"))
	eventually(t, "deleted", func() bool { _, err := b.ByAlias(ctx, "x.example.com"); return errors.Is(err, ErrTenantNotFound) })
	d.Exec("truncate pgxtenant.tenant cascade")
	eventually(t, "truncated", func() bool { _, err := b.Lookup(ctx, "bulk1"); return errors.Is(err, ErrTenantNotFound) })
}

func TestALostListenerComesBackAndForgetsWhatItMayHaveMissed(t *testing.T) {
	t.Parallel()
	s := pgtest.NewServer(t)
	d := s.New(t)
	r := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.TTL = time.Hour })
	require.NoError(t, r.Install(t.Context()))
	listening(t, r)
	ctx := t.Context()
	create(t, r, Record{Tenant: Tenant{ID: "x"}})
	plan := func() string {
		t, err := r.Lookup(ctx, "x")
		if err != nil {
			return err.Error()
		}
		return t.Plan
	}
	require.Empty(t, plan())
	// The listener is ended and the change made in one transaction: it cannot have heard of it.
	d.SuperExec("select pg_terminate_backend(pid) from pg_stat_activity where query ilike 'listen pgx%' and datname = current_database(); update pgxtenant.tenant set plan = 'one'")
	eventually(t, "the missed change is seen", func() bool { return plan() == "one" })
	listening(t, r)
	require.Equal(t, "one", plan(), "in memory from here on: what was read before may have been forgotten")

	require.NoError(t, s.Stop())
	require.Equal(t, "one", plan(), "what is in memory is served for TTL")
	_, err := r.Lookup(ctx, "y")
	require.Error(t, err)
	require.NotErrorIs(t, err, ErrTenantNotFound, "not to be reachable is not to be missing")
	require.NoError(t, s.Start())
	d.SuperExec("update pgxtenant.tenant set plan = 'two'")
	eventually(t, "the change after a restart is seen", func() bool { return plan() == "two" })
}

func TestTheCacheFailsClosedWhenTheRegistryCannotBeRead(t *testing.T) {
	t.Parallel()
	d, r := newRegistryDB(t)
	create(t, r, Record{Tenant: Tenant{ID: "x"}})
	p := pgtest.NewProxy(t, d.Server().Addr())
	via := d.Via(p.Addr()).OwnerURL()
	const ttl = 300 * time.Millisecond
	strict := openRegistry(t, via, func(c *RegistryConfig) { c.TTL = ttl })
	lax := openRegistry(t, via, func(c *RegistryConfig) { c.TTL, c.StaleOnError = ttl, time.Hour })
	listening(t, strict, lax)
	for _, r := range []*Registry{strict, lax} {
		_, err := r.Lookup(t.Context(), "x")
		require.NoError(t, err)
	}
	p.Close() // in the middle
	eventually(t, "TTL is over", func() bool { _, ok := strict.Peek("x"); return !ok })
	_, err := strict.Lookup(t.Context(), "x")
	require.Error(t, err)
	require.NotErrorIs(t, err, ErrTenantNotFound)
	eventually(t, "the lax one's too", func() bool { _, ok := lax.Peek("x"); return !ok })
	got, err := lax.Lookup(t.Context(), "x")
	require.NoError(t, err)
	require.Equal(t, "x", got.ID)
}

func TestAThousandMissesAreOneQuery(t *testing.T) {
	t.Parallel()
	for name, by := range map[string]func(r *Registry) error{
		"ID":       func(r *Registry) error { _, err := r.Lookup(context.Background(), "x"); return err },
		"alias":    func(r *Registry) error { _, err := r.ByAlias(context.Background(), "x.example.com"); return err },
		"negative": func(r *Registry) error { _, err := r.Lookup(context.Background(), "y"); return err },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, first := newRegistryDB(t)
			create(t, first, Record{Tenant: Tenant{ID: "x"}, Aliases: []string{"x.example.com"}})
			q := &queryCounter{text: "pgxtenant.tenant t where t.id = $1"}
			if name == "alias" {
				q.text = "where alias = $1"
			}
			r := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.Pool.ConnConfig.Tracer = q })
			listening(t, r)
			release := make(chan struct{})
			q.before = func() { <-release }
			var wg sync.WaitGroup
			var failed atomic.Int64
			for range 1000 {
				wg.Go(func() {
					if by(r) != nil {
						failed.Add(1)
					}
				})
			}
			calls, key := &r.tenants.calls, map[string]string{"ID": "x", "alias": "x.example.com", "negative": "y"}[name]
			if name == "alias" {
				calls = &r.aliases.calls
			}
			eventually(t, "all wait", func() bool {
				calls.mu.Lock()
				defer calls.mu.Unlock()
				return calls.calls[key] != nil && calls.calls[key].waiting == 1000
			})
			close(release)
			wg.Wait()
			if name == "negative" {
				require.EqualValues(t, 1000, failed.Load())
				require.Error(t, by(r), "and it is remembered")
			} else {
				require.Zero(t, failed.Load())
			}
			require.EqualValues(t, 1, q.n.Load())
		})
	}
}

// A read that began before a change must not be kept after it.
func TestAReadThatAChangeOvertookIsNotKept(t *testing.T) {
	t.Parallel()
	_, r := newRegistryDB(t, func(c *RegistryConfig) { c.TTL = time.Hour })
	listening(t, r)
	create(t, r, Record{Tenant: Tenant{ID: "x", Plan: "old"}})
	r.tenants.purge()
	read := r.tenants.read
	var once sync.Once
	r.tenants.read = func(ctx context.Context, id string) (Tenant, error) {
		got, err := read(ctx, id)
		once.Do(func() { // after the row was read and before it is kept
			_, err := r.Update(ctx, id, func(rec *Record) error { rec.Plan = "new"; return nil })
			require.NoError(t, err)
		})
		return got, err
	}
	for range 2 {
		got, err := r.Lookup(t.Context(), "x")
		require.NoError(t, err)
		require.Equal(t, "new", got.Plan)
	}
}

func TestTwoProcessesCreateOneTenantOnce(t *testing.T) {
	t.Parallel()
	d, a := newRegistryDB(t)
	b := openRegistry(t, d.OwnerURL())
	var wg sync.WaitGroup
	var made, exists, taken atomic.Int64
	for i := range 40 {
		r := []*Registry{a, b}[i%2]
		wg.Go(func() { require.NoError(t, r.Install(context.Background())) })
		wg.Go(func() {
			// All want the aliases, in whatever order, and half of them the ID.
			aliases := []string{"one", "two", "three"}
			if i%2 == 0 {
				aliases = []string{"three", "two", "one"}
			}
			_, err := r.Create(context.Background(), Record{Tenant: Tenant{ID: fmt.Sprint("t", i/4*(i%2))}, Aliases: aliases})
			switch {
			case err == nil:
				made.Add(1)
			case errors.Is(err, ErrTenantExists):
				exists.Add(1)
			case errors.Is(err, ErrAliasTaken):
				taken.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, made.Load(), "exists %d, alias taken %d", exists.Load(), taken.Load())
	super := d.Connect(d.SuperURL())
	require.Equal(t, 1, count(t, super, t.Context(), "select count(*) from pgxtenant.tenant"))
	require.Equal(t, 3, count(t, super, t.Context(), "select count(*) from pgxtenant.tenant_alias"))
}

// A call that loses its connection has done all or nothing, and the registry works again afterwards.
func TestAConnectionLostInTheMiddleOfCreate(t *testing.T) {
	t.Parallel()
	d, direct := newRegistryDB(t)
	p := pgtest.NewProxy(t, d.Server().Addr())
	cut := &queryCounter{text: "insert into pgxtenant.tenant_alias", before: p.Cut}
	r := openRegistry(t, d.Via(p.Addr()).OwnerURL(), func(c *RegistryConfig) { c.Pool.ConnConfig.Tracer = cut })
	_, err := r.Create(t.Context(), Record{Tenant: Tenant{ID: "x"}, Aliases: []string{"one"}})
	require.Error(t, err)
	require.ErrorContains(t, err, `tenant "x": create`)
	_, err = direct.Get(t.Context(), "x")
	require.ErrorIs(t, err, ErrTenantNotFound)
	cut.before = nil
	create(t, r, Record{Tenant: Tenant{ID: "x"}, Aliases: []string{"one"}})
	listening(t, r)
}

func TestCheckoutFollowsTheRegistry(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	one, two := d.Database("app.current_tenant_id=iso"), d.Database("app.current_tenant_id=iso")
	db := openDB(t, d.AppURL(), func(c *Config) {
		c.Admin, _ = pgxpool.ParseConfig(d.OwnerURL())
		pool, _ := pgxpool.ParseConfig(d.AppURL())
		c.Registry = &RegistryConfig{Pool: pool, Key: []byte(strings.Repeat("k", 32)), TTL: time.Hour}
	})
	here := db.Registry()
	ctx := t.Context()
	require.ErrorContains(t, db.Ping(WithTenantID(ctx, "row")), "call Registry.Install")
	require.NoError(t, here.Install(ctx))
	there := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.Key = []byte(strings.Repeat("k", 32)) })
	listening(t, here, there)
	create(t, there, Record{Tenant: Tenant{ID: "row"}})
	create(t, there, Record{Tenant: Tenant{ID: "iso", Isolation: IsolationDatabase, ConnString: one.AppURL()}})
	iso, row := WithTenantID(ctx, "iso"), WithTenantID(ctx, "row")
	eventually(t, "they are there", func() bool { return db.Ping(row) == nil && db.Ping(iso) == nil })
	require.Equal(t, []string{one.Name}, strs(t, db, iso, "select current_database()::text"))

	require.NoError(t, there.Suspend(ctx, "row"))
	eventually(t, "the next checkout fails", func() bool { return errors.Is(db.Ping(row), ErrTenantSuspended) })
	require.NoError(t, there.MakeReadOnly(ctx, "row"))
	eventually(t, "read-only", func() bool { return db.Ping(row) == nil })
	_, err := db.Exec(row, "create temp sequence s; select nextval('s'); create table x ()")
	require.Equal(t, "25006", pgCode(err), "%v", err)

	pools := func(n int) func() bool { return func() bool { return len(db.isolated.places("")) == n } }
	require.True(t, pools(1)())
	_, err = there.Update(ctx, "iso", func(rec *Record) error { rec.ConnString = two.AppURL(); return nil })
	require.NoError(t, err)
	eventually(t, "the old pool is closed, though nobody asks", pools(0))
	require.Equal(t, []string{two.Name}, strs(t, db, iso, "select current_database()::text"))
	_, err = there.Update(ctx, "iso", func(rec *Record) error { rec.Plan = "gold"; return nil })
	require.NoError(t, err)
	require.NoError(t, there.Suspend(ctx, "iso"))
	eventually(t, "a suspended tenant's pool is closed", pools(0))
	require.NoError(t, there.Resume(ctx, "iso"))
	eventually(t, "it is back", func() bool { return db.Ping(iso) == nil })
	require.NoError(t, there.Delete(ctx, "iso"))
	eventually(t, "a deleted tenant's pool is closed", pools(0))
	require.ErrorIs(t, db.Ping(iso), ErrTenantNotFound)

	_, err = here.pool.Exec(ctx, "delete from pgxtenant.tenant")
	require.Equal(t, "42501", pgCode(err), "the reading role only reads")
}

func TestTheRegistrySaysWhichRightIsMissing(t *testing.T) {
	t.Parallel()
	d, _ := newRegistryDB(t)
	r := openRegistry(t, d.AppURL())
	_, err := r.Lookup(t.Context(), "x")
	require.ErrorContains(t, err, "lacks a right")
	_, err = r.Create(t.Context(), Record{Tenant: Tenant{ID: "x"}})
	require.ErrorContains(t, err, "lacks a right")
	other := pgtest.New(t)
	require.ErrorContains(t, openRegistry(t, other.AppURL()).Install(t.Context()), "lacks a right")

	_, err = NewWithConfig(t.Context(), func() *Config {
		c, _ := ParseConfig(d.AppURL())
		c.Registry, c.Directory = &RegistryConfig{}, newDirectory()
		return c
	}())
	require.ErrorContains(t, err, "Config.Registry and Config.Directory are both set")
	require.ErrorContains(t, err, "needs a Pool, or Config.Admin")
}

func TestAClosedRegistry(t *testing.T) {
	t.Parallel()
	_, r := newRegistryDB(t)
	create(t, r, Record{Tenant: Tenant{ID: "x"}, Aliases: []string{"x"}})
	_, err := r.Lookup(t.Context(), "x")
	require.NoError(t, err)
	r.Close()
	r.Close()
	_, err = r.Lookup(t.Context(), "x")
	require.ErrorIs(t, err, ErrClosed)
	_, err = r.ByAlias(t.Context(), "x")
	require.ErrorIs(t, err, ErrClosed)
	require.ErrorIs(t, r.Suspend(t.Context(), "x"), ErrClosed)
	for _, err := range r.All(t.Context()) {
		require.ErrorIs(t, err, ErrClosed)
	}
}

func fill(t testing.TB, d *pgtest.DB, n int) {
	d.Exec(fmt.Sprintf(`insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings)
		select 't'||i, 'gold', 'row', '', '', '', '', 'active', '{}' from generate_series(1, %d) i;
		insert into pgxtenant.tenant_alias select 'a'||i||'.example.com', 't'||i from generate_series(1, %[1]d) i; analyze pgxtenant.tenant, pgxtenant.tenant_alias`, n))
}

func TestAllPagesThroughAHundredThousandTenants(t *testing.T) {
	d, r := newRegistryDB(t)
	const n = 100_000
	fill(t, d, n)
	var first, most runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&first)
	seen, last, start := 0, "", time.Now()
	var peak uint64
	for rec, err := range r.All(t.Context()) {
		require.NoError(t, err)
		if rec.ID <= last || len(rec.Aliases) != 1 {
			t.Fatal(rec.ID, last)
		}
		last = rec.ID
		if seen++; seen%10_000 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&most)
			peak = max(peak, most.HeapAlloc-min(most.HeapAlloc, first.HeapAlloc))
		}
	}
	require.Equal(t, n, seen)
	t.Logf("%d tenants in %v, heap at most %d KiB above the start", n, time.Since(start).Round(time.Millisecond), peak>>10)
	require.Less(t, peak, uint64(8<<20))
	for range r.All(t.Context()) {
		break // holds nothing
	}
}

func TestAHitAllocatesNothing(t *testing.T) {
	_, r := newRegistryDB(t)
	listening(t, r)
	create(t, r, Record{Tenant: Tenant{ID: "x"}, Aliases: []string{"x.example.com"}})
	ctx := t.Context()
	_, err := r.ByAlias(ctx, "x.example.com")
	require.NoError(t, err)
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		if _, ok := r.Peek("x"); !ok {
			t.Error("not a hit")
		}
		if _, err := r.ByAlias(ctx, "x.example.com"); err != nil {
			t.Error(err)
		}
	}))
}

func BenchmarkRegistryHit(b *testing.B) {
	d, r := newRegistryDB(b)
	fill(b, d, 10_000)
	listening(b, r)
	ids := make([]string, 8192)
	for i := range ids {
		ids[i] = fmt.Sprintf("t%d", i+1)
		if _, err := r.ByAlias(context.Background(), fmt.Sprintf("a%d.example.com", i+1)); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("Peek", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if _, ok := r.Peek(ids[i&8191]); !ok {
				b.Fatal("not a hit")
			}
		}
	})
	b.Run("ByAlias", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := r.ByAlias(context.Background(), "a1.example.com"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
