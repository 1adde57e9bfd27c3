package pgxtenant

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAHerdOfRequestsAsksOnce(t *testing.T) {
	t.Parallel()
	for name, named := range map[string]func(*http.Request){"by ID": withHeader("X-Tenant-ID", "acme"), "by alias": toHost("shop.acme.test")} {
		dir := customers()
		entered, answers := make(chan struct{}, 1000), make(chan struct{})
		dir.before = func(context.Context, string) { entered <- struct{}{}; <-answers }
		m := &middleware{}
		options := []MiddlewareOption{ByHeader("X-Tenant-ID"), ByDomain(), Reserve("example.org"), WithoutAuthorization(), func(given *middleware) { m = given }}
		h := Middleware(dir, options...)(tell)
		const herd = 100
		var wg sync.WaitGroup
		got := make([]string, herd)
		for i := range herd {
			wg.Go(func() { got[i] = answer(t, h, request(named)) })
		}
		calls := &m.gate.tenants
		key := "acme"
		if name == "by alias" {
			calls, key = &m.gate.aliases, "shop.acme.test"
		}
		eventually(t, "all wait", func() bool {
			calls.mu.Lock()
			defer calls.mu.Unlock()
			call := calls.calls[key]
			return call != nil && call.waiting == herd
		})
		asked := len(entered)
		close(answers)
		wg.Wait()
		for _, g := range got {
			require.Equal(t, "acme", g, name)
		}
		require.Equal(t, 1, asked, name)
	}
}

func TestWhoIsKnownByHeartIsNotLookedUp(t *testing.T) {
	t.Parallel()
	dir := peekingAliases{customers()}
	h := Middleware(dir, ByDomain(), ByHeader("X-Tenant-ID"), Reserve("example.org"), WithoutAuthorization())(tell)
	require.Equal(t, "acme", answer(t, h, request(withHeader("X-Tenant-ID", "acme"))))
	require.Equal(t, "acme", answer(t, h, request(toHost("shop.acme.test"))))
	require.Zero(t, dir.lookups.Load())
}

func TestGateAdmitsWhatIsNotHTTP(t *testing.T) {
	t.Parallel()
	dir := customers()
	g := NewGate(dir)
	yes := func(context.Context, Tenant) error { return nil }
	ctx, err := g.Admit(t.Context(), "acme", yes)
	require.NoError(t, err)
	tenant, ok := FromContext(ctx)
	require.True(t, ok)
	require.Equal(t, Tenant{ID: "acme", Plan: "gold"}, tenant)
	for id, want := range map[string]error{
		"": ErrUnidentified, "*": ErrInvalidTenantID, "nobody": ErrTenantNotFound, "frozen": ErrTenantSuspended,
		"new": ErrTenantUnavailable, "old": ErrTenantUnavailable, "odd": ErrInvalidTenant,
	} {
		_, err := g.Admit(t.Context(), id, yes)
		require.ErrorIs(t, err, want, id)
	}
	no := errors.New("no")
	_, err = g.Admit(t.Context(), "frozen", func(context.Context, Tenant) error { return no })
	require.ErrorIs(t, err, ErrForbidden)
	require.ErrorIs(t, err, no)
	require.NotErrorIs(t, err, ErrTenantSuspended)
	dir.before = func(context.Context, string) { panic("oh no") }
	_, err = g.Admit(t.Context(), "acme", yes)
	require.ErrorIs(t, err, ErrUnreachable)
}
