package tenantlimit

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

// tenants finds the tenant of a request as a service does.
func tenants(d pgxtenant.Directory, options ...pgxtenant.MiddlewareOption) func(http.Handler) http.Handler {
	return pgxtenant.Middleware(d, append(options, pgxtenant.ByHeader("X-Tenant-ID"), pgxtenant.WithoutAuthorization())...)
}

var known = directory{"acme": {ID: "acme", Plan: "plan"}, "globex": {ID: "globex", Plan: "plan"}, "lost": {ID: "lost", Plan: "gold"}}

// ask sends a request of a tenant to a handler.
func ask(h http.Handler, method, target, tenant string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	if tenant != "" {
		r.Header.Set("X-Tenant-ID", tenant)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

var ok = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })

func TestAnswersTellTheLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := Plan{Limits: Limits{Rate: PerMinute(60, 10), Concurrency: 3},
			Endpoints: map[string]Limits{"GET /search": {Rate: Rate{Requests: 5, Period: 1500 * time.Millisecond, Burst: 2}, Concurrency: 1},
				"GET /free": {Rate: Rate{Unlimited: true}}}}
		l := open(t, plan(p))
		mux := http.NewServeMux()
		for _, pattern := range []string{"GET /", "GET /search", "GET /free"} {
			mux.Handle(pattern, l.Middleware()(ok))
		}
		h := tenants(known)(mux)

		header := ask(h, "GET", "/", "acme").Header()
		require.Equal(t, "10", header.Get("X-RateLimit-Limit"))
		require.Equal(t, "9", header.Get("X-RateLimit-Remaining"))
		require.Equal(t, "1", header.Get("X-RateLimit-Reset"))
		require.Equal(t, `"rate";q=60;w=60;pgxtenant-burst=10, "concurrency";q=3;qu="concurrent-requests"`, header.Get("RateLimit-Policy"))
		require.Equal(t, `"rate";r=9;t=1, "concurrency";r=2`, header.Get("RateLimit"))
		require.Empty(t, header.Get("Retry-After"))

		header = ask(h, "GET", "/search", "acme").Header()
		require.Equal(t, `"endpoint-rate";q=5;pgxtenant-burst=2, "endpoint-concurrency";q=1;qu="concurrent-requests"`, header.Get("RateLimit-Policy"))
		require.Equal(t, `"endpoint-rate";r=1;t=1, "endpoint-concurrency";r=0`, header.Get("RateLimit"))

		header = ask(h, "GET", "/free", "acme").Header()
		require.Empty(t, header.Get("X-RateLimit-Limit"))
		require.Equal(t, `"concurrency";r=2`, header.Get("RateLimit"), "slots were given back")

		for range 9 {
			require.Equal(t, http.StatusOK, ask(h, "GET", "/", "acme").Code)
		}
		w := ask(h, "GET", "/", "acme")
		require.Equal(t, http.StatusTooManyRequests, w.Code)
		require.Equal(t, "2", w.Header().Get("Retry-After"), "a second and what is added for rounding")
		require.Equal(t, "0", w.Header().Get("X-RateLimit-Remaining"))
		require.Equal(t, "10", w.Header().Get("X-RateLimit-Reset"))
		require.Equal(t, `"rate";r=0;t=1, "concurrency";r=3`, w.Header().Get("RateLimit"))
		time.Sleep(2 * time.Second)
		require.Equal(t, http.StatusOK, ask(h, "GET", "/", "acme").Code)
	})
}

func TestARefusedRequestIsAProblem(t *testing.T) {
	synctest.Test(t, testARefusedRequestIsAProblem) // what it says to wait is told to the second
}

func testARefusedRequestIsAProblem(t *testing.T) {
	p := rated(PerHour(1, 5))
	p.Concurrency = 1
	l := open(t, plan(p))
	reached := 0
	handler := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached++ })
	cost := func(r *http.Request) int { return len(r.URL.RawQuery) }
	h := tenants(known)(l.Middleware(ByCost(cost))(handler))
	require.Equal(t, http.StatusOK, ask(h, "GET", "/?1234", "acme").Code)
	held := pass(t, l, "globex", Call{})
	defer held.Release()
	for _, c := range []struct{ tenant, target, kind, title, retry string }{
		{"acme", "/?12", "too-many-requests", "Too many requests", "3601"}, // with what is added for rounding
		{"acme", "/?123456", "too-costly", "Request too costly", ""},
		{"globex", "/", "too-many-at-once", "Too many requests at once", "1"},
	} {
		w := ask(h, "GET", c.target, c.tenant)
		require.Equal(t, http.StatusTooManyRequests, w.Code)
		require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
		require.Equal(t, "no-store", w.Header().Get("Cache-Control"))
		require.Equal(t, c.retry, w.Header().Get("Retry-After"), c.kind)
		require.NotEmpty(t, w.Header().Get("RateLimit"))
		var body map[string]any
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &body))
		require.Equal(t, "https://github.com/pgxtenant/pgxtenant/blob/main/docs/rate-limits.md#"+c.kind, body["type"])
		require.Equal(t, c.title, body["title"])
		require.EqualValues(t, 429, body["status"])
		require.NotContains(t, w.Body.String(), c.tenant)
		require.NotContains(t, w.Body.String(), "plan\"")
	}
	require.Equal(t, 1, reached)
}

func TestWithoutADecisionNoRequestPasses(t *testing.T) {
	t.Parallel()
	config := plan(rated(PerHour(1, 5)))
	config.OnLoss, config.Timeout = RefuseAll, time.Minute
	l, s := lossy(t, config)
	unreached := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("reached") })
	inner := l.Middleware()(unreached)

	require.Equal(t, http.StatusBadRequest, ask(inner, "GET", "/", "").Code, "no pgxtenant.Middleware is in front")
	require.Equal(t, http.StatusInternalServerError, ask(tenants(known)(inner), "GET", "/", "lost").Code, "there is no such plan")
	negative := l.Middleware(ByCost(func(*http.Request) int { return -1 }))(unreached)
	require.Equal(t, http.StatusInternalServerError, ask(tenants(known)(negative), "GET", "/", "acme").Code)
	s.Kill()
	w := ask(tenants(known)(inner), "GET", "/", "acme")
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Equal(t, "5", w.Header().Get("Retry-After"))
	require.NotContains(t, w.Body.String(), "redis")
	require.Equal(t, http.StatusNotFound, ask(tenants(known, pgxtenant.Hide())(inner), "GET", "/", "acme").Code)
}

func TestAnEndpointThatCannotBeToldIsNotLetPass(t *testing.T) {
	t.Parallel()
	p := rated(PerHour(1, 5))
	p.Endpoints = map[string]Limits{"GET /export": {Rate: PerHour(1, 1)}}
	l := open(t, plan(p))
	mux := http.NewServeMux()
	mux.Handle("GET /export", ok)

	outside := tenants(known)(l.Middleware()(mux))
	require.Equal(t, http.StatusInternalServerError, ask(outside, "GET", "/export", "acme").Code)
	require.Zero(t, l.Stats().Allowed)

	asking := l.Middleware(ByEndpoint(func(r *http.Request) string { _, pattern := mux.Handler(r); return pattern }))
	outside = tenants(known)(asking(mux))
	require.Equal(t, http.StatusOK, ask(outside, "GET", "/export", "acme").Code)
	require.Equal(t, http.StatusTooManyRequests, ask(outside, "GET", "/export", "acme").Code)
	require.Equal(t, http.StatusNotFound, ask(outside, "GET", "/none", "acme").Code, "it is under the plan's own limit")
	require.EqualValues(t, 2, l.Stats().Allowed)
}

func TestARequestsSlotIsGivenBackHoweverItEnds(t *testing.T) {
	t.Parallel()
	config := plan(slots(1))
	l := shared(t, config)
	entered, leave := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/wait", func(http.ResponseWriter, *http.Request) { entered <- struct{}{}; <-leave })
	mux.HandleFunc("/panic", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	mux.Handle("/", ok)
	service := httptest.NewServer(tenants(known)(l.Middleware()(mux)))
	defer service.Close()
	get := func(path string) (int, error) {
		r, err := http.NewRequestWithContext(t.Context(), "GET", service.URL+path, nil)
		require.NoError(t, err)
		r.Header.Set("X-Tenant-ID", "acme")
		answer, err := service.Client().Do(r)
		if err != nil {
			return 0, err
		}
		return answer.StatusCode, answer.Body.Close()
	}
	waited := make(chan int)
	go func() { status, _ := get("/wait"); waited <- status }()
	<-entered
	status, err := get("/")
	require.NoError(t, err)
	require.Equal(t, http.StatusTooManyRequests, status)
	leave <- struct{}{}
	require.Equal(t, http.StatusOK, <-waited)
	_, err = get("/panic")
	require.Error(t, err)
	require.Eventually(t, func() bool { return l.Stats().Leases == 0 }, time.Minute, time.Millisecond)
	status, err = get("/")
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status)
}

func TestRefusalsMayBeAnsweredOtherwise(t *testing.T) {
	t.Parallel()
	l := open(t, plan(rated(PerHour(1, 1))))
	h := tenants(known)(l.Middleware(OnRefusal(func(w http.ResponseWriter, r *http.Request, err error) {
		e := (*LimitError)(nil)
		require.True(t, errors.As(err, &e))
		p := ProblemFor(e)
		require.ErrorIs(t, p.Err, ErrLimited)
		p.Title = "Langsam!"
		p.ServeHTTP(w, r)
	}))(ok))
	ask(h, "GET", "/", "acme")
	w := ask(h, "GET", "/", "acme")
	require.Equal(t, http.StatusTooManyRequests, w.Code)
	require.Contains(t, w.Body.String(), "Langsam!")
	require.Equal(t, "0", w.Header().Get("X-RateLimit-Remaining"))

	for _, option := range []func(){func() { ByEndpoint(nil) }, func() { ByCost(nil) }, func() { OnRefusal(nil) }} {
		require.Panics(t, option)
	}
}

func TestALimitThatIsNotKnownIsNotTold(t *testing.T) {
	t.Parallel()
	config := plan(Plan{Limits: Limits{Rate: PerHour(1, 1), Concurrency: 1}})
	config.OnLoss, config.Timeout = AllowAll, time.Minute
	l, s := lossy(t, config)
	s.Kill()
	w := ask(tenants(known)(l.Middleware()(ok)), "GET", "/", "acme")
	require.Equal(t, http.StatusOK, w.Code)
	require.Empty(t, w.Header().Get("RateLimit"))
	require.Empty(t, w.Header().Get("X-RateLimit-Limit"))
}
