package tenantcache_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
)

// stores are all that keep the same promises.
var stores = map[string]func(testing.TB, int) tenantcache.Store{
	"memory": func(t testing.TB, maxValue int) tenantcache.Store {
		return newMemory(t, tenantcache.MemoryConfig{MaxValueBytes: maxValue})
	},
	"redis": func(t testing.TB, maxValue int) tenantcache.Store {
		return newRedis(t, tenantcache.RedisConfig{MaxValueBytes: maxValue, OnFailure: tenantcache.ReturnError})
	},
	"cluster": func(t testing.TB, maxValue int) tenantcache.Store {
		return newRedisOn(t, dial(t, cluster), tenantcache.RedisConfig{MaxValueBytes: maxValue, OnFailure: tenantcache.ReturnError})
	},
	"cluster, one slot": func(t testing.TB, maxValue int) tenantcache.Store {
		return newRedisOn(t, dial(t, cluster), tenantcache.RedisConfig{MaxValueBytes: maxValue, OnFailure: tenantcache.ReturnError, OneSlot: true})
	},
	"ring": func(t testing.TB, maxValue int) tenantcache.Store {
		shards := map[string]string{}
		servers, err := ringServers()
		require.NoError(t, err)
		for _, s := range servers {
			shards[s.Addr] = s.Addr
		}
		client := redis.NewRing(&redis.RingOptions{Addrs: shards})
		t.Cleanup(func() { require.NoError(t, client.Close()) })
		return newRedisOn(t, client, tenantcache.RedisConfig{MaxValueBytes: maxValue, OnFailure: tenantcache.ReturnError})
	},
}

// conform runs a test on each kind of store.
func conform(t *testing.T, test func(t *testing.T, store tenantcache.Store)) {
	t.Parallel()
	for _, name := range slices.Sorted(maps.Keys(stores)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, stores[name](t, 1<<16))
		})
	}
}

type invoice struct {
	Number int
	Lines  []string
}

func TestAValueIsThereUntilItIsDeleted(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[invoice]{})
		ctx := as(t, "acme")
		requireMiss(t, ctx, cache, "1")
		require.NoError(t, cache.Set(ctx, "1", invoice{1, []string{"nut"}}, 0))
		require.NoError(t, cache.Set(ctx, "2", invoice{Number: 2}, time.Hour))
		requireHit(t, ctx, cache, "1", invoice{1, []string{"nut"}})
		require.NoError(t, cache.Set(ctx, "1", invoice{Number: 11}, 0))
		requireHit(t, ctx, cache, "1", invoice{Number: 11})
		requireHit(t, ctx, cache, "2", invoice{Number: 2})

		require.NoError(t, cache.Delete(ctx, "1", "none"))
		requireMiss(t, ctx, cache, "1")
		requireHit(t, ctx, cache, "2", invoice{Number: 2})
		require.NoError(t, cache.Set(ctx, "1", invoice{Number: 111}, 0))
		requireHit(t, ctx, cache, "1", invoice{Number: 111})
		require.NoError(t, cache.Delete(ctx))
	})
}

func TestAValueExpires(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{TTL: time.Millisecond})
		ctx := as(t, "acme")
		require.NoError(t, cache.Set(ctx, "a", "short", time.Nanosecond))
		require.NoError(t, cache.Set(ctx, "b", "default", 0))
		require.NoError(t, cache.Set(ctx, "c", "long", time.Hour))
		for _, key := range []string{"a", "b"} {
			require.Eventually(t, func() bool {
				_, ok, err := cache.Get(ctx, key)
				return err == nil && !ok
			}, slow, time.Millisecond)
		}
		requireHit(t, ctx, cache, "c", "long")
		require.ErrorIs(t, cache.Set(ctx, "a", "", -time.Second), tenantcache.ErrTTL)
	})
}

func TestWithoutATenantNothingIsServed(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		suspended := pgxtenant.Tenant{ID: "acme", Status: pgxtenant.StatusSuspended}
		deleting := pgxtenant.Tenant{ID: "acme", Status: pgxtenant.StatusDeleting}
		require.NoError(t, cache.Set(as(t, "acme"), "k", "v", 0))
		for _, c := range []struct {
			ctx     context.Context
			want    error
			removes bool // may still remove what there is
		}{
			{t.Context(), pgxtenant.ErrNoTenant, false},
			{pgxtenant.WithoutTenant(as(t, "acme")), pgxtenant.ErrNoTenant, false},
			{as(t, ""), pgxtenant.ErrInvalidTenantID, false},
			{as(t, "a:b"), pgxtenant.ErrInvalidTenantID, false},
			{as(t, "a}b"), pgxtenant.ErrInvalidTenantID, false},
			{as(t, strings.Repeat("a", 1<<20)), pgxtenant.ErrInvalidTenantID, false},
			{pgxtenant.WithTenant(t.Context(), suspended), pgxtenant.ErrTenantSuspended, true},
			{pgxtenant.WithTenant(t.Context(), deleting), pgxtenant.ErrTenantUnavailable, true},
		} {
			_, _, err := cache.Get(c.ctx, "k")
			require.ErrorIs(t, err, c.want)
			_, err = cache.GetOrLoad(c.ctx, "k", 0, noLoad(t))
			require.ErrorIs(t, err, c.want)
			require.ErrorIs(t, cache.Set(c.ctx, "k", "x", 0), c.want)
			for _, remove := range []func() error{
				func() error { return cache.Delete(c.ctx, "k") },
				func() error { return cache.Invalidate(c.ctx) },
				func() error { return store.InvalidateTenant(c.ctx) },
			} {
				if c.removes {
					require.NoError(t, remove())
				} else {
					require.ErrorIs(t, remove(), c.want)
				}
			}
		}
		requireMiss(t, as(t, "acme"), cache, "k")
	})
}

func TestNoKeyLeadsToAnotherEntry(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		odd := []string{"", "a", "b", "a:b", ":", "*", "?", "[a]", "{a}", "}", "\x00", "a\x00", "e1:a:", "🐘", "e\u0301", "é",
			"\xff\xfe", "a\r\nb", "%", "..", "t", "n:a", strings.Repeat("k", 1<<17)}
		tenants := []string{"a", "b", "A", "a.b", "a-b", "a_b", "t", "n", "e1", strings.Repeat("a", 128)}
		caches := map[string]*tenantcache.Cache[string]{}
		for _, namespace := range odd[1:12] {
			caches[namespace] = newCache(t, store, tenantcache.Config[string]{Namespace: namespace})
		}
		each := func(f func(ctx context.Context, cache *tenantcache.Cache[string], key, value string)) {
			for i, tenant := range tenants {
				for namespace, cache := range caches {
					if i > 1 && namespace != "a" {
						continue
					}
					for _, key := range odd {
						f(as(t, tenant), cache, key, fmt.Sprintf("%q %q %.20q", tenant, namespace, key))
					}
				}
			}
		}
		each(func(ctx context.Context, cache *tenantcache.Cache[string], key, value string) {
			require.NoError(t, cache.Set(ctx, key, value, time.Hour))
		})
		each(func(ctx context.Context, cache *tenantcache.Cache[string], key, value string) {
			requireHit(t, ctx, cache, key, value)
		})
	})
}

func TestInvalidationReachesAllOfATenantAndNobodyElse(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		invoices := newCache(t, store, tenantcache.Config[string]{Namespace: "invoice"})
		users := newCache(t, store, tenantcache.Config[string]{Namespace: "user"})
		acme, acme2 := as(t, "acme"), as(t, "acme2")
		fill := func() {
			for _, ctx := range []context.Context{acme, acme2} {
				for _, key := range []string{"1", "2"} {
					require.NoError(t, invoices.Set(ctx, key, "invoice", time.Hour))
					require.NoError(t, users.Set(ctx, key, "user", time.Hour))
				}
			}
		}
		fill()
		require.NoError(t, invoices.Invalidate(acme))
		for _, key := range []string{"1", "2"} {
			requireMiss(t, acme, invoices, key)
			requireHit(t, acme, users, key, "user")
			requireHit(t, acme2, invoices, key, "invoice")
		}
		fill()
		require.NoError(t, store.InvalidateTenant(acme))
		for _, key := range []string{"1", "2"} {
			requireMiss(t, acme, invoices, key)
			requireMiss(t, acme, users, key)
			requireHit(t, acme2, invoices, key, "invoice")
			requireHit(t, acme2, users, key, "user")
		}
		fill()
		requireHit(t, acme, invoices, "1", "invoice")
		require.EqualValues(t, 2, store.Stats().Invalidations)
	})
}

func TestAValueThatDoesNotDecodeIsLoadedAnew(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		texts := newCache(t, store, tenantcache.Config[string]{})
		numbers := newCache(t, store, tenantcache.Config[int]{})
		ctx := as(t, "acme")
		require.NoError(t, texts.Set(ctx, "k", "no number", time.Hour))
		requireMiss(t, ctx, numbers, "k")
		n, err := numbers.GetOrLoad(ctx, "k", 0, returns(7))
		require.NoError(t, err)
		require.Equal(t, 7, n)
		requireHit(t, ctx, numbers, "k", 7)
		require.EqualValues(t, 2, store.Stats().Undecodable)
	})
}

func TestAValueThatIsTooLargeIsNotKept(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		ctx := as(t, "acme")
		large := strings.Repeat("x", 1<<16)
		require.NoError(t, cache.Set(ctx, "k", "small", 0))
		require.ErrorIs(t, cache.Set(ctx, "k", large, 0), tenantcache.ErrTooLarge)
		requireMiss(t, ctx, cache, "k")
		got, err := cache.GetOrLoad(ctx, "k", 0, returns(large))
		require.NoError(t, err)
		require.Equal(t, large, got)
		requireMiss(t, ctx, cache, "k")
		require.EqualValues(t, 2, store.Stats().TooLarge)
	})
}

func TestEachCallerHasItsOwnCopy(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[*invoice]{})
		ctx := as(t, "acme")
		loaded := &invoice{1, []string{"nut"}}
		for range 3 {
			got, err := cache.GetOrLoad(ctx, "k", 0, returns(loaded))
			require.NoError(t, err)
			require.NotSame(t, loaded, got)
			require.Equal(t, &invoice{1, []string{"nut"}}, got)
			got.Lines[0] = "changed"
		}
		require.NoError(t, cache.Set(ctx, "nil", nil, 0))
		requireHit(t, ctx, cache, "nil", nil)
	})
}

func TestACodecThatFailsIsSaid(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[any]{})
		ctx := as(t, "acme")
		require.ErrorIs(t, cache.Set(ctx, "k", func() {}, 0), tenantcache.ErrCodec)
		_, err := cache.GetOrLoad(ctx, "k", 0, returns[any](make(chan int)))
		require.ErrorIs(t, err, tenantcache.ErrCodec)
		require.ErrorContains(t, err, `tenant "acme"`)

		writeOnly := newCache(t, store, tenantcache.Config[string]{Codec: oneWay{}})
		_, err = writeOnly.GetOrLoad(ctx, "k", 0, returns("v"))
		require.ErrorIs(t, err, tenantcache.ErrCodec)
	})
}

// What a codec panics at, in the cache, is not there. The load goes on.
func TestACodecThatPanicsReadsNothing(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		texts := newCache(t, store, tenantcache.Config[string]{})
		fussy := newCache(t, store, tenantcache.Config[string]{Codec: fussyCodec{}})
		ctx := as(t, "acme")
		require.NoError(t, texts.Set(ctx, "k", "foreign", time.Hour))
		requireMiss(t, ctx, fussy, "k")
		for range 2 {
			value, err := fussy.GetOrLoad(ctx, "k", 0, returns("own"))
			require.NoError(t, err)
			require.Equal(t, "own", value)
		}
		require.EqualValues(t, 2, store.Stats().Undecodable)
		require.EqualValues(t, 1, store.Stats().Loads)
	})
}

// fussyCodec panics at what other codecs have written.
type fussyCodec struct{}

func (fussyCodec) Encode(value string) ([]byte, error) { return []byte("fussy " + value), nil }

func (fussyCodec) Decode(data []byte) (string, error) {
	own, ok := strings.CutPrefix(string(data), "fussy ")
	if !ok {
		panic("that is not mine")
	}
	return own, nil
}

// The longest time is no time that has passed.
func TestAValueMayBeKeptForEver(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		const ever = time.Duration(math.MaxInt64)
		cache := newCache(t, store, tenantcache.Config[string]{TTL: ever, LoadTimeout: ever, ErrorTTL: ever, EarlyRefresh: time.Hour})
		ctx := as(t, "acme")
		require.NoError(t, cache.Set(ctx, "set", "v", ever))
		for range 2 {
			value, err := cache.GetOrLoad(ctx, "loaded", 0, returns("v"))
			require.NoError(t, err)
			require.Equal(t, "v", value)
		}
		require.NoError(t, cache.Delete(ctx, "deleted"))
		requireHit(t, ctx, cache, "set", "v")
		require.EqualValues(t, 1, store.Stats().Loads)
		if _, ok := store.(*tenantcache.Redis); ok && !strings.Contains(t.Name(), "ring") {
			servers := standalone
			if strings.Contains(t.Name(), "cluster") {
				servers = cluster
			}
			client := dial(t, servers)
			for _, name := range names(t, client, prefixOf(t)) {
				require.Greater(t, client.TTL(ctx, name).Val(), 90*365*24*time.Hour, name)
			}
		}
	})
}

type oneWay struct{ tenantcache.JSON[string] }

func (oneWay) Decode([]byte) (string, error) { return "", errors.New("cannot read") }

func TestADoneContextIsAnError(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		require.NoError(t, cache.Set(as(t, "acme"), "k", "v", 0))
		ctx, cancel := context.WithCancel(as(t, "acme"))
		cancel()
		_, _, err := cache.Get(ctx, "k")
		require.ErrorIs(t, err, context.Canceled)
		_, err = cache.GetOrLoad(ctx, "k", 0, noLoad(t))
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, cache.Set(ctx, "k", "x", 0), context.Canceled)
		require.ErrorIs(t, cache.Delete(ctx, "k"), context.Canceled)
		require.ErrorIs(t, cache.Invalidate(ctx), context.Canceled)
		require.ErrorIs(t, store.InvalidateTenant(ctx), context.Canceled)
		requireHit(t, as(t, "acme"), cache, "k", "v")
	})
}

func TestAClosedStoreServesNothing(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		cache := newCache(t, store, tenantcache.Config[string]{})
		ctx := as(t, "acme")
		started := make(chan struct{})
		loading := make(chan error, 1)
		go func() {
			_, err := cache.GetOrLoad(ctx, "k", 0, func(ctx context.Context) (string, error) {
				close(started)
				<-ctx.Done()
				return "", ctx.Err()
			})
			loading <- err
		}()
		<-started
		store.Close()
		store.Close()
		require.ErrorIs(t, <-loading, tenantcache.ErrClosed)
		_, _, err := cache.Get(ctx, "k")
		require.ErrorIs(t, err, tenantcache.ErrClosed)
		_, err = cache.GetOrLoad(ctx, "k", 0, noLoad(t))
		require.ErrorIs(t, err, tenantcache.ErrClosed)
		require.ErrorIs(t, cache.Set(ctx, "k", "v", 0), tenantcache.ErrClosed)
		require.ErrorIs(t, cache.Delete(ctx, "k"), tenantcache.ErrClosed)
		require.ErrorIs(t, cache.Invalidate(ctx), tenantcache.ErrClosed)
		require.ErrorIs(t, store.InvalidateTenant(ctx), tenantcache.ErrClosed)
	})
}

// Each value is the tenant's and key's own, with the version of a source that changes all the time: whoever changed it, and
// said so to the cache, must from then on read that version or a later one.
func TestNobodyReadsWhatHeKnowsToBeOld(t *testing.T) {
	conform(t, func(t *testing.T, store tenantcache.Store) {
		type value struct {
			Tenant, Key string
			Version     int64
		}
		cache := newCache(t, store, tenantcache.Config[value]{EarlyRefresh: time.Hour, TTL: time.Hour})
		var source sync.Map // of *atomic.Int64
		version := func(tenant, key string) *atomic.Int64 {
			v, _ := source.LoadOrStore(tenant+" "+key, new(atomic.Int64))
			return v.(*atomic.Int64)
		}
		tenants, keys := []string{"a", "b"}, []string{"x", "y"}
		var wg sync.WaitGroup
		for worker := range 8 {
			wg.Go(func() {
				for i := range 150 {
					tenant, key := tenants[(i+worker)%2], keys[(i+worker)/2%2]
					ctx := as(t, tenant)
					least := int64(0)
					if (i+worker)%3 == 0 {
						least = version(tenant, key).Add(1)
						var err error
						switch i % 4 {
						case 0:
							err = cache.Invalidate(ctx)
						case 1:
							err = store.InvalidateTenant(ctx)
						default:
							err = cache.Delete(ctx, key)
						}
						if err != nil {
							t.Error(err)
						}
					}
					got, err := cache.GetOrLoad(ctx, key, 0, func(ctx context.Context) (value, error) {
						in, _ := pgxtenant.FromContext(ctx)
						return value{in.ID, key, version(in.ID, key).Load()}, nil
					})
					if err != nil || got.Tenant != tenant || got.Key != key || got.Version < least {
						t.Errorf("%s %s: got %v, %v; want version %d or later", tenant, key, got, err, least)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestABadConfigIsRefused(t *testing.T) {
	t.Parallel()
	client := dial(t, standalone)
	for want, err := range map[string]error{
		"Namespace is empty":                second(tenantcache.New(newMemory(t, tenantcache.MemoryConfig{}), tenantcache.Config[int]{})),
		"the Store is nil":                  second(tenantcache.New(nil, tenantcache.Config[int]{Namespace: "n"})),
		"TTL is -1ns":                       second(tenantcache.New(nil, tenantcache.Config[int]{TTL: -1})),
		"LoadTimeout is -1ns":               second(tenantcache.New(nil, tenantcache.Config[int]{LoadTimeout: -1})),
		"EarlyRefresh is -1ns":              second(tenantcache.New(nil, tenantcache.Config[int]{EarlyRefresh: -1})),
		"ErrorTTL is -1ns":                  second(tenantcache.New(nil, tenantcache.Config[int]{ErrorTTL: -1})),
		"RememberErrors has a nil":          second(tenantcache.New(nil, tenantcache.Config[int]{RememberErrors: []error{nil}})),
		`RememberErrors has "x" twice`:      second(tenantcache.New(nil, tenantcache.Config[int]{RememberErrors: []error{errors.New("x"), errors.New("x")}})),
		"MaxBytes is -1":                    second(tenantcache.NewMemory(tenantcache.MemoryConfig{MaxBytes: -1})),
		"MaxValueBytes is -1":               second(tenantcache.NewMemory(tenantcache.MemoryConfig{MaxValueBytes: -1})),
		"the Store is nil; see":             second(tenantcache.New((*tenantcache.Redis)(nil), tenantcache.Config[int]{Namespace: "n"})),
		"the client is nil":                 second(tenantcache.NewRedis(nil, tenantcache.RedisConfig{})),
		"the client is nil; see":            second(tenantcache.NewRedis((*redis.Client)(nil), tenantcache.RedisConfig{})),
		`Prefix has '{'`:                    second(tenantcache.NewRedis(client, tenantcache.RedisConfig{Prefix: "{"})),
		"Timeout is -1ns":                   second(tenantcache.NewRedis(client, tenantcache.RedisConfig{Timeout: -1})),
		"BreakerPause is -1ns":              second(tenantcache.NewRedis(client, tenantcache.RedisConfig{BreakerPause: -1})),
		"NewRedis: MaxValueBytes is -2":     second(tenantcache.NewRedis(client, tenantcache.RedisConfig{MaxValueBytes: -2})),
		"want LoadFromSource or ReturnErro": second(tenantcache.NewRedis(client, tenantcache.RedisConfig{OnFailure: 9})),
	} {
		require.ErrorContains(t, err, want)
	}
}

func second[T any](_ T, err error) error { return err }
