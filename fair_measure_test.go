//go:build !race

package pgxtenant

import (
	"context"
	"fmt"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// Under the race detector memory is not as it is, and a million of anything takes minutes.

func TestAMillionStepsOfTheGate(t *testing.T) { gateSteps(t, 1_000_000) }

func TestAMillionCheckouts(t *testing.T) { gateCheckouts(t, 1_000_000) }

// A tenant that waits takes little memory.
func TestTenThousandTenantsWaiting(t *testing.T) { // not beside others, whose memory would count
	const tenants = 10_000
	g := newTurnstile(&Config{MaxShare: 1}, 1, nil, nil)
	g.busy = func() int { return 1 }
	require.True(t, g.tryEnter())
	bindings := make([]*binding, tenants)
	for i := range bindings {
		bindings[i] = testBinding(fmt.Sprintf("t%05d", i), Limits{})
	}
	tickets := make([]*ticket, tenants)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i, bd := range bindings {
		tickets[i] = &ticket{Context: context.Background(), granted: make(chan struct{})}
		require.True(t, g.enqueue(tickets[i], bd, nil))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := int64(after.HeapAlloc-before.HeapAlloc) / tenants
	t.Logf("%d bytes for each", per)
	require.LessOrEqual(t, per, int64(512))
	g.giveBack(nil)
	for i, ticket := range tickets {
		<-ticket.granted
		g.came(ticket, &permit{gate: g}, bindings[i])
		g.released(g.permits[i])
	}
	g.mu.Lock()
	for _, p := range g.permits {
		p.closed = false
	}
	g.mu.Unlock()
	require.NoError(t, g.settled())
}

// What a tenant's turn costs, by how many wait.
func BenchmarkFairQueue(b *testing.B) {
	for _, tenants := range []int{10, 1_000, 100_000} {
		b.Run(fmt.Sprint("tenants=", tenants), func(b *testing.B) {
			q := newFairQueue(1, 1)
			ids := make([]string, tenants)
			for i := range ids {
				ids[i] = fmt.Sprint("t", i)
				q.push(&ticket{}, ids[i], 1, 0)
			}
			b.ReportAllocs()
			for b.Loop() {
				t, _ := q.next(0)
				q.push(&ticket{}, t.flow.id, 1, 0)
				q.release(t.flow, t.estimate, 1, 0)
			}
		})
	}
}
