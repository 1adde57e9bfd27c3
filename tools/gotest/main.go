// Command gotest runs the tests of every module below the current folder and sums
// them up. It prints a line per package, the output of what failed, and at the end
//
//	N passed, N failed, N skipped
//
// Its arguments go to go test. It fails when a test or a build failed, and when no
// test ran.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

func main() {
	modules, err := findModules(".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(1)
	}
	s := runAll(modules, os.Args[1:], os.Stdout)
	if !s.finish() {
		os.Exit(1)
	}
}

// atOnce is how many modules are tested at the same time, after the first. That is the root, which keeps all
// CPUs busy; the others mostly wait, for servers that they have stopped and for time to pass.
const atOnce = 2

func runAll(modules, args []string, out io.Writer) *summary {
	total := newSummary(&lockedWriter{out: out})
	run := func(dir string) *summary {
		s := newSummary(total.out)
		if err := s.runModule(dir, args); err != nil {
			fmt.Fprintf(os.Stderr, "gotest: %s: %v\n", dir, err)
			s.broken = true
		}
		return s
	}
	if len(modules) > 0 {
		total.addAll(run(modules[0]))
		modules = modules[1:]
	}
	todo, done := make(chan string), make(chan *summary)
	for range atOnce {
		go func() {
			for dir := range todo {
				done <- run(dir)
			}
		}()
	}
	go func() {
		for _, dir := range modules {
			todo <- dir
		}
		close(todo)
	}()
	for range modules {
		total.addAll(<-done)
	}
	return total
}

// lockedWriter may be used by several goroutines. What is written at once stays together.
type lockedWriter struct {
	mu  sync.Mutex
	out io.Writer
}

func (w *lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

// findModules finds the folders with a go.mod, the outermost first.
func findModules(root string) (dirs []string, err error) {
	err = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != root && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata"):
			return filepath.SkipDir
		case entry.Name() == "go.mod":
			dirs = append(dirs, filepath.Dir(path))
		}
		return nil
	})
	slices.Sort(dirs)
	return dirs, err
}

// event is a line of go test -json; see go doc test2json.
type event struct {
	Action     string
	Package    string
	ImportPath string // of build events, in place of Package
	Test       string
	Elapsed    float64
	Output     string
}

// summary gathers events. One goroutine may use it.
type summary struct {
	out                     io.Writer
	passed, failed, skipped int
	broken                  bool // something failed that no test stands for

	output map[key]*strings.Builder // of what has not ended yet
	tests  map[string]int           // tests that failed, by package
	late   map[string]bool          // packages that go test has ended
}

// key is a test, or with an empty test a package.
type key struct{ pkg, test string }

func newSummary(out io.Writer) *summary {
	return &summary{out: out, output: map[key]*strings.Builder{}, tests: map[string]int{}, late: map[string]bool{}}
}

// addAll adds the counts of another.
func (s *summary) addAll(o *summary) {
	s.passed += o.passed
	s.failed += o.failed
	s.skipped += o.skipped
	s.broken = s.broken || o.broken
}

func (s *summary) runModule(dir string, args []string) error {
	cmd := exec.Command("go", append(append([]string{"test", "-json"}, args...), "./...")...)
	cmd.Dir = dir
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	failedBefore := s.failed
	readErr := s.read(stdout)
	if err := cmd.Wait(); err != nil && s.failed == failedBefore {
		s.broken = true // what it was is printed by now
	}
	return readErr
}

func (s *summary) read(r io.Reader) error {
	for lines := bufio.NewReader(r); ; {
		line, err := lines.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) == nil {
				s.add(e)
			} else {
				fmt.Fprint(s.out, line) // not from a test
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *summary) add(e event) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "output":
		if s.output[k] == nil {
			s.output[k] = new(strings.Builder)
		}
		s.output[k].WriteString(e.Output)
		if strings.HasPrefix(e.Output, "panic: test timed out after ") {
			s.late[e.Package] = true
		}
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "pass", "skip", "fail":
		if e.Test == "" {
			s.endPackage(e)
			return
		}
		switch e.Action {
		case "pass":
			s.passed++
		case "skip":
			s.skipped++
			s.print(k) // with the reason
		case "fail":
			s.failed++
			s.tests[e.Package]++
			s.print(k)
		}
		delete(s.output, k)
	}
}

func (s *summary) endPackage(e event) {
	switch e.Action {
	case "pass":
		fmt.Fprintf(s.out, "ok    %s  %.1fs\n", e.Package, e.Elapsed)
	case "fail":
		// Tests that never ended: the process did, by a panic or a time-out.
		for _, k := range s.open(e.Package) {
			s.print(k)
		}
		s.print(key{pkg: e.Package})
		if s.tests[e.Package] == 0 {
			s.failed++
		}
		if s.late[e.Package] {
			fmt.Fprintf(s.out, "gotest: %s was ended after %.0f s, go test's -timeout: a test hangs (those above were running), or the machine is too slow or busy for this time\n", e.Package, e.Elapsed)
		}
		fmt.Fprintf(s.out, "FAIL  %s  %.1fs\n", e.Package, e.Elapsed)
	}
	for _, k := range s.open(e.Package) {
		delete(s.output, k)
	}
	delete(s.output, key{pkg: e.Package})
}

// open lists the package's tests that have not ended.
func (s *summary) open(pkg string) (open []key) {
	for k := range s.output {
		if k.pkg == pkg && k.test != "" {
			open = append(open, k)
		}
	}
	slices.SortFunc(open, func(a, b key) int { return strings.Compare(a.test, b.test) })
	return open
}

func (s *summary) print(k key) {
	if output := s.output[k]; output != nil {
		fmt.Fprint(s.out, output.String())
	}
}

// finish prints the last line and reports whether all is well.
func (s *summary) finish() bool {
	if s.broken {
		s.failed++
	}
	if s.passed+s.failed == 0 {
		fmt.Fprintln(s.out, "no test ran")
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	return s.failed == 0 && s.passed > 0
}
