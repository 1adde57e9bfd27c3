package pgxtenant

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

//go:embed debug_page.html
var debugHTML string

//go:embed debug_page.css
var debugCSS string

//go:embed debug_page.js
var debugJS string

// debugPolicy lets in the page's own style and script, known by their hashes, and what the script reads anew.
var debugPolicy = "default-src 'none'; style-src '" + hashOf(debugCSS) + "'; script-src '" + hashOf(debugJS) +
	"'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

func hashOf(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// The style and the script are not parsed as a part of the template, which would drop their comments, and so change the hashes.
var (
	debugHead = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>pgxtenant</title>
<link rel="icon" href="data:,">
<style>` + debugCSS + `</style>
</head>
<body>
`
	debugFoot = `<script>` + debugJS + `</script>
</body>
</html>
`
	debugTemplate = template.Must(template.New("debug").Funcs(template.FuncMap{
		"count": showCount, "seconds": showSeconds, "percent": showPercent, "clock": showClock, "ago": showAgo,
		"width": width, "meaning": meaningOf, "plural": plural, "class": func(s Severity) string { return string(s) },
	}).Parse(debugHTML))
)

// debugPage is what the template gets.
type debugPage struct {
	*DebugState
	Window  DebugWindow
	Tenants []debugRow
	Waiting []debugWaitRow
	Waited  int64 // checkouts
	Busy    float64
	Rate    float64
}

// debugRow is a tenant in the list.
type debugRow struct {
	DebugTenant
	Own   bool    // it has a database of its own
	Heavy bool    // it has passed Config.HeavyShare
	Share float64 // that the bar shows
}

type debugWaitRow struct {
	Label string
	Count int64
	Share float64
}

func writeDebugPage(w io.Writer, s *DebugState, window string) error {
	p := debugPage{DebugState: s, Window: s.Windows[1]}
	for _, d := range s.Windows {
		if d.Name == window {
			p.Window = d
		}
	}
	for _, t := range p.Window.Tenants {
		row := debugRow{DebugTenant: t, Share: t.SharedShare, Own: t.SharedTime == 0 && t.Time > 0}
		row.Heavy = !row.Own && t.Tenant != "" && t.SharedShare >= s.HeavyShare
		if row.Own {
			row.Share = t.TimeShare
		}
		p.Tenants = append(p.Tenants, row)
	}
	if span := p.Window.Span; span > 0 {
		p.Busy = p.Window.Total.Time / span
		p.Rate = float64(p.Window.Total.Statements) / span
	}
	p.fillWaits()
	if _, err := io.WriteString(w, debugHead); err != nil {
		return err
	}
	if err := debugTemplate.Execute(w, p); err != nil {
		return err
	}
	_, err := io.WriteString(w, debugFoot)
	return err
}

// fillWaits shows fewer classes than there are.
func (p *debugPage) fillWaits() {
	if len(p.Waits) == 0 {
		return
	}
	p.Waiting = []debugWaitRow{{Label: "≤ 1 ms"}, {Label: "≤ 10 ms"}, {Label: "≤ 100 ms"}, {Label: "≤ 1 s"}, {Label: "≤ 10 s"}, {Label: "longer"}}
	bounds := []float64{0.001, 0.01, 0.1, 1, 10}
	for _, wait := range p.Waits {
		i := 0
		for i < len(bounds) && (wait.Most == 0 || wait.Most > bounds[i]) {
			i++
		}
		p.Waiting[i].Count += wait.Count
		p.Waited += wait.Count
	}
	for i := range p.Waiting {
		p.Waiting[i].Share = ratio(p.Waiting[i].Count, p.Waited)
	}
}

// showCount groups the digits of an integer, or shortens a number with a fraction.
func showCount(v any) string {
	var digits string
	switch n := v.(type) {
	case float64:
		switch {
		case n < 10:
			return strconv.FormatFloat(n, 'f', 1, 64)
		default:
			digits = strconv.FormatFloat(n, 'f', 0, 64)
		}
	default:
		digits = fmt.Sprint(n)
	}
	var sb strings.Builder
	for i, c := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			sb.WriteRune('\u202f') // a narrow space that does not break
		}
		sb.WriteRune(c)
	}
	return sb.String()
}

func plural(n any, noun string) string {
	if text := showCount(n); text != "1" {
		return text + " " + noun + "s"
	}
	return "1 " + noun
}

func showSeconds(s float64) string {
	switch {
	case s == 0:
		return "0"
	case s < 0.9995e-3:
		return fmt.Sprintf("%.0f µs", s*1e6)
	case s < 0.9995:
		return fmt.Sprintf("%.3g ms", s*1e3)
	case s < 9.95:
		return fmt.Sprintf("%.1f s", s)
	case s < 120:
		return fmt.Sprintf("%.0f s", s)
	case s < 600:
		return fmt.Sprintf("%.1f min", s/60)
	case s < 7200:
		return fmt.Sprintf("%.0f min", s/60)
	}
	return fmt.Sprintf("%.0f h", s/3600)
}

func showPercent(share float64) string {
	switch p := 100 * share; {
	case p > 0 && p < 0.1:
		return "<\u202f0.1\u202f%"
	case p > 0 && p < 9.95:
		return strconv.FormatFloat(p, 'f', 1, 64) + "\u202f%"
	}
	return strconv.FormatFloat(100*share, 'f', 0, 64) + "\u202f%"
}

func showClock(t time.Time) string { return t.Format(time.TimeOnly) }

func showAgo(now time.Time, then *time.Time) string {
	if then == nil {
		return ""
	}
	return showSeconds(math.Round(max(0, now.Sub(*then).Seconds()))) + " ago"
}

// width is a part of a whole, for an attribute of SVG.
func width(part, whole any) string {
	p, w := number(part), number(whole)
	if w <= 0 {
		return "0%"
	}
	return strconv.FormatFloat(100*min(1, p/w), 'f', 2, 64) + "%"
}

func number(v any) float64 {
	switch n := v.(type) {
	case int32:
		return float64(n)
	case float64:
		return n
	case int:
		return float64(n)
	}
	return 0
}

// sqlClasses are what the first two characters of an SQLSTATE mean.
var sqlClasses = map[string]string{
	"08": "connection", "0A": "not supported", "21": "cardinality", "22": "data", "23": "constraint", "25": "transaction state",
	"28": "authorization", "2D": "transaction end", "3D": "database", "3F": "schema", "40": "rollback",
	"42": "syntax or rights", "53": "resources", "54": "limit", "55": "object state", "57": "intervention", "58": "system", "P0": "PL/pgSQL",
}

func meaningOf(code string) string {
	if !validSQLState(code) {
		return ""
	}
	return sqlClasses[code[:2]]
}

// Held is how many of the connections have been made.
func (c DebugConns) Held() int32 { return c.Used + c.Idle }
