package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// runIn runs the tests of modules that hold these files, and returns what is printed.
func runIn(t *testing.T, flags string, files map[string]string) (output string, ok bool) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(os.Args[0])
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOTEST_MAIN=1", "GOFLAGS="+flags)
	out, err := cmd.CombinedOutput()
	return string(out), err == nil
}

func TestMain(m *testing.M) {
	if os.Getenv("GOTEST_MAIN") != "" {
		os.Args = os.Args[:1]
		main()
		return
	}
	os.Exit(m.Run())
}

const (
	module  = "module m\n\ngo 1.25.0\n"
	passing = "package m\n\nimport \"testing\"\n\nfunc TestA(t *testing.T) { t.Run(\"sub\", func(t *testing.T) {}) }\n"
)

func test(body string) string {
	return "package m\n\nimport (\n\"os\"\n\"testing\"\n\"time\"\n)\n\nvar _, _ = os.Exit, time.Sleep\n\n" + body + "\n"
}

func TestSummary(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		flags string
		files map[string]string
		last  string
		ok    bool
		says  []string
	}{
		"every module": {
			files: map[string]string{"go.mod": module, "a_test.go": passing, "n/o/go.mod": module, "n/o/a_test.go": passing,
				"n/testdata/go.mod": "not a module", ".hidden/go.mod": "not a module"},
			last: "4 passed, 0 failed, 0 skipped", ok: true, says: []string{"ok    m  "},
		},
		"a failure and a skip": {
			files: map[string]string{"go.mod": module, "a_test.go": test(
				`func TestA(t *testing.T) { t.Log("why A") ; t.Fail() }; func TestB(t *testing.T) { t.Skip("why not B") }; func TestC(t *testing.T) { t.Log("silent") }`)},
			last: "1 passed, 1 failed, 1 skipped", says: []string{"why A", "why not B", "FAIL  m  "},
		},
		"a panic": {
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(t *testing.T) { go panic("loud"); time.Sleep(time.Hour) }`)},
			last:  "0 passed, 1 failed, 0 skipped", says: []string{"panic: loud"},
		},
		"a time-out": {
			flags: "-timeout=1s",
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(t *testing.T) { time.Sleep(time.Hour) }`)},
			last:  "0 passed, 1 failed, 0 skipped", says: []string{"test timed out after 1s", "gotest: m was ended after ", "TestA"},
		},
		"an exit": {
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(t *testing.T) { println("last words"); os.Exit(3) }`)},
			last:  "0 passed, 1 failed, 0 skipped", says: []string{"last words"},
		},
		"a failing TestMain": {
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(*testing.T) {}; func TestMain(m *testing.M) { m.Run(); println("leak"); os.Exit(1) }`)},
			last:  "1 passed, 1 failed, 0 skipped", says: []string{"leak"},
		},
		"a build failure": {
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(t *testing.T) { undefined() }`), "b/b_test.go": passing},
			last:  "2 passed, 1 failed, 0 skipped", says: []string{"undefined: undefined"},
		},
		"a vet failure": {
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(t *testing.T) { t.Logf("%d", "x") }`)},
			last:  "0 passed, 1 failed, 0 skipped", says: []string{"wrong type"},
		},
		"a broken module": {
			files: map[string]string{"go.mod": module, "a_test.go": passing, "b/go.mod": "nonsense\n", "b/a_test.go": passing},
			last:  "2 passed, 1 failed, 0 skipped", says: []string{"nonsense"},
		},
		"no test at all": {
			files: map[string]string{"go.mod": module, "a.go": "package m\n"},
			last:  "0 passed, 0 failed, 0 skipped", says: []string{"no test ran"},
		},
		"only skipped": {
			files: map[string]string{"go.mod": module, "a_test.go": test(`func TestA(t *testing.T) { t.Skip() }`)},
			last:  "0 passed, 0 failed, 1 skipped", says: []string{"no test ran"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			output, ok := runIn(t, c.flags, c.files)
			lines := strings.Split(strings.TrimSuffix(output, "\n"), "\n")
			if got := lines[len(lines)-1]; got != c.last || ok != c.ok {
				t.Errorf("ends with %q, ok %v; want %q, ok %v\n%s", got, ok, c.last, c.ok, output)
			}
			for _, want := range c.says {
				if !strings.Contains(output, want) {
					t.Errorf("does not say %q\n%s", want, output)
				}
			}
			if slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, "silent") }) {
				t.Errorf("prints what passed\n%s", output)
			}
		})
	}
}
