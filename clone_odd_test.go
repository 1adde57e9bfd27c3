package pgxtenant

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// oddTemplates are what real schemas have besides everyKind. In each TPL is the template's name, APP, OWNER and
// GROUP are roles.
var oddTemplates = []string{
	"create table a (id int primary key, up int references a)",
	"create table a (id int primary key, b int); create table b (id int primary key, a int references a); alter table a add foreign key (b) references b",
	`create table p (id int, k int, up int, uk int, primary key (id, k)) partition by list (k); create table p1 partition of p for values in (1);
		create table p2 partition of p for values in (2) partition by hash (id); create table p2a partition of p2 for values with (modulus 2, remainder 0);
		create table p2b partition of p2 for values with (modulus 2, remainder 1); alter table p add foreign key (up, uk) references p;
		create table c (id int, k int, foreign key (id, k) references p); create index on p (up) include (uk)`,
	// What needs a key to be made at all.
	"create table a (id int primary key, note text); create view v as select id, note, count(*) from a group by id; create view w as select * from v; alter view v alter column note set default 'x'",
	"create table a (id int primary key, note text); create materialized view v as select id, note, count(*) from a group by id; create index on v (id); alter materialized view v alter column note set statistics 10",
	"create table a (id int primary key, note text); create function f() returns setof text begin atomic select note from a group by id; end; create view z as select f()",
	"create table a (id int primary key, note text); create procedure f() begin atomic insert into a values (1, 'x') on conflict (id) do nothing; insert into a values (1, 'x') on conflict on constraint a_pkey do nothing; end",
	"create table a (id int primary key, n text); create view v as select id, n from a group by id; create function f(v) returns int language sql immutable as 'select 1'; create table b (x int default f(null::v))",
	"create table a (id int primary key, note text); create table b (id int, note text); create rule r as on insert to b do instead insert into a values (new.id, new.note) on conflict (id) do nothing",
	"create table t (x int); insert into t values (1); create materialized view z as select * from t; create materialized view a as select * from z",
	"create table t (id int, up int); create recursive view r (id, depth) as select id, 0 from t where up is null union all select t.id, depth + 1 from t join r on r.id = t.up",
	`create unlogged table t (id bigint generated always as identity (sequence name "Own seq"), n serial)`,
	"create table t (x text) with (toast.autovacuum_enabled = false, autovacuum_vacuum_scale_factor = 0.1); create materialized view m with (toast.autovacuum_enabled = false) as select 'x'::text x",
	// Tables that inherit, and are not quite what they inherit.
	"create table p (id int, note text default 'x', n int); create table c () inherits (p); alter table c alter column note set not null; alter table c alter column note drop default; alter table c alter column n set default 5",
	"create table p (id int check (id > 0)); create table q (id int, z int); create table c (id int, y int) inherits (p, q)",
	"create table p (id int check (id > 0)); create table c (y int, id int, constraint p_id_check check (id > 0)); alter table c inherit p",
	"create table p (id int); create table c () inherits (p); alter table p add check (id > 0) not valid; alter table p add constraint ni check (id > 1) no inherit not valid",
	"create table p (id int) partition by list (id); create table c partition of p default; alter table p add check (id > 0) not valid",
	"create table p (id int default 3, n text not null) partition by range (id, lower(n)); create table c partition of p (id default 4, check (id > 0)) for values from (1, 'a') to (2, 'b'); create table c2 partition of p default with (fillfactor = 50); alter table c2 alter column id drop default",
	"create table p (id int, g int generated always as (id * 2) stored) partition by range (id); create table c partition of p for values from (minvalue) to (10); create table d (g int generated always as (id * 2) stored, id int); alter table p attach partition d for values from (10) to (maxvalue)",
	"create table t (x int); create rule r as on delete to t do instead nothing; alter table t disable rule r; create rule s as on delete to t do also nothing; alter table t enable always rule s",
	`create function f() returns trigger language plpgsql as 'begin return new; end'; create table p (id int) partition by list (id); create table c partition of p default;
		create trigger tr after insert on p for each row execute function f(); alter table only p disable trigger tr; create trigger t2 after insert on p for each row execute function f(); alter table c disable trigger t2`,
	"create table t (x int, y int); create statistics s (mcv) on x, y from t; alter statistics s set statistics 50; create statistics s2 on (x + y), (x * 2) from t; create index i on t ((x + y)); alter index i alter column 1 set statistics 77",
	// Grants that take away, and ones in an order that is not the alphabet's.
	"create table t (x int); revoke insert on t from OWNER; create function f() returns int language sql as 'select 1'; revoke all on function f() from OWNER, public",
	"create table t (x int, y int); grant select (x), update (y), references (x) on t to APP; grant select on t to public; grant all on t to GROUP with grant option; grant select on t to APP; create sequence s; grant select, update on s to APP; grant usage on schema TPL to public; create type e as enum (); grant usage on type e to APP; revoke all on type e from public",
	"create table p (id int, k int) partition by list (id); create table c partition of p default; create index pi on only p (k)",
	"create table p (id int, k int) partition by list (id); create table c partition of p default; create unique index ci on c (id, k); create unique index pu on only p (id, k); alter index pu attach partition ci",
	`create table "T""x" ("A b" int, "ü" text, "select" int primary key); create index "I x" on "T""x" (("A b" + 1)); create function "F x"("A" int) returns int language sql as 'select 1'; comment on function "F x" is 'it''s \\ x'; create type "E x" as enum ('a\b', ''); create table u (e "E x" default 'a\b', f "E x"[]); create sequence "S x"; alter table u add z int default nextval('"S x"'); create trigger "tr x" before insert on u for each row execute function suppress_redundant_updates_trigger('tg\x''s')`,
	"create table line (x int); create view path as select * from line; create index on line (x)",
	"create table t (x int); create function f() returns text language sql as $$ select current_setting('TPL.current', true) || 'myTPL.t' $$",
	"create domain d1 as int check (value > 0); create domain d2 as d1 check (value < 100) not null; alter domain d2 add constraint nv check (value <> 50) not valid; create domain d3 as d2[]; create type c1 as (a d2, b d3); create type c2 as (x c1[]); create table t (c c2, d d3 default '{1}', e c1[]); create domain dc as c1 check ((value).a > 1)",
	"create function fdiff(float8, float8) returns float8 language sql immutable as 'select $1 - $2'; create type r as range (subtype = float8, subtype_diff = fdiff); create table t (x r, y r_multirange, exclude using gist (x with &&)); create type rr as range (subtype = text, collation = \"C\", subtype_opclass = text_pattern_ops)",
	"create function f(int) returns int language sql as 'select 1'; create function f(text) returns int language sql as 'select 2'; create function f(int, text default 'x') returns int language sql as 'select 3'; create procedure p(inout x int) language plpgsql as 'begin end'; create view v as select f(1::int, 'y') a, f('z'::text) b; comment on function f(text) is 'the second'",
	"create function a(int) returns int language plpgsql as 'begin return b($1 - 1); end'; create function b(int) returns int language plpgsql as 'begin return a($1 - 1); end'",
	"create function zz(int) returns int return $1 + 1; create function aa(int) returns int return zz($1); create table t (x int default aa(1), y int generated always as (1) stored, check (aa(x) > 0)); create index on t (x) where x > 1",
	"create table t (x int, y int); create function f() returns trigger language plpgsql as 'begin return null; end'; create trigger a after update on t referencing old table as o new table as n for each statement execute function f(); create constraint trigger b after insert on t deferrable for each row when (new.x > 0) execute function f(); create view v as select 1 a; create trigger c instead of insert on v for each row execute function f()",
	"create table t (x int, y text); create view v with (security_invoker = on, security_barrier) as select x, y from t where x > 0 with cascaded check option; create view w (a, b) as select x, y from v; alter view w rename column a to c",
	"create table t (x text references outside.country on update cascade on delete set default default 'x', y text, foreign key (y) references outside.country match full deferrable initially deferred); create table n (x text references outside.country, y int, constraint nn foreign key (x) references outside.country on delete set null)",
	"create sequence s; create table a (id int default nextval('s')); create table b (id int default nextval('s')); create table o (id int default nextval('outside.seq')); alter sequence s owned by a.id",
	"create table t (id int primary key, x text); alter table t replica identity full; create table u (id int primary key); alter table u replica identity using index u_pkey; create table v (id int); alter table v replica identity nothing; create table w (id int primary key); alter table w cluster on w_pkey",
	"create type e as enum ('b', 'd'); alter type e add value 'c' before 'd'; alter type e add value 'a' before 'b'; create table t (e e)",
	"create table t (x int, who name default current_user); alter table t enable row level security; create function okk(int) returns bool language sql stable as 'select $1 > 0'; create policy p on t for insert to APP, OWNER with check (okk(x)); create policy q on t for delete using (x > (select max(x) from t t2)); create policy r on t as restrictive using (pg_has_role(who, 'usage'))",
	`create table t (x int constraint k check (x > 0), y serial primary key); comment on column t.x is 'c'; comment on constraint k on t is 'k'; comment on index t_pkey is 'i'; comment on sequence t_y_seq is 's'; create view v as select 1 a; comment on column v.a is 'va'; create materialized view m as select 1 a; comment on column m.a is 'ma'; comment on materialized view m is 'm'; create type c as (a int); comment on type c is 'c'; create domain d int check (value > 0); comment on domain d is 'd'; comment on constraint d_check on domain d is 'dc'; comment on column t.y is E'a\nb''\\x'`,
	"create table t (id int generated by default as identity (start -5 increment -1 minvalue -100 maxvalue 5 cycle cache 7), s smallserial)",
	"create table t (x int); create view v as select * from t; create rule i as on insert to v where new.x > 5 do instead insert into t values (new.x); create rule u as on update to v do instead update t set x = new.x where x = old.x returning x",
	"create table t (a text, b int[], c jsonb, d tsvector, e point); create index on t using gin (b, c jsonb_path_ops) with (fastupdate = off, gin_pending_list_limit = 128); create index on t using brin (a) with (pages_per_range = 8); create index on t using gist (e) with (buffering = on); create index on t using spgist (e); create index on t using hash (a); create index on t (a collate \"C\" desc nulls last, (b[1])) include (e) with (fillfactor = 60, deduplicate_items = off) where a is not null",
	"create table t (a int, b int, unique (a) include (b) with (fillfactor = 50) deferrable, constraint ex exclude using btree (b with =) with (fillfactor = 60) where (b > 0) initially deferred deferrable, primary key (b, a)); create unique index ui on t (a, b); alter table t add constraint uc unique using index ui",
	`create table "user" ("order" int, "group" text); create view "all" as select "order" from "user"`,
	"create table t (a numeric(8,3)[], b varchar(7), c char(3), d interval day to second(2), e timestamp(3) with time zone, f bit varying(9), g time(1), h \"char\", i int4range, j oid, k regclass default 't'::regclass)",
	"create function ff(int) returns int language sql as 'select 1'; create sequence s; create table t (a regproc default 'ff'::regproc, b regprocedure default 'ff(int)'::regprocedure, c regtype default 't'::regtype)",
	"create table t (x text compression pglz, y text, z text) partition by list (z); create table c partition of t default; alter table c alter x set compression default; alter table t alter y set storage main; alter table t alter column y set statistics 3; alter table t alter column x set (n_distinct = 4, n_distinct_inherited = 7)",
	"create function f() returns text language sql security definer set search_path from current as 'select 1::text'; create function g() returns text language plpgsql parallel safe cost 3 as 'begin return 1; end'",
	"create table t (x int); create function f() returns bigint begin atomic select count(*) from TPL.t; end; create view v as select count(*) from TPL.t",
	"create table t (x int, y int) tablespace SPACE; create index on t (x) tablespace SPACE; create materialized view m tablespace SPACE as select 1 x; alter table t add primary key (y) using index tablespace SPACE",
}

// oddTemplatesOf15 are those that PostgreSQL 14 does not know.
var oddTemplatesOf15 = []string{
	"create table a (x int, y int, unique nulls not distinct (x, y)); create unique index on a (y) nulls not distinct",
	"create unlogged sequence s",
	"create table n (x text references outside.country on delete set null (x))",
}

var oddTemplatesOf18 = []string{
	"create table a (id int constraint given not null, n int, m int not null no inherit); alter table a add constraint later not null n not valid; alter table a rename column id to key; alter table a rename to b",
	"create table up (id int constraint given not null, n int not null); create table down (extra int) inherits (up); create table aside (id int constraint own not null, n int not null); alter table aside inherit up",
	"create table a (x int, twice int generated always as (x * 2) virtual, thrice int generated always as (x * 3) stored)",
	"create table a (id int4range, during tsrange, primary key (id, during)); create table c (x int check (x > 0) not enforced)",
}

func TestOddTemplatesAreCopiedTrue(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	ctx := context.Background()
	space, group := d.Name+"_space", d.Name+"_group"
	d.SuperExec("create role "+ident(group), "set allow_in_place_tablespaces = on", "create tablespace "+ident(space)+" location ''", "grant create on tablespace "+ident(space)+" to "+ident(d.Owner))
	t.Cleanup(func() {
		d.SuperExec("drop owned by "+ident(group), "drop role "+ident(group), "drop owned by "+ident(d.Owner)+" cascade", "drop tablespace "+ident(space))
	})
	d.Exec("create schema outside", "create table outside.country (code text primary key)", "create sequence outside.seq", "grant usage, create on schema outside to "+ident(d.App))
	templates := oddTemplates
	version := count(t, d.Connect(d.SuperURL()), ctx, "select current_setting('server_version_num')::int")
	if version >= 150000 {
		templates = append(templates, oddTemplatesOf15...)
	}
	if version >= 180000 {
		templates = append(templates, oddTemplatesOf18...)
	}
	for i, sql := range templates {
		template := fmt.Sprintf("tpl_%03d", i)
		sql = strings.NewReplacer("TPL", template, "OWNER", ident(d.Owner), "APP", ident(d.App), "GROUP", ident(group), "SPACE", ident(space)).Replace(sql)
		d.Exec("create schema "+template, "set search_path = "+template, sql)
	}
	// Not valid, for the rows are not unique: to no one a part of the schema.
	d.Exec("create table tpl_000.twice (x int)", "insert into tpl_000.twice values (1), (1)")
	_, err := d.Connect(d.OwnerURL()).Exec(ctx, "create unique index concurrently half_made on tpl_000.twice (x)")
	require.Equal(t, "23505", pgCode(err))
	// The copies are not opened to whom new objects are, and the templates' were not.
	d.Exec("alter default privileges grant all on tables to "+ident(d.App), "alter default privileges grant all on sequences to "+ident(d.App),
		"alter default privileges revoke all on functions from public", "alter default privileges grant usage on schemas to public")
	pool := schemas(t, d, SchemaOptions{Template: "any"}).admin
	for i := range templates {
		template, id := fmt.Sprintf("tpl_%03d", i), fmt.Sprintf("c%03d", i)
		m, err := NewSchemaManager(pool, SchemaOptions{Template: template})
		require.NoError(t, err)
		if err := m.Provision(ctx, id); err != nil {
			t.Errorf("%s: %v", templates[i], err)
			continue
		}
		diff, err := m.Diff(ctx, id)
		require.NoError(t, err)
		require.Empty(t, diff, templates[i])
	}
	want := everySchemaText(t, d, "tpl_")
	sameText(t, want, everySchemaText(t, d, "tenant_c"))
	var drops []string
	for i := range templates {
		drops = append(drops, fmt.Sprintf("drop schema tpl_%03d cascade", i))
	}
	d.Exec(drops...)
	sameText(t, want, everySchemaText(t, d, "tenant_c")) // they live on without their templates
}

// everySchemaText is what pg_dump makes of all schemas of a prefix and a number.
func everySchemaText(t testing.TB, d *pgtest.DB, prefix string) string {
	t.Helper()
	out, err := exec.Command(pgDump(t), "--schema-only", "--schema="+prefix+"*", "--dbname="+d.SuperURL()).CombinedOutput()
	require.NoError(t, err, string(out))
	text := regexp.MustCompile(`(?m)^\\(un)?restrict .*\n`).ReplaceAllString(string(out), "")
	// A body may hold the template's name where it means no schema.
	return regexp.MustCompile(`(`+prefix+`|tpl_)(\d\d\d)\b`).ReplaceAllString(text, "schema_$2")
}

// sameText shows where two long texts part.
func sameText(t testing.TB, want, got string) {
	t.Helper()
	a, b := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			around := func(s []string) string { return strings.Join(s[max(i-8, 0):min(i+8, len(s))], "\n") }
			t.Fatalf("line %d\nwant\n%s\ngot\n%s", i+1, around(a), around(b))
		}
	}
	require.Equal(t, len(a), len(b), "lines")
}

// What would not be a true copy is refused by name, with nothing made.
func TestTemplatesThatCannotBeCopiedAreRefused(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	ctx := context.Background()
	d.SuperExec("create table public.others ()", "create function public.others() returns int language sql as 'select 1'", "create type public.others_type as enum ()",
		"grant create on database "+ident(d.Name)+" to public")
	d.Exec("create schema outside")
	pool := schemas(t, d, SchemaOptions{Template: "any"}).admin
	for i, c := range []struct{ sql, super, want string }{
		// The schema's name as text, which leads from the copy back to the template.
		{"create table t (x int); create function f() returns bigint language sql as 'select count(*) from UPPER.t'", "", "function f() names it as text"},
		{"create table t (x int); create function f() returns bigint language sql as 'select count(*) from TPL . t'", "", "function f() names it as text"},
		{`create table t (x int); create function f() returns bigint language sql as 'select count(*) from "TPL" . "t"'`, "", "function f() names it as text"},
		{"create table t (x int); create function f(name) returns bigint language plpgsql as 'declare n bigint; begin execute format(''select count(*) from TPL.%I'', $1) into n; return n; end'", "", "function f(name) names it as text"},
		{"create table t (x int); create function f() returns bigint language plpgsql as $$ declare n bigint; begin execute format('select count(*) from %I.t', 'TPL') into n; return n; end $$", "", "function f() names it as text"},
		{"create table t (x int); create function f() returns bigint language plpgsql as $$ begin set local search_path = public, TPL; return (select count(*) from t); end $$", "", "function f() names it as text"},
		{"create table t (x int); create function f() returns bigint language plpgsql as $$ begin perform set_config('search_path', 'TPL, public', true); return (select count(*) from t); end $$", "", "function f() names it as text"},
		{"create procedure p() language plpgsql as 'begin insert into TPL.t values (1); end'; create table t (x int)", "", "function p() names it as text"},
		{"create sequence s; create table t (id int default nextval('TPL.s'::text))", "", "default t.id names it as text"},
		{"create table t (x int); create trigger tr before insert on t for each row execute function suppress_redundant_updates_trigger('TPL.t')", "", "trigger tr names it as text"},
		{"create table t (x text); create view v as select to_regclass('TPL.t')", "", "view v names it as text"},
		{"create table t (x regnamespace default 'TPL'::regnamespace)", "", "default value for column x of table t depends on schema"},
		// The server's own names win in every search_path.
		{"create domain money as numeric(10,2); create table line (x TPL.money)", "", "type TPL.money, with the name of one of the server's own"},
		{"create function lower(text) returns text language sql immutable as 'select $1'", "", "function TPL.lower(text), with the name"},
		{"create table t (x int, y int); create function ok(t) returns bool language sql immutable as 'select $1.x > 0'; alter table t add check (ok(t.*))", "", "depends on itself"},
		{"create table a (id int primary key, n text); create function f(int) returns text stable begin atomic select n from a where id = $1 group by id; end; create table b (x int check (f(x) is null))", "", "needs a key of another table"},
		{"create type e as enum ('a'); create function f(text) returns e language sql as $$ select 'a'::text::e $$; create cast (text as e) with function f(text) as assignment", "", "cast from text to e"},
		{"create table p (id int) partition by list (id); create table outside.part_x partition of p for values in (1)", "", "of which outside.part_x is a part"},
		{"create table outside.parent_x (id int) partition by list (id); create table p partition of outside.parent_x for values in (1)", "", "a partition of outside.parent_x"},
		{"create type ty as (x int); create table t of ty", "", "table t, of a kind that is not copied"},
		{"create table p (id int, primary key (id) with (fillfactor = 50)) partition by list (id)", "", "index p_pkey, of a kind that is not copied"},
		{"create table t ()", "alter table public.others set schema TPL", "table TPL.others belongs to role"},
		{"create table t ()", "alter function public.others() set schema TPL", "function TPL.others() belongs to role"},
		{"create table t ()", "alter type public.others_type set schema TPL", "type TPL.others_type belongs to role"},
		{"create table t ()", "alter schema TPL owner to APP", "schema TPL belongs to role"},
	} {
		template := fmt.Sprintf("tpl%d", i)
		names := strings.NewReplacer("TPL", template, "UPPER", strings.ToUpper(template), "APP", ident(d.App))
		d.Exec("create schema "+template, "set search_path = "+template, names.Replace(c.sql))
		if c.super != "" {
			d.SuperExec(names.Replace(c.super))
		}
		m, err := NewSchemaManager(pool, SchemaOptions{Template: template})
		require.NoError(t, err)
		err = m.Provision(ctx, "x")
		require.ErrorContains(t, err, names.Replace(c.want), c.sql)
		require.ErrorContains(t, err, `tenant "x": provision schema`)
		require.Zero(t, count(t, m.admin, ctx, "select count(*) from pg_namespace where nspname = 'tenant_x'"))
	}
}

// Rows of reference are the table's own, and numbers go on after them wherever they are drawn from.
func TestRowsOfReference(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	ctx := context.Background()
	d.Exec("create schema tpl", "set search_path = tpl", `create sequence free;
		create table kind (id int default nextval('free') primary key, n serial, i int generated always as identity, name text, up int references kind, twice text generated always as (name || name) stored);
		create table sub (extra text) inherits (kind);
		create table part (id int, primary key (id)) partition by list (id); create table part1 partition of part for values in (1); create table rest partition of part default;
		create function loud() returns trigger language plpgsql as 'begin raise exception ''loud''; end';
		insert into kind (name, up) values ('a', 1), ('b', 1); insert into sub (name, i) values ('not of kind', 7); insert into part values (1), (2);
		create trigger loud before insert on kind for each row execute function loud()`)
	m := schemas(t, d, SchemaOptions{Template: "tpl", Reference: []string{"kind", "part"}})
	require.NoError(t, m.Provision(ctx, "a"))
	require.Equal(t, []string{"1 1 1 a 1 aa", "2 2 2 b 1 bb"}, strs(t, m.admin, ctx, "select concat_ws(' ', id, n, i, name, up, twice) from tenant_a.kind order by 1"))
	require.Equal(t, []string{"part1 1", "rest 2"}, strs(t, m.admin, ctx, "select relname || ' ' || id from tenant_a.part p join pg_class c on c.oid = p.tableoid order by 1"))
	_, err := m.admin.Exec(ctx, "insert into tenant_a.kind (name) values ('x')")
	require.ErrorContains(t, err, "loud")
	d.Exec("alter table tenant_a.kind disable trigger loud")
	// sub drew from the free sequence and from n's as well.
	require.Equal(t, []string{"5 5 4"}, strs(t, m.admin, ctx, "insert into tenant_a.kind (name) values ('c') returning concat_ws(' ', id, n, i)"))

	// A copy in stock has the rows of its day, and is not given out when they have changed.
	_, err = m.Stock(ctx, 1)
	require.NoError(t, err)
	d.Exec("insert into tpl.part values (3)")
	require.NoError(t, m.Provision(ctx, "b"))
	require.Equal(t, []string{"1", "2", "3"}, strs(t, m.admin, ctx, "select id::text from tenant_b.part order by id"))
}
