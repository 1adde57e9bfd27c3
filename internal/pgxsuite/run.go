package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// outcome is what became of a test: "pass", "fail", "skip", or "hang" if its process ended before it.
type outcome struct {
	result string
	output string // what it printed
}

// results are the outcomes of one run, by package and test: "pgxpool.TestConnect/sub".
type results map[string]outcome

// timeout is how long the tests of a package may take; they need a few seconds to a minute.
const timeout = 5 * time.Minute

// compile makes the test programs, which are the same for all modes.
func (t *tree) compile(ctx context.Context, packages []string, race bool) error {
	for _, pkg := range packages {
		args := []string{"test", "-c", "-o", program(pkg)}
		if race {
			args = append(args, "-race")
		}
		if _, err := goCommand(ctx, t.pgx(pkg), append(args, ".")...); err != nil {
			return err
		}
	}
	return nil
}

func program(pkg string) string { return "./suite_" + strings.ReplaceAll(pkg, ".", "pgx") + ".test" }

// run runs the tests of a package in one mode. When their process dies, by a panic or because a test
// hangs, the tests it was in the middle of are repeated each on its own, then it goes on with the others.
func (t *tree) run(ctx context.Context, pkg string, env []string, only string, leaveOut []string) (results, error) {
	all := results{}
	var done []string
	for _, test := range leaveOut {
		done = append(done, regexp.QuoteMeta(test))
	}
	for range 10 {
		part, err := t.runOnce(ctx, pkg, env, "-test.run="+only, "-test.skip=^("+strings.Join(done, "|")+")$")
		if err != nil {
			return nil, err
		}
		maps.Copy(all, part)
		var unfinished []string
		for name, o := range part {
			if o.result == "hang" {
				unfinished = append(unfinished, topLevel(name))
			}
		}
		if len(unfinished) == 0 {
			return all, nil
		}
		all[died(pkg)] = outcome{"fail", part[unfinished[0]].output}
		slices.Sort(unfinished)
		for _, name := range slices.Compact(unfinished) {
			test := strings.TrimPrefix(name, pkg+" ")
			again, err := t.runOnce(ctx, pkg, env, "-test.timeout=60s", "-test.run=^"+regexp.QuoteMeta(test)+"$")
			if err != nil {
				return nil, err
			}
			maps.Copy(all, again)
		}
		for name := range part {
			if name == topLevel(name) {
				done = append(done, regexp.QuoteMeta(strings.TrimPrefix(name, pkg+" ")))
			}
		}
	}
	return nil, fmt.Errorf("the tests of %s keep dying", pkg)
}

func (t *tree) runOnce(ctx context.Context, pkg string, env []string, args ...string) (results, error) {
	args = append([]string{"tool", "test2json", "-t", program(pkg), "-test.v=test2json", "-test.timeout=" + timeout.String()}, args...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = t.pgx(pkg)
	cmd.Env = append(os.Environ(), env...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r, outside, parseErr := parse(stdout, pkg)
	_, _ = io.Copy(io.Discard, stdout)
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = ctx.Err()
		if r.count("fail", nil)+r.count("hang", nil) == 0 {
			r[died(pkg)] = outcome{"fail", outside} // by a data race between tests, say
		}
	}
	return r, errors.Join(parseErr, err)
}

// died is the key under which the end of a process is noted that was not a single test's.
func died(pkg string) string { return pkg + " (died)" }

// temporary matches what varies from run to run in the name of a test: the folder from T.TempDir.
var temporary = regexp.MustCompile(`[^'= ]*/Test\w*?\d+/\d{3}`)

// parse reads what test2json writes. What the tests print outside of any test is returned apart, and is
// part of the output of tests that did not end.
func parse(r io.Reader, pkg string) (found results, outside string, err error) {
	found = results{}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, "", err
		}
		var e struct{ Action, Test, Output string }
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, "", fmt.Errorf("test2json: %w: %s", err, line)
		}
		key := pkg + " " + temporary.ReplaceAllLiteralString(e.Test, "TEMP")
		o := found[key]
		switch {
		case e.Test == "":
			outside += e.Output
			continue
		case e.Action == "run":
			o.result = "hang" // until the contrary is seen
		case e.Action == "pass", e.Action == "fail", e.Action == "skip":
			o.result = e.Action
		case e.Action == "output":
			o.output += e.Output
		}
		found[key] = o
	}
	for key, o := range found {
		if o.result == "hang" && key == topLevel(key) {
			o.output += outside
			found[key] = o
		}
	}
	return found, outside, nil
}

// topLevel returns the key of the test function that a test is part of.
func topLevel(key string) string {
	pkg, test, _ := strings.Cut(key, " ")
	test, _, _ = strings.Cut(test, "/")
	return pkg + " " + test
}

// leaves tells the tests that have no subtests.
func (r results) leaves() map[string]bool {
	leaves := map[string]bool{}
	for key := range r {
		leaves[key] = true
	}
	for key := range r {
		for at := strings.LastIndexByte(key, '/'); at > 0; at = strings.LastIndexByte(key[:at], '/') {
			delete(leaves, key[:at])
		}
	}
	return leaves
}

func (r results) count(result string, leaves map[string]bool) (n int) {
	for key, o := range r {
		if o.result == result && (leaves == nil && key == topLevel(key) || leaves[key]) {
			n++
		}
	}
	return n
}

// saveOutput keeps what the tests printed that did not pass.
func (r results) saveOutput(dir, mode string) error {
	var sb strings.Builder
	for _, key := range slices.Sorted(maps.Keys(r)) {
		if o := r[key]; o.result == "fail" || o.result == "hang" {
			fmt.Fprintf(&sb, "=== %s: %s\n%s\n", key, o.result, o.output)
		}
	}
	return os.WriteFile(filepath.Join(dir, mode+".txt"), []byte(sb.String()), 0o644)
}
