package pgtest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// leakPatience is how long a goroutine may take to end after the tests.
var leakPatience = 20 * time.Second

// Main runs the tests of a package, stops their server, checks that no goroutine
// is left, and exits. The options go to goleak.
func Main(m *testing.M, options ...goleak.Option) {
	os.Exit(run(m, options))
}

func run(m *testing.M, options []goleak.Option) int {
	code := m.Run()
	if err := shared.close(); err != nil {
		fmt.Fprintf(os.Stderr, "pgtest: %v\n", err)
		code = max(code, 1)
	}
	if code != 0 {
		return code // a failed test may well leave a goroutine: say only why it failed
	}
	// goleak itself waits for less than a second for those that are about to end.
	err := goleak.Find(options...)
	for deadline := time.Now().Add(leakPatience); err != nil && time.Now().Before(deadline); {
		err = goleak.Find(options...)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "goleak: errors on successful test run: %v\n", err)
		return 1
	}
	return 0
}

// shared is the process's server, which the first New starts.
var shared sharedServer

type sharedServer struct {
	once   sync.Once
	server *Server
	err    error
}

func (s *sharedServer) get(ctx context.Context) (*Server, error) {
	s.once.Do(func() {
		// The server outlives the test that happens to be first.
		s.server, s.err = Start(context.WithoutCancel(ctx))
	})
	return s.server, s.err
}

func (s *sharedServer) close() error {
	s.once.Do(func() {}) // no test asked for it
	if s.server == nil {
		return nil
	}
	return s.server.Close()
}
