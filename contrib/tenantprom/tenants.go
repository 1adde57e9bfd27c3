package tenantprom

import (
	"strings"
	"time"
	"unicode/utf8"

	"github.com/pgxtenant/pgxtenant"
)

const (
	// Other is the label of all tenants, plans or endpoints together that have no series of their own.
	Other = "other"
	// None is the label of work under WithoutTenant, of requests without a tenant or with one that has no plan, and of
	// requests without an endpoint.
	None = "none"
)

// maxLabel is the most bytes of a label's value: the longest tenant ID.
const maxLabel = pgxtenant.MaxIDLen

// loadFamilies are made of pgxtenant.Load. They have no series with Config.DisableLoad.
var loadFamilies = []family[*snapshot]{
	counter("pgxtenant_statements_total", "Statements, by kind; those of pgxtenant.Usage.",
		loaded(func(l *pgxtenant.Load, add adder) {
			add(float64(l.Total.Queries), "query")
			add(float64(l.Total.Execs), "exec")
			add(float64(l.Total.Batched), "batch")
			add(float64(l.Total.Copies), "copy")
		}), "kind"),
	counter("pgxtenant_statement_errors_total", "Statements that failed. A batch that fails counts once.",
		loaded(func(l *pgxtenant.Load, add adder) { add(float64(l.Total.Errors)) })),
	counter("pgxtenant_statement_seconds_total", "Time in the database, on connections of the shared pool and of isolated pools. A statement that runs counts as it goes.",
		loaded(func(l *pgxtenant.Load, add adder) {
			add((l.Total.Time - l.Total.SharedTime).Seconds(), "isolated")
			add(l.Total.SharedTime.Seconds(), "shared")
		}), "pool"),
	counter("pgxtenant_rows_total", "Rows returned or changed.",
		loaded(func(l *pgxtenant.Load, add adder) { add(float64(l.Total.Rows)) })),
	gauge("pgxtenant_active_tenants", "Tenants that did anything in the last minute, five minutes or hour; an estimate where there are more than 256.",
		loaded(func(l *pgxtenant.Load, add adder) {
			add(float64(l.Minute.Active), "1m")
			add(float64(l.FiveMinutes.Active), "5m")
			add(float64(l.Hour.Active), "1h")
		}), "window"),
}

func loaded(read func(*pgxtenant.Load, adder)) func(*snapshot, adder) {
	return func(s *snapshot, add adder) {
		if s.load != nil {
			read(s.load, add)
		}
	}
}

// tenantFamilies have a series for each of the heaviest tenants, and one for all others. They are averages over a window that
// slides, so they are gauges: a counter of a tenant that goes and comes again would be taken for a new one each time.
var tenantFamilies = []family[*snapshot]{
	perTenant("pgxtenant_tenant_busy_connections", "Connections that the tenant kept busy with statements, on average over the window.",
		func(t *tenantRow) float64 { return t.Time.Seconds() / t.span }),
	perTenant("pgxtenant_tenant_shared_time_ratio", "The tenant's part of the time spent in the shared database over the window. Config.HeavyShare is about this, over five minutes.",
		func(t *tenantRow) float64 { return t.sharedShare }),
	perTenant("pgxtenant_tenant_held_connections", "Connections that the tenant has checked out now, busy or not.",
		func(t *tenantRow) float64 { return float64(t.held) }),
	perTenant("pgxtenant_tenant_waiting_acquires", "Checkouts of the tenant that waited at a time, on average over the window.",
		func(t *tenantRow) float64 { return t.WaitTime.Seconds() / t.span }),
	perTenant("pgxtenant_tenant_statements_per_second", "Statements of the tenant, on average over the window.",
		func(t *tenantRow) float64 { return float64(t.Statements()) / t.span }),
	perTenant("pgxtenant_tenant_errors_per_second", "Statements of the tenant that failed, on average over the window.",
		func(t *tenantRow) float64 { return float64(t.Errors) / t.span }),
	perTenant("pgxtenant_tenant_rows_per_second", "Rows returned to the tenant or changed, on average over the window.",
		func(t *tenantRow) float64 { return float64(t.Rows) / t.span }),
}

func perTenant(name, help string, of func(*tenantRow) float64) family[*snapshot] {
	return gauge(name, help, func(s *snapshot, add adder) {
		for i := range s.tenants {
			add(of(&s.tenants[i]), s.tenants[i].label)
		}
	}, "tenant")
}

// tenantRow is what one tenant used in the window, or all others did.
type tenantRow struct {
	label string
	pgxtenant.Usage
	sharedShare float64
	held        int
	span        float64 // of the window, in seconds
}

// rank returns rows of the tenants that used the most time, and the one of all others.
func (c *Collector) rank(load *pgxtenant.Load) []tenantRow {
	w := &load.Minute
	switch c.window {
	case FiveMinutes:
		w = &load.FiveMinutes
	case Hour:
		w = &load.Hour
	}
	span := max(w.Span, time.Second).Seconds() // of a moment nothing can be said on average
	rows := make([]tenantRow, 0, min(c.topK, len(w.Tenants))+1)
	other := tenantRow{label: Other, Usage: w.Total, span: span}
	for _, n := range load.Held {
		other.held += n
	}
	for i := range w.Tenants {
		t := &w.Tenants[i]
		if len(rows) == c.topK || t.TimeShare < c.minShare {
			break
		}
		row := tenantRow{tenantLabel(t.TenantID), t.Usage, t.SharedShare, load.Held[t.TenantID], span}
		rows = append(rows, row)
		other.take(&row)
	}
	if w.Total.SharedTime > 0 {
		other.sharedShare = float64(other.SharedTime) / float64(w.Total.SharedTime)
	}
	return append(rows, other)
}

// take takes away from the row of all what one tenant has by itself, of what there are families of.
func (o *tenantRow) take(t *tenantRow) {
	o.Queries -= t.Queries
	o.Execs -= t.Execs
	o.Batched -= t.Batched
	o.Copies -= t.Copies
	o.Rows -= t.Rows
	o.Errors -= t.Errors
	o.Time -= t.Time
	o.SharedTime -= t.SharedTime
	o.WaitTime -= t.WaitTime
	o.held -= t.held
}

// tenantLabel is a tenant's ID, unless that is a word for others. No ID has a space, so no two tenants share a label.
func tenantLabel(id string) string {
	switch id {
	case "":
		return None
	case Other, None:
		return id + " (tenant)"
	}
	return label(id)
}

// label makes a value that Prometheus takes: UTF-8, and not too long. It does not keep a longer text in memory.
func label(s string) string {
	if len(s) > maxLabel {
		s = strings.Clone(cut(s))
	}
	return cut(strings.ToValidUTF8(s, "\uFFFD"))
}

// cut returns as many whole characters as a value may have.
func cut(s string) string {
	if len(s) <= maxLabel {
		return s
	}
	end := maxLabel
	for end > maxLabel-utf8.UTFMax && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}
