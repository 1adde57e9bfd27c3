package tenantgoose

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pressly/goose/v3"
)

// ledgerTable is where goose notes what it has applied, in each place.
const ledgerTable = goose.DefaultTablename

// ledgerSQL is a ledger as one text: the versions in the order in which they were applied. One that is noted as not applied, as goose
// did before its version 3, is marked: goose takes it for applied today.
const ledgerSQL = `string_agg(version_id::text || case when is_applied then '' else '!' end, ' ' order by id)`

// ledger is what was applied in one place, in that order.
type ledger struct {
	applied []int64
	doubt   []int64 // noted as not applied
}

func parseLedger(text string) (l ledger, err error) {
	for word := range strings.FieldsSeq(text) {
		number, doubt := strings.CutSuffix(word, "!")
		v, err := strconv.ParseInt(number, 10, 64)
		switch {
		case err != nil:
			return l, fmt.Errorf("tenantgoose: table %s has version %q: %w", ledgerTable, word, err)
		case v == 0: // goose's mark that the table is there
		case doubt:
			l.doubt = append(l.doubt, v)
		default:
			// Two rows of one version are what goose takes back at once.
			l.applied = append(slices.DeleteFunc(l.applied, func(a int64) bool { return a == v }), v)
		}
	}
	return l, nil
}

// doubtful is the error of a ledger with versions noted as not applied, or nil.
func (l *ledger) doubtful() error {
	if len(l.doubt) == 0 {
		return nil
	}
	return fmt.Errorf("tenantgoose: its table %s has versions %s as not applied, from before goose 3; delete those rows", ledgerTable, joined(l.doubt))
}

func (l *ledger) has(version int64) bool { return slices.Contains(l.applied, version) }

// newest is the highest version that was applied; zero if none was.
func (l *ledger) newest() (v int64) {
	for _, a := range l.applied {
		v = max(v, a)
	}
	return v
}

// lacks are the migrations up to a version that were not applied.
func (l *ledger) lacks(f *folder, to int64) (list []Migration) {
	for _, m := range f.migrations {
		if m.Version <= to && !l.has(m.Version) {
			list = append(list, m.Migration)
		}
	}
	return list
}

// goal is where a call is to bring each place.
type goal struct {
	version int64
	down    bool
}

// String is ForEachOptions.Target. The ways up and down have different ones, so that no run of one goes on with one of the other.
func (g goal) String() string {
	if g.down {
		return strconv.FormatInt(g.version, 10) + " or below"
	}
	return strconv.FormatInt(g.version, 10)
}

// reached reports whether nothing is left to do. On the way up it does not matter what was applied besides: a process with
// older files leaves alone what newer ones have done.
func (g goal) reached(l *ledger, f *folder) bool {
	switch {
	case len(l.doubt) > 0:
		return false
	case g.down:
		return l.newest() <= g.version
	}
	return len(l.lacks(f, g.version)) == 0
}

// describe is the version of a place as it is told: the goal where it is reached, and else the highest that was
// applied, with what is missing below it.
func (g goal) describe(l *ledger, f *folder) string {
	if g.reached(l, f) {
		return g.String()
	}
	text := strconv.FormatInt(l.newest(), 10)
	if missing := l.lacks(f, l.newest()); len(missing) > 0 {
		text += " without " + versions(missing)
	}
	if len(l.doubt) > 0 {
		text += fmt.Sprintf(" (and %s as not applied, by an old goose: delete the rows from %s)", joined(l.doubt), ledgerTable)
	}
	return text
}

func versions(list []Migration) string {
	var v []int64
	for _, m := range list {
		v = append(v, m.Version)
	}
	return joined(v)
}

// joined is a list of at most five versions, since the run table has one of them for each tenant.
func joined(v []int64) string {
	var words []string
	for i, n := range v {
		if i == 5 {
			words = append(words, fmt.Sprintf("%d more", len(v)-i))
			break
		}
		words = append(words, strconv.FormatInt(n, 10))
	}
	return strings.Join(words, ", ")
}
