package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/redis/go-redis/v9"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
	"github.com/pgxtenant/pgxtenant/contrib/tenantlimit"
	"github.com/pgxtenant/pgxtenant/contrib/tenantprom"
)

// settings are what differs from one place to another.
type settings struct {
	database string         // URL as the service's role
	admin    string         // URL as the role that owns the tables
	redis    *redis.Options // nil: caches and limits are within the process
	patience time.Duration  // how long cache and limits wait for Redis; zero: 200 and 100 ms, their defaults
	domain   string         // acme.DOMAIN is acme's
}

// service is everything that must be closed, in the order in which it was opened, and its two handlers.
type service struct {
	db      *pgxtenant.TenantDB
	redis   *redis.Client // nil without Redis
	store   tenantcache.Store
	limiter *tenantlimit.Limiter
	log     *slog.Logger

	requests *tenantprom.Requests
	public   http.Handler // for customers
	ops      http.Handler // for operators, on a listener that nobody else reaches
}

func openService(ctx context.Context, c settings, log *slog.Logger) (*service, error) {
	s := &service{log: log}
	if err := s.open(ctx, c); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *service) open(ctx context.Context, c settings) (err error) {
	if s.db, err = openDatabase(ctx, c, s.log); err != nil {
		return err
	}
	if err := migrate(ctx, s.db); err != nil {
		return err
	}
	if err := provision(ctx, s.db); err != nil {
		return err
	}
	if err := s.openStores(c); err != nil {
		return err
	}
	projects, err := newProjects(s.db, s.store, s.log)
	if err != nil {
		return err
	}
	s.requests = tenantprom.NewRequests(tenantprom.Plans(slices.Sorted(maps.Keys(callLimits()))...))
	s.public = s.publicHandler(c, &api{projects})
	s.ops = s.opsHandler()
	return nil
}

// openStores opens the cache and the limiter: over all processes with Redis, else within this one.
func (s *service) openStores(c settings) (err error) {
	limits := tenantlimit.Config{Plans: callLimits(), Timeout: c.patience, Logger: s.log}
	if c.redis == nil {
		s.store, err = tenantcache.NewMemory(tenantcache.MemoryConfig{TenantBytes: cacheBytes})
	} else {
		options := *c.redis
		// Cache and limits know what to do without Redis, and wait for it a fraction of a second at most: so one more try,
		// for a connection that has broken, none for a server that cannot be reached, and never past the context.
		options.MaxRetries, options.DialerRetries, options.ContextTimeoutEnabled = 1, 1, true
		s.redis = redis.NewClient(&options)
		limits.Redis = s.redis
		s.store, err = tenantcache.NewRedis(s.redis, tenantcache.RedisConfig{Timeout: c.patience, Logger: s.log})
	}
	if err != nil {
		return err
	}
	s.limiter, err = tenantlimit.New(limits)
	return err
}

// publicHandler is what customers reach. From the outside: who is it, which tenant is meant and may he, how often
// may that tenant, and only then the API. Requests are counted on both sides of pgxtenant.Middleware: outside are those
// that it refuses, and inside is the plan of the others.
func (s *service) publicHandler(c settings, a *api) http.Handler {
	tenants := pgxtenant.Middleware(s.db.Registry(),
		pgxtenant.BySubdomain(c.domain),
		pgxtenant.ByClaim(tenantOfCaller), // must agree with the subdomain, if there is one
		pgxtenant.Reserve("api"),          // api.DOMAIN is for all: there the key alone tells
		pgxtenant.LogRefusals(s.log))
	return demoKeys().authenticate(s.requests.Around(tenants)(a.routes(s.limiter.Middleware())))
}

// opsHandler asks nobody who he is.
func (s *service) opsHandler() http.Handler {
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(s.requests,
		tenantprom.NewCollector(s.db, tenantprom.Over(tenantprom.FiveMinutes), // as for OnHeavyTenant
			tenantprom.WithCache("projects", s.store), tenantprom.WithLimiter("api", s.limiter)),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /debug/tenants", s.db.DebugHandler())
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(pgxtenant.WithoutTenant(r.Context()), time.Second)
		defer cancel()
		if err := s.db.Ping(ctx); err != nil {
			http.Error(w, "the database does not answer", http.StatusServiceUnavailable)
		}
	})
	return mux
}

// drainTime is how long requests under way may take to end once the service is told to stop.
const drainTime = 15 * time.Second

// serve answers requests until ctx is done. Then it takes no more, and returns when those under way have been answered:
// what a client was told is done has been committed. The listeners are closed in any case.
func (s *service) serve(ctx context.Context, public, ops net.Listener) error {
	outer := s.server(s.public)
	inner := s.server(s.ops)
	failed := make(chan error, 2)
	for server, listener := range map[*http.Server]net.Listener{outer: public, inner: ops} {
		go func() {
			err := server.Serve(listener)
			if errors.Is(err, http.ErrServerClosed) {
				err = nil
			}
			failed <- err
		}()
	}
	var err error
	running := 2
	select {
	case <-ctx.Done():
	case err = <-failed:
		running--
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	// The operators' listener is the last to go: one can watch the rest drain.
	for _, server := range []*http.Server{outer, inner} {
		err = errors.Join(err, server.Shutdown(end), server.Close())
	}
	for range running {
		err = errors.Join(err, <-failed)
	}
	return err
}

// server has a limit for everything that a client could do without end.
func (s *service) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      time.Minute, // longer than the longest statement
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
}

// close ends all, the last opened first. No request may be under way.
func (s *service) close() {
	if s.limiter != nil {
		s.limiter.Close()
	}
	if s.store != nil {
		s.store.Close()
	}
	if s.redis != nil {
		_ = s.redis.Close()
	}
	if s.db != nil {
		s.db.Close()
	}
}
