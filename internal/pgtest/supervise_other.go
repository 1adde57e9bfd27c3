//go:build !linux && !darwin

package pgtest

import (
	"errors"
	"syscall"
)

// supervisor is missing here: tests need PGXTENANT_TEST_DATABASE or a container.
type supervisor struct {
	*helper
	dir string
}

func supervise(string) (*supervisor, error) {
	return nil, errors.New("pgtest: cannot start programs of PostgreSQL on this system; set " + EnvDatabase)
}

func (s *supervisor) write(string, []byte) (string, error) { panic("unreachable") }
func (s *supervisor) run(...string) error                  { panic("unreachable") }
func (s *supervisor) start(...string) error                { panic("unreachable") }
func (s *supervisor) signal(string) error                  { panic("unreachable") }
func (s *supervisor) exited() bool                         { panic("unreachable") }
func (s *supervisor) log() string                          { panic("unreachable") }

func ownSession() *syscall.SysProcAttr { return nil }
