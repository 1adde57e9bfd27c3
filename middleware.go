package pgxtenant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// Middleware returns a wrapper for handlers that finds the tenant of each request, decides whether the caller
// may act as it, and puts it into the request's context. A request for which that fails is answered with a
// [Problem] and does not reach the handler.
//
//	tenants := pgxtenant.Middleware(db.Registry(),
//		pgxtenant.BySubdomain("example.com"),
//		pgxtenant.ByClaim(tenantOfToken))
//	http.ListenAndServe(addr, authenticate(tenants(mux)))
//
// The options that begin with By say where a request names its tenant; at least one is needed. All of them
// are asked, in the order given, and those that find something must agree, or the request is refused with
// ErrAmbiguousTenant. Where none finds anything it is refused with ErrUnidentified: there is no default tenant.
//
// What a client can write into a header, a host, a path or a cookie is a wish and no identity. So one of
// [Authorize] and [ByClaim] must say who may act as whom, or [WithoutAuthorization] that nobody need be asked.
//
// The handler finds the tenant by [FromContext], as the directory knew it when the request came in. Each
// checkout of a TenantDB asks the TenantDB's own Directory again, so that a suspension takes effect in the
// middle of a request; without a Directory there, the tenant is used as it is. Answer errors that come up
// then by [Refuse].
//
// Middleware panics, as [http.ServeMux.Handle] does, if its options are bad or contradict each other, or the
// directory is nil: it is called once, when the service starts. The wrapper may be used for several handlers,
// and they by any number of goroutines.
func Middleware(directory Directory, options ...MiddlewareOption) func(http.Handler) http.Handler {
	m := &middleware{log: slog.New(slog.DiscardHandler), reserved: map[string]bool{"www": true}}
	for _, o := range options {
		o(m)
	}
	if err := m.complete(directory); err != nil {
		panic(fmt.Sprintf("pgxtenant: Middleware: %v", err))
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next) })
	}
}

// A MiddlewareOption adjusts a Middleware.
type MiddlewareOption func(*middleware)

// Authorize has f decide whether the caller may act as the tenant that the request names: nil means yes. An
// error is answered with 403, and is not shown to the client; one that wraps ErrUnauthenticated with 401, and
// one that wraps ErrUnreachable or context.DeadlineExceeded with 503.
//
// ctx is r's and carries the tenant already, so f may ask the tenant's own tables. The tenant's status is
// checked only afterwards. f is called for each request, for several at once.
func Authorize(f func(ctx context.Context, r *http.Request, t Tenant) error) MiddlewareOption {
	return func(m *middleware) { m.setAuthorize++; m.authorize = f }
}

// ByClaim takes the tenant from what the authentication in front of this has verified and put into the
// context, such as a token's claim. The claim is an identity: a caller with one needs no other leave to act as
// that tenant, and naming any other tenant in the request is refused with 403. A caller without one is refused
// with 401, unless Authorize or WithoutAuthorization say otherwise; Authorize, if there is one, is asked in
// either case.
func ByClaim(f func(ctx context.Context) (tenantID string, ok bool)) MiddlewareOption {
	return func(m *middleware) { m.setClaim++; m.claim = f }
}

// WithoutAuthorization lets every caller act as every tenant that it names. That is right where a gateway has
// checked the request and overwrites what the client wrote, or for pages that are public.
func WithoutAuthorization() MiddlewareOption { return func(m *middleware) { m.anyone = true } }

// TrustProxies believes the X-Forwarded-Host of requests that come over a connection from one of these
// addresses, which must set it themselves: a proxy that passes on what its client sent hands that client the
// choice. From elsewhere, and by default, the header is ignored. Several values must be the same.
//
// The address is that of http.Request.RemoteAddr. Other middleware that changes it, by X-Forwarded-For for
// instance, must come after this one.
func TrustProxies(proxies ...netip.Prefix) MiddlewareOption {
	return func(m *middleware) { m.proxies = append(m.proxies, proxies...) }
}

// Reserve names what leads to no tenant: labels in front of the domains of BySubdomain, first segments of
// ByPath, and whole hosts, such as the API's own, that ByDomain need not look up. "www" always is reserved.
// Case does not matter.
func Reserve(names ...string) MiddlewareOption {
	return func(m *middleware) {
		for _, n := range names {
			m.reserved[strings.ToLower(n)] = true
		}
	}
}

// Hide answers every refusal with the same 404, so that nobody can tell which tenants there are, whether they
// are suspended, or what is wrong with a request. That goes for an outage of the directory too, which would show
// the tenants that are still in memory. LogRefusals tells the causes apart.
func Hide() MiddlewareOption { return func(m *middleware) { m.hide = true } }

// OnRefusal has f answer the requests that are refused, for other words, another language or a page in HTML. p
// is its own to change and is what would be sent: p.ServeHTTP(w, r) sends it. p.Err is the cause and not to be
// shown. With Hide, p is the 404.
func OnRefusal(f func(w http.ResponseWriter, r *http.Request, p *Problem)) MiddlewareOption {
	return func(m *middleware) { m.setRefusal++; m.onRefusal = f }
}

// LogRefusals logs each refusal with its cause: at level Error if the directory or a handler failed, Info if a
// caller or the status of a tenant was refused, and Debug if the request was at fault or its client went away.
// By default nothing is logged.
func LogRefusals(logger *slog.Logger) MiddlewareOption {
	return func(m *middleware) { m.log = logger }
}

// middleware is one Middleware. It is not changed once complete.
type middleware struct {
	gate      *Gate
	sources   []source
	bases     []string // of BySubdomain, the longest first
	domains   bool     // ByDomain was given
	reserved  map[string]bool
	proxies   []netip.Prefix
	claim     func(context.Context) (string, bool)
	authorize func(context.Context, *http.Request, Tenant) error
	anyone    bool
	hide      bool
	onRefusal func(http.ResponseWriter, *http.Request, *Problem)
	log       *slog.Logger
	vary      []string // one value, or none

	// How often options that are to be given once were given, and what is wrong with others.
	setAuthorize, setClaim, setRefusal int
	problems                           []error
}

// plainMiddleware is what Refuse goes by for requests that came through none.
var plainMiddleware = &middleware{log: slog.New(slog.DiscardHandler)}

// complete checks the options and prepares what follows from them.
func (m *middleware) complete(directory Directory) error {
	errs := m.problems
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if err := validDirectory(directory); err != nil {
		errs = append(errs, err)
	} else if _, ok := directory.(AliasDirectory); m.domains && !ok {
		fail("ByDomain needs an AliasDirectory, which %T is not", directory)
	}
	for _, once := range []struct {
		option string
		times  int
		isNil  bool
	}{
		{"Authorize", m.setAuthorize, m.authorize == nil},
		{"ByClaim", m.setClaim, m.claim == nil},
		{"OnRefusal", m.setRefusal, m.onRefusal == nil},
	} {
		if once.times > 1 {
			fail("%s is given %d times; want one", once.option, once.times)
		} else if once.times == 1 && once.isNil {
			fail("%s is given nil", once.option)
		}
	}
	if m.log == nil {
		fail("LogRefusals is given nil")
	}
	if len(m.sources) == 0 && m.claim == nil {
		fail("nothing says where a request names its tenant; give ByHeader, BySubdomain, ByDomain, ByPath, ByCookie, ByClaim or By")
	}
	switch {
	case m.anyone && m.authorize != nil:
		fail("Authorize and WithoutAuthorization contradict each other")
	case !m.anyone && m.authorize == nil && m.claim == nil:
		fail("nothing says who may act as which tenant; give Authorize or ByClaim, or WithoutAuthorization if nobody need be asked")
	}
	for _, p := range m.proxies {
		if !p.IsValid() || p.Addr().Is4In6() {
			fail("TrustProxies is given %v; want a valid prefix, of IPv4 addresses in their own form", p)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	slices.SortFunc(m.bases, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	m.gate = newGate(directory, m.log)
	m.setVary()
	return nil
}

// serve is the Middleware at work.
func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if m.vary != nil {
		h := w.Header()
		if h["Vary"] == nil {
			h["Vary"] = m.vary // as full as its capacity: who adds to it gets a copy
		} else {
			h.Add("Vary", m.vary[0])
		}
	}
	ctx, err := m.admit(r)
	if err != nil {
		m.refuse(w, r, err)
		return
	}
	next.ServeHTTP(w, r.WithContext(ctx))
}

// admit is Gate.Admit for a request.
func (m *middleware) admit(r *http.Request) (context.Context, error) {
	id, err := m.identify(r)
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	t, err := m.gate.find(ctx, id)
	if err != nil {
		return nil, err
	}
	c := &requestContext{tenantContext{Context: ctx, tenant: t, kind: kindID}, m}
	if m.authorize != nil {
		if err := m.authorize(c, r, t); err != nil {
			return nil, notAuthorized(id, err)
		}
	}
	if err := check(&t); err != nil {
		return nil, &TenantError{id, "check", err}
	}
	return c, nil
}

// identify returns the ID of the tenant that the request is for: the one that it wishes for, and that is not
// at odds with the caller's claim.
func (m *middleware) identify(r *http.Request) (string, error) {
	id, err := m.wish(r)
	if m.claim == nil || err != nil && !errors.Is(err, ErrTenantNotFound) {
		return id, err
	}
	claim, ok := m.claim(r.Context())
	switch {
	case !ok && m.authorize == nil && !m.anyone:
		// Before the directory is asked: strangers shall not learn from the answer who is in it.
		return "", ErrUnauthenticated
	case !ok:
		return id, err
	case ValidateID(claim) != nil:
		return "", fmt.Errorf("%w: its claim %q is no tenant's ID", ErrForbidden, clip(claim))
	case id != "" && id != claim:
		return "", &TenantError{id, "authorize", fmt.Errorf("%w: its claim is %q", ErrForbidden, claim)}
	}
	return claim, nil
}

// wish asks all sources. It returns "" if none of them finds anything, and then the error of one that found a
// name which is nobody's: that matters only if nothing else tells the tenant.
func (m *middleware) wish(r *http.Request) (id string, err error) {
	var missing error
	for _, s := range m.sources {
		got, err := s.read(m, r)
		if got != "" && got != id && err == nil {
			err = ValidateID(got)
		}
		switch {
		case errors.Is(err, ErrTenantNotFound):
			missing = err
		case err != nil:
			return "", fmt.Errorf("%s: %w", s.name, err)
		case got == "", got == id:
		case id != "":
			return "", fmt.Errorf("%w: %s says %q, and another source %q", ErrAmbiguousTenant, s.name, got, id)
		default:
			id = got
		}
	}
	if id != "" {
		return id, nil
	}
	return "", missing
}

// report logs a refusal.
func (m *middleware) report(r *http.Request, sent *Problem, err error) {
	level := slog.LevelDebug
	switch status := ProblemFor(err).Status; {
	case sent.Status == StatusClientClosedRequest:
	case status == http.StatusForbidden, errors.Is(err, ErrTenantUnavailable):
		level = slog.LevelInfo
	case status >= 500:
		level = slog.LevelError
	}
	m.log.LogAttrs(r.Context(), level, "request refused", slog.Int("status", sent.Status), slog.Any("error", err))
}

// requestContext is the context of a request that a Middleware has let pass: a tenantContext, in the same
// allocation as what Refuse needs to know.
type requestContext struct {
	tenantContext
	m *middleware
}

type middlewareKey struct{}

func (c *requestContext) Value(key any) any {
	if _, ok := key.(middlewareKey); ok {
		return c.m
	}
	return c.tenantContext.Value(key)
}
