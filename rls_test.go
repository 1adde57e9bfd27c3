package pgxtenant

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// notesDB is a TenantDB of one connection, over a table in which the tenants alice and bob have two rows
// each. No statement below has a WHERE clause on the tenant: what keeps them apart is the policy alone.
func notesDB(t *testing.T) (*TenantDB, *pgx.Conn) {
	d := pgtest.New(t)
	d.RLSTable("note")
	d.SuperExec(`insert into note values ('alice', 1, 'a1'), ('alice', 2, 'a2'), ('bob', 1, 'b1'), ('bob', 2, 'b2')`)
	return openDB(t, d.AppURL("pool_max_conns=1")), d.Connect(d.SuperURL())
}

// allNotes is what is really in the table.
func allNotes(t *testing.T, super *pgx.Conn) []string {
	t.Helper()
	return strs(t, super, context.Background(), "select tenant_id || '/' || id || '/' || body from note order by 1")
}

var untouched = []string{"alice/1/a1", "alice/2/a2", "bob/1/b1", "bob/2/b2"}

func TestATenantReadsItsOwnRowsOnly(t *testing.T) {
	t.Parallel()
	db, _ := notesDB(t)
	for range 3 {
		require.Equal(t, []string{"a1", "a2"}, strs(t, db, as("alice"), "select body from note order by id"))
		require.Equal(t, []string{"b1", "b2"}, strs(t, db, as("bob"), "select body from note order by id"))
		require.Empty(t, strs(t, db, as("carol"), "select body from note"))
	}
	// Nor by asking for them by name, by counting, or by joining.
	require.Empty(t, strs(t, db, as("alice"), "select body from note where tenant_id = 'bob'"))
	require.Empty(t, strs(t, db, as("alice"), "select body from note where tenant_id = $1", "bob"))
	require.Equal(t, 2, count(t, db, as("alice"), "select count(*) from note"))
	require.Equal(t, 4, count(t, db, as("alice"), "select count(*) from note a cross join note b"))
	require.Equal(t, 2, count(t, db, as("alice"), "with x as (select * from note union select * from note) select count(*) from x"))
}

func TestATenantCannotChangeAnothersRows(t *testing.T) {
	t.Parallel()
	db, super := notesDB(t)
	for _, sql := range []string{
		"update note set body = 'mine' where tenant_id = 'bob'",
		"update note set body = 'mine' where body like 'b%'",
		"delete from note where tenant_id = 'bob'",
		"delete from note where body like 'b%'",
	} {
		tag, err := db.Exec(as("alice"), sql)
		require.NoError(t, err)
		require.Zero(t, tag.RowsAffected(), sql)
	}
	require.Equal(t, untouched, allNotes(t, super))

	// Without any WHERE clause it is the tenant's own rows that go.
	_, err := db.Exec(as("alice"), "update note set body = 'new'")
	require.NoError(t, err)
	_, err = db.Exec(as("alice"), "delete from note where id = 2")
	require.NoError(t, err)
	require.Equal(t, []string{"alice/1/new", "bob/1/b1", "bob/2/b2"}, allNotes(t, super))
}

func TestATenantCannotWriteAsAnother(t *testing.T) {
	t.Parallel()
	db, super := notesDB(t)
	for _, sql := range []string{
		"insert into note values ('bob', 3, 'forged')",
		"insert into note select 'bob', 3, 'forged'",
		"update note set tenant_id = 'bob'",
		"insert into note values ('bob', 1, 'forged') on conflict (tenant_id, id) do update set body = excluded.body",
	} {
		_, err := db.Exec(as("alice"), sql)
		require.Equal(t, "42501", pgCode(err), "%s: %v", sql, err)
		require.ErrorContains(t, err, "row-level security")
	}
	_, err := db.CopyFrom(as("alice"), pgx.Identifier{"note"}, []string{"tenant_id", "id"}, pgx.CopyFromRows([][]any{{"bob", 3}}))
	require.Equal(t, "42501", pgCode(err), "%v", err)
	require.Equal(t, untouched, allNotes(t, super))

	// The tenant need not be named to be written.
	_, err = db.Exec(as("alice"), "insert into note (id, body) values (3, 'a3')")
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2", "a3"}, strs(t, db, as("alice"), "select body from note order by id"))
}

func TestNoTenantIsAnError(t *testing.T) {
	t.Parallel()
	db, super := notesDB(t)
	ctx := context.Background()

	_, err := db.Query(ctx, "select body from note")
	require.ErrorIs(t, err, ErrNoTenant)
	_, err = db.Exec(ctx, "delete from note")
	require.ErrorIs(t, err, ErrNoTenant)
	_, err = db.Begin(ctx)
	require.ErrorIs(t, err, ErrNoTenant)
	_, err = db.Shared().Exec(ctx, "delete from note")
	require.ErrorIs(t, err, ErrNoTenant)

	// To have none on purpose is to have no rows.
	none := WithoutTenant(as("alice"))
	require.Empty(t, strs(t, db, none, "select body from note"))
	tag, err := db.Exec(none, "delete from note")
	require.NoError(t, err)
	require.Zero(t, tag.RowsAffected())
	_, err = db.Exec(none, "insert into note values ('alice', 3, 'x')")
	require.Equal(t, "42501", pgCode(err))
	_, err = db.Exec(none, "insert into note values ('', 3, 'x')")
	require.Equal(t, "42501", pgCode(err))
	require.Equal(t, untouched, allNotes(t, super))
}

// A transaction is its tenant's to the end, whatever context its statements are given.
func TestATransactionBelongsToOneTenant(t *testing.T) {
	t.Parallel()
	db, super := notesDB(t)
	tx, err := db.Begin(as("alice"))
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2"}, strs(t, tx, as("bob"), "select body from note order by id"))
	_, err = tx.Exec(as("bob"), "update note set body = body || '!'")
	require.NoError(t, err)
	nested, err := tx.Begin(context.Background())
	require.NoError(t, err)
	require.Equal(t, []string{"a1!", "a2!"}, strs(t, nested, context.Background(), "select body from note order by id"))
	_, err = nested.Exec(context.Background(), "insert into note values ('bob', 9, 'x')")
	require.Equal(t, "42501", pgCode(err))
	require.NoError(t, nested.Rollback(context.Background()))
	require.Equal(t, []string{"a1!", "a2!"}, strs(t, tx, context.Background(), "select body from note order by id"))
	require.NoError(t, tx.Commit(context.Background()))
	require.Equal(t, []string{"alice/1/a1!", "alice/2/a2!", "bob/1/b1", "bob/2/b2"}, allNotes(t, super))
}
