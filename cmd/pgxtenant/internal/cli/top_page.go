package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/text"

	"github.com/pgxtenant/pgxtenant"
)

// topLines are what top shows, in as many lines as are given, or all that there are for 0.
func (a *app) topLines(w *watch, s *pgxtenant.DebugState, height int) []string {
	head := a.topHead(w, s)
	pools, events := a.topPools(s), a.topEvents(s)
	room := -1
	if height > 0 {
		room = max(height-len(head)-1, 3)
		// Tenants are what it is about: the rest takes what they leave.
		rest := room - min(room, 2+a.tenantsIn(w, s))
		pools = pools[:min(len(pools), max(rest, 0))]
		events = events[:min(len(events), max(rest-len(pools), 0))]
	}
	lines := append(head, a.topTenants(w, s, room-len(pools)-len(events))...)
	lines = append(append(lines, pools...), events...)
	if height > 0 {
		lines = lines[:min(len(lines), height)]
	}
	for i, line := range lines {
		if a.out.width > 0 {
			line = text.Trim(line, a.out.width)
		}
		lines[i] = strings.TrimRight(line, " ")
	}
	return lines
}

func (a *app) tenantsIn(w *watch, s *pgxtenant.DebugState) int {
	if window := windowOf(w, s); window != nil {
		return len(window.Tenants) + 1
	}
	return 0
}

func windowOf(w *watch, s *pgxtenant.DebugState) *pgxtenant.DebugWindow {
	for i := range s.Windows {
		if s.Windows[i].Name == w.window {
			return &s.Windows[i]
		}
	}
	return nil
}

func (a *app) topHead(w *watch, s *pgxtenant.DebugState) []string {
	c := s.Conns
	lines := []string{
		fmt.Sprintf("pgxtenant top  %s  window %s  (UTC)", s.At.Format(time.TimeOnly), w.window),
		fmt.Sprintf("Connections: %d used, %d idle, %d being made, %d at most. Waiting: %d.", c.Used, c.Idle, c.Making, c.Max, c.Waiting),
		fmt.Sprintf("Statements: %d. Refused by limits: %d. Pools opened: %d, evicted: %d, failed: %d.", s.Statements, s.Refused, s.Opened, s.Evicted, s.Failed),
	}
	if s.Audit != nil && s.Audit.Errors > 0 {
		lines = append(lines, a.out.paint(red, fmt.Sprintf("The last audit found errors: %d.", s.Audit.Errors)))
	}
	return lines
}

// topTenants are the heaviest tenants, in no more lines than room, if that is not negative.
func (a *app) topTenants(w *watch, s *pgxtenant.DebugState, room int) []string {
	window := windowOf(w, s)
	if window == nil {
		return []string{"", "The service does not count load: Config.DisableLoad is set."}
	}
	g := &grid{o: a.out, header: []string{"TENANT", "SHARE", "TIME", "STMT/S", "ROWS/S", "ERRORS", "WAITED", "HELD"}}
	heavy := make(map[string]bool)
	g.paint = func(column int, cell string) (color, bool) { return yellow, column == 0 && heavy[cell] }
	span := max(window.Span, 1)
	row := func(name, share string, u *pgxtenant.DebugUsage, held string) {
		g.add(name, share, seconds(u.Time), rate(u.Statements, span), rate(u.Rows, span), fmt.Sprint(u.Errors), seconds(u.WaitTime), held)
	}
	for i := range window.Tenants {
		t := &window.Tenants[i]
		name := t.Tenant
		if name == "" {
			name = "(none)"
		}
		if s.HeavyShare > 0 && t.SharedShare >= s.HeavyShare {
			heavy[name] = true
		}
		row(name, fmt.Sprintf("%.1f%%", 100*t.TimeShare), &t.DebugUsage, fmt.Sprint(t.Held))
	}
	if more := window.Active - len(window.Tenants); more > 0 {
		row("(others)", "", &window.Other, "")
	}
	lines := strings.Split(strings.TrimRight(g.String(), "\n"), "\n")
	if len(window.Tenants) == 0 {
		lines = []string{"No tenant has done anything in this window."}
	}
	if room >= 0 {
		lines = lines[:min(len(lines), max(room-1, 1))]
	}
	return append([]string{""}, lines...)
}

func (a *app) topPools(s *pgxtenant.DebugState) []string {
	g := &grid{o: a.out, header: []string{"POOL", "STATE", "USED", "IDLE", "MOST", "WAITING", "LAST USED"}}
	add := func(name string, p *pgxtenant.DebugPool) {
		last := ""
		if p.LastUsed != nil {
			last = s.At.Sub(*p.LastUsed).Round(time.Second).String() + " ago"
		}
		g.add(name, string(p.State), fmt.Sprint(p.Used), fmt.Sprint(p.Idle), fmt.Sprint(p.Max), fmt.Sprint(p.Waiting), last)
	}
	add("(shared)", &s.Shared)
	for i := range s.Pools {
		add(s.Pools[i].Tenant, &s.Pools[i])
	}
	lines := append([]string{""}, strings.Split(strings.TrimRight(g.String(), "\n"), "\n")...)
	if s.OtherPools > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", s.OtherPools))
	}
	return lines
}

func (a *app) topEvents(s *pgxtenant.DebugState) []string {
	g := &grid{o: a.out, header: []string{"LATELY", "TENANT", "WHAT", "TIMES"}}
	const most = 5 // of each kind
	for _, e := range s.Errors[:min(len(s.Errors), most)] {
		g.add(e.At.Format(time.TimeOnly), e.Tenant, "error "+e.What, fmt.Sprint(e.Count))
	}
	for _, e := range s.PoolEvents[:min(len(s.PoolEvents), most)] {
		g.add(e.At.Format(time.TimeOnly), e.Tenant, "pool "+e.What, fmt.Sprint(e.Count))
	}
	if len(g.rows) == 0 {
		return nil
	}
	return append([]string{""}, strings.Split(strings.TrimRight(g.String(), "\n"), "\n")...)
}

// seconds is a time in three digits or so.
func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	switch {
	case d >= 100*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(time.Millisecond).String()
	case d > 0:
		return d.Round(time.Microsecond).String()
	}
	return "0"
}

func rate(n int64, span float64) string {
	r := float64(n) / span
	if r < 10 {
		return fmt.Sprintf("%.1f", r)
	}
	return fmt.Sprintf("%.0f", r)
}
