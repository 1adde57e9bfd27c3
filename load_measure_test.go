//go:build !race

package pgxtenant

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestAMillionOperationsOfAHundredThousandTenants(t *testing.T) { sketched(t, 1_000_000, 100_000) }

// What a statement costs the meter, without the statement: tenants in turn, those that have places and those that must
// take another's.
func BenchmarkLoad(b *testing.B) {
	tag := pgconn.NewCommandTag("SELECT 1")
	for _, tenants := range []int{1, LoadTenants, 1000, 10_000, 100_000} {
		bindings := make([]*binding, tenants)
		for i := range bindings {
			bindings[i] = testBinding(fmt.Sprintf("t%06d", i), Limits{})
		}
		b.Run(fmt.Sprint("tenants=", tenants), func(b *testing.B) {
			m := &connMeter{load: newLoadMeter((&Config{}).withDefaults()), holder: &atomic.Pointer[binding]{}}
			m.begin()
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				m.user = bindings[i%tenants]
				m.start(runsQuery)
				m.stop(runsQuery, tag, nil)
				i++
			}
		})
	}
	// A thousand tenants, and 16 goroutines with a connection each.
	b.Run("parallel", func(b *testing.B) {
		bindings := make([]*binding, 1000)
		for i := range bindings {
			bindings[i] = testBinding(fmt.Sprintf("t%06d", i), Limits{})
		}
		l := newLoadMeter((&Config{}).withDefaults())
		var conns atomic.Int32
		b.SetParallelism((16 + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			m := &connMeter{load: l, holder: &atomic.Pointer[binding]{}}
			m.begin()
			for i := int(conns.Add(1)) * 61; pb.Next(); i++ {
				m.user = bindings[i%len(bindings)]
				m.start(runsQuery)
				m.stop(runsQuery, tag, nil)
			}
		})
	})
	b.Run("Load", func(b *testing.B) {
		l := newLoadMeter((&Config{}).withDefaults())
		for i := range 40 * 5_000 {
			l.charge(fmt.Sprint("t", i*7919%10_000), &Usage{Time: time.Duration(i)})
			if i%5_000 == 0 {
				l.tick()
			}
		}
		for b.Loop() {
			l.snapshot()
		}
	})
}
