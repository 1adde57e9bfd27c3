// Package redistest starts Redis servers for tests: real ones, that can be killed, stopped and started again. They end
// with the test, and with its process whatever ends that.
package redistest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Server is a Redis server that keeps nothing on disk. One goroutine at a time may use it.
type Server struct {
	Network, Addr string // for redis.Options

	dir   string
	args  []string
	pid   int
	shell *exec.Cmd
	stdin io.Closer // the shell ends the server when this is closed
}

// supervisor runs a server until standard input ends, whoever closes it.
const supervisor = `"$@" >log 2>&1 & pid=$!; echo $pid; cat >/dev/null; kill -KILL $pid; wait $pid`

// startTimeout is how long a server, or a cluster, may take until it answers.
const startTimeout = 30 * time.Second

// Start starts a server on a socket of its own.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// New is Start for what outlives a test. The server must be closed.
func New() (*Server, error) {
	dir, err := os.MkdirTemp("", "redistest-")
	if err != nil {
		return nil, err
	}
	s := &Server{Network: "unix", Addr: filepath.Join(dir, "socket"), dir: dir}
	s.args = []string{"--port", "0", "--unixsocket", s.Addr}
	return s, s.start()
}

// Client returns a client with these options, but for the address.
func (s *Server) Client(t testing.TB, options redis.Options) *redis.Client {
	t.Helper()
	options.Network, options.Addr = s.Network, s.Addr
	client := redis.NewClient(&options)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// Kill ends the server with SIGKILL, and all its data.
func (s *Server) Kill() {
	_ = s.stdin.Close()
	_ = s.shell.Wait()
}

// Restart starts a server that was killed again, at the same address and without data.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
}

// Stop has the server stand still, with its connections open, until Continue or Kill.
func (s *Server) Stop(t testing.TB) { s.signal(t, syscall.SIGSTOP) }

// Continue ends Stop.
func (s *Server) Continue(t testing.TB) { s.signal(t, syscall.SIGCONT) }

// Close kills the server and removes its folder.
func (s *Server) Close() {
	s.Kill()
	_ = os.RemoveAll(s.dir)
}

func (s *Server) signal(t testing.TB, signal syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(s.pid, signal); err != nil {
		t.Fatal(err)
	}
}

func (s *Server) start() error {
	program, err := exec.LookPath("redis-server")
	if err != nil {
		return fmt.Errorf("redistest: %w; tools/deps.sh installs it", err)
	}
	s.shell = exec.Command("/bin/sh", append([]string{"-c", supervisor, "redistest", program,
		"--save", "", "--appendonly", "no", "--dir", s.dir}, s.args...)...)
	s.shell.Dir = s.dir
	stdin, err := s.shell.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := s.shell.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.shell.Start(); err != nil {
		return err
	}
	s.stdin = stdin
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		s.pid, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err == nil {
		err = s.ready(func(ctx context.Context, c *redis.Client) error { return c.Ping(ctx).Err() })
	}
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(s.dir, "log"))
		s.Close()
		return fmt.Errorf("redistest: %w\n%s", err, log)
	}
	return nil
}

// ready asks the server until it says yes.
func (s *Server) ready(ask func(context.Context, *redis.Client) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	client := redis.NewClient(&redis.Options{Network: s.Network, Addr: s.Addr, MaxRetries: -1})
	defer client.Close()
	for {
		err := ask(ctx, client)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// StartCluster starts a Redis Cluster of three masters and returns their addresses.
func StartCluster(t testing.TB) []string {
	t.Helper()
	const nodes, slots = 3, 16384
	servers := make([]*Server, nodes)
	addrs := make([]string, nodes)
	for i := range servers {
		port, bus := freePort(t), freePort(t)
		dir, err := os.MkdirTemp("", "redistest-")
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{Network: "tcp", Addr: net.JoinHostPort("127.0.0.1", port), dir: dir}
		s.args = []string{"--bind", "127.0.0.1", "--port", port, "--cluster-enabled", "yes", "--cluster-port", bus}
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		servers[i], addrs[i] = s, s.Addr
		client := s.Client(t, redis.Options{})
		commands := [][]any{{"CLUSTER", "ADDSLOTSRANGE", i * slots / nodes, (i+1)*slots/nodes - 1}}
		if i > 0 {
			_, first, _ := net.SplitHostPort(addrs[0])
			commands = append(commands, []any{"CLUSTER", "MEET", "127.0.0.1", first, servers[0].args[len(servers[0].args)-1]})
		}
		for _, c := range commands {
			if err := client.Do(t.Context(), c...).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range servers {
		if err := s.ready(func(ctx context.Context, c *redis.Client) error {
			info, err := c.ClusterInfo(ctx).Result()
			if err == nil && !strings.Contains(info, "cluster_state:ok") {
				err = fmt.Errorf("the cluster is not ready: %s", info)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return addrs
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}
