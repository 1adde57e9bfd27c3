package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

// envMain makes the test's program the service itself, for what can only be seen from outside of a process.
const envMain = "SAAS_TEST_MAIN"

func TestMain(m *testing.M) {
	tenants = append(tenants, testTenants...)
	if os.Getenv(envMain) != "" {
		main()
		os.Exit(0)
	}
	logging.Disable() // go-redis reports each server that a test has killed
	code := m.Run()
	code = max(code, closeShared())
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// testTenants are those of the tests, each test's its own, so that all may run at once.
var testTenants = []pgxtenant.Tenant{
	{ID: "apart-row-1", Plan: "enterprise"},
	{ID: "apart-row-2", Plan: "enterprise"},
	{ID: "apart-schema-1", Plan: "enterprise", Isolation: pgxtenant.IsolationSchema},
	{ID: "apart-schema-2", Plan: "enterprise", Isolation: pgxtenant.IsolationSchema},
	{ID: "apart-database-1", Plan: "enterprise", Isolation: pgxtenant.IsolationDatabase},
	{ID: "apart-database-2", Plan: "enterprise", Isolation: pgxtenant.IsolationDatabase},
	{ID: "same-row-1", Plan: "enterprise"},
	{ID: "same-row-2", Plan: "enterprise"},
	{ID: "same-schema", Plan: "enterprise", Isolation: pgxtenant.IsolationSchema},
	{ID: "same-database", Plan: "enterprise", Isolation: pgxtenant.IsolationDatabase},
	{ID: "valid", Plan: "enterprise"},
	{ID: "paged", Plan: "enterprise"},
	{ID: "fresh", Plan: "enterprise"},
	{ID: "frugal", Plan: "free"},
	{ID: "thrifty", Plan: "free"},
	{ID: "frozen", Plan: "pro", Status: pgxtenant.StatusReadOnly},
	{ID: "hurried", Plan: "pro", Settings: map[string]string{"statement_timeout": "100ms"}},
	{ID: "tardy", Plan: "enterprise"},
	{ID: "bereft", Plan: "enterprise"},
	{ID: "stop-row", Plan: "enterprise"},
	{ID: "stop-schema", Plan: "enterprise", Isolation: pgxtenant.IsolationSchema},
	{ID: "stop-report", Plan: "enterprise", Isolation: pgxtenant.IsolationSchema},
}

// sharedPostgres is the server of all tests.
var sharedPostgres = sync.OnceValues(func() (*postgres, error) {
	p, err := startPostgres(context.Background())
	if err == nil {
		atEnd(p.close)
	}
	return p, err
})

// shared is the service, with Redis, for the tests that do no harm to it.
var shared = sync.OnceValues(func() (*live, error) {
	if _, err := sharedPostgres(); err != nil { // before Redis, to end after it
		return nil, err
	}
	server, err := redistest.Start(context.Background())
	if err != nil {
		return nil, err
	}
	atEnd(server.Close)
	s, err := open(settings{redis: &redis.Options{Addr: server.Addr}, patience: time.Minute}, slog.DiscardHandler) // more than a crowded machine needs
	if err == nil {
		atEnd(s.stop)
	}
	return s, err
})

// ends are what is to be closed after all tests, the last first.
var ends struct {
	sync.Mutex
	all []func() error
}

func atEnd(f func() error) {
	ends.Lock()
	defer ends.Unlock()
	ends.all = append(ends.all, f)
}

func closeShared() (code int) {
	for _, f := range slices.Backward(ends.all) {
		if err := f(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

// live is a service that serves.
type live struct {
	*service
	public, operators string // host:port
	client            http.Client
	stop              func() error
}

// opening has services migrate one after another, as deployments do.
var opening sync.Mutex

// open opens a service with these settings of caches and limits.
func open(c settings, log slog.Handler) (*live, error) {
	database, err := sharedPostgres()
	if err != nil {
		return nil, err
	}
	opening.Lock()
	defer opening.Unlock()
	c.database, c.admin, c.domain = database.app(), database.owner(), domain
	s, err := openService(context.Background(), c, slog.New(pgxtenant.LogHandler(log)))
	if err != nil {
		return nil, err
	}
	public, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ops, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.serve(ctx, public, ops) }()
	l := &live{service: s, public: public.Addr().String(), operators: ops.Addr().String()}
	l.client.Transport = &http.Transport{MaxIdleConnsPerHost: 20}
	l.stop = func() error {
		l.client.CloseIdleConnections()
		cancel()
		err := <-served
		s.close()
		return err
	}
	return l, nil
}

func sharedService(t *testing.T) *live {
	t.Helper()
	s, err := shared()
	require.NoError(t, err)
	return s
}

func start(t *testing.T, c settings, log slog.Handler) *live {
	t.Helper()
	s, err := open(c, log)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.stop()) })
	return s
}

// reply is an answer that has been read.
type reply struct {
	code   int
	header http.Header
	body   string
}

// project reads a project out of the answer.
func (r reply) project(t *testing.T) (p Project) {
	t.Helper()
	require.NoError(t, json.Unmarshal([]byte(r.body), &p), r.body)
	return p
}

// list reads the projects of a list.
func (r reply) list(t *testing.T) []Project {
	t.Helper()
	require.Equal(t, http.StatusOK, r.code, r.body)
	var page struct{ Projects []Project }
	require.NoError(t, json.Unmarshal([]byte(r.body), &page), r.body)
	return page.Projects
}

// as sends a request with a tenant's key to its subdomain.
func (l *live) as(t *testing.T, tenant, method, path, body string) reply {
	t.Helper()
	r, err := l.send(t.Context(), tenant+"."+domain, tenant+"-key", method, path, body)
	require.NoError(t, err)
	return r
}

// clear deletes what an earlier run of the same test has left.
func (l *live) clear(t *testing.T, tenants ...string) {
	t.Helper()
	for _, tenant := range tenants {
		for _, p := range l.as(t, tenant, "GET", "/projects", "").list(t) {
			require.Equal(t, http.StatusNoContent, l.as(t, tenant, "DELETE", "/projects/"+p.ID.String(), "").code)
		}
	}
}

// send sends a request to a host, with a key unless that is empty.
func (l *live) send(ctx context.Context, host, key, method, path, body string) (reply, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://"+l.public+path, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	r.Host = host
	r.Header.Set("Content-Type", "application/json")
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	res, err := l.client.Do(r)
	if err != nil {
		return reply{}, err
	}
	said, err := io.ReadAll(res.Body)
	return reply{res.StatusCode, res.Header, string(said)}, errors.Join(err, res.Body.Close())
}

// named is a project's body.
func named(name string) string { return fmt.Sprintf(`{"name":%q}`, name) }
