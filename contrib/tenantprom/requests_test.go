package tenantprom

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

// plans has a tenant for each plan, of the same name; "planless" has none.
type plans struct{}

func (plans) Lookup(_ context.Context, id string) (pgxtenant.Tenant, error) {
	switch {
	case strings.HasPrefix(id, "unknown"):
		return pgxtenant.Tenant{}, pgxtenant.ErrTenantNotFound
	case id == "planless":
		return pgxtenant.Tenant{ID: id}, nil
	}
	return pgxtenant.Tenant{ID: id, Plan: id}, nil
}

// tenants takes the tenant from a header.
var tenants = pgxtenant.Middleware(plans{}, pgxtenant.ByHeader("X-Tenant-ID"), pgxtenant.WithoutAuthorization())

// web serves a handler over HTTP.
type web struct {
	*httptest.Server
	testing.TB
}

func serve(t testing.TB, h http.Handler) *web {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // handlers that panic
	s.Start()
	s.Client().Transport.(*http.Transport).DisableKeepAlives = true // or what panics is sent again
	t.Cleanup(s.Close)
	return &web{s, t}
}

// get sends a request as a tenant and returns the status, or 0 if there was no answer.
func (s *web) get(method, path, tenant string) int {
	s.Helper()
	r, err := http.NewRequestWithContext(s.Context(), method, s.URL+path, nil)
	require.NoError(s, err)
	r.Header.Set("X-Tenant-ID", tenant)
	res, err := s.Client().Do(r)
	if err != nil {
		return 0
	}
	_, _ = io.Copy(io.Discard, res.Body)
	require.NoError(s, res.Body.Close())
	return res.StatusCode
}

// wait returns what has been counted, once no request is under way: an answer may arrive before its handler has ended.
func wait(t testing.TB, r *Requests) series {
	t.Helper()
	var s series
	require.Eventually(t, func() bool {
		s = scrape(t, r)
		return s.value(t, "pgxtenant_http_requests_in_flight", "") == 0
	}, 2*time.Minute, time.Millisecond)
	return s
}

// counted returns the counts of requests by endpoint, plan and class, in that order.
func counted(t testing.TB, r *Requests) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for labels, m := range wait(t, r)["pgxtenant_http_requests_total"] {
		var v [3]string
		for _, l := range m.GetLabel() {
			v[map[string]int{"endpoint": 0, "plan": 1, "code": 2}[l.GetName()]] = l.GetValue()
		}
		all[strings.Join(v[:], "|")] = m.GetCounter().GetValue()
		require.NotEmpty(t, labels)
	}
	return all
}

// handlers are all that a handler may do.
func handlers() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /notes/{id}", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "note") })
	mux.HandleFunc("GET /silent", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /moved", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotModified) })
	mux.HandleFunc("GET /wrong", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusTeapot)
		w.WriteHeader(http.StatusOK) // too late
	})
	mux.HandleFunc("GET /hints", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusNotFound)
	})
	mux.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic("on purpose") })
	mux.HandleFunc("GET /late-panic", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "half of it")
		panic(http.ErrAbortHandler)
	})
	mux.HandleFunc("GET /flush", func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).Flush(); err != nil {
			panic(err)
		}
		w.(http.Flusher).Flush()
	})
	mux.HandleFunc("GET /file", func(w http.ResponseWriter, r *http.Request) {
		if _, err := w.(io.ReaderFrom).ReadFrom(strings.NewReader("file")); err != nil {
			panic(err)
		}
	})
	mux.HandleFunc("GET /socket", func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		line, err := rw.ReadString('\n')
		if err == nil {
			fmt.Fprint(rw, line)
			err = rw.Flush()
		}
		if err != nil {
			panic(err)
		}
	})
	return mux
}

func TestRequestsAreCountedByPlanAndEndpoint(t *testing.T) {
	t.Parallel()
	r := NewRequests()
	s := serve(t, r.Around(tenants)(handlers()))
	for _, c := range []struct {
		path, tenant string
		status       int
	}{
		{"/notes/1", "free", 200}, {"/notes/2", "free", 200}, {"/notes/3", "pro", 200}, {"/notes/4", "planless", 200},
		{"/silent", "free", 200}, {"/moved", "free", 304}, {"/wrong", "free", 418}, {"/hints", "free", 404},
		{"/nowhere/1", "free", 404}, {"/nowhere/2", "free", 404},
		{"/panic", "free", 0}, {"/late-panic", "free", 0}, {"/flush", "free", 200}, {"/file", "free", 200},
		{"/notes/5", "unknown-1", 404}, {"/notes/6", "", 400},
	} {
		require.Equal(t, c.status, s.get("GET", c.path, c.tenant), c.path)
	}
	require.Equal(t, map[string]float64{
		"GET /notes/{id}|free|2xx": 2, "GET /notes/{id}|pro|2xx": 1, "GET /notes/{id}|none|2xx": 1,
		"GET /silent|free|2xx": 1, "GET /moved|free|3xx": 1, "GET /wrong|free|4xx": 1, "GET /hints|free|4xx": 1,
		"none|free|4xx": 2, "GET /panic|free|5xx": 1, "GET /late-panic|free|5xx": 1,
		"GET /flush|free|2xx": 1, "GET /file|free|2xx": 1, "none|none|4xx": 2,
	}, counted(t, r))
	require.InDelta(t, 2, wait(t, r).value(t, "pgxtenant_http_request_duration_seconds", "endpoint=GET /notes/{id},plan=free"), 0)
}

// Wherever it stands it has what can be seen there.
func TestAMiddlewareMayStandAnywhere(t *testing.T) {
	t.Parallel()
	type wrapper = func(http.Handler) http.Handler
	for name, c := range map[string]struct {
		around func(r *Requests) wrapper
		want   map[string]float64
	}{
		"outside": {func(r *Requests) wrapper {
			return func(next http.Handler) http.Handler { return r.Middleware(tenants(next)) }
		}, map[string]float64{"none|none|2xx": 1, "none|none|4xx": 1}},
		"inside": {func(r *Requests) wrapper {
			return func(next http.Handler) http.Handler { return tenants(r.Middleware(next)) }
		}, map[string]float64{"GET /notes/{id}|free|2xx": 1}},
		"around": {func(r *Requests) wrapper { return r.Around(tenants) },
			map[string]float64{"GET /notes/{id}|free|2xx": 1, "none|none|4xx": 1}},
		"three times": {func(r *Requests) wrapper {
			return func(next http.Handler) http.Handler { return r.Middleware(r.Around(tenants)(r.Middleware(next))) }
		}, map[string]float64{"GET /notes/{id}|free|2xx": 1, "none|none|4xx": 1}},
		"around, and a name for all": {func(r *Requests) wrapper {
			return func(next http.Handler) http.Handler { return r.Around(tenants)(r.Wrap("api", next)) }
		}, map[string]float64{"api|free|2xx": 1, "none|none|4xx": 1}},
		"with another request between": {func(r *Requests) wrapper {
			return func(next http.Handler) http.Handler {
				return r.Middleware(http.TimeoutHandler(r.Around(tenants)(next), time.Minute, ""))
			}
		}, map[string]float64{"GET /notes/{id}|free|2xx": 1, "none|none|4xx": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := NewRequests()
			s := serve(t, c.around(r)(handlers()))
			require.Equal(t, 200, s.get("GET", "/notes/1", "free"))
			require.Equal(t, 404, s.get("GET", "/notes/1", "unknown"))
			require.Equal(t, c.want, counted(t, r))
		})
	}
}

// A handler that a TimeoutHandler leaves behind tells what it knows at the same time as its request is counted, or later.
func TestAHandlerThatIsLeftBehind(t *testing.T) {
	t.Parallel()
	r, ended := NewRequests(), make(chan struct{})
	inner := r.Wrap("slow", http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { <-req.Context().Done() }))
	s := serve(t, r.Middleware(http.TimeoutHandler(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		defer func() { ended <- struct{}{} }()
		inner.ServeHTTP(w, req)
	}), time.Millisecond, "")))
	const n = 20
	for range n {
		require.Equal(t, http.StatusServiceUnavailable, s.get("GET", "/", ""))
		<-ended
	}
	all := counted(t, r)
	require.InDelta(t, n, all["none|none|5xx"]+all["slow|none|5xx"], 0)
}

// A connection that its handler takes over counts as hijacked, and not by how long it lasts.
func TestAnUpgradedConnection(t *testing.T) {
	t.Parallel()
	r := NewRequests()
	s := serve(t, r.Around(tenants)(handlers()))
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	require.NoError(t, err)
	defer conn.Close()
	fmt.Fprint(conn, "GET /socket HTTP/1.1\r\nHost: test\r\nX-Tenant-ID: free\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	fmt.Fprint(conn, "echo this\n")
	answer := bufio.NewReader(conn)
	res, err := http.ReadResponse(answer, nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusSwitchingProtocols, res.StatusCode)
	line, err := answer.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "echo this\n", line)
	require.Equal(t, map[string]float64{"GET /socket|free|hijacked": 1}, counted(t, r))
	require.NotContains(t, wait(t, r), "pgxtenant_http_request_duration_seconds")
}

func TestBoundsOfLabels(t *testing.T) {
	t.Parallel()
	given := func(r *http.Request) string { return strings.TrimPrefix(r.URL.Path, "/") }
	free, named := NewRequests(ByEndpoint(given)), NewRequests(Plans("free", "pro"), ByEndpoint(given))
	h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for i := range 1000 {
		ctx := pgxtenant.WithTenant(t.Context(), pgxtenant.Tenant{ID: "a", Plan: fmt.Sprint("plan", i)})
		for _, r := range []*Requests{free, named} {
			req := httptest.NewRequestWithContext(ctx, "GET", fmt.Sprint("/endpoint", i), nil)
			r.Middleware(h).ServeHTTP(httptest.NewRecorder(), req)
		}
	}
	for _, c := range []struct {
		r                *Requests
		plans, endpoints int
	}{{free, MaxPlans + 1, MaxEndpoints + 1}, {named, 1, MaxEndpoints + 1}} {
		plans, endpoints, total := map[string]bool{}, map[string]bool{}, 0.0
		for labels, n := range counted(t, c.r) {
			parts := strings.Split(labels, "|")
			endpoints[parts[0]], plans[parts[1]] = true, true
			total += n
		}
		require.Len(t, plans, c.plans)
		require.Len(t, endpoints, c.endpoints)
		require.Contains(t, plans, Other)
		require.InDelta(t, 1000, total, 0, "none is lost")
	}
}

// What a client writes into its path is no endpoint, or it could use them all up. http.ServeMux redirects, and names the path.
func TestAClientNamesNoEndpoint(t *testing.T) {
	t.Parallel()
	r, mux := NewRequests(), http.NewServeMux()
	nothing := func(http.ResponseWriter, *http.Request) {}
	mux.HandleFunc("/trees/{id}/", nothing)
	mux.HandleFunc("/trees/", nothing)
	mux.HandleFunc("/leaves/{id}", nothing)
	s := serve(t, r.Middleware(mux))
	send := func(line string) {
		conn, err := net.Dial("tcp", s.Listener.Addr().String())
		require.NoError(t, err)
		defer conn.Close()
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: test\r\n\r\n", line)
		_, err = http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
	}
	for i, path := range []string{"/trees/%d", "/trees/%d%%2F", "//trees/./%d", "/trees/%%7B%d%%7D"} {
		send("CONNECT " + fmt.Sprintf(path, i))
	}
	for _, path := range []string{"/trees/1/", "/trees/1/2", "/trees/", "/leaves/1"} {
		send("GET " + path)
	}
	require.Equal(t, map[string]float64{
		"none|none|3xx": 3, "/trees/{id}/|none|2xx": 2, "/trees/|none|2xx": 1, "/leaves/{id}|none|2xx": 1, "none|none|4xx": 1,
	}, counted(t, r))
}

// A router tells its route in the request's context, by the time that it has served it.
func TestAnEndpointIsAskedForOnceServed(t *testing.T) {
	t.Parallel()
	type routeKey struct{}
	r := NewRequests(ByEndpoint(func(r *http.Request) string { return *r.Context().Value(routeKey{}).(*string) }))
	h := r.Middleware(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		*req.Context().Value(routeKey{}).(*string) = "/projects/{id}"
	}))
	ctx := context.WithValue(t.Context(), routeKey{}, new(string))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", "/projects/7", nil))
	require.Equal(t, map[string]float64{"/projects/{id}|none|2xx": 1}, counted(t, r))
}

// Nobody can break a scrape by what a plan or an endpoint is called.
func TestOddNames(t *testing.T) {
	t.Parallel()
	odd := []string{"", "\xff\xfe", "\x00", "a\nb", `"`, strings.Repeat("é", 1000), "other", "none"}
	r := NewRequests(ByEndpoint(func(r *http.Request) string { return r.Header.Get("Endpoint") }))
	for _, name := range odd {
		ctx := pgxtenant.WithTenant(t.Context(), pgxtenant.Tenant{ID: "a", Plan: name})
		req := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
		req.Header.Set("Endpoint", name)
		r.Middleware(http.NotFoundHandler()).ServeHTTP(httptest.NewRecorder(), req)
	}
	for labels, m := range scrape(t, r)["pgxtenant_http_requests_total"] {
		for _, l := range m.GetLabel() {
			require.LessOrEqual(t, len(l.GetValue()), maxLabel, labels)
		}
	}
	require.Equal(t, strings.Repeat("é", 64), label(odd[5]))
	require.Equal(t, strings.Repeat("é", 63), label("x" + odd[5])[1:])
	require.Equal(t, strings.Repeat("\uFFFD", 1), label(strings.Repeat("\x80", 1000)))
	require.LessOrEqual(t, len(label(strings.Repeat("a\x80", 1000))), maxLabel)
}

// Long names are not kept in full. It is not beside others, whose memory would count.
func TestLongNamesTakeNoMemory(t *testing.T) {
	r := NewRequests(ByEndpoint(func(r *http.Request) string { return r.Header.Get("Endpoint") }))
	h, long := r.Middleware(http.NotFoundHandler()), strings.Repeat("x", 100_000)
	before := heap()
	for i := range MaxEndpoints + MaxPlans {
		ctx := pgxtenant.WithTenant(t.Context(), pgxtenant.Tenant{ID: "a", Plan: fmt.Sprint(i, long)})
		req := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
		req.Header.Set("Endpoint", fmt.Sprint(i, long))
		h.ServeHTTP(httptest.NewRecorder(), req)
	}
	require.Less(t, heap()-before, int64(len(long)*MaxEndpoints/4))
	require.Len(t, scrape(t, r)["pgxtenant_http_requests_total"], MaxEndpoints+1)
}

// heap is how many bytes are in use.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// What a http.ResponseWriter can do does not depend on being counted.
func TestAResponseWriterKeepsItsAbilities(t *testing.T) {
	t.Parallel()
	r := NewRequests()
	bare := struct{ http.ResponseWriter }{httptest.NewRecorder()}
	h := r.Middleware(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, flusher := w.(http.Flusher)
		_, hijacker := w.(http.Hijacker)
		require.False(t, flusher || hijacker)
		require.ErrorIs(t, http.NewResponseController(w).Flush(), http.ErrNotSupported)
	}))
	h.ServeHTTP(bare, httptest.NewRequest("GET", "/", nil))
	s := serve(t, r.Middleware(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c := http.NewResponseController(w)
		if err := errors.Join(c.SetReadDeadline(time.Now().Add(time.Minute)), c.SetWriteDeadline(time.Now().Add(time.Minute)), c.EnableFullDuplex()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})))
	require.Equal(t, http.StatusOK, s.get("GET", "/", ""))
}

func TestRequestsUnderWay(t *testing.T) {
	t.Parallel()
	r := NewRequests(Buckets(0.001, 60), RequestsLabels(prometheus.Labels{"server": "a"}))
	h := r.Middleware(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		require.InDelta(t, 1, scrape(t, r).value(t, "pgxtenant_http_requests_in_flight", "server=a"), 0)
		time.Sleep(2 * time.Millisecond)
	}))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	s := scrape(t, r)
	require.InDelta(t, 0, s.value(t, "pgxtenant_http_requests_in_flight", "server=a"), 0)
	buckets := s["pgxtenant_http_request_duration_seconds"]["endpoint=none,plan=none,server=a"].GetHistogram().GetBucket()
	require.EqualValues(t, []uint64{0, 1}, []uint64{buckets[0].GetCumulativeCount(), buckets[1].GetCumulativeCount()})
}

// BenchmarkMiddleware is what counting adds to a handler that does nothing.
func BenchmarkMiddleware(b *testing.B) {
	h := http.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	for name, h := range map[string]http.Handler{"none": h, "once": NewRequests().Middleware(h)} {
		b.Run("middleware="+name, func(b *testing.B) {
			req, w := httptest.NewRequest("GET", "/", nil), httptest.NewRecorder()
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(w, req)
			}
		})
	}
}
