package pgtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pgxtenant/pgxtenant/internal/freeport"
)

// startTimeout is how long a server may take for each step: to be made, to accept connections, to stop, to make a
// database. It is for machines that are slow or crowded.
const startTimeout = 3 * time.Minute

// findBinaries finds the folder of PostgreSQL's programs: what PATH names, else
// the newest version in the folders of Debian, Homebrew and Postgres.app.
func findBinaries() (folder string, found bool) {
	var folders []string
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			folders = append(folders, filepath.Dir(path))
		}
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",
		"/usr/pgsql-*/bin",
		"/opt/homebrew/opt/postgresql@*/bin",
		"/usr/local/opt/postgresql@*/bin",
		"/opt/homebrew/opt/postgresql/bin",
		"/usr/local/opt/postgresql/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
		"/usr/local/pgsql/bin",
	} {
		matches, _ := filepath.Glob(pattern) // the patterns are well-formed
		slices.SortFunc(matches, func(a, b string) int { return versionOf(b) - versionOf(a) })
		folders = append(folders, matches...)
	}
	for _, folder := range folders {
		if isExecutable(filepath.Join(folder, "initdb")) && isExecutable(filepath.Join(folder, "postgres")) {
			return folder, true
		}
	}
	return "", false
}

// startBinaries starts the server from the programs in bin.
func (s *Server) startBinaries(ctx context.Context, bin string) error {
	sup, err := supervise(string(stopImmediate))
	if err != nil {
		return err
	}
	local := &localEngine{supervisor: sup, bin: bin}
	if err = local.init(s); err == nil {
		err = local.startOnFreePort(ctx)
	}
	if err != nil {
		_ = sup.close()
		return err
	}
	s.engine = local
	s.url.Host = net.JoinHostPort("127.0.0.1", strconv.Itoa(local.port))
	return nil
}

// localEngine runs the server from PostgreSQL's own programs.
type localEngine struct {
	*supervisor
	bin  string
	port int
}

func (e *localEngine) init(s *Server) error {
	cert, key, err := newCertificate()
	if err != nil {
		return err
	}
	if s.cert, err = e.write("server.crt", cert); err != nil {
		return err
	}
	keyFile, err := e.write("server.key", key)
	if err != nil {
		return err
	}
	password, _ := s.url.User.Password()
	passwordFile, err := e.write("password", []byte(password))
	if err != nil {
		return err
	}
	if err := e.run(filepath.Join(e.bin, "initdb"), "--pgdata="+e.data(), "--username="+s.url.User.Username(),
		"--pwfile="+passwordFile, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"); err != nil {
		return err
	}
	// Shared memory as files of the folder: removing it leaves nothing behind, however the server ended.
	settings := fmt.Sprintf("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\n"+ // a socket's path must be short
		"ssl_cert_file = '%s'\nssl_key_file = '%s'\ndynamic_shared_memory_type = mmap\n", s.cert, keyFile)
	for _, setting := range serverSettings {
		name, value, _ := strings.Cut(setting, "=")
		settings += fmt.Sprintf("%s = '%s'\n", name, value)
	}
	if e.hasStatements() {
		settings += "shared_preload_libraries = 'pg_stat_statements'\n"
	}
	// The last setting of a name wins.
	conf, err := os.OpenFile(filepath.Join(e.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer conf.Close()
	if _, err := conf.WriteString(settings); err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	return nil
}

// serverSettings are those of every server that this package starts. The data need
// not survive a crash of the machine; what was committed survives [Server.Kill], so
// synchronous_commit stays on: without fsync it costs a write into the page cache.
var serverSettings = []string{
	"ssl=on",
	"fsync=off",
	"full_page_writes=off",
	"max_connections=300",
	"log_checkpoints=off",
	// It keeps five thousand statements, of all tests together, and forgets others: a test that counts asks for it.
	"pg_stat_statements.track=none",
}

// startOnFreePort tries again when another process took the port meanwhile.
func (e *localEngine) startOnFreePort(ctx context.Context) (err error) {
	for range 5 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.port, err = freeport.Pick(); err != nil {
			return err
		}
		if err = e.start(); err == nil || !strings.Contains(err.Error(), "could not bind") {
			return err
		}
	}
	return err
}

func (e *localEngine) start() error {
	pidFile := filepath.Join(e.data(), "postmaster.pid")
	_ = os.Remove(pidFile) // of a server that was killed; this supervisor runs no other
	err := e.supervisor.start(filepath.Join(e.bin, "postgres"), "-D", e.data(), "-p", strconv.Itoa(e.port))
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		// The eighth line is the server's status.
		content, err := os.ReadFile(pidFile)
		if lines := strings.Split(string(content), "\n"); err == nil && len(lines) >= 8 && strings.TrimSpace(lines[7]) == "ready" {
			return nil
		}
		if e.exited() {
			return fmt.Errorf("pgtest: the server did not start:\n%s", e.log())
		}
	}
	return fmt.Errorf("pgtest: the server did not start within %v:\n%s", startTimeout, e.log())
}

func (e *localEngine) stop(mode stopMode) error { return e.signal(string(mode)) }

func (e *localEngine) data() string { return filepath.Join(e.dir, "data") }

// hasStatements reports whether the library pg_stat_statements can be loaded. A
// server that cannot load a library does not start.
func (e *localEngine) hasStatements() bool {
	folders := []string{filepath.Join(e.bin, "../lib"), filepath.Join(e.bin, "../lib/postgresql")}
	if output, err := exec.Command(filepath.Join(e.bin, "pg_config"), "--pkglibdir").Output(); err == nil {
		folders = append(folders, strings.TrimSpace(string(output)))
	}
	return slices.ContainsFunc(folders, func(folder string) bool {
		matches, _ := filepath.Glob(filepath.Join(folder, "pg_stat_statements.*"))
		return len(matches) > 0
	})
}

// versionOf finds the major version in the path of a folder of programs.
func versionOf(path string) int {
	version := 0
	for _, field := range strings.FieldsFunc(path, func(r rune) bool { return r < '0' || r > '9' }) {
		if n, err := strconv.Atoi(field); err == nil {
			version = n
			break
		}
	}
	return version
}

func isExecutable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}
