package tenantprom

import (
	"fmt"
	"math"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// MaxPlans is how many plans have series of their own where Plans does not name them.
	MaxPlans = 20
	// MaxEndpoints is how many endpoints have series of their own.
	MaxEndpoints = 200
)

// Requests counts HTTP requests and their duration, per plan and endpoint. It is a prometheus.Collector, to be
// registered once, and its Middleware is what counts. It is safe for concurrent use.
//
// It has at most (MaxPlans+2) × (MaxEndpoints+2) pairs of plan and endpoint, whatever clients send: a plan is
// what the directory says, an endpoint what the service has named, and what comes beyond the bounds is "other".
type Requests struct {
	plans, endpoints *names
	endpoint         func(*http.Request) string
	buckets          []float64
	labels           prometheus.Labels

	count    *prometheus.CounterVec
	duration *prometheus.HistogramVec
	inFlight prometheus.Gauge
}

// A RequestsOption adjusts Requests.
type RequestsOption func(*Requests)

// Plans names the plans that have series of their own; all others are "other". Without it they are the first
// MaxPlans (20) seen.
func Plans(plans ...string) RequestsOption {
	return func(r *Requests) {
		r.plans = newNames(0)
		for _, p := range plans {
			r.plans.known[label(p)] = true
		}
	}
}

// ByEndpoint has f name the endpoint of a request, from a bounded set. It is called once the request has been served, so
// that a router has left in the request's context which route it was. An empty name is "none". By default it is the
// request's Pattern, as http.ServeMux sets it, and "none" for what the mux only redirects to the same path with a slash.
//
// It must not be made of the request's path: each path would be an endpoint, until there are MaxEndpoints.
func ByEndpoint(f func(*http.Request) string) RequestsOption {
	return func(r *Requests) { r.endpoint = f }
}

// Buckets sets the upper bounds of the durations' histogram, in seconds and ascending order, none of them twice. By default
// they are prometheus.DefBuckets.
func Buckets(seconds ...float64) RequestsOption {
	return func(r *Requests) { r.buckets = slices.Clone(seconds) }
}

// RequestsLabels adds labels that are the same for all series.
func RequestsLabels(labels prometheus.Labels) RequestsOption {
	return func(r *Requests) { r.labels = labels }
}

// NewRequests makes Requests. It panics if an option is bad: it is called once, when the service starts.
func NewRequests(options ...RequestsOption) *Requests {
	r := &Requests{
		plans: newNames(MaxPlans), endpoints: newNames(MaxEndpoints),
		endpoint: route,
		buckets:  prometheus.DefBuckets,
	}
	for _, o := range options {
		o(r)
	}
	if r.endpoint == nil {
		panic("tenantprom: NewRequests: ByEndpoint is given nil")
	}
	for i, b := range r.buckets {
		if math.IsNaN(b) || i > 0 && b <= r.buckets[i-1] {
			panic(fmt.Sprintf("tenantprom: NewRequests: Buckets are %v; want numbers in ascending order, each once", r.buckets))
		}
	}
	if len(r.buckets) == 0 {
		panic("tenantprom: NewRequests: Buckets has none")
	}
	r.count = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "pgxtenant_http_requests_total", ConstLabels: r.labels,
		Help: "HTTP requests that have ended, by the class of their status. Those that panicked are 5xx, and those whose connection the handler took over are hijacked.",
	}, []string{"plan", "endpoint", "code"})
	r.duration = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "pgxtenant_http_request_duration_seconds", ConstLabels: r.labels,
		Help:    "How long HTTP requests took, but for those whose connection was hijacked.",
		Buckets: r.buckets}, []string{"plan", "endpoint"})
	r.inFlight = prometheus.NewGauge(prometheus.GaugeOpts{Name: "pgxtenant_http_requests_in_flight", ConstLabels: r.labels,
		Help: "HTTP requests that are being served."})
	mustDescribe("NewRequests", r, r.labels)
	return r
}

// route is the Pattern of a request. Where http.ServeMux redirects /x to /x/ its Pattern may be that path, with what the
// client has written in it, in place of the pattern of the route: MaxEndpoints of those would leave no room for others.
func route(r *http.Request) string {
	p := r.Pattern
	if len(p) > 1 && strings.HasSuffix(p, "/") && !strings.HasSuffix(r.URL.EscapedPath(), "/") && path.Clean(p) == path.Clean("/"+r.URL.Path) {
		return ""
	}
	return p
}

// Describe is part of prometheus.Collector.
func (r *Requests) Describe(ch chan<- *prometheus.Desc) {
	r.count.Describe(ch)
	r.duration.Describe(ch)
	r.inFlight.Describe(ch)
}

// Collect is part of prometheus.Collector.
func (r *Requests) Collect(ch chan<- prometheus.Metric) {
	r.count.Collect(ch)
	r.duration.Collect(ch)
	r.inFlight.Collect(ch)
}

// names are the values of a label: those known, and as many more as may still become so.
type names struct {
	mu    sync.RWMutex
	known map[string]bool // as label makes them: a name is not kept in its full length
	most  int
}

func newNames(most int) *names { return &names{known: map[string]bool{}, most: most} }

// label returns the value for a name.
func (n *names) label(name string) string {
	if name == "" {
		return None
	}
	value := label(name)
	n.mu.RLock()
	known, full := n.known[value], len(n.known) >= n.most
	n.mu.RUnlock()
	if known {
		return value
	}
	if full {
		return Other
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.known[value] && len(n.known) >= n.most {
		return Other
	}
	n.known[value] = true
	return value
}
