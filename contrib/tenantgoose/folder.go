package tenantgoose

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing/fstest"

	"github.com/pressly/goose/v3"
)

// Folders of the file system that New is given.
const (
	sharedFolder = "shared" // once, in the shared schemas
	tenantFolder = "tenant" // once in each tenant's schema or database, and in what those are copied from
)

// Migration is one migration, in a file or in Go.
type Migration struct {
	Version int64
	Name    string // its path, such as tenant/00003_invoice.sql; of one in Go without a file, tenant/00003 (Go)
	Shared  bool   // in the folder shared
}

func (m Migration) folder() string {
	if m.Shared {
		return sharedFolder
	}
	return tenantFolder
}

// migration is what is known of one beforehand.
type migration struct {
	Migration
	sum      string // of the file; empty for one in Go, whose content nobody knows
	noTx     bool   // its way up runs outside of any transaction
	downNoTx bool
	noDown   bool // it has no way back
}

// folder has the migrations of one of the two folders. It is not changed once it is read, and tenants share it.
type folder struct {
	name       string
	migrations []migration // by version
	files      fstest.MapFS
	inGo       []*goose.Migration
}

// annotation is what a line means to goose, in whatever case.
func annotation(words string) *regexp.Regexp {
	return regexp.MustCompile(`(?mi)^[\t ]*--[^\n]*\+goose[\t ]+` + words + `[\t\r ]*$`)
}

var (
	noTransaction = annotation("NO[\t ]+TRANSACTION")
	wayDown       = annotation("Down")
)

// readFolder reads all files, once: each tenant gets the same ones, whatever becomes of the files meanwhile. A
// folder that is not there is nil.
func readFolder(fsys fs.FS, name string, inGo []*goose.Migration) (*folder, error) {
	f := &folder{name: name, files: fstest.MapFS{}, inGo: inGo}
	entries, err := fs.ReadDir(fsys, name)
	if errors.Is(err, fs.ErrNotExist) && len(inGo) == 0 {
		return nil, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("tenantgoose: read folder %s: %w", name, err)
	}
	goFiles := fstest.MapFS{}
	for _, e := range entries {
		at := path.Join(name, e.Name())
		version, err := goose.NumericComponent(e.Name())
		switch {
		case e.IsDir():
			continue
		case path.Ext(at) == ".go":
			goFiles[e.Name()] = &fstest.MapFile{}
			continue
		case !strings.EqualFold(path.Ext(at), ".sql"):
			continue
		case path.Ext(at) != ".sql":
			// goose passes over it, and over the next one, and their SQL would never run.
			return nil, fmt.Errorf("tenantgoose: %s: its name must end in .sql, in lower case", at)
		case err != nil:
			return nil, fmt.Errorf("tenantgoose: %s: its name is not a number above zero, an underscore and the rest: %w", at, err)
		}
		content, err := fs.ReadFile(fsys, at)
		if err != nil {
			return nil, fmt.Errorf("tenantgoose: read %s: %w", at, err)
		}
		f.files[e.Name()] = &fstest.MapFile{Data: content}
		sum := sha256.Sum256(bytes.ReplaceAll(content, []byte("\r\n"), []byte("\n")))
		noTx := noTransaction.Match(content)
		f.migrations = append(f.migrations, migration{Migration: Migration{version, at, name == sharedFolder},
			sum: hex.EncodeToString(sum[:]), noTx: noTx, downNoTx: noTx, noDown: !wayDown.Match(content)})
	}
	for _, m := range inGo {
		at := fmt.Sprintf("%s/%05d (Go)", name, m.Version)
		f.migrations = append(f.migrations, migration{Migration: Migration{m.Version, at, name == sharedFolder},
			noTx: m.UpFnNoTxContext != nil, downNoTx: m.DownFnNoTxContext != nil, noDown: m.DownFnContext == nil && m.DownFnNoTxContext == nil})
	}
	slices.SortFunc(f.migrations, func(a, b migration) int { return cmp.Compare(a.Version, b.Version) })
	for i := 1; i < len(f.migrations); i++ {
		if a, b := f.migrations[i-1], f.migrations[i]; a.Version == b.Version {
			return nil, fmt.Errorf("tenantgoose: %s and %s have the same version; give one of them another", a.Name, b.Name)
		}
	}
	if len(f.migrations) == 0 {
		return nil, nil
	}
	// What goose itself has against them; files with Go in them are there to be told from migrations that nobody registered.
	for file := range f.files {
		goFiles[file] = f.files[file]
	}
	db, end := openDB(nil)
	defer end()
	if _, err := goose.NewProvider(goose.DialectPostgres, db, goFiles, f.providerOptions()...); err != nil {
		return nil, fmt.Errorf("tenantgoose: folder %s: %w", name, err)
	}
	return f, f.parse()
}

// sqlOutside is a file that looks like a migration and is in none of the folders, or empty.
func sqlOutside(fsys fs.FS) string {
	entries, _ := fs.ReadDir(fsys, ".") // what cannot be read there is told of the folders
	for _, e := range entries {
		if _, err := goose.NumericComponent(e.Name()); err == nil && !e.IsDir() && strings.EqualFold(path.Ext(e.Name()), ".sql") {
			return e.Name()
		}
	}
	return ""
}

// parse has goose read all SQL files, both ways, as it does before it applies the first of them: so this is its Up for a
// place where nothing is applied, on a connection that can do nothing.
func (f *folder) parse() error {
	if len(f.files) == 0 {
		return nil
	}
	db := sql.OpenDB(connector{&session{ended: true}})
	defer db.Close()
	p, err := goose.NewProvider(goose.DialectCustom, db, f.files, goose.WithStore(nothingApplied{}), goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()))
	if err == nil {
		_, err = p.Up(context.Background())
	}
	if errors.Is(err, errEnded) {
		return nil // it has come to the first statement
	}
	return fmt.Errorf("tenantgoose: folder %s: %w", f.name, err)
}

// providerOptions are goose's own for one place. It takes no lock, which would be one for the whole database: the run
// has one for each tenant.
func (f *folder) providerOptions(more ...goose.ProviderOption) []goose.ProviderOption {
	inGo := make([]*goose.Migration, len(f.inGo))
	for i, m := range f.inGo {
		own := *m // goose notes the file in it
		inGo[i] = &own
	}
	return append(more, goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()), goose.WithGoMigrations(inGo...))
}

// find returns the migration of a version, or nil.
func (f *folder) find(version int64) *migration {
	i, ok := slices.BinarySearchFunc(f.migrations, version, func(m migration, v int64) int { return cmp.Compare(m.Version, v) })
	if !ok {
		return nil
	}
	return &f.migrations[i]
}

// newest is the highest version; that of no folder is zero.
func (f *folder) newest() int64 {
	if f == nil {
		return 0
	}
	return f.migrations[len(f.migrations)-1].Version
}

// before is the highest version below another; zero if there is none.
func (f *folder) before(version int64) (v int64) {
	for _, m := range f.migrations {
		if m.Version < version {
			v = m.Version
		}
	}
	return v
}
