// Pgxsuite runs pgx's own tests with every connection bound to a tenant by package pgxtenant, and
// compares the results with those of unbound connections to the same server.
//
//	go run ./internal/pgxsuite [flags]
//
// It works on copies of both modules in a temporary folder: pgx in the version that go.mod requires,
// with hooks added where a connection is made, and pgxtenant with a file that uses them.
//
// It fails if a test passes unbound and fails bound, unless the test cannot pass for a reason that is
// listed in exceptions.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// modes are the ways to bind, each a run of all tests.
var modes = []mode{
	{name: "row"},                             // one row tenant
	{name: "strict"},                          // with the setting that cleans the session at every change of tenant
	{name: "unprepared"},                      // the binding prepared anew each time, as behind a pooler
	{name: "settings"},                        // a tenant with several settings of its own
	{name: "schema"},                          // a schema tenant
	{name: "sealed"},                          // a signed tenant: simple queries are sent as extended messages
	{name: "fragments"},                       // the network delivers, and the caller writes, in small pieces
	{name: "tls"},                             // by TLS, with channel binding where it can be had
	{name: "rotate", packages: pooled},        // each checkout from a pool by another tenant
	{name: "rotate-strict", packages: pooled}, // with the strict setting
}

type mode struct {
	name     string
	packages []string // those for which the mode differs from others; nil is all
}

var pooled = []string{"pgxpool", "stdlib"}

func main() {
	var o options
	var names []string
	for _, m := range modes {
		names = append(names, m.name)
	}
	flag.StringVar(&o.source, "source", ".", "folder of the pgxtenant `module` to test")
	flag.StringVar(&o.work, "work", "", "`folder` to keep the copies and the tests' output in (default: a temporary one, removed afterwards)")
	flag.StringVar(&o.only, "run", "", "run only tests that match the `regexp`")
	flag.BoolVar(&o.race, "race", false, "with the race detector")
	flag.BoolVar(&o.verbose, "v", false, "print the output of tests that fail")
	flag.Func("modes", "comma-separated `list` out of "+strings.Join(names, ", ")+" (default: all)", list(&o.modes, names))
	packages := []string{".", "pgconn", "pgxpool", "stdlib", "pgtype"}
	flag.Func("packages", "comma-separated `list` out of "+strings.Join(packages, ", ")+" (default: all)", list(&o.packages, packages))
	flag.Parse()
	if o.modes == nil {
		o.modes = names
	}
	if o.packages == nil {
		o.packages = packages
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	ok, err := o.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "pgxsuite:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func list(to *[]string, of []string) func(string) error {
	return func(s string) error {
		for name := range strings.SplitSeq(s, ",") {
			if !slices.Contains(of, name) {
				return fmt.Errorf("%q is none of %s", name, strings.Join(of, ", "))
			}
			*to = append(*to, name)
		}
		return nil
	}
}

type options struct {
	source, work, only string
	race, verbose      bool
	modes, packages    []string
}

// run reports whether every test did as expected.
func (o *options) run(ctx context.Context) (ok bool, err error) {
	if o.work == "" {
		if o.work, err = os.MkdirTemp("", "pgxsuite"); err != nil {
			return false, err
		}
		defer os.RemoveAll(o.work)
	}
	t, err := makeTree(ctx, o.work, o.source, o.packages)
	if err != nil {
		return false, err
	}
	if err := t.compile(ctx, o.packages, o.race); err != nil {
		return false, err
	}
	server, err := pgtest.Start(ctx)
	if err != nil {
		return false, err
	}
	defer server.Close()

	fmt.Printf("pgx %s, packages %s\n", t.version, strings.Join(o.packages, " "))
	baseline, err := o.runMode(ctx, t, server, mode{name: "unbound"})
	if err != nil {
		return false, err
	}
	ok = true
	for _, m := range modes {
		if !slices.Contains(o.modes, m.name) {
			continue
		}
		bound, err := o.runMode(ctx, t, server, m)
		if err != nil {
			return false, err
		}
		if !compare(m, baseline, bound, o.verbose, o.only == "") {
			ok = false
		}
	}
	printExceptions(o.modes)
	return ok, nil
}

func (o *options) runMode(ctx context.Context, t *tree, server *pgtest.Server, m mode) (results, error) {
	env, err := prepareDatabase(ctx, server, m.name == "tls")
	if err != nil {
		return nil, err
	}
	env = append(env, "PGXSUITE_MODE="+m.name)
	start := time.Now()
	all := results{}
	for _, pkg := range o.packages {
		if !m.covers(pkg) {
			continue
		}
		var leaveOut []string
		for _, e := range exceptions {
			if name, ok := strings.CutPrefix(e.test, pkg+" "); ok && e.skip && e.in(m.name) {
				leaveOut = append(leaveOut, name)
			}
		}
		r, err := t.run(ctx, pkg, env, o.only, leaveOut)
		if err != nil {
			return nil, err
		}
		maps.Copy(all, r)
	}
	took := time.Since(start).Round(time.Second)
	bindings, err := countBindings(ctx, server)
	if err != nil {
		return nil, err
	}
	fmt.Printf("%-14s %s; %s in %v\n", m.name, all.summary(), bindings, took)
	return all, all.saveOutput(o.work, m.name)
}

func (m *mode) covers(pkg string) bool { return m.packages == nil || slices.Contains(m.packages, pkg) }
