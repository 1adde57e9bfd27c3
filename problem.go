package pgxtenant

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// DefaultRetryAfter is how long a client is asked to wait before it tries again, where that may help.
const DefaultRetryAfter = 5 * time.Second

// StatusClientClosedRequest is the status of an answer that nobody waits for: the client has gone away. It
// is nginx's, and meant for logs.
const StatusClientClosedRequest = 499

// problemTypes is what the default types of problems begin with; what follows is a heading of that page.
const problemTypes = "https://github.com/pgxtenant/pgxtenant/blob/main/docs/http.md#"

// Problem is why a request is not served, as RFC 9457 tells it to clients. It is an [http.Handler] that
// answers with itself. Nothing in it comes from the request or from an error, unless you put it there.
type Problem struct {
	Type     string `json:"type"`               // URI of the kind of problem
	Title    string `json:"title"`              // the same for each problem of a type
	Status   int    `json:"status"`             // HTTP status; zero means 500
	Detail   string `json:"detail,omitempty"`   // what may help the client
	Instance string `json:"instance,omitempty"` // URI of this very occurrence; empty unless you set it

	// RetryAfter is sent as Retry-After in whole seconds, rounded up. Zero or less means it is not sent.
	RetryAfter time.Duration `json:"-"`

	// Err is the cause, for logs. It is never sent.
	Err error `json:"-"`
}

// knownProblems are the problems of errors, in the order in which they are looked for: an error that
// wraps several is the first.
var knownProblems = []struct {
	err     error
	problem Problem
}{
	{ErrUnauthenticated, Problem{Type: problemTypes + "unauthenticated", Status: http.StatusUnauthorized, Title: "Not authenticated",
		Detail: "The request must say who makes it before it may act for a tenant."}},
	{ErrForbidden, Problem{Type: problemTypes + "forbidden", Status: http.StatusForbidden, Title: "Not authorised for this tenant",
		Detail: "The caller may not act for this tenant."}},
	{ErrUnidentified, Problem{Type: problemTypes + "unidentified", Status: http.StatusBadRequest, Title: "No tenant named",
		Detail: "The request does not say which tenant it is for."}},
	{ErrAmbiguousTenant, Problem{Type: problemTypes + "ambiguous", Status: http.StatusBadRequest, Title: "More than one tenant named",
		Detail: "The request names two different tenants."}},
	{ErrInvalidTenantID, Problem{Type: problemTypes + "malformed", Status: http.StatusBadRequest, Title: "Malformed name of a tenant",
		Detail: "What the request gives as the name of its tenant cannot be one."}},
	{ErrTenantNotFound, Problem{Type: problemTypes + "unknown", Status: http.StatusNotFound, Title: "Unknown tenant",
		Detail: "There is no such tenant."}},
	{ErrTenantSuspended, Problem{Type: problemTypes + "suspended", Status: http.StatusForbidden, Title: "Tenant suspended",
		Detail: "This tenant is suspended."}},
	{ErrTenantUnavailable, Problem{Type: problemTypes + "unavailable", Status: http.StatusServiceUnavailable, Title: "Tenant unavailable",
		Detail: "This tenant is being set up or removed.", RetryAfter: DefaultRetryAfter}},
	{ErrTenantOverloaded, Problem{Type: problemTypes + "overloaded", Status: http.StatusServiceUnavailable, Title: "Tenant overloaded",
		Detail: "Too many requests of this tenant wait already.", RetryAfter: DefaultRetryAfter}},
	{ErrPoolsBusy, unreachableProblem},
	{ErrClosed, unreachableProblem},
	{ErrUnreachable, unreachableProblem},
	{ErrWrongTenant, internalProblem},
	{ErrInvalidTenant, internalProblem},
}

var (
	unreachableProblem = Problem{Type: problemTypes + "unreachable", Status: http.StatusServiceUnavailable, Title: "Temporarily unavailable",
		Detail: "The tenant cannot be served at the moment.", RetryAfter: DefaultRetryAfter}
	internalProblem = Problem{Type: "about:blank", Status: http.StatusInternalServerError, Title: http.StatusText(http.StatusInternalServerError)}
	hiddenProblem   = Problem{Type: "about:blank", Status: http.StatusNotFound, Title: http.StatusText(http.StatusNotFound)}
	closedProblem   = Problem{Type: "about:blank", Status: StatusClientClosedRequest, Title: "Client Closed Request"}
)

// ProblemFor returns the problem that err is to a client, in a copy of your own. An error that has nothing to
// do with finding, admitting or connecting a tenant is a plain 500.
func ProblemFor(err error) *Problem {
	p := internalProblem
	if te := (*TenantError)(nil); errors.As(err, &te) {
		p = unreachableProblem
	}
	for i := range knownProblems {
		if errors.Is(err, knownProblems[i].err) {
			p = knownProblems[i].problem
			break
		}
	}
	if o := (*OverloadError)(nil); errors.As(err, &o) {
		p.RetryAfter = o.RetryAfter
	}
	p.Err = err
	return &p
}

// ServeHTTP answers with the problem as application/problem+json, which no cache may keep. To a problem with
// status 401 it adds the challenge "Bearer", unless w has a WWW-Authenticate already.
func (p *Problem) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	sent := *p
	sent.Status = orDefault(p.Status, http.StatusInternalServerError)
	body, err := json.Marshal(sent)
	if err != nil {
		panic(fmt.Sprintf("pgxtenant: a problem that is no JSON: %v", err)) // it has strings and a number
	}
	h := w.Header()
	for _, meant := range []string{"Content-Length", "Content-Encoding", "Etag", "Last-Modified"} {
		h.Del(meant) // for another body than this
	}
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if sent.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((sent.RetryAfter+time.Second-1)/time.Second), 10))
	}
	if sent.Status == http.StatusUnauthorized && h.Get("WWW-Authenticate") == "" {
		h.Set("WWW-Authenticate", "Bearer")
	}
	w.WriteHeader(sent.Status)
	_, _ = w.Write(body)
}

// Refuse answers a request with the problem that err is to its client: for the errors that a handler meets
// after the Middleware has let it pass, such as ErrTenantSuspended at a query. Options of the Middleware that
// the request came through, Hide and the like, hold for it too. Nothing may have been written to w.
func Refuse(w http.ResponseWriter, r *http.Request, err error) {
	m, _ := r.Context().Value(middlewareKey{}).(*middleware)
	if m == nil {
		m = plainMiddleware
	}
	m.refuse(w, r, err)
}

// refuse answers a request that is not served, and logs why.
func (m *middleware) refuse(w http.ResponseWriter, r *http.Request, err error) {
	p := ProblemFor(err)
	switch {
	case r.Context().Err() == context.Canceled:
		// Not what err says: the look-up was called off since nobody waits for it.
		*p = closedProblem
	case m.hide && p.Status != http.StatusInternalServerError:
		*p = hiddenProblem
	}
	p.Err = err
	m.report(r, p, err)
	if m.onRefusal != nil {
		m.onRefusal(w, r, p)
		return
	}
	p.ServeHTTP(w, r)
}
