package cli

import (
	"bytes"
	"context"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// envCommand makes the test's own program the command line, which then is run under -race too.
const envCommand = "PGXTENANT_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(envCommand) != "" {
		os.Exit(Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	pgtest.Main(m)
}

// passwords are those of all tests' roles. No output may hold one.
var passwords sync.Map

// shop is a database of a service, and how the command line reaches it.
type shop struct {
	*pgtest.DB
	t   *testing.T
	env []string
}

func newShop(t *testing.T) *shop {
	t.Helper()
	d := pgtest.New(t)
	for _, conn := range []string{d.OwnerURL(), d.AppURL()} {
		u, err := url.Parse(conn)
		require.NoError(t, err)
		password, _ := u.User.Password()
		require.NotEmpty(t, password)
		passwords.Store(password, true)
	}
	return &shop{d, t, []string{"PGXTENANT_ADMIN=" + d.OwnerURL(), "PGXTENANT_DATABASE=" + d.AppURL(), "PGXTENANT_REGISTRY_TTL=1ms"}}
}

// result is how a run of the program ended.
type result struct {
	t        *testing.T
	code     int
	out, err string
}

// run runs the program in a clean environment, without a terminal.
func run(t *testing.T, env []string, args ...string) *result {
	t.Helper()
	return runWith(t, "", env, args...)
}

func runWith(t *testing.T, stdin string, env []string, args ...string) *result {
	t.Helper()
	cmd := program(t, t.Context(), env, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		require.IsType(t, &exec.ExitError{}, err)
	}
	r := &result{t, cmd.ProcessState.ExitCode(), out.String(), errs.String()}
	noSecrets(t, r.out+r.err)
	require.NotContains(t, r.out+r.err, "\x1b", "no terminal, no escape codes")
	require.NotContains(t, r.err, "panic:")
	return r
}

func program(t *testing.T, ctx context.Context, env []string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(ctx, self, args...)
	home := t.TempDir()
	cmd.Dir = home
	cmd.Env = append([]string{envCommand + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + home, "XDG_CONFIG_HOME=" + home, "GORACE=exitcode=66 atexit_sleep_ms=0"}, env...)
	return cmd
}

func noSecrets(t *testing.T, output string) {
	t.Helper()
	passwords.Range(func(password, _ any) bool {
		require.NotContains(t, output, password, "a password in the output")
		return true
	})
}

func (s *shop) run(args ...string) *result {
	s.t.Helper()
	return run(s.t, s.env, args...)
}

// ok runs the program, which must do what it is told, and returns what it prints.
func (s *shop) ok(args ...string) string {
	s.t.Helper()
	r := s.run(args...)
	require.Zero(s.t, r.code, "%v: %s%s", args, r.out, r.err)
	return r.out
}

func (r *result) fails(code int, says ...string) {
	r.t.Helper()
	require.Equal(r.t, code, r.code, r.out+r.err)
	for _, text := range says {
		require.Contains(r.t, r.err, text)
	}
}

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// installed is a shop with a registry, and a template.
func installed(t *testing.T) *shop {
	t.Helper()
	s := newShop(t)
	s.Exec("create schema template", "create table template.note (id bigint generated always as identity, body text)")
	s.env = append(s.env, "PGXTENANT_TEMPLATE=template")
	s.ok("init")
	return s
}
