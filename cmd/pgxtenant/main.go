// Command pgxtenant is the command line for operators of a service that uses package pgxtenant: it makes and
// removes tenants, puts tables under row-level security, audits a database, and shows what a running service does.
//
//	pgxtenant help
//
// docs/command-line.md tells how it is configured and what its exit codes mean; docs/cli has a page for each command.
package main

import (
	"os"

	"github.com/pgxtenant/pgxtenant/cmd/pgxtenant/internal/cli"
)

//go:generate go run ./internal/docs/write ../../docs/cli

func main() { os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
