package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"
)

// runProgress counts, and tells OnProgress. It belongs to the goroutine of the caller of ForEach, which holds no lock.
type runProgress struct {
	run      *tenantRun
	p        RunProgress
	started  time.Time
	samples  []rateSample // of the last half minute, oldest first
	failures []RunResult
	told     time.Time
}

type rateSample struct {
	at time.Time
	n  int // ended, without current ones
}

const (
	rateSpan = 30 * time.Second
	rateStep = time.Second
)

func newRunProgress(r *tenantRun) *runProgress {
	now := time.Now()
	return &runProgress{run: r, started: now, samples: []rateSample{{at: now}}, p: RunProgress{Run: r.id, Name: r.o.Name}}
}

// bad is how many have failed.
func (g *runProgress) bad() int { return g.p.Failed + g.p.Unknown }

func (g *runProgress) stage(name string) { g.p.Stage = name }

// expect adds to what there is to do.
func (g *runProgress) expect(n int) { g.p.Total = max(g.p.Total+n, 0) }

func (g *runProgress) begun() {
	g.p.Running++
	g.tell(nil)
}

// many counts what needed no work.
func (g *runProgress) many(state RunState, n int) {
	if n > 0 {
		g.count(state, n)
		g.tell(nil)
	}
}

// stepped counts what has ended just now; nil is a target that nothing was done for.
func (g *runProgress) stepped(res *RunResult) {
	g.p.Running--
	if res != nil {
		g.count(res.State, 1)
		if (res.State == RunFailed || res.State == RunUnknown) && len(g.failures) < maxFailures {
			g.failures = append(g.failures, *res)
		}
	}
	g.tell(res)
}

func (g *runProgress) count(state RunState, n int) {
	switch state {
	case RunDone:
		g.p.Done += n
	case RunCurrent:
		g.p.Current += n
	case RunFailed:
		g.p.Failed += n
	case RunUnknown:
		g.p.Unknown += n
	case RunSkipped:
		g.p.Skipped += n
	}
}

// tick tells of the time that has passed.
func (g *runProgress) tick() {
	if time.Since(g.told) >= rateStep {
		g.tell(nil)
	}
}

func (g *runProgress) tell(last *RunResult) {
	g.measure()
	g.told = time.Now()
	if g.run.o.OnProgress == nil {
		return
	}
	p := g.p
	if last != nil {
		kept := *last
		p.Last = &kept
	}
	g.run.o.OnProgress(p)
}

// measure brings the rate up to date.
func (g *runProgress) measure() {
	now := time.Now()
	n := g.p.Ended() - g.p.Current
	for len(g.samples) > 1 && now.Sub(g.samples[1].at) >= rateSpan {
		g.samples = g.samples[1:]
	}
	if now.Sub(g.samples[len(g.samples)-1].at) >= rateStep {
		g.samples = append(g.samples, rateSample{now, n})
	}
	first := g.samples[0]
	g.p.Elapsed = now.Sub(g.started)
	g.p.Total = max(g.p.Total, g.p.Ended()+g.p.Running)
	g.p.Rate, g.p.Left = 0, 0
	if span := now.Sub(first.at); span > 0 && n > first.n {
		g.p.Rate = float64(n-first.n) / span.Seconds()
		g.p.Left = time.Duration(float64(g.p.Total-g.p.Ended()) / g.p.Rate * float64(time.Second))
	}
}

// report ends the run in the registry and says how it went.
func (r *tenantRun) report(cause error) (*RunReport, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), bookTimeout+max(r.o.Patience, 0))
	defer cancel()
	g := r.progress
	g.measure()
	rep := &RunReport{RunProgress: g.p, Resumed: r.resumed, Failures: g.failures, db: r.db}
	left, err := r.leftOver(ctx)
	if err == nil {
		if rep.LeftOver, rep.Complete = left, left == 0; rep.Complete {
			rep.Total = rep.Ended() // what is selected by a function is known now
		}
		if cause == nil && rep.Ended() == 0 && left == 0 && !r.resumed {
			rep.Complete, cause = false, ErrNothingSelected
		}
		err = r.leave(ctx, rep.Complete || errors.Is(cause, ErrNothingSelected))
	}
	if cause == nil {
		cause = err
	}
	g.p = rep.RunProgress
	if cause == nil && (rep.Complete || r.o.FailedOnly && g.bad() == 0) {
		return rep, nil
	}
	return rep, &RunError{rep, cause}
}

// leftOver counts what is not done in the run, by this call or another.
func (r *tenantRun) leftOver(ctx context.Context) (n int, err error) {
	var special []*runTarget
	shared, err := r.shared(ctx)
	if err != nil {
		return 0, err
	}
	if shared != nil {
		special = append(special, shared)
	}
	special, _, err = r.unfinished(ctx, append(special, r.templates()...))
	if err != nil {
		return 0, err
	}
	n = len(special)
	for after := ""; ; {
		var ids []Record
		err := r.book(ctx, func(ctx context.Context) error {
			ids, err = r.leftPage(ctx, after)
			return err
		})
		if err != nil {
			return 0, err
		}
		for _, rec := range ids {
			after = rec.ID
			if r.o.selects(rec.Tenant) {
				n++
			}
		}
		if len(ids) < maxPage {
			return n, nil
		}
	}
}

// leftPage reads tenants that the run is not done with. A tenant that was skipped needs nothing done, nor one that came
// after all others had been found: there will always be such.
func (r *tenantRun) leftPage(ctx context.Context, after string) (records []Record, err error) {
	args := r.scanArgs(after, maxPage)[:6]
	if args = append(args, nil); !r.scanned.IsZero() {
		args[6] = r.scanned
	}
	rows, err := r.books.Query(ctx, recordSQL+chosenSQL+` and t.status <> 'deleting' and ($7::timestamptz is null or t.created < $7)
		and coalesce((select r.state not in ('done', 'current', 'skipped') `+ofTenantSQL+`), true) order by t.id limit $2`, args...)
	if err != nil {
		return nil, err
	}
	for rows.Next() {
		rec, err := r.db.registry.decode(rows)
		if err != nil && rec.ID == "" {
			rows.Close()
			return nil, err
		}
		records = append(records, rec)
	}
	return records, rows.Err()
}

func (e *RunError) text() string {
	rep := e.Report
	text := fmt.Sprintf("pgxtenant: run %q: ", rep.Name)
	if errors.Is(e.Cause, ErrNothingSelected) {
		return text + e.Cause.Error()
	}
	if e.Cause != nil {
		text += e.Cause.Error() + "; "
	}
	text += fmt.Sprintf("%d done, %d current, %d failed, %d unknown, %d skipped, %d left", rep.Done, rep.Current, rep.Failed, rep.Unknown, rep.Skipped, rep.LeftOver)
	if !rep.Complete {
		text += "; a call under the same name goes on with what is left"
	}
	if len(rep.Failures) > 0 {
		text += "; the first failure: " + rep.Failures[0].Err.Error()
	}
	return text
}

// ForEachProgress is ForEach that tells how far it has come, as often as the loop comes round; OnProgress
// is called besides. The last value has the Report, and with it comes the error of ForEach. When the loop is left
// before, the run is stopped as by ForEachOptions.Stop, and the loop ends when nothing runs any more.
func (db *TenantDB) ForEachProgress(ctx context.Context, o ForEachOptions, f ForEachFunc) iter.Seq2[RunProgress, error] {
	return func(yield func(RunProgress, error) bool) {
		stop, left := make(chan struct{}), make(chan struct{})
		latest := make(chan RunProgress, 1)
		asked, told := o.Stop, o.OnProgress
		o.Stop = stop
		o.OnProgress = func(p RunProgress) {
			if told != nil {
				told(p)
			}
			select { // one that nobody has taken is replaced
			case <-latest:
			default:
			}
			latest <- p
		}
		type end struct {
			report *RunReport
			err    error
		}
		ended := make(chan end, 1)
		go func() {
			var e end
			e.err = callSafely(func() (err error) {
				e.report, err = db.ForEach(ctx, o, f)
				return err
			})
			ended <- e
		}()
		stopping := false
		halt := func() {
			if !stopping {
				stopping = true
				close(stop)
			}
		}
		defer func() {
			select {
			case <-left:
			default: // the loop was left, or panicked
				halt()
				<-ended
			}
		}()
		for {
			select {
			case <-asked:
				asked = nil
				halt()
			case p := <-latest:
				if !yield(p, nil) {
					return
				}
			case e := <-ended:
				close(left)
				var p RunProgress
				if e.report != nil {
					p = e.report.RunProgress
					p.Report = e.report
				}
				yield(p, e.err)
				return
			}
		}
	}
}
