package pgxtenant

import (
	"bytes"
	"strconv"
	"strings"
)

// leavings are the kinds of session state that outlive a transaction, and so could reach the next
// tenant on the connection. The binding itself leaves none.
type leavings uint8

const (
	// leavesSequence: a sequence was or may have been drawn from; currval and lastval would tell.
	leavesSequence leavings = 1 << iota
	// leavesSession: settings, roles, cursors, temporary objects, advisory locks, and statements prepared by
	// SQL, perhaps under the names of ours or pgx's, which would then run in their place.
	leavesSession
	// leavesForGood is what cannot be cleaned away without harm, so that the connection is closed
	// instead: notifications that pgx may have queued, dblink connections, and a cache of pgx's whose
	// statements are gone, each of which would fail once.
	leavesForGood

	leavesAll = leavesSequence | leavesSession
)

// cleaning is one statement that removes leavings of the previous tenant. All of them may run inside
// a transaction, ahead of the binding and in its segment, unlike DISCARD ALL; none of them touches the
// prepared statements that pgx keeps, unless SQL has put others in their place.
type cleaning struct {
	sql      string
	leavings leavings
	prepare  []byte
	execute  []byte
	bit      uint64 // of wireConn.prepared
}

var cleanings = makeCleanings(
	// First of all, so that the rest is what it seems. DEALLOCATE ALL would take pgx's own too. A statement of
	// pgx's that SQL replaced is gone after it, which pgx finds out by an error of the one who uses it next.
	cleaning{sql: "do $$ declare n text; begin for n in select name from pg_catalog.pg_prepared_statement() where from_sql loop execute pg_catalog.format('deallocate %I', n); end loop; end $$", leavings: leavesSession},
	// Then the role, so that the rest runs as the one that logged in.
	cleaning{sql: "reset session authorization", leavings: leavesSession},
	cleaning{sql: "reset role", leavings: leavesSession},
	cleaning{sql: "close all", leavings: leavesSession},
	cleaning{sql: "unlisten *", leavings: leavesSession}, // at commit; wireConn drops notifications until then
	cleaning{sql: "select pg_catalog.pg_advisory_unlock_all()", leavings: leavesSession},
	cleaning{sql: "discard temp", leavings: leavesSession},
	cleaning{sql: "reset all", leavings: leavesSession},
	cleaning{sql: "discard sequences", leavings: leavesSession | leavesSequence},
)

const deallocating = 0 // index in cleanings of what removes statements that SQL prepared

func makeCleanings(all ...cleaning) []cleaning {
	for i := range all {
		name := "pgxtenant_clean_" + strconv.Itoa(i)
		all[i].prepare = appendPrepare(nil, name, all[i].sql)
		all[i].execute = appendExecute(nil, name)
		all[i].bit = 1 << (2*maxShapes + i) // above the bits of shapes
	}
	return all
}

// leavingsOfTag tells from a CommandComplete tag what the command may have left on the session. Only
// commands known to leave nothing are trusted; any other, and any of a later server, counts as leaving
// state. rows is the number of rows the command returned, and none that it was described as one that
// returns no rows: CREATE TABLE AS and SELECT INTO say "SELECT n" without returning n rows.
func leavingsOfTag(tag []byte, rows int64, none bool) leavings {
	verb, rest, _ := bytes.Cut(tag, []byte(" "))
	switch string(verb) {
	case "SELECT":
		n, err := strconv.ParseInt(string(rest), 10, 64)
		if err != nil || n != rows || none {
			return leavesSession
		}
		return 0
	case "INSERT", "UPDATE", "MERGE", "COPY":
		return leavesSequence // by a default, most often
	case "DELETE", "BEGIN", "START", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "FETCH", "MOVE", "SHOW",
		"NOTIFY", "UNLISTEN", "TRUNCATE", "LOCK", "VACUUM", "ANALYZE", "REINDEX", "CHECKPOINT", "CLOSE":
		return 0
	case "PREPARE":
		if string(rest) == "TRANSACTION" {
			return 0
		}
	case "LISTEN":
		return leavesForGood
	case "DEALLOCATE":
		if string(rest) == "ALL" {
			return leavesForGood
		}
		return 0
	case "DISCARD":
		if string(rest) == "ALL" {
			return 0
		}
	}
	return leavesSession
}

// forgetsStatements tells from a CommandComplete tag whether prepared statements may be gone.
func forgetsStatements(tag []byte) bool {
	return bytes.HasPrefix(tag, []byte("DEALLOCATE")) || string(tag) == "DISCARD ALL"
}

// leavingsOfText tells from a statement's text what its tag hides: SELECTs that change the session
// through a function or view. What a function of the user's own does inside is not seen here; Config.Strict
// is for that.
func leavingsOfText(sql string) leavings {
	var l leavings
	for i := 0; i < len(sql); i++ {
		switch sql[i] | 0x20 {
		case 's':
			if hasFold(sql[i:], "set_config") {
				l |= leavesSession
			} else if hasFold(sql[i:], "setval") {
				l |= leavesSequence
			} else if hasFold(sql[i:], "setseed") {
				l |= leavesForGood // nothing resets it
			}
		case 'n':
			if hasFold(sql[i:], "nextval") {
				l |= leavesSequence
			}
		case 'a':
			if hasFold(sql[i:], "advisory_lock") {
				l |= leavesSession
			}
		case 'p': // an UPDATE of this view is a SET
			if hasFold(sql[i:], "pg_settings") {
				l |= leavesSession
			}
		case 'd':
			if hasFold(sql[i:], "dblink_connect") {
				l |= leavesForGood
			}
		case 'u': // a name in other letters, which may be any of these
			if hasFold(sql[i:], `u&"`) {
				l |= leavesForGood
			}
		case 'q', 't': // functions that run SQL, of which they are given the text
			if hasFold(sql[i:], "query_to_xml") || hasFold(sql[i:], "ts_stat") || hasFold(sql[i:], "ts_rewrite") {
				l |= leavesForGood
			}
		}
	}
	return l
}

func hasFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}
