//go:build linux || darwin

package pgtest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// envChild names what the test binary does when a test here runs it again.
const envChild = "PGTEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(envChild) != "" {
		os.Exit(child(m))
	}
	Main(m)
}

// child starts a server, tells where it is, and then ends in the way it was asked to.
func child(m *testing.M) int {
	s, err := startPrivate(context.Background())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	db, err := s.Create(context.Background())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	db.Exec("create table x (n int)")
	local := s.engine.(*localEngine)
	pid, err := os.ReadFile(filepath.Join(local.dir, "pid"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("server %s %s %d %s", s.Addr(), local.dir, local.cmd.Process.Pid, pid)
	switch how := os.Getenv(envChild); how {
	case "panic":
		go func() { panic("as a test may") }()
	case "stopped":
		if err := s.Stop(); err != nil {
			fmt.Println(err)
		}
		fmt.Println("stopped")
	case "leak", "pass":
		shared.once.Do(func() { shared.server = s })
		leakPatience = 0
		if how == "leak" {
			go func() { time.Sleep(time.Hour) }()
		}
		return run(m, nil)
	}
	time.Sleep(time.Hour) // until killed
	return 0
}

type childProcess struct {
	*exec.Cmd
	addr, dir string
	pids      []int // the supervisor and the server
	output    *bufio.Reader
}

// startChild runs child in a process group of its own, as a shell would.
func startChild(t *testing.T, how string) *childProcess {
	t.Helper()
	if _, found := findBinaries(); !found {
		t.Fatal(errNoServer)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), envChild+"="+how)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	output, err := cmd.StdoutPipe()
	require.NoError(t, err)
	cmd.Stderr = cmd.Stdout
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	c := &childProcess{Cmd: cmd, output: bufio.NewReader(output)}
	line, err := c.output.ReadString('\n')
	require.NoError(t, err)
	fields := strings.Fields(line)
	require.Len(t, fields, 5, line)
	c.addr, c.dir = fields[1], fields[2]
	for _, field := range fields[3:] {
		pid, err := strconv.Atoi(field)
		require.NoError(t, err)
		c.pids = append(c.pids, pid)
	}
	return c
}

func (c *childProcess) serverIsUp() bool {
	conn, err := net.Dial("tcp", c.addr)
	if err == nil {
		_ = conn.Close()
	}
	return err == nil
}

func (c *childProcess) requireAllGone(t *testing.T) {
	t.Helper()
	eventually(t, "folder "+c.dir+" removed", func() bool {
		_, err := os.Stat(c.dir)
		return os.IsNotExist(err)
	})
	require.False(t, c.serverIsUp())
	for _, pid := range c.pids {
		eventually(t, fmt.Sprintf("process %d gone", pid), func() bool { return !alive(pid) })
	}
}

// alive reports whether the process is there. A zombie is not: it has ended, and
// only the machine's init has not taken note.
func alive(pid int) bool {
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		_, state, _ := strings.Cut(string(stat), ") ")
		return !strings.HasPrefix(state, "Z")
	}
	return syscall.Kill(pid, 0) == nil
}

func TestServerEndsWithItsProcess(t *testing.T) {
	t.Parallel()
	for how, end := range map[string]func(c *childProcess) error{
		"killed":  func(c *childProcess) error { return c.Process.Kill() },
		"stopped": func(c *childProcess) error { return c.Process.Kill() },
		// As Ctrl-C does: to the whole process group.
		"interrupted": func(c *childProcess) error { return syscall.Kill(-c.Process.Pid, syscall.SIGINT) },
		"panic":       func(*childProcess) error { return nil },
	} {
		t.Run(how, func(t *testing.T) {
			c := startChild(t, how)
			switch how {
			case "panic": // may be gone by now
			case "stopped":
				line, err := c.output.ReadString('\n')
				require.NoError(t, err)
				require.Equal(t, "stopped\n", line)
				require.False(t, c.serverIsUp())
				require.True(t, alive(c.pids[0]), "the supervisor waits")
				require.False(t, alive(c.pids[1]))
			default:
				require.True(t, c.serverIsUp())
				require.True(t, alive(c.pids[0]) && alive(c.pids[1]))
			}
			require.NoError(t, end(c))
			require.Error(t, c.Wait())
			c.requireAllGone(t)
		})
	}
}

func TestNothingIsLeftOfAServerThatWasStarting(t *testing.T) {
	t.Parallel()
	parent, err := os.MkdirTemp("", "starting-")
	require.NoError(t, err)
	defer os.RemoveAll(parent)
	require.NoError(t, os.Chmod(parent, 0o777|os.ModeSticky)) // as /tmp
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), envChild+"=killed", "TMPDIR="+parent)
	require.NoError(t, cmd.Start())
	eventually(t, "initdb at work", func() bool {
		found, err := filepath.Glob(filepath.Join(parent, "pgtest-*", "data", "*"))
		return err == nil && len(found) > 0
	})
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	eventually(t, "folder removed", func() bool {
		entries, err := os.ReadDir(parent)
		return err == nil && len(entries) == 0
	})
}

func TestMainStopsTheServerAndFindsLeaks(t *testing.T) {
	t.Parallel()
	for how, code := range map[string]int{"pass": 0, "leak": 1} {
		t.Run(how, func(t *testing.T) {
			c := startChild(t, how)
			var rest strings.Builder
			_, _ = c.output.WriteTo(&rest)
			_ = c.Wait()
			require.Equal(t, code, c.ProcessState.ExitCode(), rest.String())
			c.requireAllGone(t)
			require.Equal(t, how == "leak", strings.Contains(rest.String(), "time.Sleep"), rest.String())
		})
	}
}
