package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/progress"

	"github.com/pgxtenant/pgxtenant"
)

// display shows how a run goes. Its methods are called one at a time, but for say.
type display interface {
	progress(p pgxtenant.RunProgress)
	say(text string)            // at any time
	end(r *pgxtenant.RunReport) // nil if there was no run
}

// progress is a bar on a terminal, lines in a log, or JSON.
func (a *app) progress(asJSON bool) display {
	switch {
	case asJSON:
		return &jsonDisplay{a: a}
	case a.err.terminal():
		return newBarDisplay(a)
	}
	return &lineDisplay{a: a}
}

// soFar is how far a run is, in few words.
func soFar(p *pgxtenant.RunProgress) string {
	text := fmt.Sprintf("%s: %d of %d", p.Stage, p.Ended(), p.Total)
	if failed := p.Failed + p.Unknown; failed > 0 {
		text += fmt.Sprintf(", %d failed", failed)
	}
	if p.Rate > 0 {
		text += ", " + strings.TrimSuffix(fmt.Sprintf("%.1f", p.Rate), ".0") + "/s"
	}
	if p.Left > 0 {
		text += ", " + p.Left.Round(time.Second).String() + " left"
	}
	return text
}

// failureOf tells of a result that is worth a line of its own; empty if it is not.
func (a *app) failureOf(r *pgxtenant.RunResult) string {
	if r == nil || r.Err == nil {
		return ""
	}
	return fmt.Sprintf("%s %s: %s", nameOf(r.Tenant, r.Place), r.State, a.text(r.Err))
}

// nameOf is a tenant, or the place of what is no tenant's own.
func nameOf(tenant, place string) string {
	if tenant == "" {
		return "(" + printable(place) + ")"
	}
	return printable(tenant)
}

// text is an error in one line, without secrets.
func (a *app) text(err error) string {
	return printable(strings.Join(strings.Fields(a.ourWords(err)), " "))
}

// lineDisplay is for a log: a line for each failure, for each stage, and now and then.
type lineDisplay struct {
	a     *app
	stage string
	next  time.Duration // of RunProgress.Elapsed
}

const lineEvery = 5 * time.Second

func (d *lineDisplay) progress(p pgxtenant.RunProgress) {
	if text := d.a.failureOf(p.Last); text != "" {
		d.a.err.line("%s", text)
	}
	if p.Stage == d.stage && p.Elapsed < d.next {
		return
	}
	d.stage, d.next = p.Stage, p.Elapsed+lineEvery
	d.a.err.line("%s", soFar(&p))
}

func (d *lineDisplay) say(text string) { d.a.err.line("%s", text) }

func (d *lineDisplay) end(*pgxtenant.RunReport) {}

// barDisplay is for a terminal: a bar, and the failures above it.
type barDisplay struct {
	a       *app
	bars    progress.Writer
	bar     *progress.Tracker
	drawing chan struct{} // closed when it is drawn no more
}

func newBarDisplay(a *app) *barDisplay {
	const rest = 6 // is the percentage and what is between
	barWidth := 20
	if a.err.width < 60 {
		barWidth = 5 // what is said of it is worth more
	}
	d := &barDisplay{a: a, bars: progress.NewWriter(), bar: &progress.Tracker{Message: "Looking", Total: 1}, drawing: make(chan struct{})}
	d.bars.SetOutputWriter(a.err)
	d.bars.SetTrackerLength(barWidth)
	d.bars.SetMessageLength(max(a.err.width-barWidth-rest-2, 10))
	d.bars.SetNumTrackersExpected(1)
	d.bars.SetUpdateFrequency(100 * time.Millisecond)
	style := progress.StyleDefault
	style.Options.Separator = " "
	style.Options.PercentFormat = "%3.0f%%"
	style.Options.DoneString = "" // a run may end with failures
	style.Visibility = progress.StyleVisibility{Percentage: true, Tracker: true}
	d.bars.SetStyle(style)
	d.bars.AppendTracker(d.bar)
	go func() {
		defer close(d.drawing)
		d.bars.Render()
	}()
	return d
}

func (d *barDisplay) progress(p pgxtenant.RunProgress) {
	if text := d.a.failureOf(p.Last); text != "" {
		d.say(text)
	}
	d.bar.UpdateMessage(soFar(&p))
	d.bar.UpdateTotal(int64(max(p.Total, 1)))
	d.bar.SetValue(int64(min(p.Ended(), max(p.Total, 1)-1))) // at its end it would be called done, and drawn no more
}

// say writes above the bar. An empty line comes first where the terminal has written ^C.
func (d *barDisplay) say(text string) {
	if strings.Contains(text, "Ctrl-C") {
		text = "\n" + text
	}
	for line := range strings.Lines(wrap(text, d.a.err.width)) {
		d.bars.Log("%s", strings.TrimRight(line, "\n"))
	}
}

func (d *barDisplay) end(r *pgxtenant.RunReport) {
	if r != nil {
		d.bar.UpdateMessage(soFar(&r.RunProgress))
		d.bar.SetValue(int64(max(r.Ended(), 1)))
	}
	// Stop says nothing to a Render that has not quite begun.
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		d.bars.Stop()
		select {
		case <-d.drawing:
			return
		case <-again.C:
		}
	}
}

// jsonDisplay prints an object for each event.
type jsonDisplay struct{ a *app }

type (
	progressView struct {
		Event   string  `json:"event"` // progress
		Run     string  `json:"run"`
		Stage   string  `json:"stage"`
		Done    int     `json:"done"`
		Current int     `json:"current"`
		Failed  int     `json:"failed"`
		Unknown int     `json:"unknown"`
		Skipped int     `json:"skipped"`
		Running int     `json:"running"`
		Total   int     `json:"total"`
		Elapsed float64 `json:"elapsed_seconds"`
		Rate    float64 `json:"per_second"`
		Left    float64 `json:"left_seconds"`
	}
	resultView struct {
		Event     string  `json:"event"` // result
		Tenant    string  `json:"tenant"`
		Isolation string  `json:"isolation"`
		Place     string  `json:"place"`
		State     string  `json:"state"`
		Before    string  `json:"before,omitempty"`
		After     string  `json:"after,omitempty"`
		Attempts  int     `json:"attempts"`
		Took      float64 `json:"seconds"`
		Error     string  `json:"error,omitempty"`
	}
	runView struct {
		progressView
		Resumed  bool   `json:"resumed"`
		Complete bool   `json:"complete"`
		LeftOver int    `json:"left_over"`
		Error    string `json:"error,omitempty"`
	}
)

func viewOfProgress(event string, p *pgxtenant.RunProgress) progressView {
	return progressView{event, p.Name, p.Stage, p.Done, p.Current, p.Failed, p.Unknown, p.Skipped, p.Running, p.Total,
		p.Elapsed.Seconds(), p.Rate, p.Left.Seconds()}
}

func (a *app) viewOfResult(r *pgxtenant.RunResult) resultView {
	v := resultView{"result", r.Tenant, r.Isolation.String(), r.Place, string(r.State), r.Before, r.After, r.Attempts, r.Took.Seconds(), ""}
	if r.Err != nil {
		v.Error = a.text(r.Err)
	}
	return v
}

func (a *app) viewOfReport(r *pgxtenant.RunReport, err error) runView {
	v := runView{viewOfProgress("report", &r.RunProgress), r.Resumed, r.Complete, r.LeftOver, ""}
	if err != nil {
		v.Error = a.text(err)
	}
	return v
}

func (d *jsonDisplay) progress(p pgxtenant.RunProgress) {
	if p.Last != nil {
		_ = d.a.out.json(d.a.viewOfResult(p.Last)) // a broken pipe is no reason to end a run
	}
	_ = d.a.out.json(viewOfProgress("progress", &p))
}

func (d *jsonDisplay) say(text string) { d.a.err.line("%s", text) }

func (d *jsonDisplay) end(*pgxtenant.RunReport) {}

// report tells how a run ended.
func (a *app) report(r *pgxtenant.RunReport) {
	text := fmt.Sprintf("Run %s: %d done, %d current, %d failed, %d unknown, %d skipped, of %d, in %v.",
		printable(r.Name), r.Done, r.Current, r.Failed, r.Unknown, r.Skipped, r.Total, r.Elapsed.Round(10*time.Millisecond))
	if r.Resumed {
		text += " It was resumed."
	}
	a.out.line("%s", text)
}
