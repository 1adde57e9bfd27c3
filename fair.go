package pgxtenant

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Defaults of Config.MaxShare and of Limits' fields.
const (
	DefaultMaxShare   = 0.75
	DefaultWeight     = 1
	DefaultMaxWaiting = 10_000
)

// MinWeight and MaxWeight bound Limits.Weight, so that no tenant is starved by another's.
const (
	MinWeight = 0.001
	MaxWeight = 1000
)

// Limits are what one tenant may use of the connections that it shares with others. The zero Limits are
// those of every tenant if Config.Limits is nil. With Config.ArrivalOrder only the timeouts hold.
type Limits struct {
	// Weight is the tenant's part of the connection time while there is not enough for all who wait: one
	// of weight 2 gets twice that of one of weight 1. Beyond MinWeight (0.001) and MaxWeight (1000) it
	// counts as those.
	//
	// Zero means DefaultWeight (1), as does what is negative or not a number.
	Weight float64

	// MaxWaiting is how many of the tenant's checkouts may wait for a connection of one pool at one time.
	// One more fails at once with ErrTenantOverloaded.
	//
	// Zero means DefaultMaxWaiting (10,000); a negative value means any number.
	MaxWaiting int

	// MaxWait is how long a checkout of the tenant's may wait for its turn; then it fails with
	// ErrTenantOverloaded. It fails so at once if the queue before it is seen to take longer.
	//
	// Zero or a negative value means as long as its context allows.
	MaxWait time.Duration

	// StatementTimeout, LockTimeout and IdleInTransactionTimeout are bound with the tenant as
	// statement_timeout, lock_timeout and idle_in_transaction_session_timeout, in milliseconds, rounded up.
	// What Tenant.Settings says of one of these goes before. As they are local to the
	// transaction, they end with it; in one that has failed already, or has only begun, the session's own apply:
	// they come with its first statement. Each that is set costs some 10 µs a statement.
	//
	// Zero or a negative value means the session's own.
	StatementTimeout, LockTimeout, IdleInTransactionTimeout time.Duration

	// HoldLimit is how long the application may keep a connection of the tenant's before Config.Logger
	// is told: which tenant, for how long, and where in the program it was checked out. It is told
	// again when such a connection is returned. Nothing else happens to it. A tenant with a
	// HoldLimit pays about 1 µs for each checkout.
	//
	// Zero or a negative value means no report.
	HoldLimit time.Duration
}

// ErrTenantOverloaded means that too many of the tenant's checkouts wait for a connection already, or that
// this one has waited too long; see Limits. Nothing was sent to the server. The error that wraps
// it is an *OverloadError, which tells when to come back.
var ErrTenantOverloaded = errors.New("pgxtenant: tenant overloaded")

// OverloadError is a checkout refused because of its tenant's Limits. errors.Is finds
// ErrTenantOverloaded in it.
type OverloadError struct {
	// Waiting is how many checkouts of the tenant's wait.
	Waiting int
	// Waited is how long this one did; zero if it was refused at once.
	Waited time.Duration
	// RetryAfter is about how long those who wait will take to be served, at the present pace. It is more than zero.
	RetryAfter time.Duration
}

func (e *OverloadError) Error() string {
	if e.Waited > 0 {
		return fmt.Sprintf("%v: no connection within %v, and %d checkouts wait; retry in %v",
			ErrTenantOverloaded, e.Waited.Round(time.Millisecond), e.Waiting, e.RetryAfter.Round(time.Millisecond))
	}
	return fmt.Sprintf("%v: %d checkouts wait already; retry in %v", ErrTenantOverloaded, e.Waiting, e.RetryAfter.Round(time.Millisecond))
}

func (e *OverloadError) Unwrap() error { return ErrTenantOverloaded }

// withDefaults fills in what is zero or makes no sense.
func (l Limits) withDefaults() Limits {
	switch {
	case math.IsNaN(l.Weight) || l.Weight <= 0:
		l.Weight = DefaultWeight
	default:
		l.Weight = min(max(l.Weight, MinWeight), MaxWeight)
	}
	switch {
	case l.MaxWaiting == 0:
		l.MaxWaiting = DefaultMaxWaiting
	case l.MaxWaiting < 0:
		l.MaxWaiting = math.MaxInt
	}
	return l
}

// addTo returns settings with those of the limits' that are not in it. It does not change settings.
func (l Limits) addTo(settings map[string]string) map[string]string {
	var own map[string]string
	add := func(name string, d time.Duration) {
		if d <= 0 {
			return
		}
		for given := range settings {
			if strings.EqualFold(given, name) {
				return
			}
		}
		if own == nil {
			own = make(map[string]string)
		}
		ms := (int64(d) + int64(time.Millisecond) - 1) / int64(time.Millisecond)
		own[name] = strconv.FormatInt(min(ms, math.MaxInt32), 10)
	}
	add("statement_timeout", l.StatementTimeout)
	add("lock_timeout", l.LockTimeout)
	add("idle_in_transaction_session_timeout", l.IdleInTransactionTimeout)
	if own == nil {
		return settings
	}
	for name, value := range settings {
		own[name] = value
	}
	return own
}
