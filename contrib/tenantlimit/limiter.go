package tenantlimit

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/pgxtenant/pgxtenant"
)

// A Limiter decides which calls of which tenants may pass. It is safe for concurrent use.
type Limiter struct {
	config Config // with defaults
	plans  atomic.Pointer[map[string]Plan]
	local  *localStore
	remote *redisStore // nil: there is none
	closed atomic.Bool
	counts counts
}

// A Call is what a tenant asks for. The zero value is one call of no endpoint in particular.
type Call struct {
	// Endpoint is what is called, in the words of Plan.Endpoints. A name that is not there, or none, is under the
	// plan's own limits, so it may be anything.
	Endpoint string

	// Cost is how much of the rate the call takes. Zero means 1. A negative value is refused with ErrInvalidCost.
	Cost int
}

// A Grant is a call that may pass. It is safe for concurrent use.
type Grant struct {
	// State is how the limits stand, this call counted.
	State State

	release  func()
	released atomic.Bool
}

// Release gives back the slot of a concurrency limit, and must be called when the call has ended. It waits for Redis
// at most for Config.Timeout; where that fails, the slot is free when its lease runs out. Without a concurrency
// limit, more than once, and on a nil Grant it does nothing.
func (g *Grant) Release() {
	if g != nil && g.release != nil && g.released.CompareAndSwap(false, true) {
		g.release()
	}
}

// State is how the limits of a call stood when it was decided.
type State struct {
	// Rate is the rate that the call is under. It is Unlimited where there is none, and where Config.OnLoss has let
	// the call pass.
	Rate Rate
	// OwnRate says that Rate is the endpoint's own.
	OwnRate bool
	// Remaining is what may be taken of Rate at once, 0 to Rate.Burst.
	Remaining int
	// Next is how long it takes until one more may be taken. It is zero if Remaining is Rate.Burst.
	Next time.Duration
	// Reset is how long it takes until Remaining is Rate.Burst, if nothing is taken.
	Reset time.Duration

	// Concurrency is how many calls may be under way; zero means that there is no bound.
	Concurrency int
	// OwnConcurrency says that Concurrency is the endpoint's own.
	OwnConcurrency bool
	// UnderWay is how many are, this one included if it was let pass.
	UnderWay int
}

// New makes a Limiter. It opens no connection: a Redis that is not there is found at the first call. The Limiter
// must be closed.
func New(config Config) (*Limiter, error) {
	config = config.withDefaults()
	l := &Limiter{config: config, local: newLocalStore()}
	if err := errors.Join(l.SetPlans(config.Plans), config.validate()); err != nil {
		return nil, err
	}
	if config.Redis != nil {
		l.remote = newRedisStore(config)
	}
	return l, nil
}

// SetPlans replaces Config.Plans from the next call on, or changes nothing and returns what is wrong with plans. What
// has been counted stays counted: of a bucket that has become smaller, no more than its burst is left.
func (l *Limiter) SetPlans(plans map[string]Plan) error {
	copied, err := copyPlans(plans)
	if err != nil {
		return err
	}
	l.plans.Store(&copied)
	return nil
}

// Close ends the renewal of leases and waits until it has ended. Calls of Take that come later fail with
// pgxtenant.ErrClosed. Grants may still be released.
func (l *Limiter) Close() {
	l.closed.Store(true)
	if l.remote != nil {
		l.remote.close()
	}
}

// Take counts a call of ctx's tenant, or refuses it with a [*LimitError] and counts nothing. The Grant must be
// released when the call has ended.
//
// Any other error means that nothing was decided and the call must not go on: pgxtenant.ErrNoTenant,
// pgxtenant.ErrInvalidTenantID, ErrUnknownPlan, ErrInvalidCost, ErrLost if Config.OnLoss says so,
// pgxtenant.ErrClosed, ctx's own error, or that of Config.Directory. Of a call that ctx has ended while Redis was
// asked, it is not known whether it was counted.
func (l *Limiter) Take(ctx context.Context, call Call) (*Grant, error) {
	q, err := l.question(ctx, call)
	if err != nil {
		l.counts.failed.Add(1)
		return nil, err
	}
	a, err := l.ask(ctx, q)
	if err != nil {
		l.counts.failed.Add(1)
		return nil, &pgxtenant.TenantError{Tenant: q.tenant, Op: "limit", Err: err}
	}
	if a.refused != 0 {
		return nil, l.refuse(q, a)
	}
	l.counts.allowed.Add(1)
	return &Grant{State: q.state.with(a), release: a.release}, nil
}

// question is a call with its tenant and its limits. A store is asked one.
type question struct {
	tenant, plan, endpoint string

	cost      int
	state     State  // the limits; how they stand is not known yet
	rateKey   string // of the bucket
	leasesKey string // of the slots
}

// answer is what a store says.
type answer struct {
	refused Kind    // zero: the call may pass
	tokens  float64 // left in the bucket
	taken   int     // slots
	release func()  // gives the slot back; nil: there is none

	anyway bool // Config.OnLoss lets it pass: nothing is known of its limits
}

// question finds out what call is to be held against.
func (l *Limiter) question(ctx context.Context, call Call) (*question, error) {
	if l.plans.Load() == nil {
		panic("tenantlimit: a Limiter must come from New")
	}
	if l.closed.Load() {
		return nil, pgxtenant.ErrClosed
	}
	t, err := l.tenant(ctx)
	if err != nil {
		return nil, err
	}
	plan, ok := (*l.plans.Load())[t.Plan]
	if !ok {
		return nil, fmt.Errorf("%w %q, of tenant %q", ErrUnknownPlan, t.Plan, t.ID)
	}
	if call.Cost < 0 {
		return nil, fmt.Errorf("%w: %d; want 0 or more", ErrInvalidCost, call.Cost)
	}
	q := &question{tenant: t.ID, plan: t.Plan, endpoint: call.Endpoint, cost: max(call.Cost, 1),
		state: State{Rate: plan.Rate, Concurrency: plan.Concurrency}}
	if own, ok := plan.Endpoints[call.Endpoint]; ok {
		if own.Rate != (Rate{}) {
			q.state.Rate, q.state.OwnRate = own.Rate, true
		}
		if own.Concurrency > 0 {
			q.state.Concurrency, q.state.OwnConcurrency = own.Concurrency, true
		}
	}
	if !q.state.Rate.Unlimited {
		q.rateKey = l.key(q, 'r', q.state.OwnRate)
	}
	if q.state.Concurrency > 0 {
		q.leasesKey = l.key(q, 'c', q.state.OwnConcurrency)
	}
	return q, nil
}

// tenant returns the tenant of ctx, with its plan.
func (l *Limiter) tenant(ctx context.Context) (pgxtenant.Tenant, error) {
	t, ok := pgxtenant.FromContext(ctx)
	if !ok {
		return t, pgxtenant.ErrNoTenant
	}
	if err := pgxtenant.ValidateID(t.ID); err != nil {
		return t, err // its ID would be part of a key
	}
	if err := ctx.Err(); err != nil {
		return t, &pgxtenant.TenantError{Tenant: t.ID, Op: "limit", Err: err}
	}
	if t.Plan != "" || l.config.Directory == nil {
		return t, nil
	}
	known, err := l.config.Directory.Lookup(ctx, t.ID)
	if err != nil {
		return t, &pgxtenant.TenantError{Tenant: t.ID, Op: "look up", Err: err}
	}
	t.Plan = known.Plan
	return t, nil
}

// key names a count of a tenant's. A valid ID has no brace, so the key tells where it ends: no two tenants, kinds or
// endpoints share one. The braces put all keys of a tenant into one slot of a Cluster.
func (l *Limiter) key(q *question, kind byte, own bool) string {
	key := l.config.Prefix + "{" + q.tenant + "}" + string(kind)
	if own {
		return key + ":" + q.endpoint
	}
	return key
}

// ask has a store decide q.
func (l *Limiter) ask(ctx context.Context, q *question) (answer, error) {
	if q.rateKey == "" && q.leasesKey == "" {
		return answer{}, nil
	}
	if l.remote == nil {
		return l.local.take(ctx, q)
	}
	a, err := l.remote.take(ctx, q)
	if err == nil {
		return a, nil
	}
	if ctx.Err() != nil {
		return a, ctx.Err()
	}
	l.counts.fallbacks.Add(1)
	switch l.config.OnLoss {
	case AllowAll:
		return answer{anyway: true}, nil
	case RefuseAll:
		return answer{}, fmt.Errorf("%w: %w: %w", pgxtenant.ErrUnreachable, ErrLost, err)
	default:
		return l.local.take(ctx, q)
	}
}

// refuse makes the error of a refused call.
func (l *Limiter) refuse(q *question, a answer) error {
	e := &LimitError{Tenant: q.tenant, Plan: q.plan, Endpoint: q.endpoint, Kind: a.refused, State: q.state.with(a)}
	switch {
	case a.refused == KindConcurrency:
		e.RetryAfter = ConcurrencyRetryAfter
	case q.cost > q.state.Rate.Burst:
		e.Kind = KindCost
	default:
		// A bucket that is asked a rounding error too early would refuse again.
		e.RetryAfter = q.state.Rate.toFill(float64(q.cost)-a.tokens) + time.Microsecond
	}
	l.counts.refused[e.Kind].Add(1)
	return e
}

// with returns the state that a store's answer tells.
func (s State) with(a answer) State {
	if a.anyway {
		return State{Rate: Rate{Unlimited: true}}
	}
	if !s.Rate.Unlimited {
		whole := math.Floor(a.tokens)
		s.Remaining = int(whole)
		if missing := float64(s.Rate.Burst) - a.tokens; missing > 0 {
			s.Reset = s.Rate.toFill(missing)
			s.Next = s.Rate.toFill(whole + 1 - a.tokens)
		}
	}
	s.UnderWay = a.taken
	return s
}
