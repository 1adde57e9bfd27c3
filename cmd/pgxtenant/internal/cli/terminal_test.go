package cli

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// patience is how long a test waits for what comes soon on any machine.
const patience = 2 * time.Minute

// screen is a real terminal of 80 columns: a tmux of its own.
type screen struct {
	t      *testing.T
	socket string
	done   string // a file that has the exit code when the program has ended
}

// caughtUp asks the terminal where its cursor is, and reads the answer, which ends in R: by then the terminal has taken
// all that was printed before.
const caughtUp = `saved=$(stty -g); stty -icanon -echo; printf '\033[6n'
until [ "$(dd bs=1 count=1 2>/dev/null)" = R ]; do :; done
stty "$saved"
`

// onScreen runs the program in a terminal. Its output stays there when it has ended.
func onScreen(t *testing.T, env []string, args ...string) *screen {
	t.Helper()
	parent := os.TempDir() // t.TempDir's are too long for a socket, and this may be
	if len(parent) > 80 {
		parent = "/tmp"
	}
	folder, err := os.MkdirTemp(parent, "screen")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	s := &screen{t, filepath.Join(folder, "tmux"), filepath.Join(folder, "code")}
	cmd := program(t, t.Context(), env, args...)
	script := "cd '" + cmd.Dir + "'\n"
	for _, e := range cmd.Env {
		name, value, _ := strings.Cut(e, "=")
		script += "export " + name + "='" + value + "'\n"
	}
	script += "trap : INT\nexport TERM=screen-256color\nstty -a > " + s.done + ".before\n'" + strings.Join(cmd.Args, "' '") + "'\n" +
		"code=$?\nstty -a > " + s.done + ".after\n" + caughtUp + "echo $code > " + s.done + ".new; mv " + s.done + ".new " + s.done + "\nexec cat\n"
	path := filepath.Join(folder, "script")
	require.NoError(t, os.WriteFile(path, []byte(script), 0o600))
	s.tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "sh", path)
	t.Cleanup(func() { _ = exec.Command("tmux", "-S", s.socket, "kill-server").Run() })
	return s
}

func (s *screen) tmux(args ...string) string {
	s.t.Helper()
	out, err := exec.CommandContext(context.Background(), "tmux", append([]string{"-u", "-S", s.socket}, args...)...).CombinedOutput()
	require.NoError(s.t, err, "tmux (apt install tmux): %s", out)
	return string(out)
}

// text is what is on the screen, above it too, with lines that the terminal has broken put together again.
func (s *screen) text(options ...string) string {
	s.t.Helper()
	text := s.tmux(append([]string{"capture-pane", "-p", "-J", "-S", "-"}, options...)...)
	noSecrets(s.t, text)
	return strings.TrimRight(text, "\n ")
}

// until waits for the screen to show something.
func (s *screen) until(shows string) string {
	s.t.Helper()
	require.Eventually(s.t, func() bool { return strings.Contains(s.text(), shows) }, patience, 20*time.Millisecond, "%s", s)
	return s.text()
}

func (s *screen) String() string { return s.text() }

// ended waits for the program to end, and returns its exit code.
func (s *screen) ended() string {
	s.t.Helper()
	require.Eventually(s.t, func() bool { _, err := os.Stat(s.done); return err == nil }, patience, 20*time.Millisecond, "%s", s)
	code, err := os.ReadFile(s.done)
	require.NoError(s.t, err)
	return strings.TrimSpace(string(code))
}

// restored requires that the terminal is as it was.
func (s *screen) restored() {
	s.t.Helper()
	before, err := os.ReadFile(s.done + ".before")
	require.NoError(s.t, err)
	after, err := os.ReadFile(s.done + ".after")
	require.NoError(s.t, err)
	require.Equal(s.t, string(before), string(after))
	require.Equal(s.t, "0 1", strings.TrimSpace(s.tmux("display-message", "-p", "#{alternate_on} #{cursor_flag}")))
}

// fits requires that no line is longer than the terminal is wide.
func fits(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		require.LessOrEqual(t, len([]rune(strings.TrimRight(line, "\n"))), 80, line)
	}
}

func TestListOnATerminal(t *testing.T) {
	t.Parallel()
	s := installed(t)
	long := strings.Repeat("x", 60)
	s.ok("tenant", "create", "acme", "--plan", "evil\x1b[31m", "--alias", long+".example.com,"+long+".example.org")
	s.ok("tenant", "create", "initech-"+long, "--isolation", "schema", "--status", "suspended")
	for _, noColor := range []string{"", "1"} {
		term := onScreen(t, append(s.env, "NO_COLOR="+noColor), "tenant", "list")
		require.Equal(t, "0", term.ended())
		text := term.text()
		fits(t, text)
		require.Len(t, strings.Split(text, "\n"), 3, text)
		require.Contains(t, text, `evil\x1b[31m`)
		require.Contains(t, text, "~")
		require.Equal(t, noColor == "", strings.Contains(term.text("-e"), "\x1b["), "%q", term.text("-e"))
	}
	// Elsewhere than on a terminal all is whole.
	require.Contains(t, s.ok("tenant", "list"), long+".example.com "+long+".example.org")
}

func TestDeletionAsksOnATerminal(t *testing.T) {
	t.Parallel()
	s := installed(t)
	s.ok("tenant", "create", "acme")
	term := onScreen(t, s.env, "tenant", "delete", "acme")
	fits(t, term.until("Type acme to go on:"))
	term.tmux("send-keys", "no", "Enter")
	require.Equal(t, "4", term.ended(), "%s", term)
	require.Contains(t, s.ok("tenant", "show", "acme"), "active")

	term = onScreen(t, s.env, "tenant", "delete", "acme")
	term.until("Type acme to go on:")
	term.tmux("send-keys", "C-c")
	require.Equal(t, "130", term.ended(), "%s", term)
	require.Contains(t, s.ok("tenant", "show", "acme"), "active")

	// Ended while it waits, it is completed by the same call.
	term = onScreen(t, append(s.env, "PGXTENANT_REGISTRY_TTL=1h"), "tenant", "delete", "acme")
	term.until("Type acme to go on:")
	term.tmux("send-keys", "acme", "Enter")
	term.until("Waiting 1h0m0s")
	require.Eventually(t, func() bool { return strings.Contains(s.ok("tenant", "show", "acme"), "deleting") }, patience, 20*time.Millisecond)
	term.tmux("send-keys", "C-c")
	require.Equal(t, "130", term.ended(), "%s", term)
	fits(t, term.text())
	require.Contains(t, term.text(), "The same command goes on where it stopped")
	s.ok("tenant", "delete", "acme", "--yes")
	s.run("tenant", "show", "acme").fails(exitFound)
}
