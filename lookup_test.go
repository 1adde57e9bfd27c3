package pgxtenant

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// peeking is a directory that knows some tenants by heart.
type peeking struct {
	*directory
	known map[string]Tenant
}

func (p peeking) Peek(id string) (Tenant, bool) {
	t, ok := p.known[id]
	return t, ok
}

func TestPeekIsAskedFirst(t *testing.T) {
	t.Parallel()
	dir := newDirectory(Tenant{ID: "a"}, Tenant{ID: "b"})
	known := map[string]Tenant{
		"a": {ID: "a", Settings: map[string]string{"app.user_id": "peeked"}},
		"s": {ID: "s", Status: StatusSuspended},
		"x": {ID: "y"},
	}
	db := openDB(t, pgtest.New(t).AppURL(), func(c *Config) { c.Directory = peeking{dir, known} })
	id := func(id string) context.Context { return WithTenantID(context.Background(), id) }
	require.Equal(t, []string{"peeked"}, strs(t, db, id("a"), "select current_setting('app.user_id')"))
	require.Equal(t, []string{"peeked"}, strs(t, db.Shared(), id("a"), "select current_setting('app.user_id')"))
	require.ErrorIs(t, db.Ping(id("s")), ErrTenantSuspended)
	require.ErrorIs(t, db.Ping(id("x")), ErrWrongTenant)
	require.Zero(t, dir.lookups.Load())

	require.Equal(t, []string{"b"}, strs(t, db, id("b"), readTenant))
	require.ErrorIs(t, db.Ping(id("c")), ErrTenantNotFound)
	require.EqualValues(t, 2, dir.lookups.Load())
}
