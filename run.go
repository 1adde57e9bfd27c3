package pgxtenant

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// ForEach calls f for every tenant that the options select, several at once, with a connection placed where the tenant's
// data are: see [ForEachFunc] for the connection and for what f must promise. It needs Config.Registry, whose tables
// Registry.Install brings up to date, and Config.Admin; without them it fails with ErrNoRegistry or ErrNoAdmin.
//
// What became of each tenant is kept in the registry, so that a call under the same ForEachOptions.Name does what an
// earlier one has left, whether that failed, was stopped, or died. Calls at once, in any number of processes, never have
// f at work on one tenant twice at the same time. Tenants that come during the run are found at its end; those that are
// deleted are skipped. Suspended and read-only ones count like all others.
//
// The report is nil only if nothing was begun: if the options are wrong or the registry cannot be read. If anything has
// failed, or the run ended before all was done, the error is a *RunError with the same report. When the TenantDB is
// closed, the contexts of f end and the run with ErrClosed.
func (db *TenantDB) ForEach(ctx context.Context, o ForEachOptions, f ForEachFunc) (*RunReport, error) {
	r, err := db.newRun(ctx, o, f)
	if err != nil {
		return nil, err
	}
	defer r.close()
	return r.do()
}

// tenantRun is one call of ForEach. It is the goroutine of the caller's that decides what is next; each target is
// worked on by one more, which tells it of the end and shares nothing with it.
type tenantRun struct {
	db *TenantDB
	o  ForEachOptions // with defaults
	f  ForEachFunc

	runner   string // tells this call from all others
	id       int64
	began    time.Time // by the server's clock
	scanned  time.Time // when the last look at the registry for new tenants began; the same
	resumed  bool
	homeHost string
	books    *pgxpool.Pool // to the run tables
	home     *runPlace     // the database of schema tenants and the shared schemas

	ctx    context.Context // ends with the caller's, or with the TenantDB
	cancel context.CancelCauseFunc
	beats  sync.WaitGroup

	lease lease

	// Of the caller's goroutine.
	stopped   error        // why nothing new is begun
	pending   []*runTarget // to be begun, in order
	busy      []*runTarget // another session is at work on them
	running   int
	byHost    map[string]int
	ended     chan outcome
	templated map[string]bool // templates that are done; only written while nothing runs
	progress  *runProgress
}

func (db *TenantDB) newRun(ctx context.Context, o ForEachOptions, f ForEachFunc) (*tenantRun, error) {
	if f == nil {
		return nil, errors.Join(o.withDefaults().validate(), errors.New("pgxtenant: ForEach is given no function"))
	}
	r, err := db.openRun(ctx, o)
	if err != nil {
		return nil, err
	}
	r.f = f
	if err := r.enter(r.ctx); err != nil {
		err = r.cause(err)
		r.close()
		return nil, err
	}
	r.progress = newRunProgress(r)
	return r, nil
}

// openRun makes a run that is in no table yet.
func (db *TenantDB) openRun(ctx context.Context, o ForEachOptions) (_ *tenantRun, err error) {
	o = o.withDefaults()
	err = o.validate()
	if db.registry == nil {
		err = errors.Join(err, ErrNoRegistry)
	}
	if db.admin == nil {
		err = errors.Join(err, ErrNoAdmin)
	}
	if db.closed.Load() {
		err = ErrClosed
	}
	if err != nil {
		return nil, err
	}
	r := &tenantRun{db: db, o: o, runner: newRunner(), byHost: make(map[string]int), templated: make(map[string]bool),
		ended: make(chan outcome, o.Concurrency)}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	books := db.config.Admin.Copy()
	books.MaxConns, books.MinConns, books.MinIdleConns = 3, 0, 0
	if r.books, err = pgxpool.NewWithConfig(r.ctx, books); err != nil {
		return nil, fmt.Errorf("pgxtenant: run tables: %w", err)
	}
	r.beats.Go(r.keepClaims)
	config, err := r.poolConfig(r.ctx, &runTarget{})
	if err != nil {
		return nil, err
	}
	r.homeHost = hostOf(config)
	// One more than there are targets at once, so that the next page need not wait for one of them.
	if r.home, err = r.openPlace(r.ctx, config, o.Concurrency+1); err != nil {
		return nil, r.cause(err)
	}
	return r, nil
}

// clock is the registry's.
func (r *tenantRun) clock(ctx context.Context) (now time.Time, err error) {
	err = r.book(ctx, func(ctx context.Context) error {
		return r.books.QueryRow(ctx, "select clock_timestamp()").Scan(&now)
	})
	return now, err
}

func newRunner() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func (r *tenantRun) close() {
	r.cancel(context.Canceled)
	r.beats.Wait()
	if r.home != nil {
		r.home.close()
	}
	if r.books != nil {
		r.books.Close()
	}
}

// cause is why the context has ended, if it has, or err.
func (r *tenantRun) cause(err error) error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	return err
}

// do goes through the stages and reports.
func (r *tenantRun) do() (*RunReport, error) {
	err := r.stages()
	for r.running > 0 { // after an error
		r.end(<-r.ended)
	}
	if err = cmp.Or(err, r.stopped); err != nil {
		err = r.cause(err)
	}
	return r.report(err)
}

// stages are the order of the run. Each ends before the next begins.
func (r *tenantRun) stages() error {
	n, err := r.expected(r.ctx)
	if err != nil {
		return err
	}
	r.progress.expect(n)
	shared, err := r.shared(r.ctx)
	if err != nil {
		return err
	}
	first := [...]struct {
		name    string
		targets []*runTarget
	}{{name: "shared"}, {"template", r.templates()}}
	if shared != nil {
		first[0].targets = []*runTarget{shared}
	}
	for i := range first { // all are counted before anything is told of the first
		left, done, err := r.unfinished(r.ctx, first[i].targets)
		if err != nil {
			return err
		}
		r.done(done)
		r.progress.expect(len(left))
		first[i].targets = left
	}
	for _, f := range first {
		if err := r.first(f.name, f.targets); err != nil {
			return err
		}
	}
	if len(r.o.Canaries) > 0 {
		before := r.progress.bad()
		if err := r.stage("canaries", r.tenantsFeed(r.o.isCanary, true)); err != nil {
			return err
		}
		if n := r.progress.bad() - before; n > 0 {
			r.stop(fmt.Errorf("%w: %d of the canaries failed", ErrRunStopped, n))
			return nil
		}
	}
	waves := r.o.Waves
	if len(waves) == 0 || waves[len(waves)-1] < 100 {
		waves = append(slices.Clone(waves), 100)
	}
	for i, percent := range waves {
		in := func(t Tenant) bool { return StablePercent(t.ID) < percent }
		if err := r.stage(fmt.Sprintf("wave %d", i+1), r.tenantsFeed(in, false)); err != nil || r.stopped != nil {
			return err
		}
	}
	// Tenants that came meanwhile are copies of the template as it is now, or of what it was before; in either case
	// they are in the registry by the time at which the one before has ended.
	for before := -1; before != r.progress.p.Ended(); {
		before = r.progress.p.Ended()
		if r.scanned, err = r.clock(r.ctx); err != nil {
			return err
		}
		if err := r.stage("late", r.tenantsFeed(nil, false)); err != nil || r.stopped != nil {
			return err
		}
	}
	return nil
}

// first is a stage of which nothing may fail.
func (r *tenantRun) first(name string, left []*runTarget) error {
	if r.stopped != nil || len(left) == 0 {
		return nil
	}
	before := r.progress.bad()
	rest := slices.Clone(left) // the stage takes it apart
	err := r.stage(name, func(context.Context) (next []*runTarget, _ error) {
		next, rest = rest, nil
		return next, nil
	})
	if n := r.progress.bad() - before; n > 0 {
		what := "a template"
		if len(left) == 1 {
			what = "the " + left[0].what()
		}
		r.stop(fmt.Errorf("%w: %s could not be done", ErrRunStopped, what))
	}
	if err == nil && r.stopped == nil {
		r.done(left)
	}
	return err
}

// done notes that templates are as new tenants shall be.
func (r *tenantRun) done(targets []*runTarget) {
	for _, t := range targets {
		if t.kind != targetShared {
			r.templated[t.templateKind()] = true
		}
	}
}

// what names a target that is no tenant.
func (t *runTarget) what() string {
	switch t.kind {
	case targetShared:
		return "shared schemas"
	case targetSchema:
		return fmt.Sprintf("template schema %q", t.name)
	}
	return fmt.Sprintf("template database %q on server %q", t.place, t.name)
}

// stop lets nothing new begin. The first reason counts.
func (r *tenantRun) stop(why error) {
	if r.stopped == nil {
		r.stopped = why
	}
}

// stage works on all that the feed has, and returns when that has ended. After a stop it returns as soon as nothing
// runs.
func (r *tenantRun) stage(name string, next feed) error {
	r.progress.stage(name)
	poll := time.NewTicker(busyPause)
	defer poll.Stop()
	end := false
	for {
		select {
		case <-r.o.Stop:
			r.stop(fmt.Errorf("%w, as it was asked to", ErrRunStopped))
		default:
		}
		if r.ctx.Err() != nil {
			r.stop(context.Cause(r.ctx))
		}
		if r.stopped != nil {
			r.pending, r.busy = nil, nil
			end = true
		}
		if len(r.pending) == 0 && !end {
			targets, err := next(r.ctx)
			if err != nil {
				return err
			}
			r.pending, end = targets, len(targets) == 0
			continue
		}
		r.begin()
		if r.running == 0 && len(r.pending) == 0 && len(r.busy) == 0 {
			if end {
				return nil
			}
			continue
		}
		if r.room() && len(r.pending) == 0 && !end {
			continue // to the next page
		}
		stop := r.o.Stop
		if r.stopped != nil {
			stop = nil // it is known
		}
		select {
		case out := <-r.ended:
			if err := r.end(out); err != nil {
				return err
			}
		case <-stop:
		case <-r.doneOnce():
		case <-poll.C:
			r.progress.tick()
		}
	}
}

// busyPause is how long a target that another session is at work on is left alone.
const busyPause = 250 * time.Millisecond

// doneOnce is the end of the run's context, while it is not known.
func (r *tenantRun) doneOnce() <-chan struct{} {
	if r.stopped != nil {
		return nil
	}
	return r.ctx.Done()
}

func (r *tenantRun) room() bool { return r.running < r.o.Concurrency }

// begin starts what there is room for.
func (r *tenantRun) begin() {
	now := time.Now()
	r.pending = r.beginOf(r.pending, now)
	r.busy = r.beginOf(r.busy, now)
}

func (r *tenantRun) beginOf(list []*runTarget, now time.Time) []*runTarget {
	kept := list[:0]
	for _, t := range list {
		if !r.room() || r.byHost[t.host] >= r.o.PerServer || now.Before(t.again) {
			kept = append(kept, t)
			continue
		}
		r.running++
		r.byHost[t.host]++
		r.progress.begun()
		go func() { r.ended <- r.work(t) }()
	}
	clear(list[len(kept):])
	return kept
}

// end takes note of an outcome. The error ends the run.
func (r *tenantRun) end(out outcome) error {
	t := out.target
	r.running--
	if r.byHost[t.host]--; r.byHost[t.host] == 0 {
		delete(r.byHost, t.host)
	}
	switch {
	case out.busy && out.fatal == nil:
		t.again = time.Now().Add(busyPause)
		if r.stopped == nil {
			r.busy = append(r.busy, t)
		}
		r.progress.stepped(nil)
	case out.elsewhere:
		r.progress.expect(-1)
		r.progress.stepped(nil)
	case out.undone, out.fatal != nil:
		r.progress.stepped(nil)
	default:
		r.progress.stepped(&out.result)
		r.limits()
	}
	return out.fatal
}

// limits stops the run if there are too many failures.
func (r *tenantRun) limits() {
	p, bad := &r.progress.p, r.progress.bad()
	tried := p.Done + bad
	switch {
	case r.o.StopAfter > 0 && bad >= r.o.StopAfter:
		r.stop(fmt.Errorf("%w after %d failures", ErrRunStopped, bad))
	case r.o.StopRate > 0 && tried >= StopRateSamples && float64(bad) > r.o.StopRate*float64(tried):
		r.stop(fmt.Errorf("%w: %d of %d failed, more than %v %%", ErrRunStopped, bad, tried, r.o.StopRate*100))
	}
}
