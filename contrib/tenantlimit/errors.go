package tenantlimit

import (
	"errors"
	"fmt"
	"time"
)

var (
	// ErrLimited means a call beyond a limit of its tenant. It is what a [*LimitError] wraps.
	ErrLimited = errors.New("tenantlimit: limit reached")

	// ErrUnknownPlan means a tenant whose plan is not among the Limiter's. Nothing was counted.
	ErrUnknownPlan = errors.New("tenantlimit: unknown plan")

	// ErrInvalidCost means a Call with a negative cost. Nothing was counted.
	ErrInvalidCost = errors.New("tenantlimit: invalid cost")

	// ErrLost means that Redis could not be asked, and Config.OnLoss is RefuseAll.
	ErrLost = errors.New("tenantlimit: Redis cannot be asked")
)

// Kind is what a call ran into.
type Kind uint8

const (
	_ Kind = iota
	// KindRate is the rate: it comes too early.
	KindRate
	// KindConcurrency is the concurrency: too many others are under way.
	KindConcurrency
	// KindCost is its cost, which is more than the rate's burst: it can never pass.
	KindCost
)

// String returns "rate", "concurrency" or "cost".
func (k Kind) String() string {
	switch k {
	case KindRate:
		return "rate"
	case KindConcurrency:
		return "concurrency"
	case KindCost:
		return "cost"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// ConcurrencyRetryAfter is LimitError.RetryAfter for a KindConcurrency: nobody knows when another call will end.
const ConcurrencyRetryAfter = time.Second

// LimitError is a refused call, of which nothing was counted. Reach it with errors.As; it wraps ErrLimited.
type LimitError struct {
	Tenant   string // tenant ID
	Plan     string // of the tenant
	Endpoint string // as the call named it
	Kind     Kind   // the limit that it ran into, the rate if both

	// RetryAfter is how long to wait until the same call would pass, if no other came first. It is zero for a
	// KindCost, which never passes.
	RetryAfter time.Duration

	// State is how the limits stood.
	State State
}

func (e *LimitError) Error() string {
	where := ""
	if e.Endpoint != "" {
		where = fmt.Sprintf(", endpoint %q", e.Endpoint)
	}
	what := ""
	switch e.Kind {
	case KindRate:
		what = fmt.Sprintf("rate limit of %v reached; retry in %v", e.State.Rate, e.RetryAfter)
	case KindConcurrency:
		what = fmt.Sprintf("concurrency limit of %d reached", e.State.Concurrency)
	case KindCost:
		what = fmt.Sprintf("the call costs more than a burst of %d; it cannot pass", e.State.Rate.Burst)
	}
	return fmt.Sprintf("tenantlimit: tenant %q on plan %q%s: %s", e.Tenant, e.Plan, where, what)
}

// Unwrap returns ErrLimited.
func (e *LimitError) Unwrap() error { return ErrLimited }
