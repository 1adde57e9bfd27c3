// Package pgtest gives every test a PostgreSQL server of its own.
//
// A test package hands its TestMain to Main, and each test asks New for a fresh
// database:
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
//	func TestSomething(t *testing.T) {
//		db := pgtest.New(t)
//		db.RLSTable("note")
//		pool, err := pgxpool.New(t.Context(), db.AppURL())
//		…
//	}
//
// The server starts with the first New and is shared by the tests of the process.
// It is the one that PGXTENANT_TEST_DATABASE names (the URL of a role that may
// create databases and roles); without it, one started from PostgreSQL's own
// programs where they are installed, else one in a container. A test that finds
// none of these fails: it never skips.
//
// A server that this package started ends with the process, however the process
// ends. A supervising shell of its own session holds a pipe to it; when the pipe
// closes, after a panic or a kill -9 too, it stops the server and removes its
// folder.
//
// Fault tests take a server of their own from NewServer, which they may stop,
// crash and start again, or put a Proxy or a PgBouncer between.
package pgtest
