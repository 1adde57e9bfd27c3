// Package redistest starts Redis servers for tests and examples: real ones, which can be killed, paused and started
// again. They keep nothing on disk, and end with the process that started them, however that ends: a shell of its
// own session holds a pipe to it, and when the pipe closes it kills the server and removes its folder.
//
// It speaks to them without a client, so that the module needs none.
package redistest
