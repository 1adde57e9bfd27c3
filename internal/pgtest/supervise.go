//go:build linux || darwin

package pgtest

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

//go:embed supervise.sh
var superviseScript string

// supervisor is a folder with at most one running program in it. Both end with
// the process, by way of supervise.sh. One goroutine at a time may use it.
type supervisor struct {
	*helper
	dir string
	as  *syscall.Credential // nil: the process's own user
}

// supervise makes the folder. The signal is the one that ends the program at once.
// PostgreSQL refuses to run as root, so root's servers run as the user postgres or nobody.
func supervise(signal string) (*supervisor, error) {
	s := new(supervisor)
	if os.Geteuid() == 0 {
		var err error
		if s.as, err = unprivileged(); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(s.parent(), "pgtest-")
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	s.dir = dir
	if err := s.give(dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	cmd := exec.Command("/bin/sh", "-c", superviseScript, "supervise", dir, signal)
	cmd.Env = serverEnv()
	cmd.SysProcAttr = ownSession()
	cmd.SysProcAttr.Credential = s.as
	if s.helper, err = startHelper(cmd); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

// parent is the folder for the supervisor's own: what TMPDIR says, else one in
// memory, where making a database takes a fraction of the time that it takes on disk.
func (s *supervisor) parent() string {
	const memory, enough = "/dev/shm", 4 << 30
	parent := os.TempDir()
	var stat syscall.Statfs_t
	if os.Getenv("TMPDIR") == "" && syscall.Statfs(memory, &stat) == nil &&
		uint64(stat.Bavail)*uint64(stat.Bsize) >= enough && reachable(memory) {
		parent = memory
	}
	if s.as != nil && !reachable(parent) {
		parent = "/tmp"
	}
	return parent
}

// write makes a file that only the program and this process can read.
func (s *supervisor) write(name string, content []byte) (path string, err error) {
	path = filepath.Join(s.dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return "", fmt.Errorf("pgtest: %w", err)
	}
	return path, s.give(path)
}

func (s *supervisor) give(path string) error {
	if s.as == nil {
		return nil
	}
	if err := os.Chown(path, int(s.as.Uid), int(s.as.Gid)); err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	return nil
}

// run runs a program to its end.
func (s *supervisor) run(args ...string) error {
	if err := s.call("run "+shellQuote(args), startTimeout); err != nil {
		return fmt.Errorf("pgtest: %s: %w\n%s", args[0], err, s.log())
	}
	return nil
}

// start starts a program in the background.
func (s *supervisor) start(args ...string) error {
	return s.call("start "+shellQuote(args), startTimeout)
}

// signal sends a signal to the program and waits until it has ended.
func (s *supervisor) signal(name string) error {
	return s.call("stop "+name, startTimeout)
}

// exited reports whether the started program has ended by itself.
func (s *supervisor) exited() bool {
	_, err := os.Stat(filepath.Join(s.dir, "exit"))
	return !errors.Is(err, fs.ErrNotExist)
}

// log is the end of what the programs printed.
func (s *supervisor) log() string {
	content, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	const most = 4000
	return string(content[max(0, len(content)-most):])
}

// ownSession keeps Ctrl-C from a child, which must be there after the tests to clean up.
func ownSession() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// unprivileged is the user that root's servers run as.
func unprivileged() (*syscall.Credential, error) {
	var errs []error
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("pgtest: user %s: %w", name, err)
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, fmt.Errorf("pgtest: PostgreSQL does not run as root, and there is no user to run it as: %w", errors.Join(errs...))
}

// reachable reports whether any user may make a folder in dir, as in /tmp: then
// the one whom the folder is given to can also remove it.
func reachable(dir string) bool {
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm()&0o003 != 0o003 {
		return false
	}
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
	}
	return true
}

// serverEnv is the environment of servers: none of PGHOST and its like.
func serverEnv() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
}

func shellQuote(args []string) string {
	quoted := make([]string, len(args))
	for i, arg := range args {
		quoted[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}
