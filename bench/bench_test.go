package bench

import (
	"context"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

// lab is the server of all benchmarks, made by the first.
var lab = sync.OnceValues(func() (*Lab, error) { return Open(context.Background()) })

var opened atomic.Bool

func TestMain(m *testing.M) {
	code := m.Run()
	if opened.Load() {
		if l, err := lab(); err == nil {
			_ = l.Close()
		}
	}
	os.Exit(code)
}

func openLab(tb testing.TB) *Lab {
	tb.Helper()
	opened.Store(true)
	l, err := lab()
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func BenchmarkCheckout(b *testing.B)         { run(b, &Checkout) }
func BenchmarkCheckoutParallel(b *testing.B) { run(b, &CheckoutParallel) }
func BenchmarkCheckoutGrowth(b *testing.B)   { run(b, &CheckoutGrowth) }
func BenchmarkRead(b *testing.B)             { run(b, &Read) }
func BenchmarkReadDelayed(b *testing.B)      { run(b, &ReadDelayed) }
func BenchmarkReadParallel(b *testing.B)     { run(b, &ReadParallel) }
func BenchmarkReadGrowth(b *testing.B)       { run(b, &ReadGrowth) }
func BenchmarkWrite(b *testing.B)            { run(b, &Write) }
func BenchmarkCopy(b *testing.B)             { run(b, &Copy) }
func BenchmarkPolicyPoint(b *testing.B)      { run(b, &PolicyPoint) }
func BenchmarkPolicyRange(b *testing.B)      { run(b, &PolicyRange) }
func BenchmarkPolicyAggregate(b *testing.B)  { run(b, &PolicyAggregate) }
func BenchmarkPolicyJoin(b *testing.B)       { run(b, &PolicyJoin) }
func BenchmarkSchema(b *testing.B)           { run(b, &Schema) }

// run runs each way of the job, the baselines first.
func run(b *testing.B, job *Job) {
	ways, done, err := job.Open(b.Context(), openLab(b))
	if err != nil {
		b.Fatal(err)
	}
	defer done()
	var names []string
	for _, of := range []func(Row) string{func(r Row) string { return r.Base }, func(r Row) string { return r.Way }} {
		for _, row := range job.Rows {
			if name := of(row); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		way, ok := ways[name]
		if !ok {
			b.Errorf("there is no way %q", name)
			continue
		}
		b.Run("via="+name, func(b *testing.B) { runWay(b, job, way) })
	}
}

func runWay(b *testing.B, job *Job, way *Way) {
	if way.Reset == nil { // else the rows would be there already
		if _, err := job.run(way, max(job.Warm, job.Touch), 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	if job.Workers > 1 {
		runParallel(b, job, way)
		return
	}
	for b.Loop() {
		if way.Reset != nil {
			b.StopTimer()
			if err := way.Reset(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		if err := way.Do(way.n); err != nil {
			b.Fatal(err)
		}
		way.n++
	}
}

// runParallel is b.RunParallel with an exact number of goroutines.
func runParallel(b *testing.B, job *Job, way *Way) {
	var next atomic.Int64
	next.Store(int64(way.n))
	last := int64(way.n + b.N)
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	b.ResetTimer()
	for range job.Workers {
		wg.Go(func() {
			for n := next.Add(1) - 1; n < last; n = next.Add(1) - 1 {
				if err := way.Do(int(n)); err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	way.n = int(last)
	if err := failed.Load(); err != nil {
		b.Fatal(*err)
	}
}

// TestWays does each job once in each way.
func TestWays(t *testing.T) {
	l := openLab(t)
	for _, job := range Jobs {
		t.Run(job.Name, func(t *testing.T) {
			ways, done, err := job.Open(t.Context(), l)
			if err != nil {
				t.Fatal(err)
			}
			defer done()
			for _, row := range job.Rows {
				for _, name := range []string{row.Base, row.Way} {
					way := ways[name]
					if way == nil {
						t.Fatalf("there is no way %q", name)
					}
					if way.Reset != nil {
						if err := way.Reset(); err != nil {
							t.Fatal(err)
						}
					}
					if _, err := job.run(way, 1, 0); err != nil {
						t.Fatalf("%s: %v", name, err)
					}
				}
			}
		})
	}
}

// TestIdlePool holds the memory of an open isolated pool without connections to its limit.
func TestIdlePool(t *testing.T) {
	count := 1000
	if raceEnabled { // the race detector's own memory is in it: only goroutines are of interest
		count = 200
	}
	plain, isolated, err := IdlePools(t.Context(), openLab(t), count)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("pgxpool's: %v", plain)
	t.Logf("isolated:  %v", isolated)
	if isolated.Bytes() > MaxPoolBytes && !raceEnabled {
		t.Errorf("an idle pool takes %.0f bytes; want at most %d", isolated.Bytes(), MaxPoolBytes)
	}
	if isolated.Goroutines > MaxPoolGoroutines+0.05 {
		t.Errorf("an idle pool takes %.2f goroutines; want at most %d", isolated.Goroutines, MaxPoolGoroutines)
	}
}
