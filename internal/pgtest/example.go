package pgtest

import (
	"context"
	"testing"
)

// Example stands in for a test where New wants one and there is none: in an example. End runs its clean-ups, the
// last one first; what would end a test panics instead.
type Example struct {
	testing.TB // nil; New needs no more than the methods below
	cleanups   []func()
}

func (e *Example) Helper()                  {}
func (e *Example) Context() context.Context { return context.Background() }
func (e *Example) Cleanup(f func())         { e.cleanups = append(e.cleanups, f) }
func (e *Example) Fatal(args ...any)        { panics{}.Fatal(args...) }

// End ends the example.
func (e *Example) End() {
	for len(e.cleanups) > 0 {
		last := len(e.cleanups) - 1
		f := e.cleanups[last]
		e.cleanups = e.cleanups[:last]
		f()
	}
}
