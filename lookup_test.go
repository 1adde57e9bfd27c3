package pgxtenant

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// directory is a Directory in memory.
type directory struct {
	mu      sync.Mutex
	tenants map[string]Tenant
	lookups atomic.Int64
	before  func(ctx context.Context, id string) // runs in each Lookup, unlocked
}

func newDirectory(tenants ...Tenant) *directory {
	d := &directory{tenants: make(map[string]Tenant)}
	for _, t := range tenants {
		d.put(t)
	}
	return d
}

func (d *directory) put(t Tenant) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tenants[t.ID] = t
}

func (d *directory) Lookup(ctx context.Context, id string) (Tenant, error) {
	d.lookups.Add(1)
	if d.before != nil {
		d.before(ctx, id)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t, ok := d.tenants[id]; ok {
		return t, nil
	}
	return Tenant{}, fmt.Errorf("%w in the test's directory", ErrTenantNotFound)
}

func TestTheDirectoryIsAskedAtEachCheckout(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	dir := newDirectory(Tenant{ID: "a"})
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir })
	ctx := WithTenantID(context.Background(), "a")

	require.NoError(t, db.Ping(ctx))
	require.EqualValues(t, 1, dir.lookups.Load())
	dir.put(Tenant{ID: "a", Settings: map[string]string{"app.color": "red"}})
	require.Equal(t, []string{"red"}, strs(t, db, ctx, "select current_setting('app.color')"))
	dir.put(Tenant{ID: "a", Settings: map[string]string{"app.color": "blue"}})
	require.Equal(t, []string{"blue"}, strs(t, db, ctx, "select current_setting('app.color')"))
	require.Equal(t, []string{"blue"}, strs(t, db.Shared(), ctx, "select current_setting('app.color')"))

	dir.put(Tenant{ID: "a", Status: StatusSuspended})
	expectAll(t, db, ctx, ErrTenantSuspended)
	dir.put(Tenant{ID: "a"})
	require.NoError(t, db.Ping(ctx))
	expectAll(t, db, WithTenantID(context.Background(), "b"), ErrTenantNotFound)

	// Without one, the ID is all there is to it.
	plain := openDB(t, d.AppURL())
	require.Equal(t, []string{"b"}, strs(t, plain, WithTenantID(context.Background(), "b"), readTenant))
}

func TestOneLookupForAllWhoAsk(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	dir := newDirectory(Tenant{ID: "a"})
	asked, answer := make(chan context.Context, 10), make(chan struct{})
	dir.before = func(ctx context.Context, _ string) {
		asked <- ctx
		select {
		case <-answer:
		case <-ctx.Done():
		}
	}
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir })
	type key struct{}
	first, cancelFirst := context.WithCancel(WithTenantID(context.WithValue(context.Background(), key{}, "kept"), "a"))
	results := make(chan error, 100)
	go func() { results <- db.Ping(first) }()
	lookupCtx := <-asked
	require.Equal(t, "kept", lookupCtx.Value(key{}))
	for range 50 {
		go func() { results <- db.Ping(WithTenantID(context.Background(), "a")) }()
	}
	waiting := func(n int) func() bool {
		return func() bool {
			db.lookups.mu.Lock()
			defer db.lookups.mu.Unlock()
			call := db.lookups.calls["a"]
			return call != nil && call.waiting == n
		}
	}
	eventually(t, "all wait", waiting(51))
	cancelFirst()
	err := <-results
	require.ErrorIs(t, err, context.Canceled, "who is cancelled leaves at once")
	require.ErrorContains(t, err, `tenant "a": look up`)
	require.NoError(t, lookupCtx.Err(), "and the others' look-up goes on")
	close(answer)
	for range 50 {
		require.NoError(t, <-results)
	}
	require.EqualValues(t, 1, dir.lookups.Load())
}

func TestALookupEndsWithItsLastCaller(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	dir := newDirectory(Tenant{ID: "a"})
	asked := make(chan context.Context, 10)
	var hang atomic.Bool
	hang.Store(true)
	dir.before = func(ctx context.Context, _ string) {
		if asked <- ctx; hang.Load() {
			<-ctx.Done()
		}
	}
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir })
	ctx, cancel := context.WithCancel(WithTenantID(context.Background(), "a"))
	result := make(chan error)
	go func() { result <- db.Ping(ctx) }()
	lookupCtx := <-asked
	cancel()
	require.ErrorIs(t, <-result, context.Canceled)
	<-lookupCtx.Done()
	hang.Store(false)
	require.NoError(t, db.Ping(WithTenantID(context.Background(), "a")), "the next one asks anew")
}

func TestABadDirectory(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	dir := newDirectory()
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir })
	ctx := WithTenantID(context.Background(), "a")

	dir.before = func(context.Context, string) { panic("oh no") }
	require.ErrorContains(t, db.Ping(ctx), "oh no")
	dir.before = nil
	dir.tenants["a"] = Tenant{ID: "b"}
	err := db.Ping(ctx)
	require.ErrorIs(t, err, ErrWrongTenant)
	require.ErrorContains(t, err, `"a"`)
	require.ErrorContains(t, err, `"b"`)
	dir.tenants["a"] = Tenant{ID: "a", Status: 77}
	require.ErrorIs(t, db.Ping(ctx), ErrInvalidTenant, "a status of a later version is not taken for active")
	dir.tenants["a"] = Tenant{ID: "a", Isolation: 77}
	require.ErrorIs(t, db.Ping(ctx), ErrInvalidTenant)
	dir.put(Tenant{ID: "a"})
	require.NoError(t, db.Ping(ctx))
}

// peeking is a directory that knows some tenants by heart.
type peeking struct {
	*directory
	known map[string]Tenant
}

func (p peeking) Peek(id string) (Tenant, bool) {
	t, ok := p.known[id]
	return t, ok
}

func TestPeekIsAskedFirst(t *testing.T) {
	t.Parallel()
	dir := newDirectory(Tenant{ID: "a"}, Tenant{ID: "b"})
	known := map[string]Tenant{
		"a": {ID: "a", Settings: map[string]string{"app.user_id": "peeked"}},
		"s": {ID: "s", Status: StatusSuspended},
		"x": {ID: "y"},
	}
	db := openDB(t, pgtest.New(t).AppURL(), func(c *Config) { c.Directory = peeking{dir, known} })
	id := func(id string) context.Context { return WithTenantID(context.Background(), id) }
	require.Equal(t, []string{"peeked"}, strs(t, db, id("a"), "select current_setting('app.user_id')"))
	require.Equal(t, []string{"peeked"}, strs(t, db.Shared(), id("a"), "select current_setting('app.user_id')"))
	require.ErrorIs(t, db.Ping(id("s")), ErrTenantSuspended)
	require.ErrorIs(t, db.Ping(id("x")), ErrWrongTenant)
	require.Zero(t, dir.lookups.Load())

	require.Equal(t, []string{"b"}, strs(t, db, id("b"), readTenant))
	require.ErrorIs(t, db.Ping(id("c")), ErrTenantNotFound)
	require.EqualValues(t, 2, dir.lookups.Load())
}
