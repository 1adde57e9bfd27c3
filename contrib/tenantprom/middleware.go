package tenantprom

import (
	"bufio"
	"cmp"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/felixge/httpsnoop"

	"github.com/pgxtenant/pgxtenant"
)

// Middleware counts the requests that next serves.
//
// It may stand in several places on the way of one request. The outermost counts, and each one inside tells it the
// tenant and the endpoint as they are known there, the innermost first. For nobody outside of pgxtenant.Middleware sees the
// tenant that is in the context within, and nobody inside sees the requests that were refused:
//
//	requests.Middleware(tenants(requests.Middleware(mux))) // or requests.Around(tenants)(mux)
//
// Inside alone it misses what was refused. Outside alone it has all, with the plan "none".
//
// A handler that panics is counted and goes on panicking. Whatever next's http.ResponseWriter could do it can.
func (r *Requests) Middleware(next http.Handler) http.Handler { return r.wrap(r.endpoint, next) }

// Around returns pgxtenant.Middleware, or whatever finds the tenant, with the Middleware outside and inside of it.
func (r *Requests) Around(tenants func(http.Handler) http.Handler) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler { return r.Middleware(tenants(r.Middleware(next))) }
}

// Wrap is Middleware for one endpoint, with its name. It is for routers that leave no Pattern, inside of what they do.
func (r *Requests) Wrap(endpoint string, next http.Handler) http.Handler {
	return r.wrap(func(*http.Request) string { return endpoint }, next)
}

func (r *Requests) wrap(endpoint func(*http.Request) string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if seen, ok := req.Context().Value(seenKey{r}).(*seen); ok {
			defer seen.note(req, endpoint)
			next.ServeHTTP(w, req)
			return
		}
		r.serve(w, req, endpoint, next)
	})
}

// serve is the outermost Middleware.
func (r *Requests) serve(w http.ResponseWriter, req *http.Request, endpoint func(*http.Request) string, next http.Handler) {
	seen := &seen{}
	req = req.WithContext(context.WithValue(req.Context(), seenKey{r}, seen))
	start, ended := time.Now(), false
	r.inFlight.Inc()
	defer func() {
		if !ended {
			seen.status.Store(http.StatusInternalServerError) // it panics
		}
		defer r.inFlight.Dec() // ByEndpoint may panic
		plan, endpoint := seen.note(req, endpoint)
		plan, endpoint = r.plans.label(plan), r.endpoints.label(endpoint)
		r.count.WithLabelValues(plan, endpoint, seen.class()).Inc()
		if !seen.hijacked.Load() {
			r.duration.WithLabelValues(plan, endpoint).Observe(time.Since(start).Seconds())
		}
	}()
	next.ServeHTTP(seen.watch(w), req)
	ended = true
}

// seen is what is known of a request. Handlers may write from several goroutines, and http.TimeoutHandler leaves those
// within it behind.
type seen struct {
	status   atomic.Int32 // zero for none yet, which is 200 if none comes
	hijacked atomic.Bool

	mu             sync.Mutex
	plan, endpoint string
}

type seenKey struct{ requests *Requests }

// note notes what a Middleware knows, unless one inside of it knew already.
func (s *seen) note(req *http.Request, endpoint func(*http.Request) string) (plan, name string) {
	t, _ := pgxtenant.FromContext(req.Context())
	name = endpoint(req)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plan, s.endpoint = cmp.Or(s.plan, t.Plan), cmp.Or(s.endpoint, name)
	return s.plan, s.endpoint
}

// watch returns w, and notes what is done with it.
func (s *seen) watch(w http.ResponseWriter) http.ResponseWriter {
	written := func() { s.status.CompareAndSwap(0, http.StatusOK) }
	return httpsnoop.Wrap(w, httpsnoop.Hooks{
		WriteHeader: func(next httpsnoop.WriteHeaderFunc) httpsnoop.WriteHeaderFunc {
			return func(status int) {
				if status >= 200 || status == http.StatusSwitchingProtocols { // another 1xx is not the last
					s.status.CompareAndSwap(0, int32(status))
				}
				next(status)
			}
		},
		Write: func(next httpsnoop.WriteFunc) httpsnoop.WriteFunc {
			return func(p []byte) (int, error) { written(); return next(p) }
		},
		WriteString: func(next httpsnoop.WriteStringFunc) httpsnoop.WriteStringFunc {
			return func(p string) (int, error) { written(); return next(p) }
		},
		ReadFrom: func(next httpsnoop.ReadFromFunc) httpsnoop.ReadFromFunc {
			return func(src io.Reader) (int64, error) { written(); return next(src) }
		},
		Flush: func(next httpsnoop.FlushFunc) httpsnoop.FlushFunc {
			return func() { written(); next() }
		},
		FlushError: func(next httpsnoop.FlushErrorFunc) httpsnoop.FlushErrorFunc {
			return func() error { written(); return next() }
		},
		Hijack: func(next httpsnoop.HijackFunc) httpsnoop.HijackFunc {
			return func() (net.Conn, *bufio.ReadWriter, error) {
				conn, rw, err := next()
				if err == nil {
					s.hijacked.Store(true)
				}
				return conn, rw, err
			}
		},
	})
}

// class is the status as a label.
func (s *seen) class() string {
	switch status := s.status.Load(); {
	case s.hijacked.Load():
		return "hijacked"
	case status == 0:
		return "2xx"
	case status < 200:
		return "1xx"
	case status < 300:
		return "2xx"
	case status < 400:
		return "3xx"
	case status < 500:
		return "4xx"
	}
	return "5xx"
}
