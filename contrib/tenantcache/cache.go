package tenantcache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pgxtenant/pgxtenant"
)

// Defaults of Config's fields.
const (
	DefaultTTL         = 5 * time.Minute
	DefaultLoadTimeout = 30 * time.Second
)

// Config describes a Cache. Only Namespace is required. New copies it. All processes that share a Redis must give
// a namespace the same Config.
type Config[V any] struct {
	// Namespace keeps the Cache's entries apart from other Caches' on the same Store. Any text will do. Give it
	// another name, such as "invoice/2", when V changes so that old entries must not be read any more.
	Namespace string

	// TTL is how long an entry is kept where a call does not say: Redis rounds it down to milliseconds. More than 100
	// years, here and in calls, are 100 years.
	//
	// Zero means DefaultTTL (5 minutes). A negative value is refused.
	TTL time.Duration

	// Codec turns values into bytes.
	//
	// Nil means JSON.
	Codec Codec[V]

	// LoadTimeout is the most that a load may take. It then fails with ErrLoadTimeout for all who wait.
	//
	// Zero means DefaultLoadTimeout (30 seconds). A negative value is refused.
	LoadTimeout time.Duration

	// EarlyRefresh is the last part of an entry's life, in which GetOrLoad may load it anew in the background
	// while it goes on returning the present value. Each hit does so with a probability that rises from 2 %
	// to 100 %, so that processes do not all do it at once.
	//
	// Zero means that entries are loaded when they have expired, not earlier. A negative value is refused.
	EarlyRefresh time.Duration

	// RememberErrors are what a loader says when there is no such thing, pgx.ErrNoRows for instance. When its
	// error is one of these, by errors.Is, GetOrLoad and Get return that one, without a load, for ErrorTTL.
	// Their texts must differ, since it is the text that is stored.
	//
	// Nil means that no error is remembered: each ends with those who waited for it.
	RememberErrors []error

	// ErrorTTL is how long errors are remembered.
	//
	// Zero means TTL. A negative value is refused.
	ErrorTTL time.Duration
}

func (c *Config[V]) problems() (problems []error) {
	if c.Namespace == "" {
		problems = append(problems, errors.New("the Namespace is empty; it is required"))
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"TTL", c.TTL}, {"LoadTimeout", c.LoadTimeout}, {"EarlyRefresh", c.EarlyRefresh}, {"ErrorTTL", c.ErrorTTL}} {
		if d.value < 0 {
			problems = append(problems, fmt.Errorf("%s is %v; want 0 or more", d.name, d.value))
		}
	}
	texts := map[string]bool{}
	for _, err := range c.RememberErrors {
		switch {
		case err == nil:
			problems = append(problems, errors.New("RememberErrors has a nil"))
		case texts[err.Error()]:
			problems = append(problems, fmt.Errorf("RememberErrors has %q twice", err))
		default:
			texts[err.Error()] = true
		}
	}
	return problems
}

// A Cache keeps values of one type, for each tenant its own. Whose value is meant is told by the context alone: no
// key leads to another tenant's. It is safe for concurrent use.
//
// Its methods fail with pgxtenant.ErrNoTenant if the context carries no tenant, with ErrClosed once the Store is
// closed, and else with a *pgxtenant.TenantError. A tenant whose Status in the context does not let it be served is
// not served from the cache either; a context that has no more than an ID says nothing of it.
type Cache[V any] struct {
	store   Store
	core    *core
	config  Config[V] // with defaults
	flights flights
}

// New makes a Cache on a Store, *Redis or *Memory. It has nothing to close but the Store.
func New[V any](store Store, config Config[V]) (*Cache[V], error) {
	problems := config.problems()
	if isNil(store) {
		problems = append(problems, errors.New("the Store is nil; see NewRedis and NewMemory"))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, fmt.Errorf("tenantcache: New: %w", err)
	}
	config.TTL = orDefault(config.TTL, DefaultTTL)
	config.LoadTimeout = orDefault(config.LoadTimeout, DefaultLoadTimeout)
	config.ErrorTTL = orDefault(config.ErrorTTL, config.TTL)
	if config.Codec == nil {
		config.Codec = JSON[V]{}
	}
	config.RememberErrors = append([]error(nil), config.RememberErrors...)
	return &Cache[V]{store: store, core: store.shared(), config: config}, nil
}

// Get returns the value of key, and false if there is none. What the codec does not read counts as none, and so
// does any failure of Redis, unless RedisConfig.OnFailure says otherwise.
func (c *Cache[V]) Get(ctx context.Context, key string) (value V, ok bool, err error) {
	e, err := c.entry(ctx, key, true)
	if err != nil {
		return value, false, err
	}
	hit, err := c.find(ctx, e)
	switch {
	case err == nil && hit.ok:
		return hit.value, hit.err == nil, hit.err
	case err != nil && c.mayProceed(ctx):
		err = nil
	}
	return value, false, failed(e, "read the cache", err)
}

// Set keeps value under key for ttl, in place of what was there, and even if a load of it is going on. A ttl of zero
// means Config.TTL; it must be longer than loads take for the latter to hold.
//
// After an error but ErrTooLarge it is not known whether the old value or the new one is kept, or none: Delete tells.
func (c *Cache[V]) Set(ctx context.Context, key string, value V, ttl time.Duration) error {
	e, err := c.entry(ctx, key, true)
	if err != nil {
		return err
	}
	if ttl, err = c.ttl(ttl); err == nil {
		err = c.set(ctx, e, value, ttl)
	}
	return failed(e, "write the cache", err)
}

func (c *Cache[V]) set(ctx context.Context, e *entry, value V, ttl time.Duration) error {
	payload, err := c.config.Codec.Encode(value)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCodec, err)
	}
	err = ErrTooLarge
	if len(payload) <= c.core.maxValue {
		var g generations
		if g, err = c.store.ensure(ctx, e, c.keep(ttl)); err != nil {
			return err
		}
		err = c.store.put(ctx, e, e.seal(g, kindValue, payload, ttl), ttl, c.keep(ttl))
	}
	if errors.Is(err, ErrTooLarge) {
		c.core.big.Add(1)
		// The old value must not outlive what was to replace it.
		return errors.Join(err, c.store.bury(ctx, []entry{*e}, c.keep(0)))
	}
	return err
}

// Delete forgets the values of these keys. A load that is going on is not stored; who called GetOrLoad before may
// still get its value, who calls it afterwards does not. It asks Redis even while the circuit breaker is open. After
// an error it must be repeated, or old values may be served until they expire.
func (c *Cache[V]) Delete(ctx context.Context, keys ...string) error {
	e, err := c.entry(ctx, "", false)
	if err != nil || len(keys) == 0 {
		return err
	}
	entries := make([]entry, len(keys))
	for i, key := range keys {
		entries[i] = *e
		entries[i].key = key
	}
	return failed(e, "delete from the cache", c.store.bury(ctx, entries, c.keep(0)))
}

// Invalidate is to the tenant's entries of this namespace what Delete is to one, at a cost that does not depend on
// how many there are. [Store] has InvalidateTenant for all namespaces.
func (c *Cache[V]) Invalidate(ctx context.Context) error {
	e, err := c.entry(ctx, "", false)
	if err != nil {
		return err
	}
	c.core.invalidations.Add(1)
	return failed(e, "invalidate the cache", c.store.invalidate(ctx, e.tenant.ID, e.namespace))
}

// entry finds the tenant, whose status matters where a value is served.
func (c *Cache[V]) entry(ctx context.Context, key string, serve bool) (*entry, error) {
	t, err := tenantOf(ctx)
	if err != nil {
		return nil, err
	}
	e := &entry{tenant: t, namespace: c.config.Namespace, key: key}
	if serve {
		switch t.Status {
		case pgxtenant.StatusActive, pgxtenant.StatusReadOnly:
		case pgxtenant.StatusSuspended:
			return nil, failed(e, "check", pgxtenant.ErrTenantSuspended)
		default:
			return nil, failed(e, "check", pgxtenant.ErrTenantUnavailable)
		}
	}
	if err := c.core.check(ctx); err != nil {
		return nil, failed(e, "use the cache", err)
	}
	return e, nil
}

// tenantOf returns the tenant of ctx, with a valid ID.
func tenantOf(ctx context.Context) (pgxtenant.Tenant, error) {
	t, ok := pgxtenant.FromContext(ctx)
	if !ok {
		return t, pgxtenant.ErrNoTenant
	}
	if err := pgxtenant.ValidateID(t.ID); err != nil {
		return t, &pgxtenant.TenantError{Tenant: t.ID, Op: "check", Err: err}
	}
	return t, nil
}

func failed(e *entry, op string, err error) error {
	if err == nil {
		return nil
	}
	return &pgxtenant.TenantError{Tenant: e.tenant.ID, Op: op, Err: err}
}

func (c *Cache[V]) ttl(ttl time.Duration) (time.Duration, error) {
	if ttl < 0 {
		return 0, fmt.Errorf("%w: %v; want 0 for Config.TTL, or more", ErrTTL, ttl)
	}
	return min(max(orDefault(ttl, c.config.TTL), time.Millisecond), maxKeep), nil
}

// keep is how long tombstones, and the generations of entries with this ttl, are kept: longer than the slowest load,
// so that it finds them when it wants to store.
func (c *Cache[V]) keep(ttl time.Duration) time.Duration {
	return min(ttl, maxKeep) + min(c.config.LoadTimeout, maxKeep) + time.Minute
}

// maxKeep is so long that twice of it, from now on, still fits a time.Duration. A longer TTL ends when it does.
const maxKeep = 100 * 365 * 24 * time.Hour

// mayProceed reports whether a failure of the store is none of the caller's business.
func (c *Cache[V]) mayProceed(ctx context.Context) bool {
	return c.store.proceed() && c.core.check(ctx) == nil
}

// hit is what was found under a key: a value, or a remembered error, or not ok.
type hit[V any] struct {
	found
	ok    bool
	value V
	err   error
}

// find looks for e and counts what it finds.
func (c *Cache[V]) find(ctx context.Context, e *entry) (h hit[V], err error) {
	if h.found, err = c.store.look(ctx, e); err == nil && !c.read(e, &h) && len(h.raw) > 0 && h.raw[0] != kindDeleted {
		c.core.stale.Add(1)
	}
	if h.ok {
		c.core.hits.Add(1)
	} else {
		c.core.misses.Add(1)
	}
	return h, err
}

// read makes h.found a value or an error, if it is e's and valid, and the codec reads it. It reports the former.
func (c *Cache[V]) read(e *entry, h *hit[V]) bool {
	kind, payload, ok := h.open(e)
	if !ok {
		return false
	}
	var err error
	if h.value, h.err, err = c.decode(kind, payload); err != nil {
		c.core.undecodable.Add(1)
	}
	h.ok = err == nil
	return true
}

// decode returns a value or a remembered error. A codec that panics, at bytes that it has not written, does not read them:
// the panic would come again with each call, and might be in a goroutine of nobody's.
func (c *Cache[V]) decode(kind byte, payload []byte) (value V, remembered, err error) {
	defer func() {
		if p := recover(); p != nil {
			var none V
			value, err = none, fmt.Errorf("the codec panicked: %v", p)
		}
	}()
	if kind == kindValue {
		value, err = c.config.Codec.Decode(payload)
		return value, nil, err
	}
	for _, remembered := range c.config.RememberErrors {
		if kind == kindError && remembered.Error() == string(payload) {
			return value, remembered, nil
		}
	}
	return value, nil, errors.New("neither a value nor an error that is remembered")
}
