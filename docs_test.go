package pgxtenant_test

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// documentation is every page of the repository, by its path, but for those that the command line writes.
func documentation(t *testing.T) map[string]string {
	pages := make(map[string]string)
	for path, text := range filesOf(t, ".md") {
		if !strings.HasPrefix(path, "docs/cli/") {
			pages[path] = text
		}
	}
	require.Greater(t, len(pages), 15)
	return pages
}

func filesOf(t *testing.T, suffix string) map[string]string {
	files := make(map[string]string)
	require.NoError(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "testdata" || d.Name() == "bin") {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, suffix) {
			text, err := os.ReadFile(path)
			files[filepath.ToSlash(path)] = string(text)
			return err
		}
		return nil
	}))
	return files
}

var (
	fence      = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$")
	link       = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading    = regexp.MustCompile(`(?m)^#+ (.+)$`)
	notAnchor  = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
	testName   = regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z]\\w*)`(?:/([^`|;]+))?")
	testFunc   = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
	packageDot = regexp.MustCompile(`\b(tenant(?:cache|goose|grpc|limit|migrate|prom|tern))\.([A-Z]\w*)`)
)

// Each link between pages leads somewhere, to a heading if it says so.
func TestLinksOfTheDocumentation(t *testing.T) {
	t.Parallel()
	for page, text := range documentation(t) {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			path := page
			if target != "" {
				path = filepath.Join(filepath.Dir(page), target)
			}
			require.FileExists(t, path+filepath.FromSlash(orFolder(path)), "%s links to %s", page, m[1])
			if anchor != "" {
				linked, err := os.ReadFile(path)
				require.NoError(t, err)
				require.Contains(t, anchors(string(linked)), anchor, "%s links to %s", page, m[1])
			}
		}
	}
}

// orFolder makes a folder's path one of a file in it.
func orFolder(path string) string {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return "/main.go"
	}
	return ""
}

// anchors are what GitHub makes of a page's headings.
func anchors(text string) (all []string) {
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		all = append(all, strings.ReplaceAll(notAnchor.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return all
}

// Each test that a page names is there, and each of its cases.
func TestTestsThatTheDocumentationNames(t *testing.T) {
	t.Parallel()
	var all strings.Builder
	there := make(map[string]bool)
	for _, text := range filesOf(t, "_test.go") {
		all.WriteString(text)
		for _, m := range testFunc.FindAllStringSubmatch(text, -1) {
			there[m[1]] = true
		}
	}
	named := 0
	for page, text := range documentation(t) {
		for _, m := range testName.FindAllStringSubmatch(text, -1) {
			require.True(t, there[m[1]], "%s names %s", page, m[1])
			named++
			if m[2] == "" {
				continue
			}
			// The name of a case may have commas in it: the longest that is one counts.
			for rest := strings.Split(strings.Trim(m[2], ", "), ", "); len(rest) > 0; {
				n := len(rest)
				for n > 0 && !strings.Contains(all.String(), `"`+strings.Join(rest[:n], ", ")+`"`) {
					n--
				}
				require.Positive(t, n, "%s names %s/%s", page, m[1], rest[0])
				rest = rest[n:]
			}
		}
	}
	require.Greater(t, named, 100)
}

// What pages and the package documentation show of Go is Go, and has the package's names and types. What the
// reader brings along, names without a package in lower case, may be anything.
func TestCodeOfTheDocumentation(t *testing.T) {
	t.Parallel()
	imports := exported(t)
	modules := make(map[string]string) // by the name of a package in contrib, its code
	for path, text := range filesOf(t, ".go") {
		if dir, file := filepath.Split(path); strings.HasPrefix(dir, "contrib/") && strings.Count(dir, "/") == 2 && !strings.HasSuffix(file, "_test.go") {
			modules[filepath.Base(dir)] += text
		}
	}
	blocks := 0
	for page, text := range documentation(t) {
		for _, m := range fence.FindAllStringSubmatch(text, -1) {
			if m[1] != "go" {
				continue
			}
			blocks++
			for _, err := range check(m[2], imports) {
				t.Errorf("%s: %v, in\n%s", page, err, m[2])
			}
			for _, name := range packageDot.FindAllStringSubmatch(m[2], -1) {
				declared := regexp.MustCompile(`(?m)^(?:func |type |var |const |\t)` + name[2] + `\b`)
				require.Regexp(t, declared, modules[name[1]], "%s names %s", page, name[0])
			}
		}
	}
	require.Greater(t, blocks, 20)
	require.NotEmpty(t, check("db.Nope(ctx)", imports), "what is not there is found")
	require.NotEmpty(t, check("config.MaxPools = \"x\"", imports))
	require.NotEmpty(t, check("x := pgxtenant.Tenant{Id: \"x\"}", imports))
}

// exported finds the packages that the documentation may speak of, as the go command has compiled them.
func exported(t *testing.T) types.Importer {
	var out, complaint bytes.Buffer
	list := exec.CommandContext(t.Context(), "go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".", "github.com/jackc/pgx/v5/stdlib")
	list.Stdout, list.Stderr = &out, &complaint
	require.NoError(t, list.Run(), complaint.String())
	files := make(map[string]string)
	for line := range strings.Lines(out.String()) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		files[path] = file
	}
	return importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) { return os.Open(files[path]) })
}

// shown are packages as pages name them, and before them what each piece of code may use.
var shown = map[string]string{
	"pgxtenant": "github.com/pgxtenant/pgxtenant", "pgx": "github.com/jackc/pgx/v5", "pgxpool": "github.com/jackc/pgx/v5/pgxpool", "stdlib": "github.com/jackc/pgx/v5/stdlib",
	"context": "context", "errors": "errors", "fmt": "fmt", "http": "net/http", "os": "os", "slog": "log/slog", "sql": "database/sql", "time": "time",
}

const given = `
var (
	ctx    context.Context
	db     *pgxtenant.TenantDB
	config *pgxtenant.Config
	pool   *pgxpool.Pool
	mux    *http.ServeMux
	w      http.ResponseWriter
	r      *http.Request
)

type Project struct{ ID, Name string }
`

// check returns what is wrong with a piece of Go: declarations, or statements of a function.
func check(code string, imports types.Importer) (found []error) {
	text := func(body string) string {
		head := "package p\n"
		for name, path := range shown {
			if strings.Contains(given+body, name+".") {
				head += fmt.Sprintf("import %s %q\n", name, path)
			}
		}
		return head + given + body
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "", text(code), 0)
	if err != nil {
		if file, err = parser.ParseFile(fset, "", text("func _() error {\n"+code+"\nreturn nil\n}"), 0); err != nil {
			return []error{err}
		}
	}
	known := regexp.MustCompile(`^undefined: [a-z]\w*$|^declared and not used|^"[^"]*" imported.* and not used|missing return|is not used$|repeated|no new variables`)
	conf := types.Config{Importer: imports, Error: func(err error) {
		var te types.Error
		if errors.As(err, &te) && !known.MatchString(te.Msg) {
			found = append(found, err)
		}
	}}
	_, _ = conf.Check("p", fset, []*ast.File{file}, nil)
	return found
}
