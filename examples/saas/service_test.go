package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

// heavyLog tells which tenants are logged as noisy neighbours.
type heavyLog struct {
	slog.Handler
	heavy chan string
}

func (h heavyLog) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == "noisy neighbour" {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "tenant" {
				h.heavy <- a.Value.String()
			}
			return true
		})
	}
	return nil
}

func (h heavyLog) Enabled(context.Context, slog.Level) bool { return true }

func (h heavyLog) WithAttrs([]slog.Attr) slog.Handler { return h }

// This service has no Redis: what is within the process is tried with it.
func TestPageMetricsAndLogNameTheNoisyTenant(t *testing.T) {
	log := heavyLog{slog.DiscardHandler, make(chan string, 10)}
	s := start(t, settings{}, log)
	d := &driver{public: "http://" + s.public, ops: "http://" + s.operators, domain: domain, length: 5500 * time.Millisecond}
	require.True(t, d.answers(t.Context()))
	var out strings.Builder
	driven := make(chan error, 1)
	go func() { driven <- d.drive(t.Context(), &out) }()
	t.Parallel() // not earlier: the look for heavy tenants comes ten seconds after the opening, and all else fits in between
	require.NoError(t, <-driven)
	said := out.String()
	require.Regexp(t, `(?m)^globex .*map\[200:\d+ 429:\d+\]$`, said, "it is held to its plan")
	for tenant := range quiet {
		require.Regexp(t, `(?m)^`+tenant+` .*map\[200:\d+ 201:\d+\]$`, said, "the others are served")
	}
	require.Regexp(t, `The noisy neighbour is globex: \d\d\.\d % of the shared`, said)
	share := regexp.MustCompile(`(?m)^pgxtenant_tenant_shared_time_ratio\{tenant="globex"\} (\S+)$`).FindStringSubmatch(said)
	require.Len(t, share, 2, said)
	require.Greater(t, number(t, share[1]), pgxtenant.DefaultHeavyShare)
	metrics, err := d.ask(t.Context(), "/metrics")
	require.NoError(t, err)
	for _, tenant := range regexp.MustCompile(`(?m)^pgxtenant_tenant_shared_time_ratio\{tenant="(.+)"\} (\S+)$`).FindAllSubmatch(metrics, -1) {
		if string(tenant[1]) != noisy {
			require.Less(t, number(t, string(tenant[2])), 0.1, "%s is not to blame", tenant[1])
		}
	}
	require.Regexp(t, `(?m)^pgxtenant_http_requests_total\{code="4xx",endpoint="GET /report",plan="pro"\} [1-9]`, string(metrics))
	require.Regexp(t, `(?m)^pgxtenant_http_requests_total\{code="2xx",endpoint="GET /projects",plan="enterprise"\} [1-9]`, string(metrics))

	select {
	case tenant := <-log.heavy:
		require.Equal(t, noisy, tenant)
	case <-time.After(2 * time.Minute):
		t.Fatal("no warning of a heavy tenant")
	}
}

func number(t *testing.T, s string) float64 {
	t.Helper()
	f, err := strconv.ParseFloat(s, 64)
	require.NoError(t, err)
	return f
}

// Redis is killed under requests: each is answered as if it were there, and reads what it has written.
func TestWithoutRedisAllGoesOn(t *testing.T) {
	t.Parallel()
	server, err := redistest.Start(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := start(t, settings{redis: &redis.Options{Addr: server.Addr}, patience: time.Minute}, slog.DiscardHandler)
	s.clear(t, "bereft")

	const clients, rounds = 2, 16 // less than the plan's burst in all
	var halfway, all sync.WaitGroup
	killed := make(chan struct{})
	halfway.Add(clients)
	for range clients {
		all.Go(func() {
			path := ""
			for n := range rounds {
				if n == rounds/2 {
					halfway.Done()
					<-killed
				}
				want := fmt.Sprintf("round %d", n)
				method, on, code := "PUT", path, http.StatusOK
				if n == 0 {
					method, on, code = "POST", "/projects", http.StatusCreated
				}
				r, err := s.send(t.Context(), "bereft.localhost", "bereft-key", method, on, named(want))
				if err != nil || r.code != code {
					t.Errorf("round %d: %s: %v %s, %v", n, method, r.code, r.body, err)
				}
				if n == 0 {
					path = r.header.Get("Location")
				}
				r, err = s.send(t.Context(), "bereft.localhost", "bereft-key", "GET", path, "")
				if err != nil || r.code != http.StatusOK || !strings.Contains(r.body, `"`+want+`"`) {
					t.Errorf("round %d: %v %s, %v", n, r.code, r.body, err)
				}
			}
		})
	}
	halfway.Wait()
	failures, fallbacks := s.store.Stats().Failures, s.limiter.Stats().Fallbacks
	server.Kill()
	close(killed)
	all.Wait()
	require.Greater(t, s.store.Stats().Failures, failures, "Redis was missed")
	require.Greater(t, s.limiter.Stats().Fallbacks, fallbacks)
	r := s.as(t, "bereft", "GET", "/projects", "").list(t)
	require.Len(t, r, clients)
}

// A process of its own is told to stop by SIGTERM while clients write and reports are being made.
func TestSIGTERMLosesNoAcknowledgedWrite(t *testing.T) {
	t.Parallel()
	database, err := sharedPostgres()
	require.NoError(t, err)
	opening.Lock()
	p := startProcess(t, database)
	opening.Unlock()

	p.tryCurl(t)
	var signalled atomic.Bool
	var reports, writers sync.WaitGroup
	var mu sync.Mutex
	acknowledged := make(map[string][]uuid.UUID)
	enough := make(chan struct{})
	for _, tenant := range []string{"stop-row", "stop-schema", "stop-row", "stop-schema"} {
		writers.Go(func() {
			for n := 0; ; n++ {
				r, err := p.send(t.Context(), tenant+".localhost", tenant+"-key", "POST", "/projects", named(fmt.Sprint("write ", n)))
				if err != nil && signalled.Load() {
					return // not acknowledged
				}
				if err != nil || r.code != http.StatusCreated {
					t.Errorf("write %d of %s: %v %s, %v", n, tenant, r.code, r.body, err)
					return
				}
				mu.Lock()
				acknowledged[tenant] = append(acknowledged[tenant], uuid.MustParse(strings.TrimPrefix(r.header.Get("Location"), "/projects/")))
				if len(acknowledged["stop-row"])+len(acknowledged["stop-schema"]) == 40 {
					close(enough)
				}
				mu.Unlock()
				time.Sleep(20 * time.Millisecond) // within the plan
			}
		})
	}
	<-enough
	// The reports take until all are under way and the service has been told to stop, however slowly they come.
	owner, err := pgx.Connect(t.Context(), database.owner())
	require.NoError(t, err)
	defer owner.Close(context.Background())
	hold, err := owner.Begin(t.Context())
	require.NoError(t, err)
	_, err = hold.Exec(t.Context(), "lock table "+pgx.Identifier{pgxtenant.SchemaName("stop-report"), "project"}.Sanitize())
	require.NoError(t, err)
	const reporters = 3
	for range reporters {
		reports.Go(func() {
			r, err := p.send(t.Context(), "stop-report.localhost", "stop-report-key", "GET", "/report", "")
			if err != nil || r.code != http.StatusOK {
				t.Errorf("a report under way: %v %s, %v", r.code, r.body, err)
			}
		})
	}
	p.waitForReports(t, reporters)
	signalled.Store(true)
	require.NoError(t, p.command.Process.Signal(syscall.SIGTERM))
	require.NoError(t, hold.Rollback(t.Context()))
	reports.Wait()
	writers.Wait()
	p.client.CloseIdleConnections()
	require.NoError(t, p.wait(), "it ends as if nothing had happened")
	require.Regexp(t, `msg="project created" id=\S+ tenant=stop-row\n`, p.log.String())

	s := sharedService(t)
	for tenant, ids := range acknowledged {
		rows, err := s.db.Query(pgxtenant.WithTenantID(t.Context(), tenant), "select id from project")
		require.NoError(t, err)
		there, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		require.NoError(t, err)
		require.Subset(t, there, ids)
	}
}

func TestAServiceThatCannotOpenSaysWhy(t *testing.T) {
	t.Parallel()
	database, err := sharedPostgres()
	require.NoError(t, err)
	_, err = openService(t.Context(), settings{database: database.app(), admin: database.as("saas_owner", "wrong"), domain: domain}, slog.New(slog.DiscardHandler))
	require.ErrorContains(t, err, "password authentication failed")
	require.NotContains(t, err.Error(), "wrong", "and not with what password")
}

// process is the service in a process of its own.
type process struct {
	*live
	command *exec.Cmd
	welcome string
	log     strings.Builder // to be read after wait
	wait    func() error
}

func startProcess(t *testing.T, database *postgres) *process {
	t.Helper()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), envMain+"=1", "SAAS_ADDR=127.0.0.1:0", "SAAS_OPS_ADDR=127.0.0.1:0",
		"SAAS_DATABASE_URL="+database.app(), "SAAS_ADMIN_DATABASE_URL="+database.owner(), "SAAS_REDIS_URL=none")
	p := &process{live: new(live), command: command}
	command.Stderr = &p.log
	stdout, err := command.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, command.Start())
	p.client.Transport = &http.Transport{MaxIdleConnsPerHost: 20}
	p.wait = sync.OnceValue(func() error {
		_, _ = io.Copy(io.Discard, stdout)
		return command.Wait()
	})
	t.Cleanup(func() {
		p.client.CloseIdleConnections()
		_ = command.Process.Kill()
		_ = p.wait()
		if t.Failed() {
			said := p.log.String()
			t.Log(said[max(0, len(said)-2000):])
		}
	})
	lines := bufio.NewReader(stdout)
	for !strings.Contains(p.welcome, "Ctrl-C") {
		line, err := lines.ReadString('\n')
		p.welcome += line
		require.NoError(t, err, p.welcome)
	}
	addrs := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindAllString(p.welcome, 2)
	require.Len(t, addrs, 2)
	p.public, p.operators = addrs[0], addrs[1]
	return p
}

// tryCurl pastes the first lines of the welcome into a shell.
func (p *process) tryCurl(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Log("curl is not installed: the lines to paste were not tried")
		return
	}
	lines := regexp.MustCompile(`(?m)^curl .*$`).FindAllString(p.welcome, -1)
	require.Len(t, lines, 5)
	for i, want := range []string{`"name":"Roadmap"`, `"name":"Roadmap"`, `{"projects":[`, "403 Forbidden", "403 Forbidden"} {
		said, err := exec.Command("sh", "-c", strings.Replace(lines[i], "curl", "curl --silent --show-error", 1)).CombinedOutput()
		require.NoError(t, err, "%s: %s", lines[i], said)
		require.Contains(t, string(said), want, lines[i])
	}
}

// waitForReports waits until so many reports are being made.
func (p *process) waitForReports(t *testing.T, n int) {
	t.Helper()
	d := &driver{ops: "http://" + p.operators}
	defer d.client.CloseIdleConnections()
	require.Eventually(t, func() bool {
		body, err := d.ask(t.Context(), "/debug/tenants?format=json")
		return err == nil && regexp.MustCompile(fmt.Sprintf(`"tenant": "stop-report",[^}]*"held": %d`, n)).Match(body)
	}, 2*time.Minute, 20*time.Millisecond)
}
