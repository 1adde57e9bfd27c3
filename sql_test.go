package pgxtenant

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestClassify(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]class{
		"":                                     blank,
		" ;; -- x":                             blank,
		"/* a /* nested */ ; begin */":         blank,
		"/* unterminated":                      blank,
		"begin":                                control,
		"BEGIN ISOLATION LEVEL SERIALIZABLE;":  control,
		"-- x\n /* y */ Start  Transaction":    control,
		"start":                                ordinary,
		"Rollback Transaction to savepoint s":  rewind,
		"rollback work and chain":              control,
		"commit":                               control,
		"commit prepared 'x'":                  control,
		"end;;":                                control,
		"rollback to savepoint s":              rewind,
		"abort":                                control,
		"prepare transaction 'x'":              control,
		"prepare p as select 1":                ordinary,
		"set transaction read only":            early,
		"set local transaction_isolation = x":  early,
		"SET SESSION transaction_read_only=on": early,
		"set session characteristics as transaction read only": ordinary,
		"set local x.transaction = 1":                          ordinary,
		"savepoint s":                                          ordinary,
		"select 1":                                             ordinary,
		"(select 1)":                                           ordinary,
		"1":                                                    ordinary,
		"beginning":                                            ordinary,
		"\"begin\"":                                            ordinary,
		"with x as (select 1) select":                          ordinary,
		"begin$":                                               ordinary,
	} {
		got, several := classify(text, false)
		require.Equal(t, want, got, text)
		require.False(t, several, text)
	}
}

func TestLexerSplitsAsTheServerDoes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"select 1; begin; select 2": {"select 1", "begin", "select 2"},
		";;a;;b;":                   {"a", "b"},
		"select ';'';', E'\\';', e'it''s\\';', U&';' ; b":          {"select ';'';', E'\\';', e'it''s\\';', U&';' ", "b"},
		`select "a;""b;" ; b`:                                      {`select "a;""b;" `, "b"},
		"select $$;$$, $a$;$$;$b$;$a$, $1 ; b":                     {"select $$;$$, $a$;$$;$b$;$a$, $1 ", "b"},
		"select a$b$; c$b$":                                        {"select a$b$", "c$b$"},
		"/* ; /* ; */ ; */ a -- ; b\n; c":                          {"a -- ; b\n", "c"},
		"select 1-1;b":                                             {"select 1-1", "b"},
		"create rule r as on insert to t do (delete from t; a); b": {"create rule r as on insert to t do (delete from t; a)", "b"},
		"create function f() returns int begin atomic select case when true then 1 end; select 2; end; commit": {
			"create function f() returns int begin atomic select case when true then 1 end; select 2; end", "commit"},
		"create table begin (begin int, \"end\" int); commit": {"create table begin (begin int, \"end\" int)", "commit"},
		"select 'open ; string":                               {"select 'open ; string"},
		"select $x$ open ; ":                                  {"select $x$ open ; "},
		"select 1; /* open ; ":                                {"select 1"},
		"select \"open ; ":                                    {"select \"open ; "},
		"\u00e9; begin \u00fc;":                               {"\u00e9", "begin \u00fc"},
	} {
		require.Equal(t, want, splitAll(text, false), text)
	}
	require.Equal(t, []string{"select '\\'; b'", "c"}, splitAll("select '\\'; b'; c", true), "with standard_conforming_strings off")
	require.Equal(t, []string{"select '\\'", "b'; c"}, splitAll("select '\\'; b'; c", false))
}

func splitAll(text string, escapes bool) (all []string) {
	l := lexer{text: text, escapes: escapes}
	for {
		st, ok := l.next()
		if !ok {
			return all
		}
		all = append(all, strings.TrimSuffix(text[st.start:l.pos], ";"))
	}
}

// FuzzLexer checks that any text is split into stretches that cover it in order.
func FuzzLexer(f *testing.F) {
	for _, s := range []string{"select 1; begin", "'\\';", "e'\\", "$a$ $a", "/*/**/", "--", "create begin ; end", "\"", "(;)"} {
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, text string, escapes bool) {
		l := lexer{text: text, escapes: escapes}
		end := 0
		n := 0
		for {
			st, ok := l.next()
			if !ok {
				break
			}
			n++
			if st.start < end || l.pos <= st.start || l.pos > len(text) {
				t.Fatalf("statement at %d to %d after %d in %q", st.start, l.pos, end, text)
			}
			end = l.pos
		}
		first, several := classify(text, escapes)
		if (first == blank) != (n == 0) || several != (n > 1) {
			t.Fatalf("%q has %d statements, but is classified as %v, several: %v", text, n, first, several)
		}
	})
}

func TestLeavingsOfText(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]leavings{
		"select 1": 0, "select pg_advisory_xact_lock(1)": 0,
		"select pg_catalog.\"set_config\"('a', 'b', false)":  leavesSession,
		"SELECT PG_TRY_ADVISORY_LOCK(1)":                     leavesSession,
		"select nextval('s'), setval('s', 1)":                leavesSequence,
		"select dblink_connect('x')":                         leavesForGood,
		"update pg_settings set setting = 1":                 leavesSession,
		`select U&"set\005fconfig"('a', 'b', false)`:         leavesForGood,
		"select pg_catalog.query_to_xml($1, true, true, '')": leavesForGood,
		"select ts_stat('select 1'), ts_rewrite('a', 'b')":   leavesForGood,
		"select setseed(0.5)":                                leavesForGood,
	} {
		require.Equal(t, want, leavingsOfText(sql), sql)
	}
}
