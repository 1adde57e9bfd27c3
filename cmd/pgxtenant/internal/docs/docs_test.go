package docs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/cmd/pgxtenant/internal/cli"
)

// The pages in docs/cli are those of the program as it is: go generate makes them.
func TestPagesAreUpToDate(t *testing.T) {
	t.Parallel()
	fresh := t.TempDir()
	require.NoError(t, Write(cli.Root(), fresh))
	kept := filepath.Join("..", "..", "..", "..", "docs", "cli")
	list := func(root string) (names []string) {
		require.NoError(t, filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
			if err == nil && !entry.IsDir() {
				name, _ := filepath.Rel(root, path)
				names = append(names, name)
			}
			return err
		}))
		return names
	}
	require.Equal(t, list(fresh), list(kept), "go generate ./... in cmd/pgxtenant")
	for _, name := range list(fresh) {
		want, err := os.ReadFile(filepath.Join(fresh, name))
		require.NoError(t, err)
		have, err := os.ReadFile(filepath.Join(kept, name))
		require.NoError(t, err)
		require.Equal(t, string(want), string(have), "%s: go generate ./... in cmd/pgxtenant", name)
	}
}
