package tenantlimit

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

func TestABurstPassesAndThenWhatFlowsIn(t *testing.T) {
	both(t, func(b *backend) {
		l := b.open(plan(rated(PerHour(60, 10))))
		require.Equal(b, 10, passes(b, l, "acme", Call{}, 25))
		e := refused(b, l, "acme", Call{}, KindRate)
		require.Greater(b, e.RetryAfter, time.Duration(0))
		require.LessOrEqual(b, e.RetryAfter, time.Minute+time.Microsecond)
		b.pass(l, e.RetryAfter)
		require.Equal(b, 1, passes(b, l, "acme", Call{}, 5))
		b.pass(l, 3*time.Minute)
		require.Equal(b, 3, passes(b, l, "acme", Call{}, 5))
		b.pass(l, 1000*time.Hour)
		require.Equal(b, 10, passes(b, l, "acme", Call{}, 25), "nothing is saved up beyond the burst")
	})
}

func TestARefusedCallConsumesNothing(t *testing.T) {
	both(t, func(b *backend) {
		p := rated(PerHour(60, 10))
		p.Concurrency = 1
		l := b.open(plan(p))

		held := pass(b, l, "acme", Call{})
		for range 50 {
			require.Equal(b, 9, refused(b, l, "acme", Call{}, KindConcurrency).State.Remaining)
		}
		held.Release()
		require.Equal(b, 9, passes(b, l, "acme", Call{}, 20))

		for range 50 {
			require.Zero(b, refused(b, l, "acme", Call{}, KindRate).State.UnderWay)
		}
		b.pass(l, time.Minute+time.Microsecond)
		held = pass(b, l, "acme", Call{})
		require.Equal(b, 1, held.State.UnderWay)
		held.Release()
		refused(b, l, "acme", Call{}, KindRate)
	})
}

func TestACallTakesItsCost(t *testing.T) {
	both(t, func(b *backend) {
		l := b.open(plan(rated(PerHour(60, 10))))
		require.Equal(b, 3, pass(b, l, "acme", Call{Cost: 7}).State.Remaining)
		e := refused(b, l, "acme", Call{Cost: 5}, KindRate)
		require.InDelta(b, 2*time.Minute, e.RetryAfter, float64(time.Minute))
		require.Zero(b, refused(b, l, "acme", Call{Cost: 11}, KindCost).RetryAfter, "it can never pass")
		pass(b, l, "acme", Call{Cost: 3})
		refused(b, l, "acme", Call{}, KindRate)
		pass(b, l, "globex", Call{Cost: 10})

		_, err := l.Take(as("initech"), Call{Cost: -1})
		require.ErrorIs(b, err, ErrInvalidCost)
		require.Equal(b, 10, passes(b, l, "initech", Call{}, 20), "a cost below zero gives nothing back")
	})
}

func TestTenantsAndEndpointsAreApart(t *testing.T) {
	odd := []string{"GET /a", "GET /a:", ":", "}", "{acme}", "{acme}r", "r", "c", "*", "?", "[a]", "\x00", "🦆", " ", strings.Repeat("x", 100_000)}
	both(t, func(b *backend) {
		p := rated(PerHour(1, 3))
		p.Endpoints = map[string]Limits{}
		for _, e := range odd {
			p.Endpoints[e] = Limits{Rate: PerHour(1, 2), Concurrency: 1}
		}
		l := b.open(plan(p))
		for _, tenant := range []string{"acme", "acme.r", "Acme", "a", "acm"} {
			require.Equal(b, 3, passes(b, l, tenant, Call{}, 5), tenant)
			refused(b, l, tenant, Call{Endpoint: "no limit of its own"}, KindRate)
			for _, e := range odd {
				require.Equal(b, 2, passes(b, l, tenant, Call{Endpoint: e}, 5), "%s %.20q", tenant, e)
			}
		}
	})
}

func TestAnEndpointsLimitTakesThePlaceOfThePlans(t *testing.T) {
	both(t, func(b *backend) {
		p := Plan{Limits: Limits{Rate: PerHour(1, 5), Concurrency: 2}, Endpoints: map[string]Limits{
			"export": {Concurrency: 1},
			"search": {Rate: PerHour(1, 2)},
			"status": {Rate: Rate{Unlimited: true}},
		}}
		l := b.open(plan(p))

		export := pass(b, l, "acme", Call{Endpoint: "export"})
		require.Equal(b, 4, export.State.Remaining, "the plan's rate counts it")
		refused(b, l, "acme", Call{Endpoint: "export"}, KindConcurrency)
		first, second := pass(b, l, "acme", Call{}), pass(b, l, "acme", Call{Endpoint: "search"})
		require.Equal(b, 1, second.State.Remaining)
		e := refused(b, l, "acme", Call{Endpoint: "search"}, KindConcurrency)
		require.True(b, e.State.OwnRate)
		require.False(b, e.State.OwnConcurrency, "search shares the plan's slots")
		for _, g := range []*Grant{export, first, second} {
			g.Release()
		}
		require.Equal(b, 1, passes(b, l, "acme", Call{Endpoint: "search"}, 3))
		require.Equal(b, 100, passes(b, l, "acme", Call{Endpoint: "status"}, 100))
		require.Equal(b, 3, passes(b, l, "acme", Call{}, 10), "neither search nor status took of the plan's rate")
	})
}

func TestSlotsComeBackOnceEach(t *testing.T) {
	both(t, func(b *backend) {
		l := b.open(plan(slots(3)))
		grants := []*Grant{pass(b, l, "acme", Call{}), pass(b, l, "acme", Call{}), pass(b, l, "acme", Call{})}
		require.Equal(b, 3, grants[2].State.UnderWay)
		e := refused(b, l, "acme", Call{}, KindConcurrency)
		require.Equal(b, ConcurrencyRetryAfter, e.RetryAfter)
		pass(b, l, "globex", Call{}).Release()

		var releases sync.WaitGroup
		for range 10 {
			releases.Go(grants[0].Release)
		}
		releases.Wait()
		grants[0] = pass(b, l, "acme", Call{})
		refused(b, l, "acme", Call{}, KindConcurrency)
		for _, g := range grants {
			g.Release()
		}
		require.Equal(b, 1, pass(b, l, "acme", Call{}).State.UnderWay)
		(*Grant)(nil).Release()
	})
}

func TestManyGoroutinesPassExactlyTheLimit(t *testing.T) {
	both(t, func(b *backend) {
		p := rated(PerHour(1, 100))
		p.Concurrency = 4
		l := b.open(plan(p))
		var passed, underWay atomic.Int64
		var calls sync.WaitGroup
		for range 16 {
			calls.Go(func() {
				for range 40 {
					g, err := l.Take(as("acme"), Call{})
					if err != nil {
						continue
					}
					passed.Add(1)
					if n := underWay.Add(1); n > 4 {
						b.Errorf("%d calls under way", n)
					}
					underWay.Add(-1)
					g.Release()
				}
			})
		}
		calls.Wait()
		rest := passes(b, l, "acme", Call{}, 101)
		require.EqualValues(b, 100, passed.Load()+int64(rest))
		require.Zero(b, l.Stats().Failed)
	})
}

func TestPlansMayChangeWhileTheyAreUsed(t *testing.T) {
	both(t, func(b *backend) {
		l := b.open(plan(rated(PerHour(60, 10))))
		pass(b, l, "acme", Call{Cost: 2})
		require.NoError(b, l.SetPlans(plan(rated(PerHour(60, 5))).Plans))
		require.Equal(b, 5, passes(b, l, "acme", Call{}, 20), "of a smaller bucket, no more than its burst is left")
		require.NoError(b, l.SetPlans(plan(rated(PerHour(6000, 100))).Plans))
		refused(b, l, "acme", Call{}, KindRate)
		b.pass(l, time.Minute)
		require.GreaterOrEqual(b, passes(b, l, "acme", Call{}, 99), 99, "it fills at the new pace")
		require.Error(b, l.SetPlans(nil))
		require.Error(b, l.SetPlans(map[string]Plan{"plan": {}}))
		_, err := l.Take(as("globex"), Call{})
		require.NoError(b, err, "bad plans change nothing")
	})
}

func TestTheStateTellsHowLimitsStand(t *testing.T) {
	both(t, func(b *backend) {
		p := rated(PerHour(60, 10))
		p.Concurrency = 5
		l := b.open(plan(p))
		pass(b, l, "acme", Call{})
		s := pass(b, l, "acme", Call{Cost: 3}).State
		require.Equal(b, p.Rate, s.Rate)
		require.Equal(b, 6, s.Remaining)
		require.InDelta(b, 4*time.Minute, s.Reset, float64(30*time.Second))
		require.InDelta(b, time.Minute, s.Next, float64(30*time.Second))
		require.Equal(b, 5, s.Concurrency)
		require.Equal(b, 2, s.UnderWay)
	})
}

func TestWithoutALimitNothingIsCounted(t *testing.T) {
	both(t, func(b *backend) {
		l := b.open(plan(rated(Rate{Unlimited: true})))
		g := pass(b, l, "acme", Call{Cost: 1 << 40})
		require.True(b, g.State.Rate.Unlimited)
		if l.remote != nil {
			require.Empty(b, keysOf(b, l))
		}
		require.Zero(b, l.Stats().LocalBuckets)
	})
}

type directory map[string]pgxtenant.Tenant

func (d directory) Lookup(_ context.Context, id string) (pgxtenant.Tenant, error) {
	t, ok := d[id]
	if !ok {
		return t, pgxtenant.ErrTenantNotFound
	}
	return t, nil
}

func TestWithoutATenantOrItsPlanNothingPasses(t *testing.T) {
	both(t, func(b *backend) {
		config := plan(rated(PerHour(1, 1)))
		l := b.open(config)
		background := context.Background()
		cancelled, cancel := context.WithCancel(as("acme"))
		cancel()
		for _, c := range []struct {
			ctx  context.Context
			want error
		}{
			{background, pgxtenant.ErrNoTenant},
			{pgxtenant.WithoutTenant(as("acme")), pgxtenant.ErrNoTenant},
			{pgxtenant.WithTenant(background, pgxtenant.Tenant{ID: "a}b", Plan: "plan"}), pgxtenant.ErrInvalidTenantID},
			{pgxtenant.WithTenant(background, pgxtenant.Tenant{Plan: "plan"}), pgxtenant.ErrInvalidTenantID},
			{pgxtenant.WithTenant(background, pgxtenant.Tenant{ID: "acme", Plan: "Plan"}), ErrUnknownPlan},
			{pgxtenant.WithTenantID(background, "acme"), ErrUnknownPlan},
			{cancelled, context.Canceled},
		} {
			g, err := l.Take(c.ctx, Call{})
			require.ErrorIs(b, err, c.want)
			require.NotErrorIs(b, err, ErrLimited)
			require.Nil(b, g)
		}
		require.EqualValues(b, 7, l.Stats().Failed)
		pass(b, l, "acme", Call{})
		l.Close()
		_, err := l.Take(as("acme"), Call{})
		require.ErrorIs(b, err, pgxtenant.ErrClosed)

		config.Directory = directory{"acme": {ID: "acme", Plan: "plan"}}
		config.Plans[""] = rated(PerHour(1, 5))
		l = b.open(config)
		_, err = l.Take(pgxtenant.WithTenantID(background, "nobody"), Call{})
		require.ErrorIs(b, err, pgxtenant.ErrTenantNotFound)
		_, err = l.Take(pgxtenant.WithTenantID(background, "acme"), Call{Cost: 2})
		e := (*LimitError)(nil)
		require.ErrorAs(b, err, &e)
		require.Equal(b, "plan", e.Plan, "the directory knows the plan")
		config.Directory = directory{"acme": {ID: "acme"}}
		_, err = b.open(config).Take(pgxtenant.WithTenantID(background, "acme"), Call{Cost: 2})
		require.False(b, errors.As(err, &e) && e.Kind == KindCost, "a tenant without a plan is on the plan that has no name")
	})
}

func TestStatsCountDecisions(t *testing.T) {
	both(t, func(b *backend) {
		p := rated(PerHour(1, 4))
		p.Concurrency = 2
		l := b.open(plan(p))
		first, second := pass(b, l, "acme", Call{}), pass(b, l, "acme", Call{})
		refused(b, l, "acme", Call{}, KindConcurrency)
		refused(b, l, "acme", Call{Cost: 9}, KindCost)
		refused(b, l, "acme", Call{Cost: 3}, KindRate)
		s := l.Stats()
		want := Stats{Allowed: 2, RefusedByConcurrency: 1, RefusedByCost: 1, RefusedByRate: 1}
		if l.remote != nil {
			want.Leases = 2
		} else {
			want.LocalBuckets = 1
		}
		require.Equal(b, want, s)
		first.Release()
		second.Release()
		require.Zero(b, l.Stats().Leases)
	})
}

func TestErrorsNameTenantPlanAndLimit(t *testing.T) {
	p := Plan{Limits: Limits{Rate: PerMinute(60, 2), Concurrency: 1}}
	l := open(t, plan(p))
	g := pass(t, l, "acme", Call{})
	require.EqualError(t, refused(t, l, "acme", Call{Endpoint: "x"}, KindConcurrency),
		`tenantlimit: tenant "acme" on plan "plan", endpoint "x": concurrency limit of 1 reached`)
	g.Release()
	require.EqualError(t, refused(t, l, "acme", Call{Cost: 3}, KindCost),
		`tenantlimit: tenant "acme" on plan "plan": the call costs more than a burst of 2; it cannot pass`)
	pass(t, l, "acme", Call{})
	e := refused(t, l, "acme", Call{}, KindRate)
	e.RetryAfter = time.Second
	require.EqualError(t, e, `tenantlimit: tenant "acme" on plan "plan": rate limit of 60 per 1m0s, burst 2 reached; retry in 1s`)
}
