package pgxtenant

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Real tables, to each of which something has happened in its life. They are read and written as
// tenants through the names given.
func TestEnableRLSOnTablesThatHaveLived(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		setup  string
		table  RLSTable
		insert string
		check  func(t *testing.T, d *pgtest.DB, db *TenantDB)
	}{
		"quoted names": {
			setup: `create schema "Ünï ""s"; grant usage on schema "Ünï ""s" to APP; create table "Ünï ""s"."T' x" ("Id" serial, "select" text)`,
			table: RLSTable{Name: `"Ünï ""s"."T' x"`, Column: "Ténant Id"},
		},
		"generated and identity columns": {
			setup:  `create table x (id bigint generated always as identity, twice bigint generated always as (n * 2) stored, n bigint default 3)`,
			insert: "insert into x (n) values (4)",
		},
		"a policy for others": {setup: "create table x (id serial); create policy ops on x to pg_monitor using (true)"},
		"deferred triggers at the back-fill": {
			setup: `create table x (id serial, tenant_id text); insert into x default values; create function f() returns trigger language plpgsql as 'begin return null; end';
				create constraint trigger later after update on x deferrable initially deferred for each row execute function f()`,
			table: RLSTable{Name: "x", Backfill: "old"},
		},
		"rights of columns": {
			setup: `create table x (id serial primary key); grant references (id) on x to APP; grant references (id) on x to public`,
			check: func(t *testing.T, d *pgtest.DB, db *TenantDB) {
				require.Equal(t, 0, count(t, d.Connect(d.AppURL()), context.Background(), "select count(*) from information_schema.column_privileges where table_name = 'x' and privilege_type = 'REFERENCES'"))
			},
		},
		"referred to": {setup: "create table x (id serial primary key); create table y (x int references x on delete cascade); insert into x default values; insert into y values (1)", table: RLSTable{Name: "x", Backfill: "old"}},
		"an index of the wrong kind": {
			setup: "create table x (id serial, tenant_id text not null); create index on x using brin (tenant_id); create index on x (tenant_id) where tenant_id = 'a'; create index on x (id, tenant_id)",
			check: func(t *testing.T, d *pgtest.DB, db *TenantDB) {
				require.Equal(t, 1, count(t, d.Connect(d.AppURL()), context.Background(), "select count(*) from pg_indexes where tablename = 'x' and indexdef ~ 'btree \\(tenant_id\\)$'"))
			},
		},
		"inherited twice": {
			setup: "create table x (id serial); create table c () inherits (x); create schema s; create table s.g (extra int) inherits (c); insert into c default values",
			table: RLSTable{Name: "x", Backfill: "old"},
			check: func(t *testing.T, d *pgtest.DB, db *TenantDB) {
				super := d.Connect(d.SuperURL())
				require.Equal(t, []string{"c", "s.g", "x"}, strs(t, super, context.Background(), "select indrelid::regclass::text from pg_index i join pg_attribute a on a.attrelid = indrelid and a.attnum = indkey[0] where attname = 'tenant_id' order by 1"))
				// One that is attached later is seen to by the next call.
				d.Exec("create table late () inherits (c)", "grant select on late to "+ident(d.App))
				enabled(t, db, RLSTable{Name: "x"})
				require.Equal(t, 4, count(t, super, context.Background(), "select count(*) from pg_policy where polname = 'pgxtenant'"))
			},
		},
		"partitions of all kinds": {
			setup: `create table x (id serial, k text default 'q', n int default 1) partition by list (k); create table x_r partition of x for values in ('r') partition by range (n);
				create table x_r1 partition of x_r for values from (minvalue) to (10); create table x_r2 partition of x_r default partition by hash (id);
				create table x_h0 partition of x_r2 for values with (modulus 2, remainder 0); create table x_h1 partition of x_r2 for values with (modulus 2, remainder 1); create table x_d partition of x default;
				insert into x (k, n) select k, n from unnest(array['r', 'q']) k, generate_series(5, 25) n`,
			table:  RLSTable{Name: "x", Type: "bigint", Backfill: "77"},
			insert: "insert into x (k, n) values ('r', 20)",
			check: func(t *testing.T, d *pgtest.DB, db *TenantDB) {
				d.Exec("create table x_late (like x)", "insert into x_late (id, tenant_id, k) values (1, 1, 'z'), (2, 2, 'z')", "alter table x attach partition x_late for values in ('z')", "grant select on x_late to "+ident(d.App))
				require.Equal(t, 2, count(t, db, as("2"), "select count(*) from x_late"), "nobody has seen to it")
				enabled(t, db, RLSTable{Name: "x", Type: "bigint"})
				require.Equal(t, 1, count(t, db, as("2"), "select count(*) from x_late"))
			},
		},
		"forced, by a member of the owner": {setup: "create table x (id serial, tenant_id text not null default 'a'); insert into x default values; alter table x enable row level security, force row level security"},
		"views over views": {
			setup: "create table x (id serial); create view v as select * from x; create view w as select * from v; grant select on w to APP; create rule r as on insert to v do instead insert into x (id) values (new.id)",
			check: func(t *testing.T, d *pgtest.DB, db *TenantDB) {
				require.Equal(t, 2, count(t, db, as("1"), "select count(*) from w"))
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			d := pgtest.New(t)
			d.Exec(strings.ReplaceAll(c.setup, "APP", ident(d.App)))
			table := c.table
			table.Name = orDefault(table.Name, "x")
			db := adminDB(t, d)
			before := count(t, d.Connect(d.SuperURL()), ctx, "select count(*) from "+table.Name)
			enabled(t, db, table)
			insert := orDefault(c.insert, "insert into "+table.Name+" default values")
			for _, id := range []string{"1", "2"} {
				for range 2 {
					_, err := db.Exec(as(id), insert)
					require.NoError(t, err)
				}
				require.Equal(t, 2, count(t, db, as(id), "select count(*) from "+table.Name))
			}
			require.Equal(t, before+4, count(t, d.Connect(d.SuperURL()), ctx, "select count(*) from "+table.Name))
			if table.Backfill != "" {
				require.Equal(t, before, count(t, db, as(table.Backfill), "select count(*) from "+table.Name))
			}
			if c.check != nil {
				c.check(t, d, db)
			}
		})
	}
}

// What shows rows to the role by rights of somebody whom no policy holds, by whatever detour.
func TestEnableRLSFindsTheWaysAround(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ super, want, mend string }{
		"a view of the owner's over a superuser's": {"create view v as select * from note; grant select on v to OWNER; set role OWNER; create view w as select * from v; grant select on w to APP",
			"view v (revoke all on w from", "alter view v set (security_invoker = true)"},
		"a superuser's view of a partition":     {"create view v as select * from note_1; grant select on v to APP", "view v (revoke all on v from", "revoke all on v from APP"},
		"a superuser's view to write to":        {"create view v as select * from note; grant insert on v to APP", "view v (revoke all on v from", "revoke all on v from APP"},
		"one column of a superuser's view":      {"create view v as select * from note; grant select (body) on v to public", "view v (revoke all on v from", "revoke all on v from public"},
		"a view over a materialized view":       {"set role OWNER; create materialized view m as select * from note; create view w as select * from m; grant select on w to APP", "materialized view m (revoke all on w", "drop view w"},
		"a superuser's view inside an open one": {"create view v with (security_invoker = true) as select * from note; create view w as select * from v; grant select on w to APP", "view w (revoke all on w", "alter view w set (security_invoker = on)"},
		"TRUNCATE by way of a group":            {"grant truncate on note_1 to GROUP; grant GROUP to APP", "revoke truncate on public.note_1 from", "revoke truncate on note_1 from GROUP"},
		"REFERENCES by way of a group":          {"grant references (id) on note to GROUP; grant GROUP to APP; alter role APP noinherit", "revoke references on public.note from", "revoke references on note from GROUP"},
		"a policy for a group":                  {"create policy readers on note for select to GROUP using (true); grant GROUP to APP", `drop policy "readers" on public.note`, "drop policy readers on note"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			d := pgtest.New(t)
			group := d.Name + "_group"
			d.SuperExec("create role " + ident(group))
			t.Cleanup(func() { d.SuperExec("drop owned by "+ident(group), "drop role "+ident(group)) })
			names := strings.NewReplacer("OWNER", ident(d.Owner), "APP", ident(d.App), "GROUP", ident(group))
			d.Exec("create table note (tenant_id text not null, id int, body text) partition by list (id)", "create table note_1 partition of note default")
			d.SuperExec(names.Replace(c.super))
			db := adminDB(t, d)
			err := db.EnableRLS(ctx, Tables("note")...)
			require.ErrorContains(t, err, c.want)
			require.Zero(t, count(t, d.Connect(d.SuperURL()), ctx, "select count(*) from pg_class where relname ~ 'note' and relrowsecurity"))
			d.SuperExec(names.Replace(c.mend))
			enabled(t, db, Tables("note")...)
		})
	}
}

// Without a policy the table is open to whom it was not, so what leads to it is closed first.
func TestDisableRLSOpensNothing(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.New(t)
	group := d.Name + "_group"
	d.SuperExec("create role "+ident(group), "grant "+ident(group)+" to "+ident(d.App))
	t.Cleanup(func() { d.SuperExec("drop owned by "+ident(group), "drop role "+ident(group)) })
	d.Exec("create table note (id serial, body text)", "create view v as select * from note", "create view mine with (security_invoker = true) as select * from note", "grant select on v, mine to "+ident(d.App))
	db := adminDB(t, d)
	enabled(t, db, Tables("note")...)
	for _, id := range []string{"a", "b"} {
		_, err := db.Exec(as(id), "insert into note (body) values ($1)", id)
		require.NoError(t, err)
	}
	require.Equal(t, []string{"a"}, strs(t, db, as("a"), "select body from v"))

	require.ErrorContains(t, db.DisableRLS(ctx, Tables("note")...), "view v (revoke all on v from")
	require.Equal(t, []string{"a"}, strs(t, db, as("a"), "select body from v"))
	d.Exec("revoke all on v from "+ident(d.App), "grant select on note to "+ident(group))
	require.ErrorContains(t, db.DisableRLS(ctx, Tables("note")...), "revoke select on public.note from "+group)
	d.Exec("revoke all on note from " + ident(group))
	require.NoError(t, db.DisableRLS(ctx, Tables("note")...))
	for _, from := range []string{"note", "v", "mine"} {
		_, err := db.Exec(as("a"), "select from "+from)
		require.Equal(t, "42501", pgCode(err), from)
	}
	require.Equal(t, []string{"a", "b"}, strs(t, d.Connect(d.OwnerURL()), ctx, "select body from note order by 1"))
}

// The plan says all names in full, so that psql makes of it the same as EnableRLS, whatever its search_path.
func TestThePlanInPsqlIsEnableRLS(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	setup := []string{"create schema s", "create table s.note (id serial, body text)", "create table s.child () inherits (s.note)",
		"create table s.part (k int, tenant_id uuid) partition by list (k)", "create table s.part1 partition of s.part default", "insert into s.part values (1, null)"}
	tables := []RLSTable{{Name: "s.note"}, {Name: "s.part", Backfill: "00000000-0000-0000-0000-00000000000a"}}
	var dumps []string
	for _, psql := range []bool{false, true} {
		d := pgtest.New(t)
		d.Exec(setup...)
		d.Exec("grant all on all tables in schema s to "+ident(d.App), "grant references (body) on s.note to public")
		db := adminDB(t, d)
		if psql {
			plan, err := db.PlanEnableRLS(ctx, tables...)
			require.NoError(t, err)
			cmd := exec.Command(strings.TrimSuffix(pgDump(t), "pg_dump")+"psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", d.OwnerURL())
			cmd.Stdin = strings.NewReader("set search_path = '';\n" + plan)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, string(out))
		} else {
			require.NoError(t, db.EnableRLS(ctx, tables...))
		}
		plan, err := db.PlanEnableRLS(ctx, tables...)
		require.NoError(t, err)
		require.Empty(t, plan)
		dumps = append(dumps, strings.ReplaceAll(schemaText(t, d, "s"), d.Name, "db"))
	}
	sameText(t, dumps[0], dumps[1])
}

// Writers that know nothing of it lose no row and see no error but the one that tells them they have no right
// yet, and two processes that enable at once do it once.
func TestEnableRLSUnderTraffic(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := pgtest.New(t)
	d.Exec("create table note (id bigint generated always as identity, tenant_id text, body text)", "create table line (id bigint, tenant_id text not null)",
		"grant all on note, line to "+ident(d.App), "insert into note (body) select 'old' from generate_series(1, 5000)")
	db := adminDB(t, d)
	stop := make(chan struct{})
	var written [4]int
	var writers, enabling sync.WaitGroup
	for w := range written {
		writers.Go(func() {
			id := fmt.Sprint("t", w)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				err := pgx.BeginFunc(ctx, beginAs{db, as(id)}, func(tx pgx.Tx) error {
					if _, err := tx.Exec(ctx, "insert into note (tenant_id, body) values ($1, 'new')", id); err != nil {
						return err
					}
					_, err := tx.Exec(ctx, "insert into line values ($1, $2)", i, id)
					return err
				})
				if err != nil {
					t.Errorf("writer: %v", err)
					return
				}
				written[w]++
			}
		})
	}
	for range 3 {
		enabling.Go(func() {
			if err := db.EnableRLS(ctx, RLSTable{Name: "note", Backfill: "old"}, RLSTable{Name: "line"}); err != nil {
				t.Error(err)
			}
		})
	}
	enabling.Wait()
	close(stop)
	writers.Wait()
	enabled(t, db, Tables("note", "line")...)
	for w, n := range written {
		require.Equal(t, n, count(t, db, as(fmt.Sprint("t", w)), "select count(*) from note"))
		require.Equal(t, n, count(t, db, as(fmt.Sprint("t", w)), "select count(*) from line"))
	}
	require.Equal(t, 5000, count(t, db, as("old"), "select count(*) from note"))
	require.Equal(t, 1, count(t, db.Admin(), ctx, "select count(*) from pg_index where indrelid = 'note'::regclass"))
}
