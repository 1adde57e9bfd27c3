package pgxtenant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestHideAnswersEveryRefusalAlike(t *testing.T) {
	t.Parallel()
	dir := customers()
	dir.before = func(_ context.Context, id string) {
		if id == "outage" {
			panic("no database")
		}
	}
	h := Middleware(dir, ByHeader("X-Tenant-ID"), BySubdomain("example.com"), Hide(), Authorize(func(_ context.Context, r *http.Request, t Tenant) error {
		if p, ok := principal(r.Context()); !ok {
			return ErrUnauthenticated
		} else if p != t.ID {
			return ErrForbidden
		}
		return nil
	}))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Fail") != "" {
			Refuse(w, r, fmt.Errorf("query: %w", ErrTenantSuspended)) // a moment later
			return
		}
		tell(w, r)
	}))
	wish := func(id string) func(*http.Request) { return withHeader("X-Tenant-ID", id) }
	require.Equal(t, "acme", answer(t, h, request(wish("acme"), user("acme"))))
	var first *httptest.ResponseRecorder
	for _, r := range []*http.Request{
		request(wish("nobody"), user("acme")), request(), request(wish("*")), request(toHost("..")), request(wish("acme")), request(wish("globex"), user("acme")),
		request(wish("frozen"), user("frozen")), request(wish("old"), user("old")), request(wish("outage"), user("acme")), request(wish("acme"), toHost("globex.example.com")),
		request(wish("acme"), user("acme"), withHeader("Fail", "1")),
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if first == nil {
			first = w
		}
		require.Equal(t, http.StatusNotFound, w.Code)
		require.Equal(t, first.Header(), w.Header())
		require.Equal(t, first.Body.String(), w.Body.String())
	}
	require.JSONEq(t, `{"type":"about:blank","title":"Not Found","status":404}`, first.Body.String())
}

func TestAProblemSaysNothingOfItsCause(t *testing.T) {
	t.Parallel()
	secret := "postgres://app:hunter2@db.internal/"
	dir := customers()
	dir.before = func(_ context.Context, id string) { panic(secret + id) }
	var log bytes.Buffer
	h := Middleware(dir, ByHeader("X-Tenant-ID"), WithoutAuthorization(), LogRefusals(slog.New(slog.NewTextHandler(&log, nil))))(tell)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, request(withHeader("X-Tenant-ID", "acme")))
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Equal(t, http.Header{
		"Content-Type": {"application/problem+json"}, "Cache-Control": {"no-store"}, "X-Content-Type-Options": {"nosniff"},
		"Retry-After": {"5"}, "Vary": {"X-Tenant-Id"},
	}, w.Header())
	require.NotContains(t, w.Body.String(), "hunter2")
	require.NotContains(t, w.Body.String(), "acme")
	require.Contains(t, log.String(), "level=ERROR", "but the log has it")
	require.Contains(t, log.String(), "hunter2")
	require.Equal(t, 1, strings.Count(log.String(), "request refused"))

	for _, known := range knownProblems {
		err := fmt.Errorf("%s: %w", secret, known.err)
		p := ProblemFor(&TenantError{"acme", "look up", err})
		w := httptest.NewRecorder()
		p.ServeHTTP(w, request())
		require.NotContains(t, w.Body.String(), "hunter2")
		require.NotContains(t, w.Body.String(), "acme")
		require.ErrorIs(t, p.Err, known.err)
	}
}

func TestProblemsOfErrors(t *testing.T) {
	t.Parallel()
	failed := errors.New("failed")
	for _, c := range []struct {
		status int
		err    error
	}{
		{500, failed},
		{500, nil},
		{500, ErrNoTenant}, // the service's own mistake
		{500, &TenantError{"a", "check", ErrInvalidTenant}},
		{503, &TenantError{"a", "acquire", failed}},
		{503, &TenantError{"a", "open pool", ErrPoolsBusy}},
		{503, ErrClosed},
		{403, &TenantError{"a", "check", ErrTenantSuspended}},
		{404, &TenantError{"a", "look up", ErrTenantNotFound}},
		{403, fmt.Errorf("%w: %w", ErrForbidden, ErrTenantNotFound)},
	} {
		p := ProblemFor(c.err)
		require.Equal(t, c.status, p.Status, "%v", c.err)
		require.Equal(t, c.status == 503, p.RetryAfter > 0)
	}
}

func TestWordsAreYours(t *testing.T) {
	t.Parallel()
	h := Middleware(customers(), ByHeader("X-Tenant-ID"), WithoutAuthorization(), OnRefusal(func(w http.ResponseWriter, r *http.Request, p *Problem) {
		if errors.Is(p.Err, ErrTenantSuspended) {
			p.Title, p.Detail, p.Instance = "Gesperrt", `Rufen Sie "uns" an <0800>.`, "urn:uuid:1"
			p.RetryAfter = 1500 * time.Millisecond
		}
		w.Header().Set("Content-Length", "7") // of what the handler meant to send
		p.ServeHTTP(w, r)
	}))(tell)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, request(withHeader("X-Tenant-ID", "frozen")))
	require.Equal(t, http.StatusForbidden, w.Code)
	require.Equal(t, "2", w.Header().Get("Retry-After"))
	require.Empty(t, w.Header().Get("Content-Length"))
	require.JSONEq(t, `{"type":"https://github.com/pgxtenant/pgxtenant/blob/main/docs/http.md#suspended","title":"Gesperrt","status":403,
		"detail":"Rufen Sie \"uns\" an <0800>.","instance":"urn:uuid:1"}`, w.Body.String())
	require.NotContains(t, w.Body.String(), "<", "not even in JSON")
	require.Equal(t, "404 unknown", answer(t, h, request(withHeader("X-Tenant-ID", "nobody"))), "the shared wording is as it was")
}

func TestUnauthenticatedIsChallenged(t *testing.T) {
	t.Parallel()
	w := httptest.NewRecorder()
	ProblemFor(ErrUnauthenticated).ServeHTTP(w, request())
	require.Equal(t, "Bearer", w.Header().Get("WWW-Authenticate"))
	w = httptest.NewRecorder()
	w.Header().Set("WWW-Authenticate", `Basic realm="shop"`)
	ProblemFor(ErrUnauthenticated).ServeHTTP(w, request())
	require.Equal(t, `Basic realm="shop"`, w.Header().Get("WWW-Authenticate"))
}

func TestEveryProblemHasItsHeading(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/http.md")
	require.NoError(t, err)
	for _, known := range knownProblems {
		if kind, ok := strings.CutPrefix(known.problem.Type, problemTypes); ok {
			require.Contains(t, string(page), "\n#### "+kind+"\n")
		}
	}
}

// A request's context ends when its client goes away. That is no outage.
func TestAClientThatWentAwayIsNoOutage(t *testing.T) {
	t.Parallel()
	dir := customers()
	entered := make(chan struct{})
	dir.before = func(ctx context.Context, _ string) { entered <- struct{}{}; <-ctx.Done() }
	var log bytes.Buffer
	h := Middleware(dir, ByHeader("X-Tenant-ID"), WithoutAuthorization(),
		LogRefusals(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))))(tell)
	statuses := make(chan int, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		statuses <- rec.Code
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, nil)
	require.NoError(t, err)
	r.Header.Set("X-Tenant-ID", "acme")
	gone := make(chan error)
	go func() { _, err := server.Client().Do(r); gone <- err }()
	<-entered
	cancel()
	require.ErrorIs(t, <-gone, context.Canceled)
	require.Equal(t, StatusClientClosedRequest, <-statuses)
	require.Contains(t, log.String(), "level=DEBUG")
	require.NotContains(t, log.String(), "503")

	// A deadline is the service's own, and the client still there.
	slow, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, request(withHeader("X-Tenant-ID", "acme")).WithContext(slow))
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
}

// A tenant that is overloaded is told when to come back.
func TestOverloadTellsWhenToComeBack(t *testing.T) {
	t.Parallel()
	w := httptest.NewRecorder()
	ProblemFor(&TenantError{"acme", "acquire", &OverloadError{Waiting: 3, RetryAfter: 1500 * time.Millisecond}}).ServeHTTP(w, nil)
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Equal(t, "2", w.Header().Get("Retry-After"))
	require.Contains(t, w.Body.String(), "overloaded")
}
