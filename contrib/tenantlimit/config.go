package tenantlimit

import (
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/pgxtenant/pgxtenant"
)

// What Config's fields are if left zero.
const (
	DefaultTimeout = 100 * time.Millisecond
	DefaultRetry   = time.Second
	DefaultLease   = 30 * time.Second
	DefaultPrefix  = "tenantlimit:"
)

// MinLease is the shortest Config.Lease.
const MinLease = 100 * time.Millisecond

// Config describes a Limiter. Only Plans is required; any other zero field takes its default. Limiters that
// share a Redis and a Prefix share their counts, and should have the same Config.
type Config struct {
	// Plans are the plans by the name that pgxtenant.Tenant.Plan has. One named "" is for tenants without a
	// plan. A tenant whose plan is not here is refused with ErrUnknownPlan: there is no default.
	Plans map[string]Plan

	// Redis keeps the counts, in a client for one server, a Cluster or a failover by Sentinel. It stays the caller's
	// to close, after the Limiter. With ContextTimeoutEnabled among its options a call that comes alone is sent by
	// the goroutine that makes it, which saves the time of two switches. Without, go-redis may wait past any
	// deadline, so another goroutine does.
	//
	// Nil means that the counts are of this process only, and forgotten with it. The next four fields do not
	// matter then.
	Redis redis.UniversalClient

	// OnLoss is what happens to calls while Redis cannot be asked. Zero means UseLocal.
	OnLoss OnLoss

	// Timeout is how long a call waits for Redis, whatever time-outs and retries the client has. A context that is
	// cancelled meanwhile may be noticed only then; one with an earlier deadline ends at that. Zero means DefaultTimeout
	// (100 ms). A negative value is refused.
	Timeout time.Duration

	// Retry is how long Redis is left alone after it has failed a few times running, before one call tries it
	// again. Zero means DefaultRetry (1 s). A negative value is refused.
	Retry time.Duration

	// Lease is how long the slots of a concurrency limit stay taken after the process that took them was killed. A
	// process that lives renews its own. Zero means DefaultLease (30 s). Less than MinLease (100 ms) is refused.
	Lease time.Duration

	// Prefix begins every key in Redis. Empty means DefaultPrefix. Braces are refused, since those around the
	// tenant choose the slot of a Cluster.
	Prefix string

	// Directory tells the plan of a tenant that the context knows by its ID alone, after pgxtenant.WithTenantID.
	// Behind pgxtenant.Middleware or a Gate the tenant is known whole, and nobody is asked. Nil means that
	// such a tenant has no plan.
	Directory pgxtenant.Directory

	// Logger is told when Redis is lost (Warn) and when it is back (Info). Nil means nobody.
	Logger *slog.Logger
}

// OnLoss is what happens to calls while Redis cannot be asked.
type OnLoss uint8

const (
	// UseLocal applies the same limits within each process: n processes let up to n times as many calls pass.
	UseLocal OnLoss = iota
	// AllowAll lets every call pass.
	AllowAll
	// RefuseAll refuses every call with ErrLost.
	RefuseAll
)

// String returns "local", "open" or "closed".
func (o OnLoss) String() string {
	switch o {
	case UseLocal:
		return "local"
	case AllowAll:
		return "open"
	case RefuseAll:
		return "closed"
	}
	return fmt.Sprintf("OnLoss(%d)", uint8(o))
}

func (c Config) withDefaults() Config {
	c.Timeout = orDefault(c.Timeout, DefaultTimeout)
	c.Retry = orDefault(c.Retry, DefaultRetry)
	c.Lease = orDefault(c.Lease, DefaultLease)
	c.Prefix = orDefault(c.Prefix, DefaultPrefix)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// validate reports every bad field but Plans. It is given a Config with its defaults filled in.
func (c Config) validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf("tenantlimit: "+format, args...)) }
	if isNilPointer(c.Redis) {
		fail("Config.Redis is a nil %T", c.Redis)
	}
	if isNilPointer(c.Directory) {
		fail("Config.Directory is a nil %T", c.Directory)
	}
	if c.OnLoss > RefuseAll {
		fail("Config.OnLoss is %v; want UseLocal, AllowAll or RefuseAll", c.OnLoss)
	}
	if c.Timeout < 0 {
		fail("Config.Timeout is %v; want 0 or more", c.Timeout)
	}
	if c.Retry < 0 {
		fail("Config.Retry is %v; want 0 or more", c.Retry)
	}
	if c.Lease < MinLease {
		fail("Config.Lease is %v; want %v or more", c.Lease, MinLease)
	}
	if strings.ContainsAny(c.Prefix, "{}") {
		fail("Config.Prefix is %q; want one without braces", c.Prefix)
	}
	return errors.Join(errs...)
}

func orDefault[T comparable](value, byDefault T) T {
	var zero T
	if value == zero {
		return byDefault
	}
	return value
}

// isNilPointer reports whether v is an interface that holds a nil pointer, which looks as if it were something.
func isNilPointer(v any) bool {
	r := reflect.ValueOf(v)
	return r.Kind() == reflect.Pointer && r.IsNil()
}
