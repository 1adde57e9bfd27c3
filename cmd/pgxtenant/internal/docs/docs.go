// Package docs writes the pages about the command line: in Markdown, and as man pages.
package docs

import (
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Write writes a page for each command into a folder, and the man pages into its folder man. What is there of
// commands that are gone is removed.
func Write(root *cobra.Command, folder string) error {
	man := filepath.Join(folder, "man")
	for _, pattern := range []string{filepath.Join(folder, "*.md"), filepath.Join(man, "*.1")} {
		old, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, path := range old {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	root.InitDefaultCompletionCmd()
	root.DisableAutoGenTag = true
	if err := doc.GenMarkdownTree(root, folder); err != nil {
		return err
	}
	// One date for all, so that pages change with what they say only.
	date := time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC)
	return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Date: &date, Source: "pgxtenant", Manual: "pgxtenant"}, man)
}
