package cli

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
)

// commands are all that a user can see.
func commands(c *cobra.Command) (all []*cobra.Command) {
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" && sub.Name() != "completion" {
			all = append(append(all, sub), commands(sub)...)
		}
	}
	return all
}

// Every command has a page of help with examples that can be run, within 80 columns.
func TestHelpOfEachCommand(t *testing.T) {
	t.Parallel()
	root := Root()
	for _, c := range append(commands(root), root) {
		require.NotEmpty(t, c.Example, c.CommandPath())
		require.NotEmpty(t, c.Long, c.CommandPath())
		for _, text := range []string{c.Long, c.Example, c.Short} {
			for line := range strings.Lines(text) {
				require.LessOrEqual(t, len(strings.TrimRight(line, "\n")), 80, line)
			}
		}
		fits(t, c.UsageString())
		for line := range strings.Lines(c.Example) {
			words := strings.Fields(line)
			if words[0] != "pgxtenant" {
				continue
			}
			var args []string
			for _, w := range words[1:] {
				if strings.ContainsAny(w, "|<>") {
					break
				}
				args = append(args, w)
			}
			found, rest, err := root.Find(args)
			require.NoError(t, err, line)
			require.NoError(t, found.ParseFlags(rest), line)
			require.NoError(t, found.ValidateArgs(found.Flags().Args()), line)
		}
	}
	for _, args := range [][]string{{"--help"}, {"tenant", "create", "--help"}, {"help", "audit"}, {}} {
		r := run(t, nil, args...)
		require.Zero(t, r.code)
		require.Contains(t, r.out, "Examples:")
		fits(t, r.out)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	r := run(t, nil, "--version")
	require.Zero(t, r.code)
	require.Regexp(t, `^pgxtenant version \S+\n$`, r.out)
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	r := run(t, nil, "completion", "bash")
	require.Zero(t, r.code, r.err)
	cmd := exec.Command("bash", "-n")
	cmd.Stdin = strings.NewReader(r.out)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	for _, shell := range []string{"zsh", "fish", "powershell"} {
		r := run(t, nil, "completion", shell)
		require.Zero(t, r.code, r.err)
		require.NotEmpty(t, r.out)
	}
	require.Contains(t, run(t, nil, "__complete", "tenant", "s").out, "suspend")
	require.Contains(t, run(t, nil, "__complete", "audit", "--format", "").out, "sarif")
	for args, directive := range map[string]string{"tenant show": ":4", "migrate up --id": ":4", "migrate up --dir": ":16", "tenant list --config": ":8"} {
		require.Contains(t, run(t, nil, append(append([]string{"__complete"}, strings.Fields(args)...), "")...).out, directive+"\n", "files only where they are meant: %s", args)
	}
	run(t, nil, "completion", "tcsh").fails(exitUsage, `unknown command "tcsh"`)
}
