//go:build race

package pgxtenant

// raceEnabled tells that memory and time are not as they are without the race detector.
const raceEnabled = true
