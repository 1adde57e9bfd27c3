package pgxtenant

import (
	"bytes"
	"cmp"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"
)

// DebugHandler returns a page that shows what the TenantDB is doing, in the spirit of net/http/pprof: pools and their
// connections, the tenants that use the most time, waits, and what happened lately. It is one document without anything from
// elsewhere, can be read without script, and with it keeps itself up to date. The parameter window chooses the
// window of the tenants: 1m, 5m (the default) or 60m.
//
// With format=json, or where JSON is accepted and HTML is not, the answer is a [DebugState].
//
// It holds tenants' IDs, counts, and names of tables that LastAudit found something about; no data, no text of any statement or
// error. It authenticates nobody: mount it where only operators can reach it. It runs nothing on any database.
func (db *TenantDB) DebugHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, http.StatusText(http.StatusMethodNotAllowed), http.StatusMethodNotAllowed)
			return
		}
		var body bytes.Buffer
		var err error
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("Vary", "Accept")
		h.Set("X-Content-Type-Options", "nosniff")
		state := db.debugState()
		if wantsJSON(r) {
			h.Set("Content-Type", "application/json")
			encoder := json.NewEncoder(&body)
			encoder.SetIndent("", "  ")
			err = encoder.Encode(state)
		} else {
			h.Set("Content-Type", "text/html; charset=utf-8")
			h.Set("Content-Security-Policy", debugPolicy)
			h.Set("Referrer-Policy", "no-referrer")
			err = writeDebugPage(&body, state, r.URL.Query().Get("window"))
		}
		if err != nil {
			db.config.Logger.Error("debug page", "error", err)
			http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
			return
		}
		_, _ = w.Write(body.Bytes())
	})
}

func wantsJSON(r *http.Request) bool {
	if format := r.URL.Query().Get("format"); format != "" {
		return format == "json"
	}
	accept := strings.Join(r.Header.Values("Accept"), ",")
	return strings.Contains(accept, "application/json") && !strings.Contains(accept, "text/html")
}

// DebugTenants is how many tenants, and how many pools of database tenants, a DebugState has at most.
const DebugTenants = 20

// DebugState is what DebugHandler shows, and the form of its JSON. Times that last are in seconds. Counts are those since the
// TenantDB was opened, unless they stand in a window.
type DebugState struct {
	At         time.Time     `json:"at"`
	LoadOff    bool          `json:"load_off,omitempty"` // Config.DisableLoad is set: Windows, Waits and Errors are empty
	HeavyShare float64       `json:"heavy_share"`        // Config.HeavyShare
	Conns      DebugConns    `json:"conns"`              // of all pools
	Statements int64         `json:"statements"`
	Bound      int64         `json:"bound"`   // bindings sent
	Refused    int64         `json:"refused"` // checkouts, by Limits
	Shared     DebugPool     `json:"shared"`
	Pools      []DebugPool   `json:"pools"`  // of database tenants, those with the most connections in use first
	Opened     int64         `json:"opened"` // such pools
	Evicted    int64         `json:"evicted"`
	Failed     int64         `json:"failed"`
	OtherPools int           `json:"other_pools"` // that are not in Pools
	Windows    []DebugWindow `json:"windows"`     // 1m, 5m and 60m
	Waits      []DebugWait   `json:"waits"`
	WaitTime   float64       `json:"wait_seconds"`
	PoolEvents []DebugEvent  `json:"pool_events"` // the latest first
	Errors     []DebugEvent  `json:"errors"`      // of statements, the latest first
	Audit      *DebugAudit   `json:"audit"`       // null if none has been run
}

// DebugConns counts connections.
type DebugConns struct {
	Used    int32 `json:"used"` // checked out
	Idle    int32 `json:"idle"`
	Making  int32 `json:"making"` // being made
	Max     int32 `json:"max"`
	Waiting int32 `json:"waiting"` // checkouts that wait for their turn; 0 with Config.ArrivalOrder
}

// DebugPool is a pool.
type DebugPool struct {
	DebugConns
	Tenant   string     `json:"tenant,omitempty"` // empty for the shared pool
	State    PoolState  `json:"state,omitempty"`
	LastUsed *time.Time `json:"last_used,omitempty"`
}

// DebugWindow is a LoadWindow.
type DebugWindow struct {
	Name    string        `json:"name"` // 1m, 5m or 60m
	Span    float64       `json:"span_seconds"`
	Active  int           `json:"active"`
	Exact   bool          `json:"active_exact"`
	Total   DebugUsage    `json:"total"`
	Tenants []DebugTenant `json:"tenants"` // heaviest first
	Other   DebugUsage    `json:"other"`   // of all tenants that are not in Tenants
}

// DebugUsage is a Usage.
type DebugUsage struct {
	Statements int64   `json:"statements"`
	Rows       int64   `json:"rows"`
	Errors     int64   `json:"errors"`
	Time       float64 `json:"time_seconds"`
	SharedTime float64 `json:"shared_time_seconds"`
	Waits      int64   `json:"waits"`
	WaitTime   float64 `json:"wait_seconds"`
}

// DebugTenant is a TenantLoad.
type DebugTenant struct {
	Tenant string `json:"tenant"` // empty for work under WithoutTenant
	DebugUsage
	Missed         float64 `json:"missed_seconds"`
	TimeShare      float64 `json:"time_share"`
	SharedShare    float64 `json:"shared_share"`
	StatementShare float64 `json:"statement_share"`
	Held           int     `json:"held"`
}

// DebugWait counts checkouts by how long they waited.
type DebugWait struct {
	Most  float64 `json:"most_seconds"` // this long at most, and longer than those before; 0 for all that took longer
	Count int64   `json:"count"`
}

// DebugEvent is something that happened.
type DebugEvent struct {
	At     time.Time `json:"at"`
	Tenant string    `json:"tenant"`
	What   string    `json:"what"`  // for an error its SQLSTATE, or a word
	Count  int       `json:"count"` // of the same in a row; At is the last one's
}

// DebugAudit is what LastAudit found, without what is allowed.
type DebugAudit struct {
	At       time.Time      `json:"at"`
	Errors   int            `json:"errors"`
	Warnings int            `json:"warnings"`
	Notes    int            `json:"notes"`
	Findings []DebugFinding `json:"findings"` // the gravest first
}

// DebugFinding is a Finding.
type DebugFinding struct {
	Code     string   `json:"code"`
	Severity Severity `json:"severity"`
	Object   string   `json:"object"`
}

func (db *TenantDB) debugState() *DebugState {
	stat, load := db.Stat(), db.Load()
	s := &DebugState{
		At: load.At.UTC(), LoadOff: db.config.DisableLoad, HeavyShare: db.config.HeavyShare,
		Statements: load.Total.Statements(), Bound: stat.BoundCount(), Refused: stat.RefusedAcquireCount(),
		Opened: stat.OpenedPoolsCount(), Evicted: stat.EvictedPoolsCount(), Failed: stat.FailedPoolsCount(),
		Conns:      DebugConns{stat.AcquiredConns(), stat.IdleConns(), stat.ConstructingConns(), stat.MaxConns(), stat.WaitingAcquires()},
		Pools:      []DebugPool{},
		PoolEvents: debugEventsOf(db.load.events.latest(&db.load.events.pools)),
		Errors:     debugEventsOf(db.load.events.latest(&db.load.events.errors)),
	}
	shared := countersOf(db.shared.Stat(), db.gate)
	s.Shared.DebugConns = DebugConns{shared.acquired, shared.idle, shared.constructing, shared.maxConns, shared.waiting}
	for _, p := range stat.pools {
		pool := DebugPool{Tenant: p.TenantID, State: p.State,
			DebugConns: DebugConns{p.AcquiredConns, p.IdleConns, p.ConstructingConns, p.MaxConns, p.WaitingAcquires}}
		if !p.LastUsed.IsZero() {
			at := p.LastUsed.UTC()
			pool.LastUsed = &at
		}
		s.Pools = append(s.Pools, pool)
	}
	slices.SortStableFunc(s.Pools, func(a, b DebugPool) int {
		return cmp.Or(cmp.Compare(b.Used, a.Used), cmp.Compare(b.Idle, a.Idle))
	})
	s.OtherPools = max(0, len(s.Pools)-DebugTenants)
	s.Pools = s.Pools[:len(s.Pools)-s.OtherPools]
	s.Windows = []DebugWindow{
		debugWindow("1m", &load.Minute, load.Held), debugWindow("5m", &load.FiveMinutes, load.Held), debugWindow("60m", &load.Hour, load.Held),
	}
	waits := stat.AcquireWaits()
	s.Waits, s.WaitTime = []DebugWait{}, waits.Sum.Seconds()
	for i, n := range waits.Counts {
		wait := DebugWait{Count: n}
		if i < len(waits.Bounds) {
			wait.Most = waits.Bounds[i].Seconds()
		}
		s.Waits = append(s.Waits, wait)
	}
	if r, at := db.LastAudit(); r != nil {
		s.Audit = debugAudit(r, at)
	}
	return s
}

func debugWindow(name string, w *LoadWindow, held map[string]int) DebugWindow {
	d := DebugWindow{Name: name, Span: w.Span.Seconds(), Active: w.Active, Exact: w.Exact, Total: debugUsage(&w.Total), Tenants: []DebugTenant{}}
	other := w.Total
	for _, t := range w.Tenants[:min(len(w.Tenants), DebugTenants)] {
		other.sub(&t.Usage)
		d.Tenants = append(d.Tenants, DebugTenant{
			Tenant: t.TenantID, DebugUsage: debugUsage(&t.Usage), Missed: t.Missed.Seconds(),
			TimeShare: t.TimeShare, SharedShare: t.SharedShare, StatementShare: t.StatementShare, Held: held[t.TenantID],
		})
	}
	d.Other = debugUsage(&other)
	return d
}

func debugUsage(u *Usage) DebugUsage {
	return DebugUsage{u.Statements(), u.Rows, u.Errors, u.Time.Seconds(), u.SharedTime.Seconds(), u.Waits, u.WaitTime.Seconds()}
}

func debugEventsOf(events []event) []DebugEvent {
	all := make([]DebugEvent, len(events))
	for i, e := range events {
		all[i] = DebugEvent{e.at.UTC(), e.tenant, e.what, e.n}
	}
	return all
}

func debugAudit(r *Report, at time.Time) *DebugAudit {
	const most = 50
	a := &DebugAudit{At: at.UTC(), Errors: r.Count(SeverityError), Warnings: r.Count(SeverityWarning), Notes: r.Count(SeverityInfo), Findings: []DebugFinding{}}
	for _, f := range r.Findings {
		if !f.Allowed && len(a.Findings) < most {
			a.Findings = append(a.Findings, DebugFinding{f.Code, f.Severity, f.Object})
		}
	}
	return a
}
