//go:build !race

package pgxtenant

const raceEnabled = false
