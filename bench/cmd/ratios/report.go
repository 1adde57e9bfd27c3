package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/pgxtenant/pgxtenant/bench"
)

// report is what a run came to.
type report struct {
	Started    time.Time                     `json:"started"`
	CPUs       int                           `json:"cpus"` // shared by client and server
	Go         string                        `json:"go"`
	PostgreSQL string                        `json:"postgresql"`
	Rounds     int                           `json:"rounds"`
	Slice      string                        `json:"slice"`
	Rows       []result                      `json:"rows"`
	Plans      map[string][]bench.PolicyPlan `json:"plans,omitempty"` // by job
}

// result is one row of the table.
type result struct {
	Job  string `json:"job"`
	What string `json:"what"`
	Base string `json:"base"`
	Way  string `json:"way"`
	Unit string `json:"unit"`
	Rate bool   `json:"rate,omitempty"` // the values are operations per second

	BaseValue float64 `json:"base_value"` // otherwise nanoseconds per operation; medians
	Value     float64 `json:"value"`
	Ratio     float64 `json:"ratio"` // median of the rounds' ratios
	P25       float64 `json:"p25,omitempty"`
	P75       float64 `json:"p75,omitempty"`
	Quiet     float64 `json:"quiet,omitempty"` // ratio of the two ways' fastest tenths of slices

	Allocs      float64 `json:"allocs"`       // per operation
	AddedAllocs float64 `json:"added_allocs"` // above the baseline's, or the one the limit is about
	Goroutines  float64 `json:"goroutines,omitempty"`

	Limit   string  `json:"limit,omitempty"`
	Verdict verdict `json:"verdict,omitempty"`
}

type verdict string

const (
	withinLimit verdict = "ok"
	overLimit   verdict = "OVER"
)

// allocSlack is for what else the process allocates meanwhile, and for what pgxpool allocates once in 128 checkouts.
const allocSlack = 0.05

// sample collects the slices of one way.
type sample struct {
	perOp  []float64 // nanoseconds
	allocs []float64 // per operation
}

func (s *sample) add(of bench.Slice) {
	s.perOp = append(s.perOp, of.PerOp())
	s.allocs = append(s.allocs, float64(of.Allocs)/float64(of.Ops))
}

// allocsPerOp is the median over the slices: what else the process does now and then is in few of them.
func (s *sample) allocsPerOp() float64 { return quantile(s.allocs, 0.5) }

func judge(job *bench.Job, row bench.Row, base, way, allocBase sample, ratios []float64) result {
	r := result{
		Job: job.Name, What: row.What, Base: row.Base, Way: row.Way, Unit: job.Unit, Rate: row.Rate,
		BaseValue: quantile(base.perOp, 0.5), Value: quantile(way.perOp, 0.5),
		Ratio: quantile(ratios, 0.5), P25: quantile(ratios, 0.25), P75: quantile(ratios, 0.75),
		Quiet:  quantile(way.perOp, 0.1) / quantile(base.perOp, 0.1),
		Allocs: way.allocsPerOp(), AddedAllocs: way.allocsPerOp() - allocBase.allocsPerOp(),
	}
	var limits []string
	verdict := withinLimit
	if row.Limit != 0 {
		if row.Rate {
			limits = append(limits, fmt.Sprintf("≥ %.2f", row.Limit))
		} else {
			limits = append(limits, fmt.Sprintf("≤ %.2f", row.Limit))
		}
		if row.Rate && r.Ratio < row.Limit || !row.Rate && r.Ratio > row.Limit {
			verdict = overLimit
		}
	}
	if !math.IsInf(row.Allocs, 1) {
		limits = append(limits, fmt.Sprintf("+%.0f allocs", row.Allocs))
		if r.AddedAllocs > row.Allocs+allocSlack {
			verdict = overLimit
		}
	}
	if len(limits) > 0 {
		r.Limit, r.Verdict = strings.Join(limits, ", "), verdict
	}
	if row.Rate {
		r.Quiet = 1 / r.Quiet
		scale := 1e9 * float64(max(job.Scale, 1))
		r.BaseValue, r.Value = scale/r.BaseValue, scale/r.Value
	}
	return r
}

// quantile of values, interpolated.
func quantile(values []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// printer prints rows as they come, or all at the end as JSON.
type printer struct {
	report *report
	json   bool
	job    string
}

func newPrinter(r *report, json bool) *printer {
	if !json {
		fmt.Printf("Client and server share %d CPUs. %s, PostgreSQL %s.\n", r.CPUs, r.Go, r.PostgreSQL)
		fmt.Printf("%d rounds, slices of %s; median of the rounds' ratios, their quartiles,\nand (quiet) the ratio of each side's fastest tenth of slices.\n", r.Rounds, r.Slice)
	}
	return &printer{report: r, json: json}
}

func (p *printer) add(r result) {
	p.report.Rows = append(p.report.Rows, r)
	if p.json {
		return
	}
	if p.job != r.Job {
		fmt.Printf("\n%-56s %10s %10s %7s  %-11s %6s %11s  %s\n", r.Job+": "+clip(r.Unit, 54-len(r.Job)), "baseline", "ours", "ratio", "p25-p75", "quiet", "allocs", "limit")
		p.job = r.Job
	}
	limit := "-"
	if r.Verdict != "" {
		limit = fmt.Sprintf("%s  %s", r.Limit, r.Verdict)
	}
	if r.Job == "IdlePool" {
		fmt.Printf("%-56s %10.1f %10.1f %7.2f  %-11s %6s %11s  %s (%.2f goroutines)\n", r.What, r.BaseValue, r.Value, r.Ratio, "", "", "", limit, r.Goroutines)
		return
	}
	spread := fmt.Sprintf("%.2f-%.2f", r.P25, r.P75)
	format := "%-56s %10s %10s %7.2f  %-11s %6.2f %11s  %s\n"
	if strings.Contains(r.Job, "Delayed") {
		spread = fmt.Sprintf("%.3f-%.3f", r.P25, r.P75)
		format = strings.NewReplacer("%7.2f", "%7.3f", "%6.2f", "%6.3f").Replace(format)
	}
	fmt.Printf(format, r.What, value(r, r.BaseValue), value(r, r.Value), r.Ratio, spread, r.Quiet, allocs(r), limit)
}

// addPlans prints how the server runs a job's query under each form of a policy.
func (p *printer) addPlans(job *bench.Job, plans []bench.PolicyPlan) {
	if len(plans) == 0 {
		return
	}
	if p.json {
		if p.report.Plans == nil {
			p.report.Plans = make(map[string][]bench.PolicyPlan)
		}
		p.report.Plans[job.Name] = plans
		return
	}
	fmt.Printf("\n%-56s %10s %10s %10s  %-12s %-7s %s\n", job.Name+": plans", "estimated", "rows", "server", "setting read", "plan", "shape")
	for _, plan := range plans {
		read, kind := "once", "custom"
		if plan.PerRow {
			read = "for each row"
		}
		if plan.Generic {
			kind = "generic"
		}
		fmt.Printf("%-56s %10.0f %10.0f %7.2f ms  %-12s %-7s %s\n", plan.Tenant+" tenant, "+plan.Form, plan.Estimated, plan.Actual, plan.Millis, read, kind, plan.Shape)
	}
}

func (p *printer) end() error {
	if p.json {
		return encode(p.report)
	}
	return nil
}

func value(r result, v float64) string {
	switch {
	case r.Rate:
		return fmt.Sprintf("%.0f/s", v)
	case v < 1e3:
		return fmt.Sprintf("%.1f ns", v)
	case v < 1e6:
		return fmt.Sprintf("%.2f µs", v/1e3)
	}
	return fmt.Sprintf("%.2f ms", v/1e6)
}

func allocs(r result) string {
	if strings.Contains(r.Job, "Delayed") {
		return "" // the proxy is in this process, and allocates too
	}
	return fmt.Sprintf("%.1f %+.1f", r.Allocs, r.AddedAllocs+0) // never -0
}

func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
