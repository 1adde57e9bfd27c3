package pgxtenant

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// Ledgers finds each tenant's own table, of one tenant as of hundreds, and leaves out those that have none.
func TestLedgers(t *testing.T) {
	t.Parallel()
	const tenants = 2*ledgerBatch + 3
	fl := newFleet(t, tenants)
	ctx := context.Background()
	fl.d.Exec(`create schema "odd ""name"""`, `create table "odd ""name""".ledger (version text)`, `insert into "odd ""name""".ledger values ('7'), ('8')`,
		"create schema empty", "create table empty.ledger (version text)", "create table public.ledger (version text)", "insert into public.ledger values ('shared')",
		"drop schema tenant_t0005 cascade", "drop table tenant_t0006.ledger")
	of := func(id, schema string) Tenant { return Tenant{ID: id, Isolation: IsolationSchema, Schema: schema} }
	all := []Tenant{of("odd", `odd "name"`), of("empty", "empty"), of("nobody", "nowhere")}
	want := map[string]string{"odd": "8", "empty": ""}
	for i := range tenants {
		id := fmt.Sprintf("t%04d", i)
		all = append(all, of(id, "tenant_"+id))
		if i != 5 && i != 6 {
			want[id] = "1"
		}
	}
	conn := fl.d.Connect(fl.d.OwnerURL())
	found, err := fl.db.Ledgers(ctx, conn, all, "ledger", "max(version)")
	require.NoError(t, err)
	require.Equal(t, want, found)
	for _, tenant := range []Tenant{all[0], all[1], all[2], all[3], all[8], all[9]} {
		found, err := fl.db.Ledgers(ctx, conn, []Tenant{tenant}, "ledger", "max(version)")
		require.NoError(t, err)
		version, ok := want[tenant.ID]
		require.Equal(t, ok, len(found) == 1, tenant.ID)
		require.Equal(t, version, found[tenant.ID])
	}
	for _, tenant := range []Tenant{{}, {ID: "db", Isolation: IsolationDatabase}} { // the shared schemas, and the session's own
		found, err = fl.db.Ledgers(ctx, conn, []Tenant{tenant}, "ledger", "max(version)")
		require.NoError(t, err)
		require.Equal(t, map[string]string{tenant.ID: "shared"}, found)
	}
	_, err = fl.db.Ledgers(ctx, conn, all, "ledger", "max(nothing)")
	require.ErrorContains(t, err, `read table "ledger" of 506 tenants`)
	found, err = fl.db.Ledgers(ctx, conn, nil, "ledger", "max(version)")
	require.NoError(t, err)
	require.Empty(t, found)
}
