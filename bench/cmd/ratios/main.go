// Command ratios measures what binding a tenant costs, against pgxpool alone and against recipes written by
// hand, and prints one table of ratios.
//
// The ways of a job take turns: in each round every way runs for one short slice right beside a slice of
// its baseline, so that what else the machine does falls on both. A ratio is the median over the rounds.
//
// It starts a throw-away server; see the package pgtest for how one is found.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"time"

	"github.com/pgxtenant/pgxtenant/bench"
)

var (
	rounds  = flag.Int("rounds", 30, "rounds of each comparison")
	slice   = flag.Duration("slice", 100*time.Millisecond, "length of a slice")
	only    = flag.String("run", "", "run only rows whose `job/way/baseline` matches this regular expression")
	asJSON  = flag.Bool("json", false, "print JSON instead of a table")
	limited = flag.Bool("limits", false, "run only rows that have a limit")
	forms   = flag.Bool("forms", false, "in the Policy jobs, run all forms of a policy and print the server's plans")
	check   = flag.Bool("check", false, "exit with status 1 if a row is over its limit")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	over, err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "ratios:", err)
		os.Exit(1)
	}
	if over && *check {
		os.Exit(1)
	}
}

func run(ctx context.Context) (over bool, err error) {
	match, err := regexp.Compile(*only)
	if err != nil {
		return false, err
	}
	if *rounds < 1 || flag.NArg() > 0 {
		return false, fmt.Errorf("want -rounds of 1 or more, and no arguments")
	}
	lab, err := bench.Open(ctx)
	if err != nil {
		return false, err
	}
	defer lab.Close()
	version, err := lab.Version(ctx)
	if err != nil {
		return false, err
	}
	report := &report{
		CPUs: runtime.NumCPU(), Go: runtime.Version(), PostgreSQL: version,
		Rounds: *rounds, Slice: slice.String(), Started: time.Now().UTC().Truncate(time.Second),
	}
	out := newPrinter(report, *asJSON)
	for _, job := range bench.Jobs {
		rows := slices.DeleteFunc(slices.Clone(job.Rows), func(r bench.Row) bool {
			return !match.MatchString(job.Name+"/"+r.Way+"/"+r.Base) || *limited && r.Limit == 0 || r.Form && !*forms
		})
		if len(rows) > 0 {
			if err := compare(ctx, lab, job, rows, out.add); err != nil {
				return false, fmt.Errorf("%s: %w", job.Name, err)
			}
		}
		if len(rows) > 0 && *forms {
			explained, err := job.Explain(ctx, lab)
			if err != nil {
				return false, fmt.Errorf("%s: %w", job.Name, err)
			}
			out.addPlans(job, explained)
		}
	}
	if match.MatchString("IdlePool/isolated/pool") {
		r, err := idlePool(ctx, lab)
		if err != nil {
			return false, err
		}
		out.add(r)
	}
	if err := out.end(); err != nil {
		return false, err
	}
	return slices.ContainsFunc(report.Rows, func(r result) bool { return r.Verdict == overLimit }), nil
}

// compare measures rows of one job, round by round.
func compare(ctx context.Context, lab *bench.Lab, job *bench.Job, rows []bench.Row, add func(result)) error {
	ways, done, err := job.Open(ctx, lab)
	if err != nil {
		return err
	}
	defer done()
	type series struct {
		base, way, allocs sample
		ratios            []float64
	}
	all := make([]series, len(rows))
	for round := -1; round < *rounds; round++ { // the first only warms up
		for i := range rows {
			at := (i + max(round, 0)) % len(rows)
			row, s := rows[at], &all[at]
			base, way := ways[row.Base], ways[row.Way]
			if base == nil || way == nil {
				return fmt.Errorf("there is no way %q or %q", row.Base, row.Way)
			}
			var of [2]bench.Slice
			for k := range of {
				who := (k + round + 1) % 2 // which of the two is first alternates
				if of[who], err = job.Slice([]*bench.Way{base, way}[who], *slice); err != nil {
					return err
				}
				if err := ctx.Err(); err != nil {
					return err
				}
			}
			if round < 0 {
				continue
			}
			s.base.add(of[0])
			s.way.add(of[1])
			if row.Rate {
				s.ratios = append(s.ratios, of[0].PerOp()/of[1].PerOp())
			} else {
				s.ratios = append(s.ratios, of[1].PerOp()/of[0].PerOp())
			}
			if row.AllocBase != "" {
				extra, err := job.Slice(ways[row.AllocBase], *slice/4)
				if err != nil {
					return err
				}
				s.allocs.add(extra)
			}
		}
	}
	for i, row := range rows {
		s := &all[i]
		allocBase := &s.base
		if row.AllocBase != "" {
			allocBase = &s.allocs
		}
		add(judge(job, row, s.base, s.way, *allocBase, s.ratios))
	}
	return nil
}

// idlePool measures memory, where nothing has to take turns.
func idlePool(ctx context.Context, lab *bench.Lab) (result, error) {
	const count = 1000
	plain, isolated, err := bench.IdlePools(ctx, lab, count)
	if err != nil {
		return result{}, fmt.Errorf("IdlePool: %w", err)
	}
	r := result{
		Job: "IdlePool", What: fmt.Sprintf("idle isolated pool without connections, KB (of %d)", count),
		Base: "pool", Way: "isolated", Unit: "KB of heap and stack",
		BaseValue: plain.Bytes() / 1024, Value: isolated.Bytes() / 1024, Ratio: isolated.Bytes() / plain.Bytes(),
		Goroutines: isolated.Goroutines, Verdict: withinLimit,
		Limit: fmt.Sprintf("≤ %d KB, %d goroutine", bench.MaxPoolBytes>>10, bench.MaxPoolGoroutines),
	}
	if isolated.Bytes() > bench.MaxPoolBytes || isolated.Goroutines > bench.MaxPoolGoroutines+0.05 {
		r.Verdict = overLimit
	}
	return r, nil
}

func encode(r *report) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
