package pgxtenant

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// busyDB is a TenantDB on which a lot has happened: one tenant is heavy, connections are held, pools were opened, closed and
// refused, statements failed, and an audit has been run. Many tenants, or few, have done very little.
func busyDB(t *testing.T, small int) *TenantDB {
	t.Helper()
	d := docsDB(t)
	db := openDB(t, d.AppURL("pool_max_conns=16"), func(c *Config) {
		c.MaxPools = 3
		c.Admin = mustParse(t, d.OwnerURL())
	})
	for i, id := range []string{"initech", "acme", "hooli", "umbrella", "stark", "wayne", "soylent", "globex"} {
		n := int64(40_000 >> i)
		spent := time.Duration(n) * 3 * time.Millisecond
		u := Usage{Queries: n, Execs: n / 5, Rows: 17 * n, Time: spent, SharedTime: spent, Waits: n / 100, WaitTime: spent / 300}
		if id == "umbrella" || id == "stark" {
			u.SharedTime = 0
		}
		db.load.charge(id, &u)
	}
	for i := range small {
		db.load.charge(fmt.Sprint("tenant-", i), &Usage{Queries: 100, Time: time.Second / 20, SharedTime: time.Second / 20})
	}
	for i := range db.load.waits {
		db.load.waits[i].Store(40_000 >> (2 * i))
	}
	hold := func(ctx context.Context, n int) {
		var conns []*pgxpool.Conn
		for range n {
			conn, err := db.Acquire(ctx)
			require.NoError(t, err)
			conns = append(conns, conn)
		}
		t.Cleanup(func() {
			for _, conn := range conns {
				conn.Release()
			}
		})
	}
	for _, id := range []string{"wayne", "umbrella", "stark"} {
		require.NoError(t, db.Ping(isolated(id, d.AppURL())))
	}
	require.NoError(t, db.Ping(isolated("wonka", d.AppURL("application_name=1"))))
	hold(isolated("umbrella", d.AppURL()), 4)
	hold(as("initech"), 6)
	hold(as("acme"), 2)
	idle, err := db.Acquire(as("hooli"))
	require.NoError(t, err)
	idle.Release()
	require.Error(t, db.Ping(isolated("soylent", "postgres://s3cr3tUser:s3cr3tPw@127.0.0.1:1/s3cr3tDB")))
	d.SuperExec("alter table docs add constraint once unique (tenant_id, id)")
	for range 3 {
		_, err = db.Exec(as("a"), "insert into docs values ('a', 1, 's3cr3tValue')")
		require.Equal(t, "23505", pgCode(err))
	}
	_, err = db.Exec(as("hooli"), "select s3cr3tText from docs")
	require.Equal(t, "42703", pgCode(err))
	_, err = db.Audit(context.Background())
	require.NoError(t, err)
	return db
}

func debugPageOf(t testing.TB, h http.Handler, target string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestDebugPage(t *testing.T) {
	t.Parallel()
	db := busyDB(t, 30)
	h := db.DebugHandler()

	page := debugPageOf(t, h, "/")
	require.Equal(t, 200, page.Code)
	require.Equal(t, "text/html; charset=utf-8", page.Header().Get("Content-Type"))
	require.Equal(t, "no-store", page.Header().Get("Cache-Control"))
	policy := page.Header().Get("Content-Security-Policy")
	require.Contains(t, policy, "default-src 'none'")
	require.NotContains(t, policy, "unsafe")
	text := page.Body.String()
	for _, want := range []string{"initech", "umbrella", "23505", "constraint", "not opened: connection", "closed: Config.MaxPools reached", "× 3"} {
		require.Contains(t, text, want)
	}
	require.NotContains(t, text, "ZgotmplZ")
	for _, outside := range []string{"http:", "https:", "src=", "@import", "url("} {
		require.NotContains(t, text, outside, "it needs nothing from elsewhere")
	}

	answer := debugPageOf(t, h, "/?format=json")
	require.Equal(t, "application/json", answer.Header().Get("Content-Type"))
	var state DebugState
	decoder := json.NewDecoder(strings.NewReader(answer.Body.String()))
	decoder.DisallowUnknownFields()
	require.NoError(t, decoder.Decode(&state))
	require.EqualValues(t, 16, state.Shared.Max)
	require.EqualValues(t, 8, state.Shared.Used)
	require.Equal(t, []string{"1m", "5m", "60m"}, []string{state.Windows[0].Name, state.Windows[1].Name, state.Windows[2].Name})
	five := state.Windows[1]
	require.Equal(t, "initech", five.Tenants[0].Tenant)
	require.Equal(t, 6, five.Tenants[0].Held)
	require.Greater(t, five.Tenants[0].SharedShare, 0.5)
	require.Len(t, five.Tenants, DebugTenants)
	sum := five.Other.Statements
	for _, tenant := range five.Tenants {
		sum += tenant.Statements
	}
	require.Equal(t, five.Total.Statements, sum)
	require.Len(t, state.Pools, 3)
	require.Equal(t, "umbrella", state.Pools[0].Tenant)
	require.EqualValues(t, 4, state.Pools[0].Used)
	require.Equal(t, []int64{4, 1, 1}, []int64{state.Opened, state.Evicted, state.Failed})
	require.Equal(t, "not opened: connection", state.PoolEvents[0].What)
	require.Equal(t, []string{"42703", "23505"}, []string{state.Errors[0].What, state.Errors[1].What})
	require.Equal(t, 3, state.Errors[1].Count)
	require.NotNil(t, state.Audit)

	require.Equal(t, "application/json", debugPageOf(t, h, "/", "Accept", "application/json").Header().Get("Content-Type"))
	for _, other := range []string{"/?window=1m", "/?window=60m", "/?window=nonsense&format=html"} {
		require.Equal(t, 200, debugPageOf(t, h, other).Code)
	}
	require.Contains(t, debugPageOf(t, h, "/?window=1m").Body.String(), `href="?window=1m" aria-current`)

	for _, text := range []string{text, answer.Body.String()} {
		require.NotContains(t, text, "s3cr3t", "no data, no secrets, no SQL")
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", nil))
	require.Equal(t, 405, w.Code)
	require.Equal(t, "GET, HEAD", w.Header().Get("Allow"))
}

func TestDebugPageOfNothing(t *testing.T) {
	t.Parallel()
	for _, params := range []string{"pool_max_conns=4", "tenant_disable_load=true"} {
		db := openDB(t, pgtest.New(t).AppURL(params))
		for range 2 {
			text := debugPageOf(t, db.DebugHandler(), "/").Body.String()
			require.Contains(t, text, "None has been run")
			require.Equal(t, params != "pool_max_conns=4", strings.Contains(text, "Config.DisableLoad is set"))
			require.Contains(t, text, "</html>")
			require.NoError(t, json.Unmarshal(debugPageOf(t, db.DebugHandler(), "/?format=json").Body.Bytes(), &DebugState{}))
			db.Close() // and then again
		}
	}
}

// No ID can be more than text, wherever it comes from.
func TestTheDebugPageEscapes(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL())
	const evil = `"><script>alert(1)</script><img src=x onerror=alert(1)>'`
	db.load.charge(evil, &Usage{Queries: 1, Time: time.Second, SharedTime: time.Second})
	db.load.events.pool(evil, evil)
	db.load.events.failed(evil, &TenantError{evil, evil, pgx.ErrNoRows})
	db.lastAudit.Store(&auditRun{&Report{Findings: []Finding{{Code: evil, Severity: Severity(evil), Object: evil}}}, time.Now()})
	text := debugPageOf(t, db.DebugHandler(), "/?window="+"%22%3E%3Cscript%3E").Body.String()
	require.Equal(t, 1, strings.Count(text, "<script"), "the page's own")
	require.NotContains(t, text, "<img")
	require.Contains(t, text, "&lt;script&gt;")
}

// Text has the contrast that WCAG 2 asks for (4.5:1), in the light and in the dark.
func TestTheDebugPageCanBeReadInTheDark(t *testing.T) {
	t.Parallel()
	light, dark, ok := strings.Cut(debugCSS, "@media (prefers-color-scheme: dark)")
	require.True(t, ok)
	dark, _, _ = strings.Cut(dark, "}")
	var before string
	for _, scheme := range []string{light, dark} {
		luminance := func(name string) (l float64) {
			found := regexp.MustCompile(`--` + name + `: #([0-9a-f]+);`).FindStringSubmatch(scheme)
			require.NotNil(t, found, name)
			digits := found[1]
			if len(digits) == 3 {
				digits = string([]byte{digits[0], digits[0], digits[1], digits[1], digits[2], digits[2]})
			}
			for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
				n, err := strconv.ParseUint(digits[2*i:2*i+2], 16, 8)
				require.NoError(t, err)
				l += weight * math.Pow((float64(n)/255+0.055)/1.055, 2.4)
			}
			return l
		}
		for _, pair := range []string{"ink card", "ink paper", "quiet card", "quiet paper", "quiet track", "used paper",
			"error card", "warning card", "good card", "heavy card"} {
			text, ground, _ := strings.Cut(pair, " ")
			a, b := luminance(text)+0.05, luminance(ground)+0.05
			require.GreaterOrEqual(t, max(a, b)/min(a, b), 4.5, pair)
		}
		require.NotEqual(t, before, fmt.Sprint(luminance("paper") < luminance("ink")), "one is light, the other dark")
		before = fmt.Sprint(luminance("paper") < luminance("ink"))
	}
}

// The rings keep the latest, and count what comes again.
func TestEventsAreBounded(t *testing.T) {
	t.Parallel()
	var e events
	require.Empty(t, e.latest(&e.pools))
	for i := range 3 * debugEvents {
		e.pool(fmt.Sprint(i/2), "opened")
	}
	got := e.latest(&e.pools)
	require.Len(t, got, debugEvents)
	for i, ev := range got {
		require.Equal(t, fmt.Sprint(3*debugEvents/2-1-i), ev.tenant)
		require.Equal(t, 2, ev.n)
	}
}

func TestErrorCodes(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL())
	_, err := db.Exec(as("a"), "do $$ begin raise 'x' using errcode = 'SE001'; end $$")
	require.Equal(t, "SE001", errorCode(err))
	ctx, cancel := context.WithCancel(as("a"))
	cancel()
	_, err = db.Exec(ctx, "select 1")
	require.Equal(t, "canceled", errorCode(err))
	ctx, cancel = context.WithTimeout(as("a"), 0)
	defer cancel()
	_, err = db.Exec(ctx, "select 1")
	require.Equal(t, "timeout", errorCode(err))
	require.Equal(t, "client", errorCode(pgx.ErrTxClosed))
	require.Equal(t, "wrong tenant", errorCode(fmt.Errorf("x: %w", ErrWrongTenant)))
	require.Equal(t, "invalid tenant", errorCode(db.Ping(isolated("a", "postgres://127.0.0.1:1/x?tenant_max_conns=3"))))
}

// browser finds Chromium, or a browser made of it.
func browser(t *testing.T) string {
	t.Helper()
	for _, name := range []string{os.Getenv("CHROMIUM"), "chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome",
		"/Applications/Google Chrome.app/Contents/MacOS/Google Chrome", "/Applications/Chromium.app/Contents/MacOS/Chromium"} {
		if path, err := exec.LookPath(name); name != "" && err == nil && exec.Command(path, "--version").Run() == nil {
			return path
		}
	}
	// .ci/run takes no skipped test for passed.
	t.Skip("no Chromium that starts; install one, or name it in CHROMIUM")
	return ""
}

// browse runs the browser on a page of h, and returns what it prints.
func browse(t *testing.T, h http.Handler, target string, args ...string) string {
	t.Helper()
	server := httptest.NewServer(h)
	defer server.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	args = append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
		"--disable-background-networking", "--user-data-dir=" + t.TempDir()}, args...)
	cmd := exec.CommandContext(ctx, browser(t), append(args, server.URL+target)...)
	cmd.WaitDelay = time.Minute
	if len(os.TempDir()) > 40 {
		cmd.Env = append(os.Environ(), "TMPDIR=/tmp") // its socket's path must be short
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, stderr.String())
	return string(out)
}

// A real browser takes the page as it is meant: its own policy lets its style and script run, and it fits a phone. With
// PGXTENANT_SCREENSHOTS the folder named there gets pictures of it.
func TestDebugPageInABrowser(t *testing.T) {
	t.Parallel()
	h := busyDB(t, 4).DebugHandler()
	// The page's own elements are measured from around it, for its policy lets no other script in.
	dom := browse(t, measuring(h), "/frames", "--virtual-time-budget=5000", "--dump-dom")
	for _, width := range []int{390, 1280} {
		require.Contains(t, dom, fmt.Sprintf("width %d of %d", width, width), "no wider than the screen")
	}
	require.Equal(t, 2, strings.Count(dom, "style rgb("), "its style is let in")
	require.Equal(t, 2, strings.Count(dom, "state is-live;"), "so is its script")
	require.Equal(t, 2, strings.Count(dom, "read again;"), "and it keeps itself up to date")
	folder := os.Getenv("PGXTENANT_SCREENSHOTS")
	if folder == "" {
		return
	}
	for _, scheme := range []string{"light", "dark"} {
		for _, size := range []string{"390,2300", "1280,1052"} {
			args := []string{"--window-size=" + size, "--virtual-time-budget=1000",
				"--screenshot=" + filepath.Join(folder, "debug-"+scheme+"-"+strings.Split(size, ",")[0]+".png")}
			if scheme == "dark" {
				args = append(args, "--blink-settings=preferredColorScheme=0")
			}
			browse(t, h, "/", args...)
		}
	}
}

// measuring serves the page, and at /frames a page with it in two frames, of a phone's width and of a desk's, that says
// what it looks like there.
func measuring(h http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/frames", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `<iframe src="/" width=390 height=800 style="border:0"></iframe><iframe src="/" width=1280 height=800 style="border:0"></iframe>
		<p id="said"></p><script>
			const said = document.getElementById("said");
			for (const frame of document.querySelectorAll("iframe")) frame.onload = () => {
				const page = frame.contentDocument, root = page.documentElement, first = page.querySelector("main");
				said.append("width " + root.scrollWidth + " of " + root.clientWidth + "; ");
				said.append("style " + frame.contentWindow.getComputedStyle(page.querySelector("section")).backgroundColor + "; ");
				said.append("state " + root.className + "; ");
				const look = setInterval(() => {
					if (page.querySelector("main") !== first) {
						said.append("read " + "again; ");
						clearInterval(look);
					}
				}, 100);
			};
		</script>`)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(framed{w}, r)
	})
	return mux
}

// framed lets the test put the page into a frame.
type framed struct{ http.ResponseWriter }

func (f framed) Write(b []byte) (int, error) {
	f.Header().Set("Content-Security-Policy", strings.Replace(debugPolicy, "frame-ancestors 'none'", "frame-ancestors 'self'", 1))
	return f.ResponseWriter.Write(b)
}
