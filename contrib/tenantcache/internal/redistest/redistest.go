// Package redistest runs real Redis servers for tests. They end with the process that started them, however that ends.
package redistest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// startTimeout is how long a server, or a cluster, may take until it answers.
const startTimeout = time.Minute

// supervise kills the server when it reads a line. When the other end of standard input is closed, whatever the
// reason, it also removes the folder.
const supervise = `"$@" >log 2>&1 </dev/null & echo $!; read -r _; last=$?
kill -KILL $! 2>/dev/null; wait $!
[ $last = 0 ] || rm -rf "$PWD"`

// Server is a redis-server on a loopback port of its own, without persistence. It ends with the process at the
// latest. One goroutine at a time may use it.
type Server struct {
	Addr string

	dir     string
	busPort string // of a cluster's nodes
	args    []string
	shell   *exec.Cmd
	stdin   io.WriteCloser // nil while it does not run
	pid     int
}

// Start starts a server with further settings, such as "--maxmemory", "1mb".
func Start(settings ...string) (*Server, error) {
	dir, err := os.MkdirTemp("", "redistest-")
	if err != nil {
		return nil, fmt.Errorf("redistest: %w", err)
	}
	// Another process may take a port before the server does.
	for range 5 {
		var port, busPort string
		if port, err = freePort(); err == nil {
			busPort, err = freePort()
		}
		if err != nil {
			break
		}
		s := &Server{Addr: net.JoinHostPort("127.0.0.1", port), dir: dir, busPort: busPort}
		s.args = append([]string{"redis-server", "--bind", "127.0.0.1", "--port", port, "--cluster-port", busPort,
			"--save", "", "--appendonly", "no", "--dir", dir}, settings...)
		if err = s.Restart(); err == nil {
			return s, nil
		}
	}
	return nil, errors.Join(err, os.RemoveAll(dir))
}

// Restart starts a server that was killed again, on the same port and empty.
func (s *Server) Restart() (err error) {
	s.shell = exec.Command("/bin/sh", append([]string{"-c", supervise, "supervise"}, s.args...)...)
	s.shell.Dir = s.dir
	s.shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is not for it
	if s.stdin, err = s.shell.StdinPipe(); err != nil {
		return fmt.Errorf("redistest: %w", err)
	}
	stdout, err := s.shell.StdoutPipe()
	if err != nil {
		return fmt.Errorf("redistest: %w", err)
	}
	if err := s.shell.Start(); err != nil {
		return fmt.Errorf("redistest: %w", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		s.pid, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err == nil {
		err = s.await()
	}
	if err != nil {
		s.Kill()
		return fmt.Errorf("redistest: %w\n%s", err, s.log())
	}
	return nil
}

func (s *Server) log() string {
	log, _ := os.ReadFile(filepath.Join(s.dir, "log")) // without it there is nothing to tell
	return string(log)
}

// await returns once the server answers.
func (s *Server) await() error {
	client := redis.NewClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
	defer client.Close()
	return until(func() error {
		if strings.Contains(s.log(), "Failed listening") {
			return errPort
		}
		return client.Ping(context.Background()).Err()
	})
}

// Kill ends the server with SIGKILL, and returns when it is gone.
func (s *Server) Kill() {
	if s.stdin != nil {
		_, _ = s.stdin.Write([]byte{'\n'}) // fails only if the shell has ended
		s.end()
	}
}

func (s *Server) end() {
	_ = s.stdin.Close()
	_ = s.shell.Wait() // the status is of no interest
	s.stdin = nil
}

// Pause stops the server's process: it accepts connections, and says nothing.
func (s *Server) Pause() error { return syscall.Kill(s.pid, syscall.SIGSTOP) }

// Resume has it go on.
func (s *Server) Resume() error { return syscall.Kill(s.pid, syscall.SIGCONT) }

// Close kills the server and removes its folder.
func (s *Server) Close() error {
	if s.stdin != nil {
		s.end()
	}
	return os.RemoveAll(s.dir)
}

// StartCluster starts a Cluster of three servers, and returns when all agree on it.
func StartCluster() (servers []*Server, err error) {
	defer func() {
		if err != nil {
			for _, s := range servers {
				err = errors.Join(err, s.Close())
			}
		}
	}()
	for range 3 {
		s, err := Start("--cluster-enabled", "yes")
		if err != nil {
			return servers, err
		}
		servers = append(servers, s)
	}
	return servers, join(servers)
}

func join(servers []*Server) error {
	ctx := context.Background()
	const slots = 16384
	for i, s := range servers {
		from, to := i*slots/len(servers), (i+1)*slots/len(servers)-1
		client := redis.NewClient(&redis.Options{Addr: s.Addr})
		err := client.ClusterAddSlotsRange(ctx, from, to).Err()
		for _, other := range servers[:i] {
			host, port, _ := net.SplitHostPort(other.Addr)
			err = errors.Join(err, client.Do(ctx, "cluster", "meet", host, port, other.busPort).Err())
		}
		if err = errors.Join(err, client.Close()); err != nil {
			return fmt.Errorf("redistest: %w", err)
		}
	}
	for _, s := range servers {
		client := redis.NewClient(&redis.Options{Addr: s.Addr})
		err := until(func() error {
			info, err := client.ClusterInfo(ctx).Result()
			if err == nil && (!strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, "cluster_size:3")) {
				err = errors.New("the cluster is not joined: " + info)
			}
			return err
		})
		if err = errors.Join(err, client.Close()); err != nil {
			return fmt.Errorf("redistest: %w", err)
		}
	}
	return nil
}

var errPort = errors.New("the port is taken")

// until repeats f until it succeeds.
func until(f func() error) (err error) {
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = f(); err == nil || errors.Is(err, errPort) {
			return err
		}
	}
	return err
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("redistest: %w", err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port), nil
}
