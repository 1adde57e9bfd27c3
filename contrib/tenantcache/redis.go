package tenantcache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker/v2"
)

// Defaults of RedisConfig's fields.
const (
	DefaultPrefix          = "tenantcache"
	DefaultTimeout         = 200 * time.Millisecond
	DefaultBreakerFailures = 5
	DefaultBreakerPause    = 2 * time.Second
)

// OnFailure is what reads do when Redis fails.
type OnFailure uint8

const (
	// LoadFromSource has Get find nothing and GetOrLoad load.
	LoadFromSource OnFailure = iota
	// ReturnError has both return an error that wraps ErrUnavailable.
	ReturnError
)

// RedisConfig describes a Redis. NewRedis copies it.
type RedisConfig struct {
	// Prefix begins the name of all that is kept in Redis. It has letters, digits and _ . : - only, and all
	// processes that are to share entries have the same.
	//
	// Empty means DefaultPrefix ("tenantcache").
	Prefix string

	// OneSlot keeps all of a tenant's entries in one hash slot of a Redis Cluster, so on one node: a read is then
	// one command to one node. Otherwise they are spread over all nodes, of which a read asks up to three at once.
	// It matters in a Cluster only, but changes names: to change it empties the cache.
	OneSlot bool

	// Timeout is the most that a call waits for Redis, whatever the timeouts of its client; that of a read is
	// also bounded by half of the time that is left to its context, so that a load can still be done.
	//
	// Zero means DefaultTimeout (200 milliseconds). A negative value is refused.
	Timeout time.Duration

	// OnFailure is what reads do when Redis fails. Writes and invalidations always return the error.
	//
	// Zero means LoadFromSource.
	OnFailure OnFailure

	// BreakerFailures is how many calls in a row must fail for the circuit breaker to open. It then spares
	// Redis for BreakerPause, lets one call through, and closes if that succeeds. Delete and invalidations go
	// through it at any time.
	//
	// Zero means DefaultBreakerFailures (5). A negative value means that it never opens.
	BreakerFailures int

	// BreakerPause is how long the circuit breaker stays open.
	//
	// Zero means DefaultBreakerPause (2 seconds). A negative value is refused.
	BreakerPause time.Duration

	// MaxValueBytes is the longest encoded value that is kept.
	//
	// Zero means DefaultMaxValueBytes (4 MiB). A negative value is refused.
	MaxValueBytes int

	// SweepAfterInvalidate has each InvalidateTenant followed by a Sweep in the background, one at a time for
	// all tenants that wait for it. Otherwise invalid entries are left to their TTLs.
	SweepAfterInvalidate bool

	// Logger is told when the circuit breaker opens and closes, and when a sweep fails.
	//
	// Nil means no log.
	Logger *slog.Logger
}

func (c *RedisConfig) problems() (problems []error) {
	for _, r := range c.Prefix {
		if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("_.:-", r)) {
			problems = append(problems, fmt.Errorf("the Prefix has %q; want letters, digits and _ . : - only", r))
		}
	}
	if c.Timeout < 0 {
		problems = append(problems, fmt.Errorf("the Timeout is %v; want 0 or more", c.Timeout))
	}
	if c.BreakerPause < 0 {
		problems = append(problems, fmt.Errorf("BreakerPause is %v; want 0 or more", c.BreakerPause))
	}
	if c.MaxValueBytes < 0 {
		problems = append(problems, fmt.Errorf("MaxValueBytes is %d; want 0 or more", c.MaxValueBytes))
	}
	if c.OnFailure > ReturnError {
		problems = append(problems, fmt.Errorf("OnFailure is %d; want LoadFromSource or ReturnError", c.OnFailure))
	}
	return problems
}

// Redis is a Store in Redis 7 or later, or in what speaks its protocol: standalone, behind Sentinel, as a Cluster, or
// as the shards of a Ring. All processes that use it see each other's changes.
//
// A read is one round trip: an entry comes together with the generations of its tenant and namespace, and is valid
// if it was written under these. So invalidation is to remove a generation, and nothing else.
//
// What Redis confirmed but loses again is out of reach: after a restart from an older snapshot, a failover to a
// replica that was behind, or when the client reads from replicas, an entry may be served that was deleted or
// invalidated just before. TTLs bound for how long.
type Redis struct {
	*core
	client  redis.UniversalClient
	config  RedisConfig // with defaults
	layout  layout
	single  bool // one node answers for all keys that a read needs
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
	sweeper sweeper

	failures, refused, opens atomic.Uint64
}

// NewRedis makes a Store on a client, which stays the caller's to close, after the Store. Nothing is sent yet.
func NewRedis(client redis.UniversalClient, config RedisConfig) (*Redis, error) {
	problems := config.problems()
	if isNil(client) {
		problems = append(problems, errors.New("the client is nil; see redis.NewUniversalClient"))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, fmt.Errorf("tenantcache: NewRedis: %w", err)
	}
	config.Prefix = orDefault(config.Prefix, DefaultPrefix)
	config.Timeout = orDefault(config.Timeout, DefaultTimeout)
	config.BreakerFailures = orDefault(config.BreakerFailures, DefaultBreakerFailures)
	config.BreakerPause = orDefault(config.BreakerPause, DefaultBreakerPause)
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	_, alone := client.(*redis.Client)
	r := &Redis{
		core:   newCore(orDefault(config.MaxValueBytes, DefaultMaxValueBytes)),
		client: client,
		config: config,
		layout: layout{config.Prefix, config.OneSlot},
		single: alone || config.OneSlot,
	}
	r.breaker = r.newBreaker()
	return r, nil
}

// InvalidateTenant implements Store, in one round trip.
func (r *Redis) InvalidateTenant(ctx context.Context) error {
	t, err := tenantOf(ctx)
	if err != nil {
		return err
	}
	e := &entry{tenant: t}
	if err := r.check(ctx); err != nil {
		return failed(e, "invalidate the cache", err)
	}
	r.invalidations.Add(1)
	if err := r.unlink(ctx, r.layout.tenantGeneration(t.ID)); err != nil {
		return failed(e, "invalidate the cache", err)
	}
	if r.config.SweepAfterInvalidate {
		r.sweepLater(t.ID)
	}
	return nil
}

// Stats implements Store.
func (r *Redis) Stats() Stats {
	s := r.stats()
	s.Failures, s.Refused, s.BreakerOpens = r.failures.Load(), r.refused.Load(), r.opens.Load()
	switch r.breaker.State() {
	case gobreaker.StateHalfOpen:
		s.Breaker = BreakerHalfOpen
	case gobreaker.StateOpen:
		s.Breaker = BreakerOpen
	}
	return s
}

func (r *Redis) proceed() bool { return r.config.OnFailure == LoadFromSource }

func (r *Redis) look(ctx context.Context, e *entry) (found, error) {
	keys := [...]string{
		r.layout.tenantGeneration(e.tenant.ID),
		r.layout.namespaceGeneration(e.tenant.ID, e.namespace),
		r.layout.entry(e),
	}
	return guarded(ctx, r, r.readBudget(ctx), func(ctx context.Context) (f found, err error) {
		var texts [len(keys)]string
		var there [len(keys)]bool
		if r.single {
			err = r.mget(ctx, keys[:], texts[:], there[:])
		} else {
			err = r.gets(ctx, keys[:], texts[:], there[:])
		}
		f.tenant, f.namespace, f.known = texts[0], texts[1], there[0] && there[1]
		if there[2] {
			f.raw = []byte(texts[2])
		}
		return f, err
	})
}

func (r *Redis) mget(ctx context.Context, keys, texts []string, there []bool) error {
	values, err := r.client.MGet(ctx, keys...).Result()
	if err == nil && len(values) != len(keys) {
		err = fmt.Errorf("MGET of %d keys has %d values", len(keys), len(values))
	}
	if err != nil {
		return err
	}
	for i, v := range values {
		texts[i], there[i] = v.(string)
	}
	return nil
}

// gets is mget where the keys may be on several nodes, each of which is asked at the same time.
func (r *Redis) gets(ctx context.Context, keys, texts []string, there []bool) error {
	cmds := make([]*redis.StringCmd, len(keys))
	_, err := r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, key := range keys {
			cmds[i] = p.Get(ctx, key)
		}
		return nil
	})
	if err != nil && !errors.Is(err, redis.Nil) {
		return err
	}
	for i, cmd := range cmds {
		switch text, err := cmd.Result(); {
		case err == nil:
			texts[i], there[i] = text, true
		case !errors.Is(err, redis.Nil):
			return err
		}
	}
	return nil
}

func (r *Redis) ensure(ctx context.Context, e *entry, keep time.Duration) (generations, error) {
	return guarded(ctx, r, r.readBudget(ctx), func(ctx context.Context) (generations, error) {
		fresh := [...]string{newGeneration(), newGeneration()}
		var cmds [len(fresh)]*redis.StatusCmd
		_, err := r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
			// NX GET returns what is there, or nothing when it has set ours.
			args := redis.SetArgs{Mode: "NX", Get: true, TTL: keep}
			cmds[0] = p.SetArgs(ctx, r.layout.tenantGeneration(e.tenant.ID), fresh[0], args)
			cmds[1] = p.SetArgs(ctx, r.layout.namespaceGeneration(e.tenant.ID, e.namespace), fresh[1], args)
			return nil
		})
		if err != nil && !errors.Is(err, redis.Nil) {
			return generations{}, err
		}
		for i, cmd := range cmds {
			switch text, err := cmd.Result(); {
			case err == nil:
				fresh[i] = text
			case !errors.Is(err, redis.Nil):
				return generations{}, err
			}
		}
		return generations{tenant: fresh[0], namespace: fresh[1], known: true}, nil
	})
}

func (r *Redis) put(ctx context.Context, e *entry, raw []byte, ttl, keep time.Duration) error {
	_, err := guarded(ctx, r, r.config.Timeout, func(ctx context.Context) (struct{}, error) {
		_, err := r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
			p.Set(ctx, r.layout.entry(e), raw, ttl)
			r.prolong(ctx, p, e, keep)
			return nil
		})
		return struct{}{}, err
	})
	return err
}

// replaceScript needs one key and so works wherever that is. KEYS: the entry. ARGV: the head that it must have; the
// new entry; its milliseconds; the head's length.
const replaceScript = `if redis.call('GETRANGE', KEYS[1], 0, ARGV[4] - 1) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1`

func (r *Redis) replace(ctx context.Context, e *entry, head string, raw []byte, ttl, keep time.Duration) (bool, error) {
	return guarded(ctx, r, r.config.Timeout, func(ctx context.Context) (bool, error) {
		var stored *redis.Cmd
		_, err := r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
			// Not EVALSHA: its fallback would cost a round trip, the text costs 150 bytes.
			stored = p.Eval(ctx, replaceScript, []string{r.layout.entry(e)}, head, raw, max(ttl.Milliseconds(), 1), headLen)
			r.prolong(ctx, p, e, keep)
			return nil
		})
		if err != nil {
			return false, err
		}
		return stored.Bool()
	})
}

// prolong has the generations last longer than the entry that is written.
func (r *Redis) prolong(ctx context.Context, p redis.Pipeliner, e *entry, keep time.Duration) {
	p.ExpireGT(ctx, r.layout.tenantGeneration(e.tenant.ID), keep)
	p.ExpireGT(ctx, r.layout.namespaceGeneration(e.tenant.ID, e.namespace), keep)
}

func (r *Redis) bury(ctx context.Context, entries []entry, keep time.Duration) error {
	return r.always(ctx, func(ctx context.Context) error {
		_, err := r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
			for i := range entries {
				p.Set(ctx, r.layout.entry(&entries[i]), tombstone(), keep)
			}
			return nil
		})
		return err
	})
}

func (r *Redis) invalidate(ctx context.Context, tenantID, namespace string) error {
	return r.unlink(ctx, r.layout.namespaceGeneration(tenantID, namespace))
}

func (r *Redis) unlink(ctx context.Context, key string) error {
	return r.always(ctx, func(ctx context.Context) error { return r.client.Unlink(ctx, key).Err() })
}
