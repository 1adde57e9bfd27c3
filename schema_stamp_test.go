package pgxtenant

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A copy in stock is given out without a look at the template's objects while nothing has changed, and never after a
// change of any kind.
func TestStockAfterEveryKindOfChange(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	ctx := context.Background()
	app := ident(d.App)
	smallTemplate(t, d)
	d.Exec("set search_path = tpl", `create table kind (name text); create table item (id int primary key, note bigint references note, name text check (name <> ''), price int);
		create index item_name on item (name); create sequence num; create type mood as enum ('sad'); create domain short as text; create type pair as (a int, b int);
		create function one() returns int language sql as 'select 1'; create function trig() returns trigger language plpgsql as 'begin return new; end';
		create view v as select id from item; create statistics item_stat on name, price from item; alter table item enable row level security;
		create policy p on item using (true); create trigger tr before insert on item for each row execute function trig();
		create table part (id int) partition by list (id); create table part1 partition of part for values in (1)`)
	m := schemas(t, d, SchemaOptions{Template: "tpl", Reference: []string{"kind"}})
	stamped := func() bool { // whether the next tenant is made of a copy by its stamp
		_, err := m.Stock(ctx, 1)
		require.NoError(t, err)
		tx, err := m.admin.Begin(ctx)
		require.NoError(t, err)
		defer func() { require.NoError(t, tx.Rollback(ctx)) }()
		fingerprint, err := m.fromStamped(ctx, tx, "x")
		require.NoError(t, err)
		return fingerprint != nil
	}
	stamp := func() (stamp string) {
		require.NoError(t, pgx.BeginFunc(ctx, m.admin, func(tx pgx.Tx) (err error) {
			stamp, err = m.stamp(ctx, tx)
			return err
		}))
		return stamp
	}
	require.True(t, stamped())
	require.NoError(t, m.Provision(ctx, "first"))
	require.True(t, stamped(), "to copy the template and to give out a copy does not change it")
	before := stamp()
	for _, change := range []string{
		"insert into tpl.kind values ('a')",
		"update tpl.kind set name = 'b'",
		"alter table tpl.item add more int",
		"alter table tpl.item alter more set default 1",
		"alter table tpl.item alter more set not null",
		"alter table tpl.item alter more set statistics 7",
		"alter table tpl.item rename more to less",
		"comment on column tpl.item.less is 'x'",
		"comment on constraint item_name_check on tpl.item is 'x'",
		"comment on index tpl.item_name is 'x'",
		"comment on schema tpl is 'x'",
		"grant select (name) on tpl.item to " + app,
		"grant delete on tpl.item to " + app,
		"grant create on schema tpl to " + app,
		"alter default privileges in schema tpl grant select on tables to " + app,
		"alter table tpl.item add check (price > 0)",
		"alter table tpl.item drop constraint item_note_fkey",
		"create index on tpl.item (price)",
		"alter index tpl.item_name set (fillfactor = 70)",
		"alter index tpl.item_name rename to item_named",
		"create unique index u on tpl.item (id, less)",
		"alter table tpl.item replica identity using index item_pkey",
		"alter sequence tpl.num increment 5",
		"alter type tpl.mood add value 'glad'",
		"alter type tpl.mood rename value 'glad' to 'merry'",
		"alter domain tpl.short add check (length(value) < 9)",
		"alter type tpl.pair add attribute c int",
		"create or replace function tpl.one() returns int language sql as 'select 2'",
		"alter function tpl.one() stable",
		"create or replace view tpl.v as select id, name from tpl.item",
		"alter statistics tpl.item_stat set statistics 9",
		"alter policy p on tpl.item using (id > 0)",
		"alter table tpl.item force row level security",
		"alter table tpl.item disable trigger tr",
		"create rule r as on delete to tpl.kind do nothing",
		"create table tpl.part2 partition of tpl.part for values in (2)",
		"alter table tpl.part detach partition tpl.part1",
		"drop view tpl.v",
	} {
		d.Exec(change)
		after := stamp()
		require.NotEqual(t, before, after, change)
		before = after
	}
	require.NoError(t, m.Provision(ctx, "last"))
	require.True(t, stamped())
	require.NoError(t, m.Provision(ctx, "latest"))
	diff, err := m.Diff(ctx, "latest")
	require.NoError(t, err)
	require.Empty(t, diff)

	// What says the template's name is written anew for each copy, which a stamp cannot do.
	d.Exec("create function tpl.own() returns int language sql set search_path = tpl as 'select 1'")
	require.False(t, stamped())
	require.NoError(t, m.Provision(ctx, "named"))
	require.Equal(t, []string{"{search_path=tenant_named}"}, strs(t, m.admin, ctx, fmt.Sprintf("select proconfig::text from pg_proc where proname = 'own' and pronamespace = '%s'::regnamespace", SchemaName("named"))))
}
