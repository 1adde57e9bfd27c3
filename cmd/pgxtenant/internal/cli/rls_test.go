package cli

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRowLevelSecurityIsPutOnAndTakenOff(t *testing.T) {
	t.Parallel()
	s := newShop(t)
	s.Exec("create table invoice (id bigint)", "create table payment (id bigint)", "insert into payment values (1)")
	plan := s.ok("rls", "plan", "invoice")
	require.Contains(t, plan, "create policy")
	s.run("rls", "plan", "invoice", "--check").fails(exitFound, "there is something to do")
	require.Equal(t, plan, s.ok("rls", "enable", "invoice", "--dry-run"))
	require.Equal(t, "Table invoice is under row-level security.\n", s.ok("rls", "enable", "invoice"))
	require.Equal(t, "Table invoice is under row-level security already.\n", s.ok("rls", "enable", "invoice"))
	require.Equal(t, "-- Nothing to do.\n", s.ok("rls", "plan", "invoice", "--check"))

	// The first one is done when the second fails, and it is said.
	s.ok("rls", "disable", "invoice", "--yes")
	r := s.run("rls", "enable", "invoice", "payment", "nope")
	r.fails(exitFailed, "payment", "rows")
	require.Equal(t, "Table invoice is under row-level security.\n", r.out)
	require.Contains(t, s.ok("rls", "enable", "payment", "--backfill", "acme", "--column", "customer"), "is under")

	s.run("rls", "disable", "invoice").fails(exitRefused, "Nothing was done")
	require.Equal(t, "-- Nothing to do.\n", s.ok("rls", "plan", "invoice"))
	require.Contains(t, s.ok("rls", "disable", "invoice", "--dry-run"), "disable row level security")
	require.Equal(t, "Table invoice is without row-level security.\n", s.ok("rls", "disable", "invoice", "--yes"))
	s.psql(s.ok("rls", "plan", "invoice"))
	require.Equal(t, "-- Nothing to do.\n", s.ok("rls", "plan", "invoice"))

	s.run("rls", "enable").fails(exitUsage, "requires at least 1 arg(s)")
	s.ok("init")
	s.run("rls", "enable", "pgxtenant.tenant", "--backfill", "acme").fails(exitFailed, "pgxtenant.tenant is the package's own")
	s.run("rls", "enable", "nope").fails(exitFailed, "there is no such table")
	s.run("rls", "enable", "invoice", "--type", "date").fails(exitFailed, "want text, uuid, integer or bigint")
	s.run("move", "acme").fails(exitUsage, "move is reserved")
	run(t, []string{"PGXTENANT_ADMIN=" + s.AppURL(), "PGXTENANT_DATABASE=" + s.AppURL()}, "rls", "enable", "invoice").fails(exitFailed, "not the owner")
}
