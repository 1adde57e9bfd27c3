package pgxtenant

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What net/http makes of requests that no client of its own would send, and the Middleware of that.
func TestRequestsAsTheyComeOverTheNetwork(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(Middleware(customers(), BySubdomain("example.com"), ByHeader("X-Tenant-ID"), ByPath("/t/"), WithoutAuthorization())(tell))
	server.Config.MaxHeaderBytes = 4 << 20
	server.Start()
	defer server.Close()
	for _, c := range []struct {
		want    string // the tenant, or the status and what the answer has
		request string
	}{
		{"acme", "GET / HTTP/1.1\r\nHost: acme.example.com\r\n\r\n"},
		{"acme", "GET / HTTP/1.1\r\nHost:   ACME.EXAMPLE.COM.:80  \r\n\r\n"},
		{"400 unidentified", "GET / HTTP/1.0\r\n\r\n"}, // net/http lets it pass, with no host
		{"400 unidentified", "GET / HTTP/1.1\r\nHost:\r\n\r\n"},
		{"400 unidentified", "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"},
		{"400 malformed", "GET / HTTP/1.1\r\nHost: a..b.example.com\r\n\r\n"},
		{"400 malformed", "GET / HTTP/1.1\r\nHost: acme%2eexample.com\r\n\r\n"},
		{"400 unidentified", "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"},
		{"400 ", "GET / HTTP/1.1\r\n\r\n"},
		{"400 ", "GET / HTTP/1.1\r\nHost: acme.example.com\r\nHost: globex.example.com\r\n\r\n"},
		{"400 ", "GET / HTTP/1.1\r\nHost: acme.example.com, globex.example.com\r\n\r\n"},
		{"400 ", "GET / HTTP/1.1\r\nHost: b\xc3\xbccher.example.com\r\n\r\n"},
		{"400 ", "GET / HTTP/1.1\r\nHost: user@acme.example.com\r\n\r\n"},
		// RFC 9112: the target's host is the request's, and Host is ignored. A proxy must do so too.
		{"globex", "GET http://globex.example.com/ HTTP/1.1\r\nHost: acme.example.com\r\n\r\n"},
		{"400 ambiguous", "GET http://globex.example.com/ HTTP/1.1\r\nHost: acme.example.com\r\nX-Tenant-ID: acme\r\n\r\n"},
		{"", "OPTIONS * HTTP/1.1\r\nHost: example.com\r\n\r\n"}, // which net/http answers by itself

		{"acme", "GET / HTTP/1.1\r\nHost: x\r\nx-tenant-id:acme \r\n\r\n"},
		{"400 ambiguous", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: acme\r\nx-tenant-id: globex\r\n\r\n"},
		{"400 malformed", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: acme, globex\r\n\r\n"},
		{"400 malformed", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID:\r\n\r\n"},
		{"400 malformed", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: <script>\r\n\r\n"},
		{"400 malformed", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: " + strings.Repeat("a", 1<<20) + "\r\n\r\n"},
		{"431 ", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: " + strings.Repeat("a", 5<<20) + "\r\n\r\n"}, // net/http's own limit
		{"400 ", "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: acme\x00\r\n\r\n"},

		{"acme", "GET /t/acme/x HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400 malformed", "GET /t/%61cme/x HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400 malformed", "GET /t/acme%2Fx HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400 malformed", "GET /%74/acme HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"400 unidentified", "GET //t/acme HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		require.NoError(t, err)
		go func() { _, _ = io.WriteString(conn, c.request) }()
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err, "%.80q", c.request)
		body, _ := io.ReadAll(res.Body)
		_ = conn.Close()
		if res.StatusCode == http.StatusOK {
			require.Equal(t, c.want, res.Header.Get("Tenant"), "%.80q", c.request)
			continue
		}
		var p Problem
		_ = json.Unmarshal(body, &p) // net/http's own refusals are plain text
		_, kind, _ := strings.Cut(p.Type, "#")
		require.Equal(t, c.want, fmt.Sprint(res.StatusCode, " ", kind), "%.80q", c.request)
		require.NotContains(t, string(body), "script")
	}
}

// HTTP/2 has the host in :authority. A Host beside it is one of the headers, which nobody looks at.
func TestTheHostOfHTTP2(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(Middleware(customers(), BySubdomain("example.com"), WithoutAuthorization())(tell))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	for host, want := range map[string]string{"acme.example.com": "acme", "ACME.example.com.:443": "acme", "example.com": "", "a..example.com": ""} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
		require.NoError(t, err)
		r.Host = host
		r.Header["X-Forwarded-Host"], r.Header["Authority"] = []string{"globex.example.com"}, []string{"globex.example.com"}
		res, err := server.Client().Do(r)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		require.Equal(t, 2, res.ProtoMajor)
		require.Equal(t, want, res.Header.Get("Tenant"), host)
		require.Equal(t, want != "", res.StatusCode == http.StatusOK, host)
	}
}

// The handler gets the server's own http.ResponseWriter, so whatever that can do: flush, take the connection over, have a deadline.
func TestAHandlerMayStreamAndTakeOverTheConnection(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(Middleware(customers(), ByHeader("X-Tenant-ID"), WithoutAuthorization())(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c := http.NewResponseController(w)
			if err := errors.Join(c.SetWriteDeadline(time.Now().Add(time.Minute)), c.EnableFullDuplex()); err != nil {
				panic(err)
			}
			conn, rw, err := c.Hijack()
			if err != nil {
				panic(err)
			}
			defer conn.Close()
			tenant, _ := FromContext(r.Context())
			fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\n\r\n%s\n", tenant.ID)
			_ = rw.Flush()
			line, _ := rw.ReadString('\n') // the context lasts as long as the handler
			tenant, _ = FromContext(r.Context())
			fmt.Fprint(rw, line, tenant.ID, " ", r.Context().Err(), "\n")
			_ = rw.Flush()
		})))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	require.NoError(t, err)
	defer conn.Close()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nX-Tenant-ID: acme\r\n\r\n")
	answer := bufio.NewReader(conn)
	head, err := http.ReadResponse(answer, nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusSwitchingProtocols, head.StatusCode)
	said, err := answer.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "acme\n", said)
	fmt.Fprint(conn, "ping\n")
	rest, err := io.ReadAll(answer)
	require.NoError(t, err)
	require.Equal(t, "ping\nacme <nil>\n", string(rest))
}

// A hook that panics, or that never comes back, lets nobody in, and keeps nobody else out.
func TestAHookThatFailsBadlyLetsNobodyIn(t *testing.T) {
	t.Parallel()
	entered := make(chan struct{})
	h := Middleware(customers(), ByHeader("X-Tenant-ID"), Authorize(func(ctx context.Context, _ *http.Request, t Tenant) error {
		switch t.ID {
		case "globex":
			panic("no such table")
		case "reader":
			close(entered)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}))(tell)
	require.PanicsWithValue(t, "no such table", func() {
		h.ServeHTTP(httptest.NewRecorder(), request(withHeader("X-Tenant-ID", "globex")))
	})
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan string)
	go func() {
		waited <- answer(t, h, request(func(r *http.Request) { *r = *r.WithContext(ctx) }, withHeader("X-Tenant-ID", "reader")))
	}()
	<-entered
	require.Equal(t, "acme", answer(t, h, request(withHeader("X-Tenant-ID", "acme"))))
	cancel()
	require.Equal(t, "499", <-waited)
}

// What is in the context already is replaced, never taken for the request's tenant.
func TestATenantInTheContextIsNoAnswer(t *testing.T) {
	t.Parallel()
	h := Middleware(customers(), ByHeader("X-Tenant-ID"), WithoutAuthorization())(tell)
	for _, before := range []context.Context{as("globex"), WithTenantID(t.Context(), "globex"), WithoutTenant(t.Context())} {
		carried := func(r *http.Request) { *r = *r.WithContext(before) }
		require.Equal(t, "acme", answer(t, h, request(carried, withHeader("X-Tenant-ID", "acme"))))
		require.Equal(t, "400 unidentified", answer(t, h, request(carried)))
		require.Equal(t, "400 ambiguous", answer(t, Middleware(customers(), ByHeader("X-Tenant-ID"), ByHeader("X-Other"), WithoutAuthorization())(h),
			request(carried, withHeader("X-Tenant-ID", "acme"), withHeader("X-Other", "globex"))))
	}
}

// knownBodies are the bodies of all answers that a Middleware may give.
func knownBodies() map[string]bool {
	bodies := map[string]bool{}
	problems := []Problem{internalProblem}
	for _, known := range knownProblems {
		problems = append(problems, known.problem)
	}
	for _, p := range problems {
		w := httptest.NewRecorder()
		p.ServeHTTP(w, nil)
		bodies[w.Body.String()] = true
	}
	return bodies
}

// Whatever a request says, it is served as a tenant that all its parts agree on, or refused in words that are
// none of its own.
func FuzzMiddleware(f *testing.F) {
	for _, s := range [][6]string{
		{"acme.example.com", "acme", "acme", "tenant=acme", "/t/acme/", "acme.example.com"},
		{"shop.acme.test:443", "", "", "", "/", ""},
		{"a..b", "*", "globex", "tenant=a; tenant=b", "/t/%2e", "globex.example.com, acme.example.com"},
		{"[::1]:80", "acme\x00", "\"", "tenant=\"acme\"", "//t/acme", "[::1]"},
	} {
		f.Add(s[0], s[1], s[2], s[3], s[4], s[5])
	}
	dir := peekingAliases{customers()}
	var served string
	h := Middleware(dir, BySubdomain("example.com"), ByDomain(), ByHeader("X-Tenant-ID"), ByCookie("tenant"), ByPath("/t/"), WithoutAuthorization(),
		TrustProxies(netip.MustParsePrefix("192.0.2.0/24")))(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t, _ := FromContext(r.Context())
		served = t.ID
	}))
	bodies := knownBodies()
	f.Fuzz(func(t *testing.T, host, first, second, cookie, target, forwarded string) {
		r := request(toHost(host)) // from 192.0.2.1
		if u, err := url.Parse(target); err == nil {
			r.URL = u
		}
		for name, v := range map[string][]string{"X-Tenant-Id": {first, second}, "Cookie": {cookie}, "X-Forwarded-Host": {forwarded}} {
			for _, v := range v {
				if v != "" {
					r.Header[name] = append(r.Header[name], v)
				}
			}
		}
		served = ""
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			require.Empty(t, served)
			require.True(t, bodies[w.Body.String()], w.Body.String())
			return
		}
		tenant, ok := dir.tenants[served]
		require.True(t, ok && (tenant.Status == StatusActive || tenant.Status == StatusReadOnly), served)
		for _, v := range r.Header["X-Tenant-Id"] {
			require.Equal(t, served, v)
		}
		for _, c := range r.CookiesNamed("tenant") {
			require.Equal(t, served, c.Value)
		}
		if rest, ok := strings.CutPrefix(r.URL.Path, "/t/"); ok && !strings.HasPrefix(rest, "www") && rest != "" && rest[0] != '/' {
			require.True(t, rest == served || strings.HasPrefix(rest, served+"/"), rest)
		}
		effective := host
		if forwarded != "" {
			effective, _, _ = strings.Cut(forwarded, ",")
		}
		name, err := normalHost(strings.TrimSpace(effective))
		require.NoError(t, err)
		if label, ok := strings.CutSuffix(name, ".example.com"); ok && label != "www" && !strings.Contains(label, ".") {
			require.Equal(t, served, label)
		} else if id := dir.of[name]; id != "" && !ok {
			require.Equal(t, served, id)
		}
	})
}

// A host name has one form, which is its own, and nothing else passes.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"", "a", "A.b.:80", "[::1]:1", "a..b", "bücher.test", "xn--a", "%2e", "a:b", "::1", "a_b-c.test."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		name, err := normalHost(header)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalidTenantID)
			require.Empty(t, name)
			return
		}
		if name == "" {
			require.True(t, header == "" || header[0] == '[')
			return
		}
		again, err := normalHost(name)
		require.NoError(t, err)
		require.Equal(t, name, again)
		require.True(t, strings.HasPrefix(strings.ToLower(header), name))
		alias, err := normalAlias(name)
		require.NoError(t, err, "each host can be an alias")
		require.Equal(t, name, alias)
	})
}
