package tenantprom

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
)

// DefaultTopK is how many tenants have series of their own.
const DefaultTopK = 20

// Window is one of the windows of pgxtenant.Load.
type Window uint8

const (
	// Minute is Load.Minute.
	Minute Window = iota
	// FiveMinutes is Load.FiveMinutes.
	FiveMinutes
	// Hour is Load.Hour.
	Hour
)

// A Collector tells Prometheus of a TenantDB, its caches and its limiters. It counts nothing itself: each scrape reads
// what they have counted, and runs no statement. It is safe for concurrent use.
type Collector struct {
	db       *pgxtenant.TenantDB
	caches   []named[tenantcache.Store]
	limiters []named[*tenantlimit.Limiter]
	topK     int
	window   Window
	minShare float64
	labels   prometheus.Labels

	root    group[*snapshot]
	cache   group[cacheStats]
	limiter group[tenantlimit.Stats]
	waits   *prometheus.Desc
}

type named[S any] struct {
	name   string
	source S
}

// An Option adjusts a Collector.
type Option func(*Collector)

// WithCache adds the counters of a cache's store, with the name as label "cache". It may be given for several stores,
// each under a name of its own.
func WithCache(name string, store tenantcache.Store) Option {
	return func(c *Collector) { c.caches = append(c.caches, named[tenantcache.Store]{label(name), store}) }
}

// WithLimiter adds the counters of a limiter, with the name as label "limiter". It may be given for several limiters,
// each under a name of its own.
func WithLimiter(name string, limiter *tenantlimit.Limiter) Option {
	return func(c *Collector) {
		c.limiters = append(c.limiters, named[*tenantlimit.Limiter]{label(name), limiter})
	}
}

// TopK sets how many tenants have series of their own, in place of DefaultTopK (20): those that used the most of the
// databases' time. All others together are "other". Zero leaves only that. It is pgxtenant.LoadTenants (256) at most.
func TopK(n int) Option { return func(c *Collector) { c.topK = n } }

// Over sets the window that tenants' series are averages of, in place of Minute. The longer it is, the less often
// another tenant comes among the TopK, and so the fewer series there are in Prometheus after a day.
func Over(w Window) Option { return func(c *Collector) { c.window = w } }

// MinShare leaves tenants to "other" that used less than this share, 0 to 1, of the databases' time. By default it is 0.
// Where very many tenants are about equal it keeps those from coming and going that nobody need look at.
func MinShare(share float64) Option { return func(c *Collector) { c.minShare = share } }

// ConstLabels adds labels that are the same for all series, such as the name of a TenantDB where a process has two.
func ConstLabels(labels prometheus.Labels) Option { return func(c *Collector) { c.labels = labels } }

// NewCollector makes the Collector of a TenantDB, to be registered once. The TenantDB, stores and limiters may be closed
// before it; it then tells of their last state.
//
// NewCollector panics if an option is bad, or the TenantDB is nil: it is called once, when the service starts.
func NewCollector(db *pgxtenant.TenantDB, options ...Option) *Collector {
	c := &Collector{db: db, topK: DefaultTopK}
	for _, o := range options {
		o(c)
	}
	if err := c.validate(); err != nil {
		panic(fmt.Sprintf("tenantprom: NewCollector: %v", err))
	}
	c.root = newGroup(slices.Concat(poolFamilies, auditFamilies, loadFamilies, tenantFamilies), c.labels)
	c.cache = newGroup(cacheFamilies, c.labels, "cache")
	c.limiter = newGroup(limiterFamilies, c.labels, "limiter")
	c.waits = prometheus.NewDesc("pgxtenant_acquire_wait_seconds",
		"How long checkouts waited for a connection, or for their tenant's turn, whether they got it or not.", nil, c.labels)
	mustDescribe("NewCollector", c, c.labels)
	return c
}

// mustDescribe panics if labels that are the same for all series are none, or are ours: a registry would say so too, but
// of "le" not before the first observation.
func mustDescribe(constructor string, c prometheus.Collector, labels prometheus.Labels) {
	err := prometheus.NewRegistry().Register(c)
	if _, ok := labels["le"]; ok {
		err = errors.New(`"le" is the label of histograms' buckets`)
	}
	if err != nil {
		panic(fmt.Sprintf("tenantprom: %s: %v", constructor, err))
	}
}

func (c *Collector) validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.db == nil {
		fail("the TenantDB is nil")
	}
	if c.topK < 0 || c.topK > pgxtenant.LoadTenants {
		fail("TopK is %d; want 0 to %d", c.topK, pgxtenant.LoadTenants)
	}
	if c.window > Hour {
		fail("Over is given Window(%d); want Minute, FiveMinutes or Hour", c.window)
	}
	if !(c.minShare >= 0 && c.minShare <= 1) {
		fail("MinShare is %v; want 0 to 1", c.minShare)
	}
	names := map[string]bool{}
	for _, s := range c.caches {
		if isNil(s.source) {
			fail("the store of WithCache(%q) is nil", s.name)
		}
		if names["cache "+s.name] {
			fail("WithCache is given %q twice", s.name)
		}
		names["cache "+s.name] = true
	}
	for _, l := range c.limiters {
		if l.source == nil {
			fail("the limiter of WithLimiter(%q) is nil", l.name)
		}
		if names["limiter "+l.name] {
			fail("WithLimiter is given %q twice", l.name)
		}
		names["limiter "+l.name] = true
	}
	return errors.Join(errs...)
}

// isNil reports whether there is no store, or none in it.
func isNil(store tenantcache.Store) bool {
	v := reflect.ValueOf(store)
	return store == nil || v.Kind() == reflect.Pointer && v.IsNil()
}

// Describe is part of prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	c.root.describe(ch)
	ch <- c.waits
	if len(c.caches) > 0 {
		c.cache.describe(ch)
	}
	if len(c.limiters) > 0 {
		c.limiter.describe(ch)
	}
}

// Collect is part of prometheus.Collector. It takes about a millisecond if there are very many tenants.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	s := c.snapshot()
	c.root.collect(ch, s)
	c.collectWaits(ch, s.stat.AcquireWaits())
	for _, n := range c.caches {
		_, inProcess := n.source.(*tenantcache.Memory)
		c.cache.collect(ch, cacheStats{n.source.Stats(), inProcess}, n.name)
	}
	for _, n := range c.limiters {
		c.limiter.collect(ch, n.source.Stats(), n.name)
	}
}

// snapshot is what one scrape has read of a TenantDB: each of its parts once, so that the series made of it agree.
type snapshot struct {
	stat      *pgxtenant.Stat
	sharedMax int32
	isolated  pgxtenant.PoolStat // the sum of the isolated pools
	pools     map[pgxtenant.PoolState]int
	audit     *pgxtenant.Report // nil if there was none
	auditAt   time.Time
	load      *pgxtenant.Load // nil if none is counted
	tenants   []tenantRow
}

func (c *Collector) snapshot() *snapshot {
	s := &snapshot{stat: c.db.Stat(), sharedMax: c.db.Shared().Stat().MaxConns(), pools: map[pgxtenant.PoolState]int{}}
	for _, p := range s.stat.Pools() {
		s.pools[p.State]++
		s.isolated.Leases += p.Leases
		s.isolated.MaxConns += p.MaxConns
		s.isolated.TotalConns += p.TotalConns
		s.isolated.IdleConns += p.IdleConns
		s.isolated.AcquiredConns += p.AcquiredConns
		s.isolated.ConstructingConns += p.ConstructingConns
		s.isolated.WaitingAcquires += p.WaitingAcquires
	}
	s.audit, s.auditAt = c.db.LastAudit()
	if load := c.db.Load(); load.Minute.Span > 0 {
		s.load = load
		s.tenants = c.rank(load)
	}
	return s
}

// collectWaits tells of the waits.
func (c *Collector) collectWaits(ch chan<- prometheus.Metric, h pgxtenant.WaitHistogram) {
	if len(h.Counts) == 0 {
		return
	}
	count, buckets := uint64(0), make(map[float64]uint64, len(h.Bounds))
	for i, n := range h.Counts {
		count += uint64(n)
		if i < len(h.Bounds) {
			buckets[h.Bounds[i].Seconds()] = count
		}
	}
	ch <- prometheus.MustNewConstHistogram(c.waits, count, h.Sum.Seconds(), buckets)
}

// family is one metric: what is told of it, and how it is read from its source.
type family[S any] struct {
	name, help string
	kind       prometheus.ValueType
	labels     []string
	read       func(s S, add adder)
}

// adder adds one series to a family, with the values of its labels.
type adder func(value float64, labels ...string)

// group is all families with the same source.
type group[S any] struct {
	families []family[S]
	descs    []*prometheus.Desc
}

// newGroup makes the group, whose series have the labels in first ahead of their own.
func newGroup[S any](families []family[S], constant prometheus.Labels, first ...string) group[S] {
	g := group[S]{families: families}
	for _, f := range families {
		g.descs = append(g.descs, prometheus.NewDesc(f.name, f.help, slices.Concat(first, f.labels), constant))
	}
	return g
}

func (g *group[S]) describe(ch chan<- *prometheus.Desc) {
	for _, d := range g.descs {
		ch <- d
	}
}

func (g *group[S]) collect(ch chan<- prometheus.Metric, s S, first ...string) {
	for i, f := range g.families {
		f.read(s, func(value float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(g.descs[i], f.kind, value, slices.Concat(first, labels)...)
		})
	}
}

// counter is a family that only rises, and gauge one that goes both ways.
func counter[S any](name, help string, read func(S, adder), labels ...string) family[S] {
	return family[S]{name, help, prometheus.CounterValue, labels, read}
}

func gauge[S any](name, help string, read func(S, adder), labels ...string) family[S] {
	return family[S]{name, help, prometheus.GaugeValue, labels, read}
}

// number is a family without labels of its own.
func number[S any, N int | int32 | int64 | uint64](of func(S) N) func(S, adder) {
	return func(s S, add adder) { add(float64(of(s))) }
}
