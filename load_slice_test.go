package pgxtenant

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fakeTime is a clock that stands still unless it is told.
type fakeTime struct{ now time.Duration }

// newTestMeter returns a loadMeter on a clock of its own.
func newTestMeter(t *testing.T, adjust ...func(*Config)) (*loadMeter, *fakeTime) {
	t.Helper()
	c := (&Config{}).withDefaults()
	for _, f := range adjust {
		f(c)
	}
	clock := &fakeTime{now: time.Hour}
	l := newLoadMeter(c)
	l.clock = func() time.Duration { return clock.now }
	l.current.reset(clock.now)
	return l, clock
}

// load is one operation of a test's.
func (l *loadMeter) op(id string, d time.Duration) {
	l.charge(id, &Usage{Queries: 1, Rows: 2, Time: d, SharedTime: d})
}

// What is told of a tenant was surely used; what it may have missed is told too, and is bounded; and
// nobody is left out who used more than that bound.
func TestTheSketchAgainstExactCounts(t *testing.T) {
	t.Parallel()
	sketched(t, 50_000, 20_000)
}

func sketched(t *testing.T, ops, tenants int) {
	r := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(r, 1.1, 1, uint64(tenants-1))
	ids := make([]string, tenants)
	for i := range ids {
		ids[i] = fmt.Sprintf("t%06d", i)
	}
	l, clock := newTestMeter(t)
	exact := map[string]*Usage{}
	start := time.Now()
	for i := range ops {
		id := ids[zipf.Uint64()]
		d := time.Duration(r.ExpFloat64() * float64(time.Millisecond))
		l.op(id, d)
		u := exact[id]
		if u == nil {
			u = &Usage{}
			exact[id] = u
		}
		u.Time += d
		u.Queries++
		if clock.now += 200 * time.Second / time.Duration(ops); i%(ops/20) == ops/20-1 { // 10 s
			l.tick()
		}
	}
	t.Logf("%v an operation, with the exact count", time.Since(start)/time.Duration(ops))

	byTime := make([]string, 0, len(exact))
	for id := range exact {
		byTime = append(byTime, id)
	}
	slices.SortFunc(byTime, func(a, b string) int { return int(exact[b].Time - exact[a].Time) })
	load := l.snapshot()
	for _, w := range []LoadWindow{load.FiveMinutes, load.Hour} {
		require.EqualValues(t, ops, w.Total.Statements())
		require.EqualValues(t, ops*2, w.Total.Rows)
		require.Len(t, w.Tenants, LoadTenants)
		require.False(t, w.Exact)
		require.InEpsilon(t, len(exact), w.Active, 0.1)
		bound := w.Total.Time / LoadTenants
		var named Usage
		told := map[string]bool{}
		worst := 0.0
		for _, got := range w.Tenants {
			want := exact[got.TenantID]
			require.LessOrEqual(t, got.Time, want.Time)
			require.LessOrEqual(t, got.Queries, want.Queries)
			require.GreaterOrEqual(t, got.Time+got.Missed, want.Time)
			require.LessOrEqual(t, got.Missed, bound)
			named.add(&got.Usage)
			told[got.TenantID] = true
			worst = max(worst, float64(want.Time-got.Time)/float64(w.Total.Time))
		}
		t.Logf("%d tenants, %d estimated; the worst miss is %.3f %% of all time", len(exact), w.Active, 100*worst)
		named.add(&w.Other)
		require.Equal(t, w.Total, named)
		for i, id := range byTime {
			if exact[id].Time > bound {
				require.True(t, told[id], "%s is missing", id)
			}
			if i < 20 {
				require.Equal(t, id, w.Tenants[i].TenantID, "the %d. heaviest", i)
			}
		}
	}
}

// No clock, no share and no place is charged twice or lost, whatever comes in whatever order.
func TestSlicesKeepTheirSums(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 0))
		var hashMask uint64
		if seed%3 == 0 {
			hashMask = ^uint64(3) // IDs of the same hash, and of the same slot
		}
		var sketch loadSketch
		exact := map[string]time.Duration{}
		var total time.Duration
		tenants := 1 + r.IntN(2*loadPlaces)
		ops := r.IntN(8000)
		for range ops {
			id := fmt.Sprint(r.IntN(tenants))
			d := time.Duration(r.IntN(4)) // zero too
			sketch.add(id, loadHash(id)|hashMask, &Usage{Time: d, Rows: 1})
			exact[id] += d
			total += d
		}
		var s loadSlice
		sketch.finish(&s, 1)
		require.Equal(t, total, s.total.Time)
		require.EqualValues(t, ops, s.total.Rows)
		require.Len(t, s.places, min(len(exact), LoadTenants))
		require.Equal(t, len(exact) > LoadTenants, s.seen.full)
		require.LessOrEqual(t, s.missed, total/LoadTenants)
		told := map[string]bool{}
		for _, p := range s.places {
			require.LessOrEqual(t, p.usage.Time, exact[p.id])
			require.GreaterOrEqual(t, p.weight(), exact[p.id])
			require.LessOrEqual(t, p.before, s.missed)
			told[p.id] = true
		}
		require.Len(t, told, len(s.places), "nobody has two")
		for id, d := range exact {
			if !told[id] {
				require.LessOrEqual(t, d, s.missed)
			}
		}
	}
}

// What is made of several slices promises the same as each of them.
func TestSlicesAddUp(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		var sum loadSum
		exact := map[string]time.Duration{}
		var total time.Duration
		for part := range 3 {
			var sketch loadSketch
			for range 3000 {
				id := fmt.Sprint(part*LoadTenants/2 + r.IntN(LoadTenants/2+int(seed%2)*LoadTenants)) // every second has too many
				d := time.Duration(r.IntN(100))
				sketch.add(id, loadHash(id), &Usage{Time: d})
				exact[id] += d
				total += d
			}
			var s loadSlice
			sketch.finish(&s, 1)
			sum.add(&s)
		}
		s := sum.slice(0, 3)
		require.Len(t, s.places, LoadTenants)
		require.True(t, s.seen.full)
		require.Equal(t, total, s.total.Time)
		require.LessOrEqual(t, s.missed, 2*total/LoadTenants)
		for _, p := range s.places {
			require.LessOrEqual(t, p.usage.Time, exact[p.id])
			require.GreaterOrEqual(t, p.weight(), exact[p.id])
			delete(exact, p.id)
		}
		for _, d := range exact {
			require.LessOrEqual(t, d, s.missed)
		}
	}
}

func TestDistinct(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 300, 3_000, 100_000} {
		var a, b distinct
		for i := range n {
			for range 2 { // twice is once
				[]*distinct{&a, &b}[i%2].add(maphash.String(loadSeed, fmt.Sprint(i)))
			}
		}
		a.merge(&b)
		require.InDelta(t, n, a.estimate(), 1+0.1*float64(n))
	}
}

func TestNth(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 3))
	for range 3000 {
		all := make([]time.Duration, 1+r.IntN(40))
		for i := range all {
			all[i] = time.Duration(r.IntN(1 + r.IntN(40)))
		}
		want := slices.Sorted(slices.Values(all))
		for n := range all {
			require.Equal(t, want[n], nth(slices.Clone(all), n))
		}
	}
}
