package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	pgxPath = "github.com/jackc/pgx/v5"
	ourPath = "github.com/pgxtenant/pgxtenant"
)

//go:embed hook.go.txt
var hook []byte

// importHook is added to each package's tests.
const importHook = `package %s_test

import (
	"testing"

	pgxtenant %q
)

func TestSuiteIsBound(t *testing.T) { pgxtenant.SuiteCheck(t) }
`

// edits open pgx to the hook. They change nothing as long as nobody sets the variables.
var edits = []struct{ file, old, new string }{
	{
		"pgconn/pgconn.go",
		`
			return nil, newPerDialConnectError("AfterNetConnect failed", err)
		}
	}
`, `
			return nil, newPerDialConnectError("AfterNetConnect failed", err)
		}
	}
	if SuiteNetConn != nil {
		pgConn.conn = SuiteNetConn(ctx, config, pgConn.conn)
	}
`,
	},
	{
		"pgconn/pgconn.go",
		`
			if config.ValidateConnect != nil {
				err := config.ValidateConnect(ctx, pgConn)
`, `
			if SuiteIdle != nil {
				if err := SuiteIdle(pgConn); err != nil {
					pgConn.conn.Close()
					return nil, newPerDialConnectError("SuiteIdle failed", err)
				}
			}
			if config.ValidateConnect != nil {
				err := config.ValidateConnect(ctx, pgConn)
`,
	},
	{
		"pgconn/pgconn.go",
		"\n// PgConn is a low-level PostgreSQL connection handle.",
		`
// SuiteNetConn wraps a connection above TLS, and above the config's own AfterNetConnect. SuiteIdle is
// called once it is ready for queries. SuiteModeKey is the context's key for pgx's query mode.
var (
	SuiteNetConn func(context.Context, *Config, net.Conn) net.Conn
	SuiteIdle    func(*PgConn) error
)

type SuiteModeKey struct{}

// PgConn is a low-level PostgreSQL connection handle.`,
	},
	{
		"conn.go",
		"\n\tc.pgConn, err = pgconn.ConnectConfig(ctx, &config.Config)\n",
		"\n\tmode := context.WithValue(ctx, pgconn.SuiteModeKey{}, config.DefaultQueryExecMode)\n" +
			"\tc.pgConn, err = pgconn.ConnectConfig(mode, &config.Config)\n",
	},
	{
		"pgxpool/pool.go",
		"\n\tprepareConn := config.PrepareConn\n",
		"\n\tif SuiteConfig != nil {\n\t\tconfig = SuiteConfig(config)\n\t}\n\tprepareConn := config.PrepareConn\n",
	},
	{
		"pgxpool/pool.go",
		"\n// NewWithConfig creates a new [Pool].",
		"\n// SuiteConfig replaces the config of each new pool.\nvar SuiteConfig func(*Config) *Config\n\n// NewWithConfig creates a new [Pool].",
	},
}

// tree is a workspace of two modules: a patched copy of pgx and one of pgxtenant with the hook added.
type tree struct {
	dir     string
	version string // of pgx
}

func (t *tree) pgx(pkg string) string { return filepath.Join(t.dir, "pgx", pkg) }

// makeTree copies pgxtenant from source, and pgx in the version that it requires, into dir, and has the
// tests of each package import the hook.
func makeTree(ctx context.Context, dir, source string, packages []string) (*tree, error) {
	out, err := goCommand(ctx, source, "mod", "download", "-json", pgxPath)
	if err != nil {
		return nil, err
	}
	var pgx struct{ Dir, Version string }
	if err := json.Unmarshal(out, &pgx); err != nil {
		return nil, err
	}
	t := &tree{dir: dir, version: pgx.Version}
	if err := os.CopyFS(filepath.Join(dir, "pgx"), os.DirFS(pgx.Dir)); err != nil {
		return nil, err
	}
	for _, e := range edits {
		if err := replaceOnce(t.pgx(e.file), e.old, e.new); err != nil {
			return nil, fmt.Errorf("pgx %s has changed, adapt the edits: %w", pgx.Version, err)
		}
	}
	for _, pkg := range packages {
		name := filepath.Base(pkg)
		if pkg == "." {
			name = "pgx"
		}
		text := fmt.Sprintf(importHook, name, ourPath)
		if err := os.WriteFile(filepath.Join(t.pgx(pkg), "suite_hook_test.go"), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	if err := copyOurs(ctx, filepath.Join(dir, "pgxtenant"), source); err != nil {
		return nil, err
	}
	// The go directive must not be older than those of the modules used.
	version, err := goCommand(ctx, source, "env", "GOVERSION")
	if err != nil {
		return nil, err
	}
	number, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(string(version)), "go"), " ")
	work := "go " + number + "\n\nuse (\n\t./pgx\n\t./pgxtenant\n)\n"
	return t, os.WriteFile(filepath.Join(dir, "go.work"), []byte(work), 0o644)
}

// copyOurs copies the root package of pgxtenant, what it imports of its own module, and the hook.
func copyOurs(ctx context.Context, dir, source string) error {
	out, err := goCommand(ctx, source, "list", "-deps", "-f", "{{.ImportPath}}", ".")
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(out)) {
		sub, ours := strings.CutPrefix(path+"/", ourPath+"/")
		if !ours {
			continue
		}
		if err := copyFiles(filepath.Join(dir, sub), filepath.Join(source, sub)); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "suite_hook.go"), hook, 0o644)
}

// copyFiles copies the files of one folder, but for tests.
func copyFiles(to, from string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	for _, e := range entries {
		if e.IsDir() || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		content, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, e.Name()), content, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return err
}

func replaceOnce(file, old, new string) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if n := strings.Count(string(content), old); n != 1 {
		return fmt.Errorf("%s: found %d times, want once: %q", file, n, old)
	}
	return os.WriteFile(file, []byte(strings.Replace(string(content), old, new, 1)), 0o644)
}

// goCommand runs the go command and returns what it prints. Its own output is part of an error.
func goCommand(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return out, nil
}
