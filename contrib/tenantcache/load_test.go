package tenantcache_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
)

// result is what a call of GetOrLoad returned.
type result struct {
	value string
	err   error
}

// getOrLoad calls it in the background.
func getOrLoad(ctx context.Context, cache *tenantcache.Cache[string], key string, load func(context.Context) (string, error)) <-chan result {
	results := make(chan result, 1)
	go func() {
		value, err := cache.GetOrLoad(ctx, key, 0, load)
		results <- result{value, err}
	}()
	return results
}

// gate is a loader that says when it has begun and waits until it may go on.
type gate struct {
	begun, open chan struct{}
	value       string
	err         error
}

func newGate(value string, err error) *gate {
	return &gate{make(chan struct{}), make(chan struct{}), value, err}
}

func (g *gate) load(context.Context) (string, error) {
	close(g.begun)
	<-g.open
	return g.value, g.err
}

// awaitShared returns when n calls wait for others' loads.
func awaitShared(t *testing.T, store tenantcache.Store, n uint64) {
	t.Helper()
	require.Eventually(t, func() bool { return store.Stats().Shared == n }, slow, time.Millisecond)
}

func TestOneLoadServesAllWhoAsk(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		ctx := as(t, "acme")
		g := newGate("v", nil)
		waiting := []<-chan result{getOrLoad(ctx, cache, "k", g.load)}
		<-g.begun
		for range 20 {
			waiting = append(waiting, getOrLoad(ctx, cache, "k", noLoad(t)))
		}
		// Neither another key's nor another tenant's load has anything to do with it.
		for ctx, key := range map[context.Context]string{ctx: "other", as(t, "acme2"): "k"} {
			value, err := cache.GetOrLoad(ctx, key, 0, returns("mine"))
			require.NoError(t, err)
			require.Equal(t, "mine", value)
		}
		awaitShared(t, store, 20)
		close(g.open)
		for _, w := range waiting {
			require.Equal(t, result{"v", nil}, <-w)
		}
		require.EqualValues(t, 3, store.Stats().Loads)
	})
}

// Those who looked before the load was stored, and asked for one when it had ended, are the hard case.
func TestOneLoadServesThoseWhoComeWhenItEnds(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		ctx := as(t, "acme")
		for round := range 60 {
			key := fmt.Sprint(round)
			var loads atomic.Int32
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					value, err := cache.GetOrLoad(ctx, key, 0, func(context.Context) (string, error) {
						loads.Add(1)
						return key, nil
					})
					if err != nil || value != key {
						t.Errorf("got %q, %v; want %q", value, err, key)
					}
				})
			}
			wg.Wait()
			require.EqualValues(t, 1, loads.Load())
		}
	})
}

func TestALoadOutlivesItsFirstCaller(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		type userKey struct{}
		leaving, leave := context.WithCancel(context.WithValue(as(t, "acme"), userKey{}, "user"))
		begun, open := make(chan struct{}), make(chan struct{})
		first := getOrLoad(leaving, cache, "k", func(ctx context.Context) (string, error) {
			close(begun)
			<-open
			tenant, _ := pgxtenant.FromContext(ctx)
			_, bounded := ctx.Deadline()
			return fmt.Sprintln(tenant.ID, ctx.Value(userKey{}), bounded, ctx.Err()), nil
		})
		<-begun
		second := getOrLoad(as(t, "acme"), cache, "k", noLoad(t))
		awaitShared(t, store, 1)
		leave()
		got := <-first
		require.ErrorIs(t, got.err, context.Canceled)
		close(open)
		require.Equal(t, result{"acme user true <nil>\n", nil}, <-second)
	})
}

func TestALoadsErrorIsSharedAndNotKept(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		ctx := as(t, "acme")
		failure := errors.New("no database")
		g := newGate("", failure)
		first := getOrLoad(ctx, cache, "k", g.load)
		<-g.begun
		second := getOrLoad(ctx, cache, "k", noLoad(t))
		awaitShared(t, store, 1)
		close(g.open)
		require.Equal(t, failure, (<-first).err)
		require.Equal(t, failure, (<-second).err)
		value, err := cache.GetOrLoad(ctx, "k", 0, returns("v"))
		require.NoError(t, err)
		require.Equal(t, "v", value)
		require.EqualValues(t, 1, store.Stats().LoadErrors)
	})
}

func TestAnErrorIsRememberedWhereAsked(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		notFound, other := errors.New("not found"), errors.New("other")
		config := tenantcache.Config[string]{RememberErrors: []error{other, notFound}}
		cache := newCache(t, store, config)
		ctx := as(t, "acme")
		fails := func(context.Context) (string, error) { return "", fmt.Errorf("invoice 1: %w", notFound) }
		_, err := cache.GetOrLoad(ctx, "k", 0, fails)
		require.Equal(t, notFound, err)
		_, err = cache.GetOrLoad(ctx, "k", 0, noLoad(t))
		require.Equal(t, notFound, err)
		_, ok, err := cache.Get(ctx, "k")
		require.Equal(t, notFound, err)
		require.False(t, ok)
		require.NoError(t, cache.Set(ctx, "k", "v", 0))
		requireHit(t, ctx, cache, "k", "v")

		// A process that does not remember it loads.
		require.NoError(t, cache.Delete(ctx, "k"))
		_, err = cache.GetOrLoad(ctx, "k", 0, fails)
		require.Equal(t, notFound, err)
		elsewhere := newCache(t, store, tenantcache.Config[string]{})
		value, err := elsewhere.GetOrLoad(ctx, "k", 0, returns("v"))
		require.NoError(t, err)
		require.Equal(t, "v", value)

		config.ErrorTTL = time.Millisecond
		brief := newCache(t, store, config)
		_, err = brief.GetOrLoad(ctx, "brief", time.Hour, fails)
		require.Equal(t, notFound, err)
		require.Eventually(t, func() bool {
			value, err := brief.GetOrLoad(ctx, "brief", time.Hour, returns("v"))
			return err == nil && value == "v"
		}, slow, time.Millisecond)
	})
}

func TestALoaderThatPanicsHarmsNobody(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		ctx := as(t, "acme")
		begun, open := make(chan struct{}), make(chan struct{})
		first := getOrLoad(ctx, cache, "k", func(context.Context) (string, error) {
			close(begun)
			<-open
			panic("ouch")
		})
		<-begun
		second := getOrLoad(ctx, cache, "k", noLoad(t))
		awaitShared(t, store, 1)
		close(open)
		for _, got := range []result{<-first, <-second} {
			var p *tenantcache.PanicError
			require.ErrorAs(t, got.err, &p)
			require.Equal(t, "ouch", p.Value)
			require.Contains(t, string(p.Stack), "load_test.go")
			require.EqualError(t, got.err, `tenant "acme": load: tenantcache: the load panicked: ouch`)
		}
		for name, load := range map[string]func(context.Context) (string, error){
			"goexit": func(context.Context) (string, error) { runtime.Goexit(); return "", nil },
			"nil":    nil,
		} {
			_, err := cache.GetOrLoad(ctx, name, 0, load)
			var p *tenantcache.PanicError
			require.ErrorAs(t, err, &p, name)
		}
		value, err := cache.GetOrLoad(ctx, "k", 0, returns("v"))
		require.NoError(t, err)
		require.Equal(t, "v", value)
		require.EqualValues(t, 3, store.Stats().LoadErrors)
	})
}

func TestALoaderThatNeverReturnsHoldsNobody(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{LoadTimeout: 10 * time.Millisecond})
		ctx := as(t, "acme")
		g := newGate("late", nil)
		_, err := cache.GetOrLoad(ctx, "k", 0, g.load)
		require.ErrorIs(t, err, tenantcache.ErrLoadTimeout)
		patient := newCache(t, store, tenantcache.Config[string]{})
		value, err := patient.GetOrLoad(ctx, "k", 0, returns("v"))
		require.NoError(t, err)
		require.Equal(t, "v", value)
		close(g.open)
		store.Close() // returns when the loader has
	})
}

func TestALoadThatIsOvertakenIsNotKept(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{EarlyRefresh: time.Hour, TTL: time.Hour})
		calm := newCache(t, store, tenantcache.Config[string]{TTL: time.Hour}) // the same entries, and a hit refreshes none
		for name, overtake := range map[string]func(ctx context.Context) error{
			"delete":            func(ctx context.Context) error { return cache.Delete(ctx, "k") },
			"set":               func(ctx context.Context) error { return cache.Set(ctx, "k", "set", 0) },
			"invalidate":        cache.Invalidate,
			"invalidate-tenant": store.InvalidateTenant,
		} {
			for _, before := range []string{"", "deleted", "invalid"} {
				ctx := as(t, name+before)
				if before != "" {
					require.NoError(t, cache.Set(ctx, "k", before, 0))
				}
				switch before {
				case "deleted":
					require.NoError(t, cache.Delete(ctx, "k"))
				case "invalid":
					require.NoError(t, cache.Invalidate(ctx))
				}
				g := newGate("old", nil)
				first := getOrLoad(ctx, cache, "k", g.load)
				<-g.begun
				require.NoError(t, overtake(ctx))
				want := "new"
				if name == "set" {
					want = "set"
				}
				// It does not wait for the old load.
				value, err := calm.GetOrLoad(ctx, "k", 0, returns("new"))
				require.NoError(t, err)
				require.Equal(t, want, value, "%s, %s", name, before)
				close(g.open)
				require.Equal(t, result{"old", nil}, <-first) // it asked before
				require.Eventually(t, func() bool { return store.Stats().Overtaken > 0 || name[0] == 'i' }, slow, time.Millisecond)
				value, _, err = cache.Get(ctx, "k")
				require.NoError(t, err)
				require.Contains(t, []string{want, ""}, value, "%s, %s", name, before)
			}
		}
	})
}

func TestAHitIsRefreshedEarlyInTheBackground(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{EarlyRefresh: time.Hour, TTL: time.Hour})
		ctx := as(t, "acme")
		require.NoError(t, cache.Set(ctx, "k", "old", 0))
		begun, open := make(chan struct{}), make(chan struct{})
		refresh := func(context.Context) (string, error) {
			close(begun) // a second refresh would panic
			<-open
			return "new", nil
		}
		for hits := 0; store.Stats().Refreshes == 0; hits++ { // each with 2 %
			value, err := cache.GetOrLoad(ctx, "k", 0, refresh)
			require.NoError(t, err)
			require.Equal(t, "old", value)
		}
		<-begun
		value, err := cache.GetOrLoad(ctx, "k", 0, noLoad(t)) // while the refresh goes on
		require.NoError(t, err)
		require.Equal(t, "old", value)
		close(open)
		require.Eventually(t, func() bool {
			value, _, err := cache.Get(ctx, "k")
			return err == nil && value == "new"
		}, slow, time.Millisecond)
		require.EqualValues(t, 1, store.Stats().Refreshes)

		never := newCache(t, store, tenantcache.Config[string]{TTL: time.Hour})
		for range 300 {
			_, err := never.GetOrLoad(ctx, "k", 0, noLoad(t))
			require.NoError(t, err)
		}
	})
}
