package tenantprom

import (
	"fmt"
	"net/http"
	"slices"
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
	return func(r *Requests) { r.plans = namesOf(plans) }
}

// ByEndpoint has f name the endpoint of a request, from a bounded set. It is called once the request has been served, so
// that a router has left in the request's context which route it was. An empty name is "none". By default it is the
// request's Pattern, as http.ServeMux sets it.
//
// It must not be made of the request's path: each path would be an endpoint, until there are MaxEndpoints.
func ByEndpoint(f func(*http.Request) string) RequestsOption {
	return func(r *Requests) { r.endpoint = f }
}

// Buckets sets the upper bounds of the durations' histogram, in seconds and ascending order. By default they are
// prometheus.DefBuckets.
func Buckets(seconds ...float64) RequestsOption { return func(r *Requests) { r.buckets = seconds } }

// RequestsLabels adds labels that are the same for all series.
func RequestsLabels(labels prometheus.Labels) RequestsOption {
	return func(r *Requests) { r.labels = labels }
}

// NewRequests makes Requests. It panics if an option is bad: it is called once, when the service starts.
func NewRequests(options ...RequestsOption) *Requests {
	r := &Requests{
		plans: &names{most: MaxPlans, known: map[string]string{}}, endpoints: &names{most: MaxEndpoints, known: map[string]string{}},
		endpoint: func(r *http.Request) string { return r.Pattern },
		buckets:  prometheus.DefBuckets,
	}
	for _, o := range options {
		o(r)
	}
	if r.endpoint == nil {
		panic("tenantprom: NewRequests: ByEndpoint is given nil")
	}
	if len(r.buckets) == 0 || !slices.IsSorted(r.buckets) {
		panic(fmt.Sprintf("tenantprom: NewRequests: Buckets are %v; want one or more, in ascending order", r.buckets))
	}
	r.count = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "pgxtenant_http_requests_total", ConstLabels: r.labels,
		Help: "HTTP requests that have ended, by the class of their status. Those that panicked are 5xx, and those whose connection the handler took over are hijacked.",
	}, []string{"plan", "endpoint", "code"})
	r.duration = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "pgxtenant_http_request_duration_seconds", ConstLabels: r.labels,
		Help:    "How long HTTP requests took, but for those whose connection was hijacked.",
		Buckets: r.buckets}, []string{"plan", "endpoint"})
	r.inFlight = prometheus.NewGauge(prometheus.GaugeOpts{Name: "pgxtenant_http_requests_in_flight", ConstLabels: r.labels,
		Help: "HTTP requests that are being served."})
	return r
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
	known map[string]string // by what was given
	most  int
}

func namesOf(given []string) *names {
	n := &names{known: map[string]string{}}
	for _, name := range given {
		n.known[name] = label(name)
	}
	return n
}

// label returns the value for a name.
func (n *names) label(name string) string {
	if name == "" {
		return None
	}
	n.mu.RLock()
	value, ok := n.known[name]
	full := len(n.known) >= n.most
	n.mu.RUnlock()
	if ok {
		return value
	}
	if full {
		return Other
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if value, ok := n.known[name]; ok {
		return value
	}
	if len(n.known) >= n.most {
		return Other
	}
	value = label(name)
	n.known[name] = value
	return value
}
