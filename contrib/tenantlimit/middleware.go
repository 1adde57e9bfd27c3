package tenantlimit

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/pgxtenant/pgxtenant"
)

// Middleware returns a wrapper for handlers that takes each request from the limits of its tenant, whom
// pgxtenant.Middleware must have put into the context before. The slot of a concurrency limit is given back when the
// handler returns, or panics.
//
//	mux.Handle("POST /exports", limiter.Middleware()(exports)) // endpoint "POST /exports"
//	http.ListenAndServe(addr, tenants(mux))
//
// Every answer has the limits in its header, as [SetHeader] writes them. A request beyond them is answered by [Refuse]
// and does not reach the handler; so is one for which nothing could be decided.
//
// Middleware panics, as [http.ServeMux.Handle] does, if an option is given nil. The wrapper may be used for
// several handlers, and they by any number of goroutines.
func (l *Limiter) Middleware(options ...MiddlewareOption) func(http.Handler) http.Handler {
	m := &middleware{limiter: l, cost: func(*http.Request) int { return 1 }, refuse: Refuse}
	for _, o := range options {
		o(m)
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next) })
	}
}

// A MiddlewareOption adjusts a Middleware.
type MiddlewareOption func(*middleware)

// ByEndpoint has f name the endpoint of a request, in the words of Plan.Endpoints. By default it is the pattern that
// http.ServeMux has found for it, such as "POST /exports". That is known only inside the mux: if any plan has
// Endpoints, a request without a pattern is answered with 500 rather than held against the wrong limit. Where the
// Middleware wraps the mux itself, ask it:
//
//	ByEndpoint(func(r *http.Request) string { _, pattern := mux.Handler(r); return pattern })
func ByEndpoint(f func(*http.Request) string) MiddlewareOption {
	if f == nil {
		panic("tenantlimit: ByEndpoint is given nil")
	}
	return func(m *middleware) { m.endpoint = f }
}

// ByCost has f say what a request costs. By default each costs 1.
func ByCost(f func(*http.Request) int) MiddlewareOption {
	if f == nil {
		panic("tenantlimit: ByCost is given nil")
	}
	return func(m *middleware) { m.cost = f }
}

// OnRefusal has f answer the requests that do not pass, for other words, another language or a page in HTML. err is
// what Take returned. The limits are in w's header by then. By default f is [Refuse].
func OnRefusal(f func(w http.ResponseWriter, r *http.Request, err error)) MiddlewareOption {
	if f == nil {
		panic("tenantlimit: OnRefusal is given nil")
	}
	return func(m *middleware) { m.refuse = f }
}

// middleware is one Middleware. It is not changed once its options are applied.
type middleware struct {
	limiter  *Limiter
	endpoint func(*http.Request) string // nil: the pattern
	cost     func(*http.Request) int
	refuse   func(http.ResponseWriter, *http.Request, error)
}

// errNoPattern is a request whose endpoint cannot be told.
var errNoPattern = errors.New("tenantlimit: plans have Endpoints, and the request has no pattern: " +
	"put the Middleware inside the ServeMux, or give it ByEndpoint")

func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	g, err := m.take(r)
	if err != nil {
		if refused := (*LimitError)(nil); errors.As(err, &refused) {
			SetHeader(w.Header(), refused.State)
		}
		m.refuse(w, r, err)
		return
	}
	defer g.Release()
	SetHeader(w.Header(), g.State)
	next.ServeHTTP(w, r)
}

func (m *middleware) take(r *http.Request) (*Grant, error) {
	call := Call{Endpoint: r.Pattern, Cost: m.cost(r)}
	if m.endpoint != nil {
		call.Endpoint = m.endpoint(r)
	} else if r.Pattern == "" && m.limiter.hasEndpoints() {
		return nil, errNoPattern
	}
	return m.limiter.Take(r.Context(), call)
}

// hasEndpoints reports whether it matters what a call's endpoint is.
func (l *Limiter) hasEndpoints() bool {
	for _, p := range *l.plans.Load() {
		if len(p.Endpoints) > 0 {
			return true
		}
	}
	return false
}

// problem is the address of the page that tells about refusals.
const problem = "https://github.com/pgxtenant/pgxtenant/blob/main/docs/rate-limits.md#"

// Refuse answers a request with what err is to its client: a *[LimitError] with 429, Retry-After and a
// [pgxtenant.Problem]; no tenant with 400; Redis lost with 503 and Retry-After; anything else as
// pgxtenant.Refuse does. It is for handlers that call Take themselves. Nothing may have been written to w.
func Refuse(w http.ResponseWriter, r *http.Request, err error) {
	refused := (*LimitError)(nil)
	switch {
	case errors.As(err, &refused):
		ProblemFor(refused).ServeHTTP(w, r)
	case errors.Is(err, pgxtenant.ErrNoTenant):
		pgxtenant.Refuse(w, r, fmt.Errorf("%w: %w", pgxtenant.ErrUnidentified, err))
	default:
		pgxtenant.Refuse(w, r, err)
	}
}

// ProblemFor returns the problem that a refused call is to a client, in a copy of your own.
func ProblemFor(e *LimitError) *pgxtenant.Problem {
	p := &pgxtenant.Problem{Status: http.StatusTooManyRequests, RetryAfter: e.RetryAfter, Err: e}
	switch e.Kind {
	case KindConcurrency:
		p.Type, p.Title = problem+"too-many-at-once", "Too many requests at once"
		p.Detail = "As many requests of this tenant are under way as its plan allows."
	case KindCost:
		p.Type, p.Title = problem+"too-costly", "Request too costly"
		p.Detail = "This request costs more than the tenant's plan allows at once. Make it smaller."
	default:
		p.Type, p.Title = problem+"too-many-requests", "Too many requests"
		p.Detail = "This tenant has used up what its plan allows for now."
	}
	return p
}

// SetHeader writes the limits of a call into a response's header. Of a rate, these are
//
//	X-RateLimit-Limit: 10       the burst
//	X-RateLimit-Remaining: 9    what may be taken at once
//	X-RateLimit-Reset: 1        seconds until Remaining is Limit again, if nothing is taken
//
// and of rate and concurrency the fields of draft-ietf-httpapi-ratelimit-headers-10, in which t is the time until
// Remaining is one more:
//
//	RateLimit-Policy: "rate";q=60;w=60;pgxtenant-burst=10, "concurrency";q=5;qu="concurrent-requests"
//	RateLimit: "rate";r=9;t=1, "concurrency";r=4
//
// A limit that is the endpoint's own is called "endpoint-rate" or "endpoint-concurrency". Seconds are rounded up.
// Without a limit nothing is written.
func SetHeader(h http.Header, s State) {
	var policies, limits []string
	if r := s.Rate; !r.Unlimited {
		h.Set("X-RateLimit-Limit", strconv.Itoa(r.Burst))
		h.Set("X-RateLimit-Remaining", strconv.Itoa(s.Remaining))
		h.Set("X-RateLimit-Reset", strconv.FormatInt(seconds(s.Reset), 10))
		name := policyName("rate", s.OwnRate)
		policies = append(policies, fmt.Sprintf("%s;q=%d%s;pgxtenant-burst=%d", name, r.Requests, window(r.Period), r.Burst))
		limit := fmt.Sprintf("%s;r=%d", name, s.Remaining)
		if s.Next > 0 {
			limit += fmt.Sprintf(";t=%d", seconds(s.Next))
		}
		limits = append(limits, limit)
	}
	if s.Concurrency > 0 {
		name := policyName("concurrency", s.OwnConcurrency)
		policies = append(policies, fmt.Sprintf(`%s;q=%d;qu="concurrent-requests"`, name, s.Concurrency))
		limits = append(limits, fmt.Sprintf("%s;r=%d", name, max(0, s.Concurrency-s.UnderWay)))
	}
	if len(limits) > 0 {
		h.Set("RateLimit-Policy", strings.Join(policies, ", "))
		h.Set("RateLimit", strings.Join(limits, ", "))
	}
}

func policyName(kind string, own bool) string {
	if own {
		return `"endpoint-` + kind + `"`
	}
	return `"` + kind + `"`
}

// window is the parameter for a period, which has whole seconds or is left out.
func window(period time.Duration) string {
	if period%time.Second != 0 {
		return ""
	}
	return fmt.Sprintf(";w=%d", period/time.Second)
}

// seconds rounds up.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }
