package pgxtenant

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// nameless takes the schema's own name out of the settings of functions, and refuses it where it stands as
// text, which the server reads only when it runs: in a copy it would lead to the template.
func (d *description) nameless(schema string, names []string) error {
	n := newNaming(schema, names)
	for _, objects := range [][]object{d.made, d.later, d.keys, d.late, d.guards} {
		for i := range objects {
			o := &objects[i]
			if strings.HasPrefix(o.name, "comment ") {
				continue
			}
			head, body, isFunction := o.sql, "", strings.HasPrefix(o.name, "function ")
			if isFunction {
				head, body, _ = strings.Cut(o.sql, "\nAS ")
				o.sql = n.withoutPath(head) + strings.TrimPrefix(o.sql, head)
				body = dollarTag.ReplaceAllString(body, "\n")
			}
			if n.inLiteral(head) || n.inBody(body) {
				return fmt.Errorf("pgxtenant: schema %[1]q cannot be copied: %[2]s names it as text, which would lead from the copy to %[1]q; leave the name out, and let the search_path find its objects", schema, o.name)
			}
		}
	}
	return nil
}

// naming finds a schema's name in texts.
type naming struct {
	schema  string
	word    *regexp.Regexp // the name; what follows it begins with its last group
	path    *regexp.Regexp
	objects []string // of the schema, in lower case
}

func newNaming(schema string, objects []string) *naming {
	quoted := regexp.QuoteMeta(schema)
	n := &naming{
		schema: schema,
		// Quoted or not, in either case; then perhaps space, and a dot.
		word: regexp.MustCompile(`(?i)(?:^|[^\pL\pN_$])(` + quoted + `)(?:$|["']|\s*\.)`),
		path: regexp.MustCompile(`(?i)search_path\s*(?:=|\sto\s|'\s*,)[^;]*?[^\pL\pN_$]` + quoted + `(?:$|[^\pL\pN_$])`),
	}
	for _, name := range objects {
		n.objects = append(n.objects, strings.ToLower(name))
	}
	return n
}

// withoutPath replaces the name in a function's SET search_path.
func (n *naming) withoutPath(head string) string {
	lines := strings.Split(head, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, " SET search_path TO ") {
			lines[i] = strings.ReplaceAll(line, literal(n.schema), "'"+ownName+"'")
		}
	}
	return strings.Join(lines, "\n")
}

// inLiteral finds the name before one of the schema's objects inside a string of a statement that the server
// has printed, which has no other use for it.
func (n *naming) inLiteral(sql string) bool {
	for at := range n.places(sql) {
		if strings.Count(sql[:at], "'")%2 == 1 && n.leads(sql[at+len(n.schema):]) {
			return true
		}
	}
	return false
}

// inBody finds the name before one of the schema's objects anywhere, in a search_path, or as a string where
// statements are put together.
func (n *naming) inBody(body string) bool {
	for at := range n.places(body) {
		if n.leads(body[at+len(n.schema):]) {
			return true
		}
	}
	return n.path.MatchString(body) || strings.Contains(body, literal(n.schema)) && dynamic.MatchString(body)
}

// dollarTag is what a body stands between. It may be taken for a part of the last name in it.
var dollarTag = regexp.MustCompile(`\$\w*\$`)

var dynamic = regexp.MustCompile(`(?i)\b(execute|set_config)\b`)

func (n *naming) places(text string) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for from := 0; ; {
			m := n.word.FindStringSubmatchIndex(text[from:])
			if m == nil || !yield(from+m[2]) {
				return
			}
			from += m[3] // what ends one may begin the next
		}
	}
}

var member = regexp.MustCompile(`^"?\s*\.\s*(?:"((?:[^"]|"")*)"|([\pL_][\pL\pN_$]*))?`)

// leads reports whether what follows the name is a dot and an object of the schema, or a dot and something
// that only the run of the statement tells. Any other name belongs to a table or a setting that is called
// like the schema.
func (n *naming) leads(rest string) bool {
	m := member.FindStringSubmatch(rest)
	if m == nil {
		return false
	}
	name := strings.ToLower(strings.ReplaceAll(m[1], `""`, `"`) + m[2])
	return name == "" || slices.Contains(n.objects, name)
}
