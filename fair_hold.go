package pgxtenant

import (
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"time"
)

// holdWatch reports who holds a connection for longer than the tenant's Limits.HoldLimit. It serves one
// checkout after the other.
type holdWatch struct {
	log *slog.Logger

	mu     sync.Mutex
	holder *binding // nil while nobody is watched
	since  time.Time
	late   bool // it has been reported
	pcs    [32]uintptr
	frames int
	timer  *time.Timer
}

// begin watches a checkout. It is called in the goroutine that made it.
func (w *holdWatch) begin(bd *binding) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holder, w.since, w.late = bd, time.Now(), false
	w.frames = runtime.Callers(2, w.pcs[:])
	if w.timer == nil {
		w.timer = time.AfterFunc(bd.limits.HoldLimit, w.expire)
	} else {
		w.timer.Reset(bd.limits.HoldLimit)
	}
}

// expire reports the checkout, unless the timer fired for one that has ended since.
func (w *holdWatch) expire() {
	w.mu.Lock()
	if w.holder == nil || w.late || time.Since(w.since) < w.holder.limits.HoldLimit {
		w.mu.Unlock()
		return
	}
	w.late = true
	report := w.reportLocked()
	w.mu.Unlock()
	w.log.Warn("connection held too long", report...)
}

// unwatch ends the watch of who has p, if there is one.
func (p *permit) unwatch() {
	if w := p.watch.Load(); w != nil {
		w.end()
	}
}

// end ends the watch. It may be called when there is none.
func (w *holdWatch) end() {
	w.mu.Lock()
	if w.holder == nil {
		w.mu.Unlock()
		return
	}
	w.timer.Stop()
	late := w.late
	var report []any
	if late {
		report = w.reportLocked()
	}
	w.holder = nil
	w.mu.Unlock()
	if late {
		w.log.Warn("connection held too long has been returned", report...)
	}
}

// reportLocked says who, for how long, and where.
func (w *holdWatch) reportLocked() []any {
	place, stack := stackOf(w.pcs[:w.frames])
	return []any{"tenant", w.holder.tenant.ID, "held", time.Since(w.since), "limit", w.holder.limits.HoldLimit, "at", place, "stack", stack}
}

// stackOf prints a stack, and the first place in it that is neither in this package nor in pgx.
func stackOf(pcs []uintptr) (place, stack string) {
	var sb strings.Builder
	frames := runtime.CallersFrames(pcs)
	for more := true; more; {
		var f runtime.Frame
		if f, more = frames.Next(); f.Function == "" {
			break
		}
		line := fmt.Sprintf("%s %s:%d", f.Function, f.File, f.Line)
		if place == "" && !beneath(f) {
			place = line
		}
		sb.WriteString(line + "\n")
	}
	return place, sb.String()
}

// beneath reports whether f is a part of what the application calls.
func beneath(f runtime.Frame) bool {
	return strings.HasPrefix(f.Function, "github.com/jackc/") ||
		strings.HasPrefix(f.Function, "github.com/pgxtenant/pgxtenant.") && !strings.HasSuffix(f.File, "_test.go")
}
