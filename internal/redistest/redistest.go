//go:build unix

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
)

// startTimeout is how long a server, or a cluster, may take until it answers.
const startTimeout = 2 * time.Minute

// longestParent is how long the name of the folder may be that holds servers' folders: systems take about a hundred bytes for a
// socket's.
const longestParent = 70

// supervise kills the server when it reads a line. When the other end of standard input is closed, whatever the
// reason, it also removes the folder.
const supervise = `"$@" >log 2>&1 </dev/null & echo $!; read -r _; last=$?
kill -KILL $! 2>/dev/null; wait $!
[ $last = 0 ] || rm -rf "$PWD"`

// Server is a redis-server. One goroutine at a time may use it.
type Server struct {
	// Addr is for redis.Options: the path of a socket, or of a cluster's node a loopback address.
	Addr string

	dir     string
	busPort string // of a cluster's nodes
	args    []string
	shell   *exec.Cmd
	stdin   io.WriteCloser // nil while it does not run
	pid     int
}

// Start starts a server on a socket of its own, with further settings such as "--maxmemory", "1mb". The error
// wraps exec.ErrNotFound if Redis is not installed, and ctx's if that ends before the server answers.
func Start(ctx context.Context, settings ...string) (*Server, error) {
	dir, err := newDir()
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "socket")
	s := newServer(dir, socket, append([]string{"--port", "0", "--unixsocket", socket}, settings...))
	if err := s.start(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// StartCluster starts a Cluster of three servers on loopback ports, and returns when all agree on it.
func StartCluster(ctx context.Context) (servers []*Server, err error) {
	defer func() {
		if err != nil {
			for _, s := range servers {
				err = errors.Join(err, s.Close())
			}
		}
	}()
	for range 3 {
		s, err := startNode(ctx)
		if err != nil {
			return servers, err
		}
		servers = append(servers, s)
	}
	return servers, join(ctx, servers)
}

// Restart starts a server that was killed again, at the same address and empty.
func (s *Server) Restart() error { return s.start(context.Background()) }

// Kill ends the server with SIGKILL, and returns when it is gone.
func (s *Server) Kill() {
	if s.stdin != nil {
		_, _ = s.stdin.Write([]byte{'\n'}) // fails only if the shell has ended
		s.end()
	}
}

// Pause stops the server's process: it accepts connections, and says nothing.
func (s *Server) Pause() error { return syscall.Kill(s.pid, syscall.SIGSTOP) }

// Resume has it go on.
func (s *Server) Resume() error { return syscall.Kill(s.pid, syscall.SIGCONT) }

// Close kills the server and removes its folder. It may be called again.
func (s *Server) Close() error {
	if s.stdin != nil {
		s.end()
	}
	return os.RemoveAll(s.dir)
}

func newDir() (string, error) {
	parent := os.TempDir()
	if len(parent) > longestParent {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "redistest-")
	if err != nil {
		return "", fmt.Errorf("redistest: %w", err)
	}
	return dir, nil
}

func newServer(dir, addr string, args []string) *Server {
	return &Server{Addr: addr, dir: dir, args: append([]string{"--save", "", "--appendonly", "no", "--dir", dir}, args...)}
}

func (s *Server) start(ctx context.Context) error {
	program, err := exec.LookPath("redis-server")
	if err != nil {
		return fmt.Errorf("redistest: %w; tools/deps.sh installs it", err)
	}
	s.shell = exec.Command("/bin/sh", append([]string{"-c", supervise, "supervise", program}, s.args...)...)
	s.shell.Dir = s.dir
	s.shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is not for it
	stdin, err := s.shell.StdinPipe()
	if err != nil {
		return fmt.Errorf("redistest: %w", err)
	}
	stdout, err := s.shell.StdoutPipe()
	if err != nil {
		return fmt.Errorf("redistest: %w", err)
	}
	if err := s.shell.Start(); err != nil {
		return fmt.Errorf("redistest: %w", err)
	}
	s.stdin = stdin
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		s.pid, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err == nil {
		err = s.await(ctx)
	}
	if err != nil {
		s.Kill()
		return fmt.Errorf("redistest: %w\n%s", err, s.log())
	}
	return nil
}

func (s *Server) end() {
	_ = s.stdin.Close()
	_ = s.shell.Wait() // the status is of no interest
	s.stdin = nil
}

func (s *Server) log() string {
	log, _ := os.ReadFile(filepath.Join(s.dir, "log")) // without it there is nothing to tell
	return string(log)
}

var errPort = errors.New("the port is taken")

// await returns once the server answers.
func (s *Server) await(ctx context.Context) error {
	return until(ctx, func(ctx context.Context) error {
		if strings.Contains(s.log(), "Failed listening") {
			return errPort
		}
		_, err := s.do(ctx, "PING")
		return err
	})
}

// do sends a command and returns the reply, a line or a text.
func (s *Server) do(ctx context.Context, words ...string) (string, error) {
	network := "unix"
	if s.busPort != "" {
		network = "tcp"
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, s.Addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := io.WriteString(conn, strings.Join(words, " ")+"\r\n"); err != nil {
		return "", err
	}
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	switch kind, rest := line[0], strings.TrimSpace(line[1:]); kind {
	case '+':
		return rest, nil
	case '$':
		n, err := strconv.Atoi(rest)
		if err != nil {
			return "", err
		}
		text := make([]byte, max(n, 0))
		_, err = io.ReadFull(r, text)
		return string(text), err
	default:
		return "", fmt.Errorf("%s: %s", words[0], rest)
	}
}

// until repeats f until it succeeds.
func until(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil || errors.Is(err, errPort) {
			return err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}
