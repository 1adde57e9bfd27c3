package main

import (
	"math"
	"testing"

	"github.com/pgxtenant/pgxtenant/bench"
)

func series(perOp, allocs float64) sample {
	return sample{perOp: []float64{perOp, perOp, perOp}, allocs: []float64{allocs, allocs, 100}}
}

func TestJudge(t *testing.T) {
	for _, tt := range []struct {
		name   string
		row    bench.Row
		allocs float64 // above the baseline's
		ratio  float64
		want   verdict
	}{
		{"within", bench.Row{Limit: 1.5}, 0, 1.49, withinLimit},
		{"slower than the limit", bench.Row{Limit: 1.5}, 0, 1.51, overLimit},
		{"one allocation more", bench.Row{Limit: 1.5}, 1, 1, overLimit},
		{"as many as allowed", bench.Row{Limit: 1.5, Allocs: 4}, 4, 1, withinLimit},
		{"any number allowed", bench.Row{Limit: 1.5, Allocs: math.Inf(1)}, 40, 1, withinLimit},
		{"a rate that is high enough", bench.Row{Limit: 0.82, Rate: true}, 0, 0.83, withinLimit},
		{"a rate that is too low", bench.Row{Limit: 0.82, Rate: true}, 0, 0.81, overLimit},
		{"nothing asked", bench.Row{Allocs: math.Inf(1)}, 40, 40, ""},
	} {
		base, way := series(100, 7), series(100*tt.ratio, 7+tt.allocs)
		got := judge(&bench.Job{}, tt.row, base, way, base, []float64{tt.ratio})
		if got.Verdict != tt.want {
			t.Errorf("%s: verdict %q; want %q", tt.name, got.Verdict, tt.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	values := []float64{4, 1, 3, 2}
	for q, want := range map[float64]float64{0: 1, 0.5: 2.5, 1: 4} {
		if got := quantile(values, q); got != want {
			t.Errorf("quantile %v of %v is %v; want %v", q, values, got, want)
		}
	}
}
