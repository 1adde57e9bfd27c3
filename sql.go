package pgxtenant

import "strings"

// class is what a statement means for the binding. It is read off the statement's first words; a
// statement taken for another class than its own runs unbound at worst, which policies refuse.
type class uint8

const (
	// ordinary statements run as the tenant: the binding goes before them.
	ordinary class = iota
	// control statements begin or end a transaction, and with it the life of the binding. They pass as
	// they are: a query before BEGIN ISOLATION LEVEL would make it fail, one before ROLLBACK be refused.
	control
	// early statements, such as SET TRANSACTION, must come before any query of the transaction.
	early
	// rewind is ROLLBACK TO SAVEPOINT, which must pass in a failed transaction. It leaves the binding in
	// force, and what was cleaned with it: both come before the first savepoint.
	rewind
	// blank is nothing but space, semicolons and comments. The server runs nothing.
	blank
)

// statement is one of several in a text, from its first word to the end, its semicolon included.
type statement struct {
	start, end int // offsets in the text
	class      class
	copyIn     bool // COPY … FROM, which wants rows from the client
}

// lexer walks over the statements of a text as the server's own scanner would split them: it knows
// strings, quoted names, dollar quotes, nested comments, parentheses and SQL-standard function bodies.
type lexer struct {
	text    string
	pos     int
	escapes bool // standard_conforming_strings is off: a backslash escapes in plain strings too
}

// next returns the next statement, or false at the end of the text.
func (l *lexer) next() (statement, bool) {
	for {
		l.skipBlank()
		if l.pos >= len(l.text) {
			return statement{}, false
		}
		if l.text[l.pos] != ';' {
			break
		}
		l.pos++
	}
	st := statement{start: l.pos}
	var words [4]string // the first words tell the class
	n := 0
	last := ""
	parens, blocks := 0, 0
	for l.pos < len(l.text) {
		switch c := l.text[l.pos]; {
		case c == ';' && parens == 0 && blocks == 0:
			l.pos++
			st.end, st.class = l.pos, classOf(words[:n])
			return st, true
		case c == '(':
			parens++
			l.pos++
		case c == ')':
			parens = max(parens-1, 0)
			l.pos++
		case c == '\'':
			l.skipString(l.escapes)
		case c == '"':
			l.skipQuoted('"')
		case c == '$':
			l.skipDollar()
		case isBlank(c), c == '-', c == '/':
			if before := l.pos; l.skipBlank() == before {
				l.pos++ // an operator
			}
		case isWordStart(c):
			w := l.word()
			if len(w) == 1 && (w[0]|0x20) == 'e' && l.pos < len(l.text) && l.text[l.pos] == '\'' {
				l.skipString(true)
				continue
			}
			if n < len(words) && parens == 0 {
				words[n] = w
				n++
			}
			if parens == 0 && strings.EqualFold(words[0], "copy") && strings.EqualFold(w, "from") {
				st.copyIn = true
			}
			// CREATE FUNCTION … BEGIN ATOMIC …; …; END holds semicolons of its own. Without ATOMIC, begin is a name.
			switch {
			case blocks == 0 && parens == 0 && strings.EqualFold(w, "atomic") && strings.EqualFold(last, "begin"),
				blocks > 0 && strings.EqualFold(w, "case"):
				blocks++
			case blocks > 0 && strings.EqualFold(w, "end"):
				blocks--
			}
			last = w
		default:
			if n == 0 {
				words[0], n = "?", len(words) // does not begin with a word
			}
			l.pos++
		}
	}
	st.end, st.class = l.pos, classOf(words[:n])
	return st, true
}

// classify returns the class of the first statement of text, and whether more follow.
func classify(text string, escapes bool) (first class, several bool) {
	l := lexer{text: text, escapes: escapes}
	l.skipBlankAndSemicolons()
	if l.pos >= len(text) {
		return blank, false
	}
	// Most texts hold one statement: the words at its start are all that need be read.
	if semi := strings.IndexByte(text[l.pos:], ';'); semi < 0 || strings.TrimRight(text[l.pos+semi:], "; \t\r\n") == "" {
		return classOf(l.leadingWords()), false
	}
	st, _ := l.next()
	l.skipBlankAndSemicolons()
	return st.class, l.pos < len(text)
}

// leadingWords returns up to four words that the statement at pos begins with.
func (l *lexer) leadingWords() []string {
	var words [4]string
	n := 0
	for n < len(words) {
		l.skipBlank()
		if l.pos >= len(l.text) || !isWordStart(l.text[l.pos]) {
			break
		}
		words[n] = l.word()
		n++
	}
	return words[:n]
}

func classOf(words []string) class {
	at := func(i int, want string) bool { return i < len(words) && strings.EqualFold(words[i], want) }
	prefixed := func(i int) bool {
		const p = "transaction"
		return i < len(words) && len(words[i]) >= len(p) && strings.EqualFold(words[i][:len(p)], p)
	}
	if len(words) == 0 {
		return ordinary
	}
	switch words[0][0] | 0x20 {
	case 'b':
		if at(0, "begin") {
			return control
		}
	case 'c':
		if at(0, "commit") {
			return control
		}
	case 'e':
		if at(0, "end") {
			return control
		}
	case 'r':
		switch {
		case at(0, "rollback") && (at(1, "to") || (at(1, "work") || at(1, "transaction")) && at(2, "to")):
			return rewind
		case at(0, "rollback"):
			return control
		}
	case 'a':
		if at(0, "abort") {
			return control
		}
	case 'p':
		if at(0, "prepare") && at(1, "transaction") {
			return control
		}
	case 's':
		switch {
		case at(0, "start") && at(1, "transaction"):
			return control
		case at(0, "set") && prefixed(1), // SET TRANSACTION …, SET transaction_read_only = …
			at(0, "set") && (at(1, "local") || at(1, "session")) && prefixed(2):
			return early
		}
	}
	return ordinary
}

func isBlank(c byte) bool {
	return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v'
}

func isWordStart(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || c >= 0x80
}

func (l *lexer) word() string {
	start := l.pos
	for l.pos < len(l.text) {
		c := l.text[l.pos]
		if !isWordStart(c) && c != '$' && (c < '0' || c > '9') {
			break
		}
		l.pos++
	}
	return l.text[start:l.pos]
}

// skipBlank passes over space and comments and returns the new position.
func (l *lexer) skipBlank() int {
	for l.pos < len(l.text) {
		rest := l.text[l.pos:]
		switch {
		case isBlank(rest[0]):
			l.pos++
		case strings.HasPrefix(rest, "--"):
			end := strings.IndexAny(rest, "\r\n")
			if end < 0 {
				end = len(rest)
			}
			l.pos += end
		case strings.HasPrefix(rest, "/*"):
			l.skipComment()
		default:
			return l.pos
		}
	}
	return l.pos
}

func (l *lexer) skipBlankAndSemicolons() {
	for {
		if l.skipBlank() >= len(l.text) || l.text[l.pos] != ';' {
			return
		}
		l.pos++
	}
}

func (l *lexer) skipComment() {
	depth := 0
	for l.pos < len(l.text) {
		switch {
		case strings.HasPrefix(l.text[l.pos:], "/*"):
			depth++
			l.pos += 2
		case strings.HasPrefix(l.text[l.pos:], "*/"):
			depth--
			l.pos += 2
			if depth == 0 {
				return
			}
		default:
			l.pos++
		}
	}
}

func (l *lexer) skipString(escapes bool) {
	for l.pos++; l.pos < len(l.text); l.pos++ {
		switch c := l.text[l.pos]; {
		case c == '\\' && escapes:
			l.pos++
		case c == '\'' && l.pos+1 < len(l.text) && l.text[l.pos+1] == '\'':
			l.pos++ // a doubled quote
		case c == '\'':
			l.pos++
			return
		}
	}
	l.pos = len(l.text)
}

func (l *lexer) skipQuoted(q byte) {
	if end := strings.IndexByte(l.text[l.pos+1:], q); end >= 0 {
		l.pos += end + 2
		return
	}
	l.pos = len(l.text)
}

// skipDollar passes over $tag$…$tag$, or over a lone dollar or a parameter.
func (l *lexer) skipDollar() {
	start := l.pos
	l.pos++
	if l.pos < len(l.text) && isWordStart(l.text[l.pos]) {
		for l.pos < len(l.text) && (isWordStart(l.text[l.pos]) || '0' <= l.text[l.pos] && l.text[l.pos] <= '9') {
			l.pos++
		}
	}
	if l.pos >= len(l.text) || l.text[l.pos] != '$' {
		return
	}
	l.pos++
	tag := l.text[start:l.pos]
	if end := strings.Index(l.text[l.pos:], tag); end >= 0 {
		l.pos += end + len(tag)
		return
	}
	l.pos = len(l.text)
}
