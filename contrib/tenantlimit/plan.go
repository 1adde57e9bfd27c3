package tenantlimit

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// A Plan is what the tenants that have bought it may do. It is a plain value.
type Plan struct {
	// Limits hold for all calls of a tenant together. Rate is required: one that has been left out is more likely
	// forgotten than meant.
	Limits

	// Endpoints are the limits of single endpoints, by the name that Call.Endpoint, or the Middleware, gives
	// them. A limit that is set here takes the place of the plan's for that endpoint and has a count of its own. One
	// that is left zero is the plan's, counted together with other endpoints. The name "" is refused.
	Endpoints map[string]Limits
}

// Limits are bounds on the calls of one tenant.
type Limits struct {
	// Rate is how often it may call.
	Rate Rate

	// Concurrency is how many of its calls may be under way at the same time, over all processes. Zero means no
	// bound, or, in Plan.Endpoints, the plan's. A negative value is refused.
	Concurrency int
}

// Rate is a token bucket: it holds Burst, and Requests more flow in each Period, evenly. A call takes its cost out.
// All three must be positive, unless Unlimited is set; then they must be zero. So of a bucket that is full Burst calls
// pass at once, and over any longer time Requests per Period.
type Rate struct {
	Requests int           // at most 1,000,000,000,000
	Period   time.Duration // at least 1 µs
	Burst    int           // at most 1,000,000,000,000; filling it takes 100 years at most

	// Unlimited says that there is no bound.
	Unlimited bool
}

// PerSecond returns a Rate of n a second, of which up to burst may come at once.
func PerSecond(n, burst int) Rate { return Rate{Requests: n, Period: time.Second, Burst: burst} }

// PerMinute returns a Rate of n a minute, of which up to burst may come at once.
func PerMinute(n, burst int) Rate { return Rate{Requests: n, Period: time.Minute, Burst: burst} }

// PerHour returns a Rate of n an hour, of which up to burst may come at once.
func PerHour(n, burst int) Rate { return Rate{Requests: n, Period: time.Hour, Burst: burst} }

// StarterPlans returns three plans to begin with, in a map of your own: "free" with 60 calls a minute and 10 at once,
// "pro" with 600 and 50, and "enterprise" with 6,000 and 200.
func StarterPlans() map[string]Plan {
	return map[string]Plan{
		"free":       {Limits: Limits{Rate: PerMinute(60, 10)}},
		"pro":        {Limits: Limits{Rate: PerMinute(600, 50)}},
		"enterprise": {Limits: Limits{Rate: PerMinute(6000, 200)}},
	}
}

// String returns the rate as in "60 per 1m0s, burst 10".
func (r Rate) String() string {
	if r.Unlimited {
		return "unlimited"
	}
	return fmt.Sprintf("%d per %v, burst %d", r.Requests, r.Period, r.Burst)
}

// perSecond is the pace at which the bucket fills.
func (r Rate) perSecond() float64 { return float64(r.Requests) / r.Period.Seconds() }

// toFill is how long tokens take to flow in.
func (r Rate) toFill(tokens float64) time.Duration {
	return time.Duration(tokens / r.perSecond() * float64(time.Second))
}

// Bounds of a Rate. The counts are exact in a float64 that also holds fractions; the time fits a Duration.
const (
	maxCount  = 1e12
	minPeriod = time.Microsecond
	maxFill   = 100 * 365 * 24 * time.Hour
)

func (r Rate) validate() error {
	if r.Unlimited {
		if r != (Rate{Unlimited: true}) {
			return errors.New("is Unlimited and has numbers; want one of them")
		}
		return nil
	}
	if r == (Rate{}) {
		return errors.New("is not set; say Unlimited where no bound is meant")
	}
	switch {
	case r.Requests < 1 || int64(r.Requests) > maxCount:
		return fmt.Errorf("has Requests %d; want 1 to %d", r.Requests, int64(maxCount))
	case r.Burst < 1 || int64(r.Burst) > maxCount:
		return fmt.Errorf("has Burst %d; want 1 to %d", r.Burst, int64(maxCount))
	case r.Period < minPeriod:
		return fmt.Errorf("has Period %v; want %v or more", r.Period, minPeriod)
	case float64(r.Burst)/r.perSecond() > maxFill.Seconds():
		return fmt.Errorf("takes more than 100 years to fill a Burst of %d", r.Burst)
	}
	return nil
}

// copyPlans returns plans in a map of its own, or what is wrong with each.
func copyPlans(plans map[string]Plan) (map[string]Plan, error) {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf("tenantlimit: "+format, args...)) }
	if len(plans) == 0 {
		fail("there are no plans; StarterPlans has some")
	}
	copied := make(map[string]Plan, len(plans))
	for _, name := range slices.Sorted(maps.Keys(plans)) {
		p := plans[name]
		if err := p.Rate.validate(); err != nil {
			fail("plan %q: Rate %w", name, err)
		}
		if p.Concurrency < 0 {
			fail("plan %q: Concurrency is %d; want 0 or more", name, p.Concurrency)
		}
		for _, endpoint := range slices.Sorted(maps.Keys(p.Endpoints)) {
			e := p.Endpoints[endpoint]
			if endpoint == "" {
				fail("plan %q: an endpoint has no name", name)
			}
			if e == (Limits{}) {
				fail("plan %q, endpoint %q: no limit is set", name, endpoint)
			}
			if err := e.Rate.validate(); err != nil && e.Rate != (Rate{}) {
				fail("plan %q, endpoint %q: Rate %w", name, endpoint, err)
			}
			if e.Concurrency < 0 {
				fail("plan %q, endpoint %q: Concurrency is %d; want 0 or more", name, endpoint, e.Concurrency)
			}
		}
		p.Endpoints = maps.Clone(p.Endpoints)
		copied[name] = p
	}
	return copied, errors.Join(errs...)
}
