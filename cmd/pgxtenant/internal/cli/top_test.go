package cli

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

// service is a running one, with tenants at work. It wants a header, and may be down.
func service(t *testing.T) (url string, down *atomic.Bool) {
	t.Helper()
	s := newShop(t)
	s.RLSTable("note")
	config, err := pgxtenant.ParseConfig(s.AppURL("pool_max_conns=4"))
	require.NoError(t, err)
	config.Admin, err = pgxpool.ParseConfig(s.OwnerURL())
	require.NoError(t, err)
	db, err := pgxtenant.NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	slow := make(chan error, 1)
	go func() { // so that acme is first, however long the others' statements wait for a CPU
		_, err := db.Exec(pgxtenant.WithTenantID(context.Background(), "acme"), "select pg_sleep(2)")
		slow <- err
	}()
	for tenant, n := range map[string]int{"acme": 30, "initech": 5, "t" + strings.Repeat("x", 70): 1} {
		for range n {
			_, err := db.Exec(pgxtenant.WithTenantID(context.Background(), tenant), "select pg_sleep(0.001)")
			require.NoError(t, err)
		}
	}
	_, err = db.Exec(pgxtenant.WithTenantID(context.Background(), "acme"), "select 1/0")
	require.Error(t, err)
	require.NoError(t, <-slow)
	down = new(atomic.Bool)
	page := db.DebugHandler()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case down.Load():
			http.Error(w, "down", http.StatusBadGateway)
		case r.Header.Get("Authorization") != "Bearer sEcret96":
			http.Redirect(w, r, "/login", http.StatusFound)
		default:
			page.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(web.Close)
	passwords.Store("sEcret96", true)
	return web.URL, down
}

func TestTopOfARunningService(t *testing.T) {
	t.Parallel()
	url, down := service(t)
	config := file(t, "c.yaml", "top:\n  url: "+url+"\n  headers:\n    Authorization: Bearer sEcret96\n")
	s := &shop{nil, t, []string{"PGXTENANT_CONFIG=" + config}}
	out := s.ok("top")
	require.Regexp(t, `\nacme +\d+\.\d% +\S+ +\S+ +\S+ +1 +`, out)
	require.Regexp(t, `\n\(shared\) +0 +[12] +4 +0`, out)
	require.Regexp(t, `acme +error 22012 +1`, out)
	require.Less(t, strings.Index(out, "\nacme"), strings.Index(out, "\ninitech"))

	var state pgxtenant.DebugState
	require.NoError(t, json.Unmarshal([]byte(s.ok("top", "--json", "--once")), &state))
	require.Equal(t, "acme", state.Windows[0].Tenants[0].Tenant)

	run(t, nil, "top", "--url", url).fails(exitFailed, "the service answers 302 Found")
	run(t, nil, "top", "--url", url, "--header", "Authorization: sEcret96").fails(exitFailed, "302")
	run(t, nil, "top", "--url", "http://127.0.0.1:1/").fails(exitFailed, "connection refused")
	run(t, nil, "top").fails(exitUsage, "PGXTENANT_TOP_URL")
	run(t, nil, "top", "--url", "ftp://sEcret96").fails(exitUsage, "no http or https URL")
	s.run("top", "--window", "2m").fails(exitUsage, `there is no window "2m"`)
	s.run("top", "--interval", "1ms").fails(exitUsage, "want 100ms or more")
	s.run("top", "--header", "sEcret96").fails(exitUsage, "want 'Name: value'")
	down.Store(true)
	s.run("top").fails(exitFailed, "502 Bad Gateway")

	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) }))
	defer other.Close()
	run(t, nil, "top", "--url", other.URL).fails(exitFailed, "no DebugHandler")
}

// On a terminal it fits, follows keys, sits out a restart of the service, and leaves no trace.
func TestTopOnATerminal(t *testing.T) {
	t.Parallel()
	url, down := service(t)
	config := file(t, "c.yaml", "top:\n  url: "+url+"\n  headers:\n    Authorization: Bearer sEcret96\n")
	for _, end := range []string{"C-c", "q"} {
		term := onScreen(t, []string{"PGXTENANT_CONFIG=" + config}, "top", "--interval", "100ms")
		text := term.until("window 5m")
		fits(t, text)
		require.LessOrEqual(t, len(strings.Split(text, "\n")), 24)
		require.Contains(t, text, "TENANT")
		if end == "q" {
			term.tmux("send-keys", "1")
			fits(t, term.until("window 1m"))
			down.Store(true)
			fits(t, term.until("502 Bad Gateway"))
			down.Store(false)
			term.until("window 1m")
			term.tmux("resize-window", "-x", "40", "-y", "1")
			require.Eventually(t, func() bool { return strings.Contains(term.tmux("capture-pane", "-p"), "pgxtenant top") }, 30*time.Second, 20*time.Millisecond, "on a single line: %s", term)
			term.tmux("resize-window", "-x", "80", "-y", "24")
			term.until("TENANT")
		}
		term.tmux("send-keys", end)
		require.Equal(t, "0", term.ended(), "%s", term)
		term.restored()
		require.Empty(t, term.text())
	}
}

// JSON lines go on until Ctrl-C.
func TestTopAsJSONLines(t *testing.T) {
	t.Parallel()
	url, _ := service(t)
	config := file(t, "c.yaml", "top:\n  url: "+url+"\n  headers:\n    Authorization: Bearer sEcret96\n")
	term := onScreen(t, []string{"PGXTENANT_CONFIG=" + config}, "top", "--json", "--interval", "100ms")
	require.Eventually(t, func() bool { return strings.Count(term.text(), `{"at":`) >= 2 }, patience, 20*time.Millisecond)
	term.tmux("send-keys", "C-c")
	require.Equal(t, "0", term.ended(), "%s", term)
	term.restored()
}
