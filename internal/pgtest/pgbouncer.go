package pgtest

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgxtenant/pgxtenant/internal/freeport"
)

var errNoPgBouncer = errors.New("pgtest: no PgBouncer to test with; any one of these gives one:\n" +
	"\tmake deps                         installs what is missing\n" +
	"\tapt-get install pgbouncer         on Debian and Ubuntu\n" +
	"\tbrew install pgbouncer            on macOS")

// PgBouncer starts a PgBouncer in front of the database's server, stops it after
// the test, and returns the same database reached through it. It knows the owner's,
// the application's and the superuser's roles.
//
// It pools by transaction, with 2 server connections for each database and role.
// Each param is of the form key=value, as in the section pgbouncer of its
// configuration, and takes the place of the default of that key.
func PgBouncer(t testing.TB, db *DB, params ...string) *DB {
	t.Helper()
	program, err := findPgBouncer()
	if err != nil {
		t.Fatal(err)
	}
	sup, err := supervise("KILL") // it has nothing to save
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sup.close(); err != nil {
			t.Error(err)
		}
	})
	port, err := startPgBouncer(sup, program, db, params)
	if err != nil {
		t.Fatal(err)
	}
	return db.Via(net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

func findPgBouncer() (string, error) {
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer", "/opt/homebrew/bin/pgbouncer", "/usr/local/bin/pgbouncer"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errNoPgBouncer
}

func startPgBouncer(sup *supervisor, program string, db *DB, params []string) (port int, err error) {
	super := db.server.url.User
	superPassword, _ := super.Password()
	users := ""
	for _, user := range [][2]string{{db.App, db.password}, {db.Owner, db.password}, {super.Username(), superPassword}} {
		users += fmt.Sprintf("%q %q\n", user[0], user[1])
	}
	userFile, err := sup.write("users", []byte(users))
	if err != nil {
		return 0, err
	}
	if port, err = freeport.Pick(); err != nil {
		return 0, err
	}
	host, serverPort, err := net.SplitHostPort(db.server.Addr())
	if err != nil {
		return 0, fmt.Errorf("pgtest: pgbouncer: %w", err)
	}
	// The last setting of a name wins.
	settings := append([]string{
		"listen_addr=127.0.0.1",
		"listen_port=" + strconv.Itoa(port),
		"unix_socket_dir=",
		"auth_type=scram-sha-256",
		"auth_file=" + userFile,
		"pool_mode=transaction",
		"default_pool_size=2",
		"max_client_conn=500",
		"ignore_startup_parameters=extra_float_digits",
	}, params...)
	config := fmt.Sprintf("[databases]\n* = host=%s port=%s\n[pgbouncer]\n%s\n", host, serverPort, strings.Join(settings, "\n"))
	file, err := sup.write("pgbouncer.ini", []byte(config))
	if err != nil {
		return 0, err
	}
	if err := sup.start(program, file); err != nil {
		return 0, err
	}
	return port, waitForPort(sup, port)
}

// waitForPort waits until the program accepts connections.
func waitForPort(sup *supervisor, port int) error {
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return conn.Close()
		}
		if sup.exited() {
			break
		}
	}
	return fmt.Errorf("pgtest: pgbouncer did not start:\n%s", sup.log())
}
