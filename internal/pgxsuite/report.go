package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

func (r results) summary() string {
	leaves := r.leaves()
	failed := func(leaves map[string]bool) int { return r.count("fail", leaves) + r.count("hang", leaves) }
	return fmt.Sprintf("tests: %4d passed %3d failed %3d skipped; with subtests: %4d passed %3d failed %3d skipped",
		r.count("pass", nil), failed(nil), r.count("skip", nil),
		r.count("pass", leaves), failed(leaves), r.count("skip", leaves))
}

// compare prints the tests that went otherwise bound than unbound, and reports whether all of them were
// expected to. In a run of all tests an exception that is not needed counts too, so that the list
// stays short.
func compare(m mode, baseline, bound results, verbose, all bool) (ok bool) {
	ok = true
	leaves := baseline.leaves()
	needed := map[string]bool{}
	for _, key := range slices.Sorted(maps.Keys(baseline)) {
		before, after := baseline[key].result, bound[key].result
		pkg, _, _ := strings.Cut(key, " ")
		if before != "pass" || after == "pass" || !leaves[key] || !m.covers(pkg) {
			continue
		}
		if e := exceptionFor(key, m.name); e != nil {
			needed[e.test] = true
			continue
		}
		ok = false
		if after == "" {
			after = "missing"
		}
		fmt.Printf("\t%s: %s\n", after, key)
		if verbose {
			fmt.Println("\t\t" + indent(bound[key].output))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(bound)) {
		if pkg, _, _ := strings.Cut(key, " "); key == died(pkg) {
			fmt.Printf("\tthe tests' process ended early: %s\n\t\t%s\n", pkg, indent(bound[key].output))
			ok = false
		}
	}
	fmt.Printf("\t%d tests fail as expected\n", len(needed))
	for _, e := range exceptions {
		if all && !needed[e.test] && e.in(m.name) && bound.has(e.test) {
			fmt.Printf("\tpasses, although it is listed as an exception: %s\n", e.test)
			ok = false
		}
	}
	return ok
}

// printExceptions says why tests were expected to fail.
func printExceptions(modes []string) {
	fmt.Println("expected to fail:")
	for _, e := range exceptions {
		in := ""
		if e.modes != nil {
			in = " (" + strings.Join(e.modes, ", ") + ")"
		}
		if e.modes == nil || slices.ContainsFunc(modes, e.in) {
			fmt.Printf("\t%s%s: %s\n", e.test, in, e.reason)
		}
	}
}

func (r results) has(test string) bool { _, ok := r[test]; return ok }

func indent(text string) string { return strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n\t\t") }
