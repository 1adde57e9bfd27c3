package pgxtenant

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// aliases is a directory that knows tenants by other names too.
type aliases struct {
	*directory
	of map[string]string // ID by alias
}

func (a aliases) ByAlias(ctx context.Context, alias string) (Tenant, error) {
	if a.before != nil {
		a.before(ctx, alias)
	}
	id, ok := a.of[alias]
	if !ok {
		return Tenant{}, ErrTenantNotFound
	}
	return a.Lookup(ctx, id)
}

// peekingAliases knows them all by heart.
type peekingAliases struct{ aliases }

func (a peekingAliases) Peek(id string) (Tenant, bool) {
	t, ok := a.tenants[id]
	return t, ok
}

func (a peekingAliases) PeekAlias(alias string) (Tenant, bool) { return a.Peek(a.of[alias]) }

// customers is the directory of most tests here.
func customers() aliases {
	return aliases{
		newDirectory(Tenant{ID: "acme", Plan: "gold"}, Tenant{ID: "globex"}, Tenant{ID: "frozen", Status: StatusSuspended},
			Tenant{ID: "new", Status: StatusProvisioning}, Tenant{ID: "old", Status: StatusDeleting}, Tenant{ID: "reader", Status: StatusReadOnly},
			Tenant{ID: "odd", Status: 77}, Tenant{ID: "xn--bcher-kva"}, Tenant{ID: "www"}, Tenant{ID: "a_b"}),
		map[string]string{"shop.acme.test": "acme", "globex.test": "globex", "acme.example.com": "globex", "xn--mller-kva.test": "acme"},
	}
}

// request makes one to the host example.org, which means nothing to anybody.
func request(adjust ...func(*http.Request)) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Host = "example.org"
	for _, f := range adjust {
		f(r)
	}
	return r
}

func toHost(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }

func withHeader(name string, values ...string) func(*http.Request) {
	return func(r *http.Request) {
		for _, v := range values {
			r.Header.Add(name, v)
		}
	}
}

type principalKey struct{}

// user authenticates the caller as the user of one tenant.
func user(tenant string) func(*http.Request) {
	return func(r *http.Request) { *r = *r.WithContext(context.WithValue(r.Context(), principalKey{}, tenant)) }
}

func principal(ctx context.Context) (string, bool) {
	p, ok := ctx.Value(principalKey{}).(string)
	return p, ok
}

// tell answers with the tenant.
var tell = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	t, ok := FromContext(r.Context())
	if !ok {
		panic("a request without a tenant has come through")
	}
	w.Header().Set("Tenant", t.ID)
})

// answer is what became of a request: the tenant, or the status and the last part of the problem's type.
func answer(t testing.TB, h http.Handler, r *http.Request) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code == http.StatusOK {
		return w.Header().Get("Tenant")
	}
	var p Problem
	require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &p), w.Body.String())
	require.Equal(t, w.Code, p.Status)
	_, kind, _ := strings.Cut(p.Type, "#")
	return strings.TrimSpace(fmt.Sprintf("%d %s", p.Status, kind))
}

func TestARequestNamesItsTenant(t *testing.T) {
	t.Parallel()
	every := Middleware(customers(), WithoutAuthorization(), BySubdomain("example.com", "EU.example.com."), ByDomain(), ByHeader("x-tenant-id"),
		ByPath("/t/"), ByCookie("tenant"), Reserve("api", "Status", "api.example.net"),
		By(func(r *http.Request) (string, error) { return r.URL.Query().Get("tenant"), nil }))(tell)
	path := func(p string) func(*http.Request) {
		return func(r *http.Request) { r.URL = httptest.NewRequest(http.MethodGet, p, nil).URL }
	}
	for _, c := range []struct {
		want string
		r    *http.Request
	}{
		{"acme", request(toHost("acme.example.com"))},
		{"acme", request(toHost("ACME.Example.COM"))},
		{"acme", request(toHost("acme.example.com:8080"))},
		{"acme", request(toHost("acme.example.com:"))},
		{"acme", request(toHost("acme.example.com."))},
		{"acme", request(toHost("acme.example.com.:443"))},
		{"acme", request(toHost("acme.eu.example.com"))},
		{"xn--bcher-kva", request(toHost("xn--bcher-kva.example.com"))},
		{"a_b", request(toHost("a_b.example.com"))},
		{"reader", request(toHost("reader.example.com"))},
		{"404 unknown", request(toHost("nobody.example.com"))},

		{"acme", request(toHost("shop.acme.test"))},
		{"acme", request(toHost("SHOP.acme.test.:443"))},
		{"acme", request(toHost("xn--mller-kva.test"))},
		{"404 unknown", request(toHost("shop.globex.test"))},
		{"404 unknown", request()}, // no alias, and nothing else

		{"acme", request(withHeader("X-Tenant-ID", "acme"))},
		{"acme", request(withHeader("X-Tenant-ID", "acme", "acme"))},
		{"404 unknown", request(withHeader("X-Tenant-ID", "Acme"))}, // IDs are compared byte by byte
		{"acme", request(path("/t/acme"))},
		{"acme", request(path("/t/acme/"))},
		{"acme", request(path("/t/acme/invoices%2F1"))},
		{"acme", request(path("/?tenant=acme"))},
		{"acme", request(withHeader("Cookie", "a=b; tenant=acme; tenant=acme"))},
		{"acme", request(withHeader("Cookie", "Tenant=globex;xtenant=globex;; tenant=acme;", "tenant=acme"))},
		{"acme", request(toHost("acme.example.com"), withHeader("X-Tenant-ID", "acme"), path("/t/acme/"), withHeader("Cookie", "tenant=acme"))},

		// Nobody's hosts leave it to others to say.
		{"acme", request(toHost("api.example.com"), withHeader("X-Tenant-ID", "acme"))},
		{"acme", request(toHost("www.example.com"), withHeader("X-Tenant-ID", "acme"))},
		{"acme", request(toHost(""), withHeader("X-Tenant-ID", "acme"))},
		{"acme", request(toHost("api.example.net"), withHeader("X-Tenant-ID", "acme"))},
		{"acme", request(toHost("[2001:db8::1]:80"), withHeader("X-Tenant-ID", "acme"))},
		{"400 unidentified", request(toHost("example.com"))},
		{"400 unidentified", request(toHost("eu.example.com"))},
		{"400 unidentified", request(toHost("www.example.com"))},
		{"400 unidentified", request(toHost("WWW.example.com"))},
		{"400 unidentified", request(toHost("status.example.com"))},
		{"400 unidentified", request(toHost("a.b.example.com"))},
		{"400 unidentified", request(toHost("acme.www.example.com"))},
		{"400 unidentified", request(toHost(""))},
		{"400 unidentified", request(toHost("[::1]"))},
		{"400 unidentified", request(toHost("[::1]:8080"))},
		{"400 unidentified", request(toHost("api.example.net"), path("/t/"))},
		{"400 unidentified", request(toHost("api.example.net"), path("/t/status/x"))},
		{"404 unknown", request(toHost("notexample.com"))},
		{"404 unknown", request(toHost("acmexexample.com"))},
		{"404 unknown", request(toHost("acme-example.com"))},
		{"404 unknown", request(toHost("127.0.0.1:80"))},

		{"400 ambiguous", request(toHost("acme.example.com"), withHeader("X-Tenant-ID", "globex"))},
		{"400 ambiguous", request(toHost("shop.acme.test"), withHeader("X-Tenant-ID", "globex"))},
		{"400 ambiguous", request(toHost("shop.acme.test"), path("/t/globex/"))},
		{"400 ambiguous", request(path("/t/acme/?tenant=globex"))},
		{"400 ambiguous", request(toHost("acme.example.com"), withHeader("X-Tenant-ID", "nobody"))},
		{"400 ambiguous", request(withHeader("X-Tenant-ID", "acme", "globex"))},
		{"400 ambiguous", request(withHeader("X-Tenant-ID", "acme", ""))},
		{"400 ambiguous", request(withHeader("Cookie", "tenant=acme; tenant=globex"))},

		{"400 malformed", request(withHeader("X-Tenant-ID", ""))},
		{"400 malformed", request(withHeader("X-Tenant-ID", "acme, globex"))},
		{"400 malformed", request(withHeader("X-Tenant-ID", " acme"))},
		{"400 malformed", request(withHeader("X-Tenant-ID", "acme\x00"))},
		{"400 malformed", request(withHeader("X-Tenant-ID", "../acme"))},
		{"400 malformed", request(withHeader("X-Tenant-ID", "açme"))},
		{"400 malformed", request(withHeader("X-Tenant-ID", strings.Repeat("a", 1<<20)))},
		{"400 malformed", request(toHost("acme.example.com"), withHeader("X-Tenant-ID", strings.Repeat("a", 1<<20)))},
		{"400 malformed", request(path("/t/a%63me"), func(r *http.Request) { r.URL.RawPath = "/t/a%63me" })},
		{"400 malformed", request(path("/t/acme%2Fglobex"))},
		{"400 malformed", request(path("/t/../acme"))},
		{"400 malformed", request(path("/t/%00"))},
		{"400 malformed", request(withHeader("Cookie", "tenant="))},
		{"400 malformed", request(withHeader("Cookie", "tenant"))},
		{"400 malformed", request(withHeader("Cookie", `tenant="acme"`))},
		{"400 malformed", request(withHeader("Cookie", "tenant =x; tenant=a\"b"))},
		{"400 malformed", request(path("/?tenant=*"))},
	} {
		require.Equal(t, c.want, answer(t, every, c.r), "host %q, path %q, header %.100v", c.r.Host, c.r.URL, c.r.Header)
	}
}

func TestAbsurdHostsAreMalformed(t *testing.T) {
	t.Parallel()
	h := Middleware(customers(), WithoutAuthorization(), BySubdomain("example.com"), ByHeader("X-Tenant-ID"))(tell)
	for _, host := range []string{
		"a..b.example.com", ".example.com", "acme.example.com..", ".", "..", ":80", "acme%2eexample.com", "acme%00.example.com",
		"acme.example.com:80:80", "acme.example.com:http", "acme.example.com:123456", "acme.example.com:-1", "::1", "2001:db8::1",
		"[::1", "[::1]80", "[acme.example.com]", "[127.0.0.1]", "[]", "[::1]:x", "acme .example.com", " acme.example.com", "acme.example.com ",
		"acme.example.com\x00", "acme\r\nX: y.example.com", "bücher.example.com", "acmе.example.com", "acme。example.com", "-acme.example.com", "acme-.example.com",
		"_acme.example.com", "user@acme.example.com", "acme.example.com/", "acme.example.com?", "http://acme.example.com", "*.example.com", "<acme>.example.com",
		"\u212a.example.com", strings.Repeat("a", 64) + ".example.com", strings.Repeat("a.", 127) + "example.com", strings.Repeat("a", 1<<20), strings.Repeat(".", 1<<20),
	} {
		require.Equal(t, "400 malformed", answer(t, h, request(toHost(host))), "%.60q", host)
		require.Equal(t, "400 malformed", answer(t, h, request(toHost(host), withHeader("X-Tenant-ID", "acme"))), "%.60q, though the header is good", host)
	}
	require.Equal(t, "404 unknown", answer(t, h, request(toHost(strings.Repeat("a", 63)+".example.com"))))
}

func TestForwardedHostIsBelievedFromProxiesOnly(t *testing.T) {
	t.Parallel()
	h := Middleware(customers(), WithoutAuthorization(), BySubdomain("example.com"),
		TrustProxies(netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")))(tell)
	from := func(addr string) func(*http.Request) { return func(r *http.Request) { r.RemoteAddr = addr } }
	for _, c := range []struct {
		want      string
		from      string
		forwarded []string
	}{
		{"globex", "10.1.2.3:4567", []string{"globex.example.com"}},
		{"globex", "[::ffff:10.1.2.3]:4567", []string{"globex.example.com"}},
		{"globex", "[fd00::1]:4567", []string{"globex.example.com"}},
		{"globex", "[fd00::1%eth0]:4567", []string{"globex.example.com"}},
		{"globex", "10.1.2.3:4567", []string{"GLOBEX.example.com:443, globex.example.com."}},
		{"globex", "10.1.2.3:4567", []string{"globex.example.com", "globex.example.com"}},
		{"acme", "10.1.2.3:4567", nil},
		{"400 ambiguous", "10.1.2.3:4567", []string{"globex.example.com", "acme.example.com"}},
		{"400 ambiguous", "10.1.2.3:4567", []string{"globex.example.com, acme.example.com"}},
		{"400 ambiguous", "10.1.2.3:4567", []string{"globex.example.com,"}},
		{"400 malformed", "10.1.2.3:4567", []string{"bücher.example.com"}},
		{"400 unidentified", "10.1.2.3:4567", []string{""}},
		{"acme", "10.2.2.3:4567", []string{"globex.example.com"}},
		{"acme", "10.2.2.3:4567", []string{"globex.example.com", "acme.example.com"}},
		{"acme", "[2001:db8::1]:4567", []string{"globex.example.com"}},
		{"acme", "10.1.2.3", []string{"globex.example.com"}},
		{"acme", "", []string{"globex.example.com"}},
		{"acme", "@", []string{"globex.example.com"}},
	} {
		r := request(toHost("acme.example.com"), from(c.from), withHeader("X-Forwarded-Host", c.forwarded...))
		require.Equal(t, c.want, answer(t, h, r), "%q from %s", c.forwarded, c.from)
	}
	plain := Middleware(customers(), WithoutAuthorization(), BySubdomain("example.com"))(tell)
	r := request(toHost("acme.example.com"), from("10.1.2.3:4567"), withHeader("X-Forwarded-Host", "globex.example.com"))
	require.Equal(t, "acme", answer(t, plain, r), "by default nobody is trusted")
}

func TestAWishIsNoIdentity(t *testing.T) {
	t.Parallel()
	asked := func(ctx context.Context, r *http.Request, tenant Tenant) error {
		if carried, ok := FromContext(ctx); !ok || carried.ID != tenant.ID {
			panic("the hook's context has not the tenant")
		}
		switch p, ok := principal(r.Context()); {
		case !ok:
			return fmt.Errorf("who is it? %w", ErrUnauthenticated)
		case p == "slow":
			return context.DeadlineExceeded
		case p == "outage":
			return fmt.Errorf("members: %w", ErrUnreachable)
		case p != tenant.ID && p != "root":
			return errors.New("secret: not a member")
		}
		return nil
	}
	dir := customers()
	wish := func(id string) func(*http.Request) { return withHeader("X-Tenant-ID", id) }
	for name, c := range map[string]struct {
		h    http.Handler
		want map[string]*http.Request
	}{
		"Authorize": {Middleware(dir, ByHeader("X-Tenant-ID"), Authorize(asked))(tell), map[string]*http.Request{
			"acme":                request(wish("acme"), user("acme")),
			"globex":              request(wish("globex"), user("root")),
			"401 unauthenticated": request(wish("acme")),
			"403 forbidden":       request(wish("globex"), user("acme")),
			"400 unidentified":    request(user("acme")),
			"503 unreachable":     request(wish("acme"), user("outage")),
		}},
		"Authorize, by status": {Middleware(dir, ByHeader("X-Tenant-ID"), Authorize(asked))(tell), map[string]*http.Request{
			"403 suspended":   request(wish("frozen"), user("frozen")),
			"403 forbidden":   request(wish("frozen"), user("acme")), // and not that it is suspended
			"503 unavailable": request(wish("old"), user("old")),
			"503 unreachable": request(wish("acme"), user("slow")),
			"500":             request(wish("odd"), user("odd")),
		}},
		"ByClaim": {Middleware(dir, ByHeader("X-Tenant-ID"), ByClaim(principal))(tell), map[string]*http.Request{
			"acme":                request(user("acme")),
			"globex":              request(wish("globex"), user("globex")),
			"401 unauthenticated": request(wish("acme")),
			"403 forbidden":       request(wish("globex"), user("acme")),
			"403 suspended":       request(user("frozen")),
			"404 unknown":         request(user("nobody")),
			"400 malformed":       request(wish("*"), user("acme")),
		}},
		"ByClaim, strangers": {Middleware(dir, ByHeader("X-Tenant-ID"), ByClaim(principal))(tell), map[string]*http.Request{
			"401 unauthenticated": request(wish("nobody")), // the same as of a tenant that there is
			"403 forbidden":       request(user("*")),      // no fault of the request's
		}},
		"ByClaim and nothing named": {Middleware(dir, ByClaim(principal))(tell), map[string]*http.Request{
			"acme":                request(user("acme")),
			"401 unauthenticated": request(),
		}},
		"ByClaim and ByDomain": {Middleware(dir, ByDomain(), ByClaim(principal))(tell), map[string]*http.Request{
			"acme":                request(toHost("api.test"), user("acme")),
			"globex":              request(toHost("globex.test"), user("globex")),
			"403 forbidden":       request(toHost("globex.test"), user("acme")),
			"401 unauthenticated": request(toHost("api.test")),
		}},
		"ByClaim and Authorize": {Middleware(dir, ByHeader("X-Tenant-ID"), ByClaim(principal), Authorize(func(_ context.Context, _ *http.Request, t Tenant) error {
			if t.ID == "globex" {
				return nil
			}
			return ErrForbidden
		}))(tell), map[string]*http.Request{
			"globex":           request(wish("globex")), // Authorize says so
			"403 forbidden":    request(user("acme")),
			"400 unidentified": request(),
		}},
		"ByClaim, and public": {Middleware(dir, ByHeader("X-Tenant-ID"), ByClaim(principal), WithoutAuthorization())(tell), map[string]*http.Request{
			"acme":          request(wish("acme")),
			"globex":        request(user("globex")),
			"403 forbidden": request(wish("globex"), user("acme")),
		}},
		"WithoutAuthorization": {Middleware(dir, ByHeader("X-Tenant-ID"), WithoutAuthorization())(tell), map[string]*http.Request{
			"acme":            request(wish("acme")),
			"403 suspended":   request(wish("frozen")),
			"503 unavailable": request(wish("new")),
			"404 unknown":     request(wish("nobody")),
		}},
	} {
		for want, r := range c.want {
			require.Equal(t, want, answer(t, c.h, r), name)
		}
	}
}

func TestMiddlewareRefusesOptionsThatLeaveADoorOpen(t *testing.T) {
	t.Parallel()
	yes := func(context.Context, *http.Request, Tenant) error { return nil }
	by := ByHeader("X-Tenant-ID")
	var noRegistry *Registry
	for want, options := range map[string][]MiddlewareOption{
		"who may act as which tenant":  {by},
		"contradict each other":        {by, Authorize(yes), WithoutAuthorization()},
		"Authorize is given nil":       {by, Authorize(nil)},
		"Authorize is given 2 times":   {by, Authorize(yes), Authorize(yes)},
		"ByClaim is given nil":         {ByClaim(nil)},
		"ByClaim is given 2 times":     {ByClaim(principal), ByClaim(principal)},
		"OnRefusal is given nil":       {ByClaim(principal), OnRefusal(nil)},
		"LogRefusals is given nil":     {ByClaim(principal), LogRefusals(nil)},
		"By is given nil":              {By(nil), Authorize(yes)},
		"where a request names":        {WithoutAuthorization()},
		`ByHeader is given ""`:         {ByHeader(""), Authorize(yes)},
		`ByHeader is given "Host"`:     {ByHeader("Host"), Authorize(yes)},
		`ByHeader is given "a b"`:      {ByHeader("a b"), Authorize(yes)},
		`ByCookie is given "a=b"`:      {ByCookie("a=b"), Authorize(yes)},
		`ByPath is given "t/"`:         {ByPath("t/"), Authorize(yes)},
		`ByPath is given "/t"`:         {ByPath("/t"), Authorize(yes)},
		"BySubdomain is given no":      {BySubdomain(), Authorize(yes)},
		`BySubdomain is given ""`:      {BySubdomain(""), Authorize(yes)},
		`given "*.example.com"`:        {BySubdomain("*.example.com"), Authorize(yes)},
		`given ".example.com"`:         {BySubdomain(".example.com"), Authorize(yes)},
		`given "bücher.example"`:       {BySubdomain("bücher.example"), Authorize(yes)},
		"ByDomain needs an Alias":      {ByDomain(), Authorize(yes)},
		"TrustProxies is given inv":    {by, Authorize(yes), TrustProxies(netip.Prefix{})},
		"TrustProxies is given ::ffff": {by, Authorize(yes), TrustProxies(netip.MustParsePrefix("::ffff:10.0.0.0/104"))},
	} {
		require.Contains(t, panicOf(func() { Middleware(newDirectory(), options...) }), want)
	}
	require.Contains(t, panicOf(func() { Middleware(nil, by, Authorize(yes)) }), "the directory is nil")
	require.Contains(t, panicOf(func() { Middleware(noRegistry, by, Authorize(yes)) }), "nil *Registry")
	require.Contains(t, panicOf(func() { NewGate(nil) }), "the directory is nil")
	require.Contains(t, panicOf(func() { NewGate(noRegistry) }), "nil *Registry")
	all := panicOf(func() { Middleware(nil, ByPath("")) })
	for _, want := range []string{"the directory is nil", "ByPath", "who may act"} {
		require.Contains(t, all, want, "everything that is wrong is told at once")
	}
}

func panicOf(f func()) (said string) {
	defer func() { said = fmt.Sprint(recover()) }()
	f()
	return ""
}

func TestVaryNamesWhatTheTenantDependsOn(t *testing.T) {
	t.Parallel()
	vary := func(next http.HandlerFunc, options ...MiddlewareOption) []string {
		w := httptest.NewRecorder()
		w.Header().Add("Vary", "Origin")
		Middleware(customers(), append(options, ByCookie("tenant"), WithoutAuthorization())...)(next).ServeHTTP(w, request(withHeader("Cookie", "tenant=acme")))
		require.Equal(t, http.StatusOK, w.Code)
		return w.Header()["Vary"]
	}
	add := func(w http.ResponseWriter, _ *http.Request) { w.Header().Add("Vary", "Accept") }
	require.Equal(t, []string{"Origin", "X-Tenant-Id, Cookie, X-Forwarded-Host", "Accept"},
		vary(add, ByHeader("X-Tenant-ID"), ByHeader("X-Tenant-ID"), BySubdomain("example.com"), TrustProxies(netip.MustParsePrefix("10.0.0.0/8"))))
	h := Middleware(customers(), ByCookie("tenant"), WithoutAuthorization())(http.HandlerFunc(add))
	for range 2 {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, request(withHeader("Cookie", "tenant=acme")))
		require.Equal(t, []string{"Cookie", "Accept"}, w.Header()["Vary"], "no request sees what another's handler added")
	}
}

func TestATenantSuspendedWithinARequestIsRefusedAtItsNextQuery(t *testing.T) {
	t.Parallel()
	d, r := newRegistryDB(t)
	create(t, r, Record{Tenant: Tenant{ID: "acme", Plan: "gold", Settings: map[string]string{"app.color": "red"}}, Aliases: []string{"shop.acme.test"}})
	for name, c := range map[string]struct {
		dir  Directory
		want string
	}{
		"with the registry": {r, "403 suspended"},
		"without":           {nil, "acme"}, // as it was when the request came in
	} {
		db := openDB(t, d.AppURL(), func(c2 *Config) { c2.Directory = c.dir })
		passed, suspended := make(chan struct{}), make(chan struct{})
		h := Middleware(r, ByDomain(), WithoutAuthorization())(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			tenant, _ := FromContext(req.Context())
			var id, color string
			err := db.QueryRow(req.Context(), "select current_setting('app.current_tenant_id'), current_setting('app.color')").Scan(&id, &color)
			if err != nil || id != "acme" || color != "red" || tenant.Plan != "gold" {
				panic(fmt.Sprint(id, color, tenant, err))
			}
			passed <- struct{}{}
			<-suspended
			if err := db.QueryRow(req.Context(), readTenant).Scan(&id); err != nil {
				Refuse(w, req, err)
				return
			}
			w.Header().Set("Tenant", id)
		}))
		got := make(chan string)
		go func() { got <- answer(t, h, request(toHost("shop.acme.test"))) }()
		<-passed
		require.NoError(t, r.Suspend(t.Context(), "acme"))
		suspended <- struct{}{}
		require.Equal(t, c.want, <-got, name)
		require.Equal(t, "403 suspended", answer(t, h, request(toHost("shop.acme.test"))), name)
		require.NoError(t, r.Resume(t.Context(), "acme"))
	}
}

func TestTheHookMayAskTheTenantsOwnTables(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	d.RLSTable("member")
	dir := customers()
	db := openDB(t, d.AppURL(), func(c *Config) { c.Directory = dir })
	acme := WithTenantID(context.Background(), "acme")
	_, err := db.Exec(acme, "insert into member (id, body) values (1, 'jill')")
	require.NoError(t, err)
	h := Middleware(dir, ByHeader("X-Tenant-ID"), Authorize(func(ctx context.Context, r *http.Request, _ Tenant) error {
		user, _ := principal(ctx)
		var is bool
		if err := db.QueryRow(ctx, "select exists (select from member where body = $1)", user).Scan(&is); err != nil {
			return err
		}
		if !is {
			return ErrForbidden
		}
		return nil
	}))(tell)
	require.Equal(t, "acme", answer(t, h, request(withHeader("X-Tenant-ID", "acme"), user("jill"))))
	require.Equal(t, "403 forbidden", answer(t, h, request(withHeader("X-Tenant-ID", "acme"), user("jack"))))
	require.Equal(t, "403 forbidden", answer(t, h, request(withHeader("X-Tenant-ID", "globex"), user("jill"))))
	require.Equal(t, "403 forbidden", answer(t, h, request(withHeader("X-Tenant-ID", "frozen"), user("jill"))), "its tables cannot be asked")
}

// Rows 116-123 of the ways in which isolation fails, at random: nobody ever acts as a tenant other than its own.
func TestRandomRequestsNeverReachAnotherTenant(t *testing.T) {
	t.Parallel()
	h := Middleware(customers(), BySubdomain("example.com"), ByDomain(), ByHeader("X-Tenant-ID"), ByPath("/t/"), ByCookie("tenant"), ByClaim(principal),
		TrustProxies(netip.MustParsePrefix("10.0.0.0/8")))(tell)
	rnd := rand.New(rand.NewPCG(1, 2))
	ids := []string{"acme", "globex", "frozen", "nobody", "ACME", "acme ", "", "*", "a,b", "acme\x00", "../acme", "acme,globex", "%61cme", strings.Repeat("x", 200)}
	hosts := []string{"acme.example.com", "globex.example.com", "GLOBEX.example.com:1", "shop.acme.test", "globex.test", "www.example.com", "a.globex.example.com", "..", "", "[::1]", "evil.test"}
	pick := func(from []string) string { return from[rnd.IntN(len(from))] }
	counts := map[string]int{}
	for range 10_000 {
		r := request(toHost(pick(hosts)))
		caller := ""
		if rnd.IntN(4) > 0 {
			caller = pick(ids[:4])
			user(caller)(r)
		}
		for range rnd.IntN(3) {
			name := pick([]string{"X-Tenant-ID", "x-tenant-id", "X-TENANT-ID", "X-Tenant_ID", "Tenant", "X-Original-Host", "Forwarded", "Host"})
			r.Header.Add(name, pick(ids))
		}
		if rnd.IntN(3) == 0 {
			withHeader("X-Forwarded-Host", pick(hosts))(r)
			r.RemoteAddr = pick([]string{"10.0.0.1:1", "11.0.0.1:1", ""})
		}
		if rnd.IntN(3) == 0 {
			withHeader("Cookie", "tenant="+pick(ids))(r)
		}
		if rnd.IntN(3) == 0 {
			r.URL.Path = "/t/" + pick(ids)
		}
		got := answer(t, h, r)
		counts[got]++
		switch got {
		case "acme", "globex": // the other two of ids are not served
			require.Equal(t, caller, got, "%v", r)
		case "400 unidentified", "400 malformed", "400 ambiguous", "401 unauthenticated", "403 forbidden", "403 suspended", "404 unknown":
		default:
			t.Fatalf("%s: %v", got, r)
		}
	}
	for _, some := range []string{"acme", "globex", "400 malformed", "400 ambiguous", "401 unauthenticated", "403 forbidden", "403 suspended", "404 unknown"} {
		require.NotZero(t, counts[some], some)
	}
}

// TestMiddlewareAllocations holds a request with a warm directory to its price.
func TestMiddlewareAllocations(t *testing.T) { // not beside others, whose allocations would count
	dir := peekingAliases{customers()}
	bare := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	w := httptest.NewRecorder()
	for name, c := range map[string]struct {
		r       *http.Request
		options []MiddlewareOption
	}{
		"header":    {request(withHeader("X-Tenant-ID", "acme")), []MiddlewareOption{ByHeader("X-Tenant-ID"), Authorize(func(context.Context, *http.Request, Tenant) error { return nil })}},
		"subdomain": {request(toHost("acme.example.com:8080"), user("acme")), []MiddlewareOption{BySubdomain("example.com"), ByClaim(principal)}},
		"domain":    {request(toHost("shop.acme.test")), []MiddlewareOption{ByDomain(), WithoutAuthorization()}},
		"cookie":    {request(withHeader("Cookie", "session=1; tenant=acme")), []MiddlewareOption{ByCookie("tenant"), WithoutAuthorization()}},
		"path":      {request(func(r *http.Request) { r.URL.Path = "/t/acme/x" }), []MiddlewareOption{ByPath("/t/"), WithoutAuthorization()}},
	} {
		h := Middleware(dir, c.options...)(bare)
		got := testing.AllocsPerRun(1000, func() {
			clear(w.Header())
			h.ServeHTTP(w, c.r)
		})
		require.LessOrEqual(t, got, 3.0, name)
		require.Equal(t, http.StatusOK, w.Code)
		t.Logf("%s: %v allocations", name, got)
	}
}
