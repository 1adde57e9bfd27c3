package bench

import (
	"context"
	"runtime"
	"sync"
	"time"
)

// Job is a piece of work, and how to set up the ways of doing it.
type Job struct {
	Name    string // as in -run, and of the benchmark
	Unit    string // what one operation is
	Workers int    // goroutines that share the work; 0 is 1
	Stride  int    // operations between two looks at the clock; 0 is 1
	Warm    int    // operations after which nothing is done for the first time
	Touch   int    // operations that use every connection once
	Scale   int    // units in an operation, for rates; 0 is 1
	Rows    []Row

	open    func(ctx context.Context, l *Lab) ([]Way, error)
	explain func(ctx context.Context, l *Lab) ([]PolicyPlan, error) // nil: there is nothing to explain
}

// Way is one way of doing a job.
type Way struct {
	Name  string
	Do    func(n int) error // n counts the operations, over all workers
	Reset func() error      // before each slice, not timed; may be nil
	Close func()

	n int // operations done
}

// Row is a comparison of two ways of a job.
type Row struct {
	What   string
	Base   string  // name of the way it is measured against
	Way    string  // and of the one that is measured
	Limit  float64 // of the time per operation, as a ratio; 0 is none
	Rate   bool    // the ratio is that of operations per second, and Limit the least
	Allocs float64 // the most allocations per operation above those of AllocBase
	// AllocBase is the way whose allocations are compared; empty means Base.
	AllocBase string
	// Form is set for a policy of another form than EnableRLS makes, which is measured only if asked for.
	Form bool
}

// Open sets up every way of the job.
func (j *Job) Open(ctx context.Context, l *Lab) (ways map[string]*Way, done func(), err error) {
	// As under a request: pgx watches a context that can be cancelled.
	ctx, cancel := context.WithCancel(ctx)
	all, err := j.open(ctx, l)
	done = func() {
		cancel()
		for _, w := range all {
			if w.Close != nil {
				w.Close()
			}
		}
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	ways = make(map[string]*Way, len(all))
	for i := range all {
		ways[all[i].Name] = &all[i]
	}
	return ways, done, nil
}

// Slice is what a stretch of work came to.
type Slice struct {
	Ops     int
	Elapsed time.Duration
	Allocs  uint64
}

// PerOp is the time per operation, in nanoseconds.
func (s Slice) PerOp() float64 { return float64(s.Elapsed) / float64(s.Ops) }

// Slice works for about d, after a warm-up that is not counted: a pool that has not been used for a second
// pings its connections, and the server's process behind one has been out of the caches.
func (j *Job) Slice(w *Way, d time.Duration) (Slice, error) {
	if w.Reset != nil {
		if err := w.Reset(); err != nil {
			return Slice{}, err
		}
	} else {
		least := j.Touch
		if w.n == 0 {
			least = j.Warm
		}
		if _, err := j.run(w, least, d/8); err != nil {
			return Slice{}, err
		}
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	ops, err := j.run(w, 1, d)
	elapsed := time.Since(start)
	runtime.ReadMemStats(&after)
	return Slice{ops, elapsed, after.Mallocs - before.Mallocs}, err
}

// run does at least so many operations, for at least d.
func (j *Job) run(w *Way, least int, d time.Duration) (ops int, err error) {
	stride, workers := max(j.Stride, 1), max(j.Workers, 1)
	start, first := time.Now(), w.n
	if workers == 1 {
		for done := false; !done; done = w.n-first >= least && time.Since(start) >= d {
			for range stride {
				if err := w.Do(w.n); err != nil {
					return 0, err
				}
				w.n++
			}
		}
		return w.n - first, nil
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range workers {
		wg.Go(func() {
			n, failed := 0, error(nil)
			for done := false; !done && failed == nil; done = n*workers >= least && time.Since(start) >= d {
				for range stride {
					if failed = w.Do(first + n*workers + i); failed != nil {
						break
					}
					n++
				}
			}
			mu.Lock()
			defer mu.Unlock()
			ops += n
			if err == nil {
				err = failed
			}
		})
	}
	wg.Wait()
	w.n += ops
	return ops, err
}
