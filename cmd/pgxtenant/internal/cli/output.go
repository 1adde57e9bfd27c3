package cli

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unicode"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"golang.org/x/term"
)

// output is stdout or stderr. What goes to a terminal fits its width, and has colours unless NO_COLOR is set;
// what goes elsewhere is whole and plain.
type output struct {
	file  *os.File
	width int // of the terminal; 0 if it is none
	color bool

	mu     sync.Mutex
	failed error // the first failure of a write; whatever is written afterwards may be lost too
}

func newOutput(file *os.File) *output {
	o := &output{file: file}
	if !term.IsTerminal(int(file.Fd())) {
		return o
	}
	o.width = 80
	if w, _, err := term.GetSize(int(file.Fd())); err == nil && w > 0 {
		o.width = w
	}
	o.color = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	return o
}

func (o *output) terminal() bool { return o.width > 0 }

func (o *output) Write(p []byte) (int, error) {
	n, err := o.file.Write(p)
	if err != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.failed = cmp.Or(o.failed, err)
	}
	return n, err
}

// lost is why not all could be written, or nil. That whoever reads it has gone, as head does, is nothing to complain of.
func (o *output) lost() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if errors.Is(o.failed, syscall.EPIPE) {
		return nil
	}
	return o.failed
}

// line prints a line without what could steer a terminal, and breaks it at the terminal's width. See lost for errors.
func (o *output) line(format string, args ...any) {
	_, _ = io.WriteString(o, wrap(fmt.Sprintf(format, args...), o.width)+"\n")
}

// wrap breaks lines at spaces where there are any; 0 is no width.
func wrap(s string, width int) string {
	if width > 0 {
		lines := strings.Split(s, "\n")
		for i, line := range lines {
			if text.StringWidthWithoutEscSequences(line) > width {
				lines[i] = text.WrapSoft(line, width)
			}
		}
		s = strings.Join(lines, "\n")
	}
	return padding.ReplaceAllString(s, "")
}

var padding = regexp.MustCompile(`(?m) +$`)

// json prints a value as one line.
func (o *output) json(value any) error { return json.NewEncoder(o).Encode(value) }

type color = text.Color

const (
	red    = text.FgRed
	green  = text.FgGreen
	yellow = text.FgYellow
	faint  = text.Faint
)

func (o *output) paint(c color, s string) string {
	if !o.color || s == "" {
		return s
	}
	return c.EscapeSeq() + s + text.EscapeReset
}

// grid is a table for people: columns without lines between them. Cells that find no room on a terminal are cut
// off, those of the widest columns first.
type grid struct {
	o      *output
	header []string
	rows   [][]string
	paint  func(column int, cell string) (color, bool) // may be nil
}

// least is how far a column is narrowed at most.
const least = 4

func (g *grid) add(cells ...string) {
	for i := range cells {
		cells[i] = printable(cells[i])
	}
	g.rows = append(g.rows, cells)
}

func (g *grid) String() string {
	widths := make([]int, len(g.header))
	for _, row := range append([][]string{g.header}, g.rows...) {
		for i, cell := range row {
			widths[i] = max(widths[i], text.StringWidth(cell))
		}
	}
	if g.o.width > 0 {
		narrow(widths, g.o.width-2*(len(widths)-1))
	}
	w := table.NewWriter()
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "  "
	style.Format.Header = text.FormatDefault
	w.SetStyle(style)
	w.AppendHeader(g.row(g.header, widths, -1))
	for i, row := range g.rows {
		w.AppendRow(g.row(row, widths, i))
	}
	return padding.ReplaceAllString(w.Render(), "") + "\n"
}

func (g *grid) row(cells []string, widths []int, n int) table.Row {
	row := make(table.Row, len(cells))
	for i, cell := range cells {
		cell = text.Snip(cell, widths[i], "~")
		if n >= 0 && g.paint != nil {
			if c, ok := g.paint(i, cells[i]); ok {
				cell = g.o.paint(c, cell)
			}
		}
		row[i] = cell
	}
	return row
}

// narrow takes from the widest column until all fit.
func narrow(widths []int, room int) {
	for {
		sum, widest := 0, 0
		for i, w := range widths {
			sum += w
			if w > widths[widest] {
				widest = i
			}
		}
		if sum <= room || widths[widest] <= least {
			return
		}
		widths[widest]--
	}
}

// printable shows what a terminal would take for a command, and what would break a line.
func printable(s string) string {
	if strings.IndexFunc(s, unprintable) < 0 {
		return s
	}
	var sb strings.Builder
	for _, r := range s {
		if unprintable(r) {
			quoted := strconv.QuoteRuneToASCII(r)
			sb.WriteString(quoted[1 : len(quoted)-1])
		} else {
			sb.WriteRune(r)
		}
	}
	return sb.String()
}

// printableLines is the same for text of several lines.
func printableLines(s string) string {
	lines := strings.Split(strings.ReplaceAll(s, "\t", "    "), "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	return strings.Join(lines, "\n")
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
