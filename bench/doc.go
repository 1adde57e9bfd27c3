// Package bench measures what binding a tenant costs, each time against the best
// that can be had without: the same work in the same run, on pgxpool alone as a role
// that no policy holds, and by the recipes that an application would write by hand.
//
// A [Job] is a piece of work and a [Way] one way of doing it. The benchmarks of
// this package run every way of a job one after the other:
//
//	go test -bench Read -run '^$' -count 10
//
// Command ratios runs them by turns, in short slices, and prints the ratios.
// That is what to go by on a machine that is not quite quiet.
package bench
