package pgtest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

// EnvDatabase names the environment variable with the URL of the server to use.
const EnvDatabase = "PGXTENANT_TEST_DATABASE"

// errNoServer tells how to get a server.
var errNoServer = errors.New("pgtest: no PostgreSQL server to test with; any one of these gives one:\n" +
	"\tmake deps                         installs what is missing\n" +
	"\tapt-get install postgresql        on Debian and Ubuntu\n" +
	"\tbrew install postgresql           on macOS\n" +
	"\ta running Docker engine           then a container is used\n" +
	"\t" + EnvDatabase + "=postgres://user:password@host/postgres   for a server of your own")

// Server is a PostgreSQL server. Its methods are safe for concurrent use, but two
// tests that stop and start one server disturb each other: take one from NewServer.
type Server struct {
	url     url.URL // superuser's, database postgres
	cert    string  // file of the server's certificate
	version int     // server_version_num

	// mu serializes stop and start. engine is nil for a server that this package did not start.
	mu      sync.Mutex
	engine  engine
	running bool
	closed  bool
}

// engine starts and stops the server's processes.
type engine interface {
	start() error
	stop(mode stopMode) error
	close() error // stops the server and removes what it left
}

type stopMode string

const (
	stopFast      stopMode = "INT"  // disconnects clients and shuts down
	stopImmediate stopMode = "QUIT" // as a crash: recovery at the next start
)

// Start starts a server outside of a test, as New does within one. The context
// bounds only the start; Close ends the server, and so does the end of the process.
func Start(ctx context.Context) (*Server, error) {
	if external := os.Getenv(EnvDatabase); external != "" {
		return useExternal(ctx, external)
	}
	return startPrivate(ctx)
}

// NewServer starts a server for this test alone, which the test may stop and
// start. It needs PostgreSQL's programs or Docker even where PGXTENANT_TEST_DATABASE is set.
func NewServer(t testing.TB) *Server {
	t.Helper()
	s, err := startPrivate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Close stops the server for good and removes its folder. A server that
// PGXTENANT_TEST_DATABASE names is left alone.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed, s.running = true, false
	if s.engine == nil {
		return nil
	}
	return s.engine.close()
}

// Stop disconnects every client and shuts the server down; Start brings it back
// on the same address with the same data.
func (s *Server) Stop() error { return s.stop(stopFast) }

// Kill stops the server as a crash would: nothing is said to clients, and the
// next Start recovers from the log: what was committed is there.
func (s *Server) Kill() error { return s.stop(stopImmediate) }

// Start starts a stopped server again. It returns when the server accepts connections.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.controllableLocked(); err != nil || s.running {
		return err
	}
	if err := s.engine.start(); err != nil {
		return err
	}
	s.running = true
	return nil
}

// Restart is Stop, then Start.
func (s *Server) Restart() error {
	if err := s.Stop(); err != nil {
		return err
	}
	return s.Start()
}

// Addr is the server's host and port.
func (s *Server) Addr() string {
	return net.JoinHostPort(s.url.Hostname(), orDefault(s.url.Port(), "5432"))
}

// URL connects to the database postgres as the superuser. Each param is of the
// form key=value and takes the place of the default of that key.
func (s *Server) URL(params ...string) string {
	return withParams(s.url, params)
}

// CertFile is the file of the server's certificate, for sslmode=verify-full with
// sslrootcert. It is empty for a server that PGXTENANT_TEST_DATABASE names.
func (s *Server) CertFile() string { return s.cert }

func (s *Server) stop(mode stopMode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.controllableLocked(); err != nil || !s.running {
		return err
	}
	s.running = false
	return s.engine.stop(mode)
}

func (s *Server) controllableLocked() error {
	switch {
	case s.closed:
		return errors.New("pgtest: the server is closed")
	case s.engine == nil:
		return errors.New("pgtest: cannot stop or start the server of " + EnvDatabase + "; use NewServer")
	}
	return nil
}

func (s *Server) isRunning() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running
}

func useExternal(ctx context.Context, external string) (*Server, error) {
	u, err := url.Parse(external)
	if err != nil || (u.Scheme != "postgres" && u.Scheme != "postgresql") {
		// The value holds a password: do not repeat it.
		return nil, errors.New("pgtest: " + EnvDatabase + " must be of the form postgres://user:password@host:port/database")
	}
	config, err := pgx.ParseConfig(external)
	if err != nil {
		return nil, fmt.Errorf("pgtest: %s: %w", EnvDatabase, err)
	}
	// pgx fills what the URL leaves out from PGHOST and its like: pin it down.
	u.User = url.UserPassword(config.User, config.Password)
	u.Path = "/" + config.Database
	if u.Host == "" && !u.Query().Has("host") {
		u.Host = net.JoinHostPort(config.Host, strconv.Itoa(int(config.Port)))
	}
	s := &Server{url: *u, running: true}
	if err := s.readVersion(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", EnvDatabase, err)
	}
	return s, nil
}

func (s *Server) readVersion(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer conn.Close(ctx)
	err = conn.QueryRow(ctx, "select current_setting('server_version_num')::int").Scan(&s.version)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	return nil
}

// startPrivate starts a server from PostgreSQL's programs, or else in a container.
func startPrivate(ctx context.Context) (*Server, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	bin, found := findBinaries()
	if !found && !haveDocker(ctx) {
		return nil, errNoServer
	}
	s := &Server{url: url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword("postgres", randomHex(16)),
		Path:     "/postgres",
		RawQuery: "sslmode=disable",
	}}
	var err error
	if found {
		err = s.startBinaries(ctx, bin)
	} else {
		err = s.startContainer(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.running = true
	password, _ := s.url.User.Password()
	hash, err := verifier(password)
	if err == nil {
		err = execute(ctx, s.URL(), "alter role current_user password '"+hash+"'")
	}
	if err == nil {
		err = s.readVersion(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func withParams(u url.URL, params []string) string {
	query := u.Query()
	for _, param := range params {
		key, value, _ := strings.Cut(param, "=")
		query.Set(key, value)
	}
	// Connection strings know %20 only.
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20")
	return u.String()
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func orDefault(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}
