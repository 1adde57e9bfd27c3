package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// redisServer is a server for this example alone, which keeps nothing on disk.
type redisServer struct {
	dir    string
	shell  *exec.Cmd
	stdin  io.Closer // the shell ends the server when this is closed, by kill or by the end of the process
	socket string
}

// redisSupervisor runs a server until standard input ends, whoever closes it, and removes its folder, the first argument.
const redisSupervisor = `dir=$1; shift; "$@" >log 2>&1 & pid=$!; echo started; cat >/dev/null; kill -KILL $pid; wait $pid; rm -rf "$dir"`

// errNoRedis means that no Redis is installed.
var errNoRedis = errors.New("redis-server is not installed")

// startRedis starts a server, or returns errNoRedis.
func startRedis(ctx context.Context) (*redisServer, error) {
	program, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, errNoRedis
	}
	dir, err := os.MkdirTemp("", "saas-redis-")
	if err != nil {
		return nil, err
	}
	s := &redisServer{dir: dir, socket: filepath.Join(dir, "socket")}
	if err := s.start(ctx, program); err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "log"))
		s.kill()
		return nil, fmt.Errorf("redis-server: %w\n%s", err, log)
	}
	return s, nil
}

func (s *redisServer) start(ctx context.Context, program string) (err error) {
	s.shell = exec.Command("/bin/sh", "-c", redisSupervisor, "saas", s.dir, program,
		"--port", "0", "--unixsocket", s.socket, "--save", "", "--appendonly", "no", "--dir", s.dir)
	s.shell.Dir = s.dir
	s.shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for the service, which needs Redis until it has ended
	if s.stdin, err = s.shell.StdinPipe(); err != nil {
		return err
	}
	stdout, err := s.shell.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.shell.Start(); err != nil {
		return err
	}
	if said, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || strings.TrimSpace(said) != "started" {
		return fmt.Errorf("the shell said %q: %w", said, err)
	}
	return s.ready(ctx)
}

// ready asks the server until it answers.
func (s *redisServer) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	client := redis.NewClient(s.options())
	defer client.Close()
	for {
		err := client.Ping(ctx).Err()
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

// options lead to the server.
func (s *redisServer) options() *redis.Options {
	return &redis.Options{Network: "unix", Addr: s.socket}
}

// kill ends the server as a crash would. It may be called again.
func (s *redisServer) kill() {
	if s.stdin != nil {
		_ = s.stdin.Close()
		_ = s.shell.Wait()
		s.stdin = nil
	}
	_ = os.RemoveAll(s.dir) // where there has been no shell to do so
}
