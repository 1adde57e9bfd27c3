// Command write writes the pages about the command line into a folder.
package main

import (
	"fmt"
	"os"

	"github.com/pgxtenant/pgxtenant/cmd/pgxtenant/internal/cli"
	"github.com/pgxtenant/pgxtenant/cmd/pgxtenant/internal/docs"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: write FOLDER")
		os.Exit(2)
	}
	if err := docs.Write(cli.Root(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "write:", err)
		os.Exit(1)
	}
}
