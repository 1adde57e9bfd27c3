package pgxtenant

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// ownName stands for the name of the described schema in a statement, where it cannot be left out.
const ownName = "\x01"

// object is a statement that makes one object, or one property of it. Names of the schema's own objects are
// not qualified in it, so that it makes the same in any schema that comes first in the search_path.
type object struct {
	oid  uint32 // of what other objects may depend on; 0 for properties
	name string // for messages
	sql  string
}

// A part of a schema is read by one query, which returns OIDs, names and statements. The parts are in the
// order of making: nothing depends on a later one, but for what sortObjects sees to.
type part struct {
	what string
	sql  string
}

// describedSchema is what every query below begins with; $1 is the schema.
const describedSchema = `with ns as (select oid, nspname, nspowner from pg_namespace where nspname = $1),
	rel as (select c.*, quote_ident(c.relname) as q from pg_class c join ns on ns.oid = c.relnamespace),
	tab as (select * from rel where relkind in ('r', 'p')),
	func as (select p.*, p.oid::regprocedure::text as q from pg_proc p join ns on ns.oid = p.pronamespace
		where not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'i')),
	typ as (select t.*, quote_ident(t.typname) as q from pg_type t join ns on ns.oid = t.typnamespace)
	`

// refused are kinds of objects that are not copied: a schema that has one is refused, by its name.
const refusedObjects = describedSchema + `
	select pg_describe_object(classid, objid, 0) from (
		select 'pg_class'::regclass as classid, oid as objid from rel where relkind = 'f' or reloftype <> 0
			or relkind = 'r' and relam <> (select oid from pg_am where amname = 'heap')
		union all select 'pg_proc'::regclass, oid from func where prokind in ('a', 'w')
		union all select 'pg_operator'::regclass, o.oid from pg_operator o join ns on ns.oid = o.oprnamespace
		union all select 'pg_opclass'::regclass, o.oid from pg_opclass o join ns on ns.oid = o.opcnamespace
		union all select 'pg_opfamily'::regclass, o.oid from pg_opfamily o join ns on ns.oid = o.opfnamespace
		union all select 'pg_collation'::regclass, o.oid from pg_collation o join ns on ns.oid = o.collnamespace
		union all select 'pg_conversion'::regclass, o.oid from pg_conversion o join ns on ns.oid = o.connamespace
		union all select 'pg_ts_config'::regclass, o.oid from pg_ts_config o join ns on ns.oid = o.cfgnamespace
		union all select 'pg_ts_dict'::regclass, o.oid from pg_ts_dict o join ns on ns.oid = o.dictnamespace
		union all select 'pg_ts_parser'::regclass, o.oid from pg_ts_parser o join ns on ns.oid = o.prsnamespace
		union all select 'pg_ts_template'::regclass, o.oid from pg_ts_template o join ns on ns.oid = o.tmplnamespace
		union all select 'pg_type'::regclass, oid from typ where typtype = 'b' and typelem = 0
		union all select 'pg_extension'::regclass, e.oid from pg_extension e join ns on ns.oid = e.extnamespace
	) x order by 1 limit 1`

// madeParts make objects that others may depend on, in any order; sortObjects finds a right one.
var madeParts = []part{
	{"enum", `select t.oid, t.q, format('create type %s as enum (%s)', t.q,
			(select string_agg(quote_literal(e.enumlabel), ', ' order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid))
		from typ t where t.typtype = 'e'`},
	{"domain", `select t.oid, t.q, format('create domain %s as %s%s%s%s', t.q, format_type(t.typbasetype, t.typtypmod),
			case when t.typcollation <> b.typcollation then ' collate ' || t.typcollation::regcollation end,
			' default ' || pg_get_expr(t.typdefaultbin, 0), case when t.typnotnull then ' not null' end)
		from typ t join pg_type b on b.oid = t.typbasetype where t.typtype = 'd'`},
	{"composite type", `select t.oid, t.q, format('create type %s as (%s)', t.q,
			(select string_agg(format('%I %s%s', a.attname, format_type(a.atttypid, a.atttypmod),
					case when a.attcollation <> y.typcollation then ' collate ' || a.attcollation::regcollation end), ', ' order by a.attnum)
				from pg_attribute a join pg_type y on y.oid = a.atttypid where a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped))
		from typ t join pg_class c on c.oid = t.typrelid and c.relkind = 'c'`},
	{"range type", `select t.oid, t.q, format('create type %s as range (subtype = %s, multirange_type_name = %I%s%s%s%s)', t.q, format_type(r.rngsubtype, null), m.typname,
			case when o.opcdefault then '' else ', subtype_opclass = ' || format('%I.%I', n.nspname, o.opcname) end,
			', collation = ' || nullif(r.rngcollation, 0)::regcollation,
			', canonical = ' || nullif(r.rngcanonical::oid, 0)::regproc, ', subtype_diff = ' || nullif(r.rngsubdiff::oid, 0)::regproc)
		from typ t join pg_range r on r.rngtypid = t.oid join pg_type m on m.oid = r.rngmultitypid
		join pg_opclass o on o.oid = r.rngsubopc join pg_namespace n on n.oid = o.opcnamespace`},
	{"function", `select f.oid, f.q, replace(pg_get_functiondef(f.oid),
			format('CREATE OR REPLACE %s %I.%I(', case f.prokind when 'p' then 'PROCEDURE' else 'FUNCTION' end, $1, f.proname),
			format('CREATE %s %I(', case f.prokind when 'p' then 'PROCEDURE' else 'FUNCTION' end, f.proname))
		from func f where f.prokind in ('f', 'p')`},
	{"sequence", `select c.oid, c.q, format('create sequence %s as %s increment %s minvalue %s maxvalue %s start %s cache %s%s', c.q, format_type(s.seqtypid, null),
			s.seqincrement, s.seqmin, s.seqmax, s.seqstart, s.seqcache, case when s.seqcycle then ' cycle' end)
		from rel c join pg_sequence s on s.seqrelid = c.oid
		where not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'i')`},
	{"table", `select c.oid, c.q, format(E'create%s table %s (%s)%s%s%s', case c.relpersistence when 'u' then ' unlogged' end, c.q,
			(select string_agg(e'\n\t' || line, ',' order by k, n, line) from (
				select 1 k, a.attnum n, format('%I %s%s%s%s', a.attname, format_type(a.atttypid, a.atttypmod),
						case when a.attcollation <> y.typcollation then ' collate ' || a.attcollation::regcollation end,
						case when a.attgenerated = 's' then format(' generated always as (%s) stored', pg_get_expr(d.adbin, d.adrelid)) end,
						case when a.attnotnull then ' not null' end) line
					from pg_attribute a join pg_type y on y.oid = a.atttypid left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
					where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and (a.attislocal or c.relispartition)
				union all
				select 2, 0, format('constraint %I %s', k.conname, pg_get_constraintdef(k.oid))
					from pg_constraint k where k.conrelid = c.oid and k.contype = 'c' and k.convalidated and (k.conislocal or c.relispartition)) x),
			(select ' inherits (' || string_agg(i.inhparent::regclass::text, ', ' order by i.inhseqno) || ')' from pg_inherits i where i.inhrelid = c.oid and not c.relispartition),
			' partition by ' || pg_get_partkeydef(c.oid),
			(select ' with (' || string_agg(format('%s = %L', o.option_name, o.option_value), ', ') || ')' from pg_options_to_table(c.reloptions) o))
		from tab c`},
	{"view", `select c.oid, c.q, format(E'create view %s%s as\n%s', c.q,
			(select ' with (' || string_agg(format('%s = %L', o.option_name, o.option_value), ', ') || ')' from pg_options_to_table(c.reloptions) o),
			pg_get_viewdef(c.oid))
		from rel c where c.relkind = 'v'`},
	{"materialized view", `select c.oid, c.q, format(E'create materialized view %s%s as\n%s\nwith no data', c.q,
			(select ' with (' || string_agg(format('%s = %L', o.option_name, o.option_value), ', ') || ')' from pg_options_to_table(c.reloptions) o),
			rtrim(pg_get_viewdef(c.oid), ';'))
		from rel c where c.relkind = 'm'`},
}

// dependencies are pairs of OIDs of made objects, of which the first needs the second. What stands
// inside a statement is taken for a part of the object that it makes.
const dependencies = describedSchema + `,
	made as (select oid, 'pg_type'::regclass::oid class from typ where typtype in ('e', 'd', 'r')
		union all select t.oid, 'pg_type'::regclass from typ t join pg_class c on c.oid = t.typrelid and c.relkind = 'c'
		union all select oid, 'pg_proc'::regclass from func
		union all select oid, 'pg_class'::regclass from rel where relkind in ('S', 'r', 'p', 'v', 'm')),
	inside as (
		select oid part, class, oid whole from made
		union all select t.oid, 'pg_type'::regclass, coalesce(nullif(t.typelem, 0), nullif(t.typrelid, 0), t.oid) from typ t
			where not exists (select from pg_class c where c.oid = t.typrelid and c.relkind = 'c')
		union all select c.oid, 'pg_class'::regclass, c.reltype from rel c where c.relkind = 'c'
		union all select r.rngmultitypid, 'pg_type'::regclass, r.rngtypid from pg_range r
		union all select w.oid, 'pg_rewrite'::regclass, w.ev_class from pg_rewrite w where w.rulename = '_RETURN'
		union all select k.oid, 'pg_constraint'::regclass, k.conrelid from pg_constraint k where k.contype = 'c' and k.convalidated and k.conrelid <> 0
		union all select d.oid, 'pg_attrdef'::regclass, d.adrelid from pg_attrdef d join pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum and a.attgenerated <> '')
	select distinct a.whole, coalesce(deeper.whole, b.whole)
	from pg_depend d
	join inside a on a.part = d.objid and a.class = d.classid
	join inside b on b.part = d.refobjid and b.class = d.refclassid
	left join inside deeper on deeper.part = b.whole and deeper.class = 'pg_type'::regclass and deeper.part <> deeper.whole
	where a.whole <> b.whole and d.deptype in ('n', 'a')
		and not (d.classid = 'pg_class'::regclass and exists (select from rel s where s.oid = d.objid and s.relkind = 'S'))`

// laterParts complete what has been made.
var laterParts = []part{
	{"domain constraint", `select 0::oid, k.conname, format('alter domain %s add constraint %I %s', t.q, k.conname, pg_get_constraintdef(k.oid))
		from typ t join pg_constraint k on k.contypid = t.oid order by 2, 3`},
	{"identity", `select 0::oid, c.q || '.' || a.attname, format('alter table %s alter column %I add generated %s as identity (sequence name %s start with %s increment by %s minvalue %s maxvalue %s cache %s%s)',
			c.q, a.attname, case a.attidentity when 'a' then 'always' else 'by default' end, s.oid::regclass,
			q.seqstart, q.seqincrement, q.seqmin, q.seqmax, q.seqcache, case when q.seqcycle then ' cycle' end)
		from tab c join pg_attribute a on a.attrelid = c.oid and a.attidentity <> ''
		join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = c.oid and d.refobjsubid = a.attnum and d.classid = 'pg_class'::regclass and d.deptype = 'i'
		join pg_class s on s.oid = d.objid and s.relkind = 'S' join pg_sequence q on q.seqrelid = s.oid order by 2, 3`},
	{"owner of a sequence", `select 0::oid, s.q, format('alter sequence %s owned by %s.%I', s.q, d.refobjid::regclass, a.attname)
		from rel s join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = s.oid and d.refclassid = 'pg_class'::regclass and d.deptype = 'a'
		join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid where s.relkind = 'S' order by 2, 3`},
	{"default", `select 0::oid, c.q || '.' || a.attname, format('alter %s %s alter column %I set default %s', case c.relkind when 'v' then 'view' else 'table only' end, c.q, a.attname, pg_get_expr(d.adbin, d.adrelid))
		from rel c join pg_attribute a on a.attrelid = c.oid join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
		where a.attgenerated = '' and (a.attislocal or c.relispartition or c.relkind = 'v' or d.oid is not null) order by 2, 3`},
	{"column option", `select 0::oid, c.q || '.' || a.attname, format('alter %s %s alter column %I %s', case c.relkind when 'm' then 'materialized view' else 'table only' end, c.q, a.attname, o.sql)
		from rel c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped join pg_type y on y.oid = a.atttypid
		cross join lateral (
			select 'set storage ' || case a.attstorage when 'p' then 'plain' when 'e' then 'external' when 'm' then 'main' else 'extended' end where a.attstorage <> y.typstorage
			union all select 'set compression ' || case a.attcompression when 'p' then 'pglz' else 'lz4' end where a.attcompression in ('p', 'l')
			union all select 'set statistics ' || a.attstattarget where a.attstattarget >= 0
			union all select format('set (%s)', string_agg(format('%s = %L', x.option_name, x.option_value), ', ')) from pg_options_to_table(a.attoptions) x having count(*) > 0) o(sql)
		where c.relkind in ('r', 'p', 'm') order by 2, 3`},
	{"partition", `select 0::oid, c.q, format('alter table only %s attach partition %s %s', i.inhparent::regclass, c.q, pg_get_expr(c.relpartbound, c.oid))
		from tab c join pg_inherits i on i.inhrelid = c.oid where c.relispartition order by 2, 3`},
}

// guardParts come after rows have been copied.
var guardParts = []part{
	{"constraint", `select 0::oid, k.conname, format('alter table only %s add constraint %I %s', c.q, k.conname, pg_get_constraintdef(k.oid))
		from tab c join pg_constraint k on k.conrelid = c.oid
		where k.contype in ('p', 'u', 'x') or k.contype = 'c' and not k.convalidated and k.conislocal
		order by c.relispartition, k.contype <> 'p', c.q, 2`},
	{"index", `select 0::oid, x.q, pg_get_indexdef(x.oid, 0, true)
		from rel x join pg_index i on i.indexrelid = x.oid join rel c on c.oid = i.indrelid
		where not exists (select from pg_constraint k where k.conindid = x.oid and k.contype in ('p', 'u', 'x'))
		order by c.relispartition, 2`},
	{"index of a partition", `select 0::oid, x.q, format('alter index %s attach partition %s', i.inhparent::regclass, x.q)
		from rel x join pg_inherits i on i.inhrelid = x.oid where x.relkind in ('i', 'I') order by 2`},
	{"clustering", `select 0::oid, x.q, format('alter table %s cluster on %s', i.indrelid::regclass, x.q) from rel x join pg_index i on i.indexrelid = x.oid where i.indisclustered order by 2`},
	{"replica identity", `select 0::oid, c.q, format('alter table only %s replica identity %s', c.q, case c.relreplident when 'f' then 'full' when 'n' then 'nothing'
			else 'using index ' || (select i.indexrelid::regclass from pg_index i where i.indrelid = c.oid and i.indisreplident) end)
		from tab c where c.relreplident <> 'd' order by 2`},
	{"foreign key", `select 0::oid, k.conname, format('alter table %s add constraint %I %s', c.q, k.conname, pg_get_constraintdef(k.oid))
		from tab c join pg_constraint k on k.conrelid = c.oid where k.contype = 'f' and k.conparentid = 0 order by c.q, 2`},
	{"statistics", `select 0::oid, s.stxname, replace(pg_get_statisticsobjdef(s.oid), format('CREATE STATISTICS %I.%I ', $1, s.stxname), format('CREATE STATISTICS %I ', s.stxname))
		from pg_statistic_ext s join ns on ns.oid = s.stxnamespace order by 2`},
	{"rule", `select 0::oid, w.rulename, pg_get_ruledef(w.oid, true) from rel c join pg_rewrite w on w.ev_class = c.oid where w.rulename <> '_RETURN' order by c.q, 2`},
	{"trigger", `select 0::oid, t.tgname, pg_get_triggerdef(t.oid, true) from rel c join pg_trigger t on t.tgrelid = c.oid where not t.tgisinternal and t.tgparentid = 0 order by c.q, 2`},
	{"state of a trigger", `select 0::oid, t.tgname, format('alter table %s %s trigger %I', c.q, case t.tgenabled when 'D' then 'disable' when 'R' then 'enable replica' else 'enable always' end, t.tgname)
		from rel c join pg_trigger t on t.tgrelid = c.oid where not t.tgisinternal and t.tgenabled <> 'O' order by c.q, 2`},
	{"policy", `select 0::oid, p.polname, format('create policy %I on %s as %s for %s to %s%s%s', p.polname, c.q, case when p.polpermissive then 'permissive' else 'restrictive' end,
			case p.polcmd when 'r' then 'select' when 'a' then 'insert' when 'w' then 'update' when 'd' then 'delete' else 'all' end,
			(select string_agg(case r when 0 then 'public' else quote_ident(pg_get_userbyid(r)) end, ', ') from unnest(p.polroles) r),
			' using (' || pg_get_expr(p.polqual, p.polrelid) || ')', ' with check (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')')
		from tab c join pg_policy p on p.polrelid = c.oid order by c.q, 2`},
	{"row-level security", `select 0::oid, c.q, format('alter table %s %s row level security', c.q, x) from tab c, lateral (select 'enable' where c.relrowsecurity union all select 'force' where c.relforcerowsecurity) x(x) order by 2, 3`},
	{"comment", `select 0::oid, x.on_what, format('comment on %s is %L', x.on_what, d.description) from (
			select 'pg_class'::regclass class, c.oid, 0 sub, case c.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence' when 'i' then 'index' when 'I' then 'index' when 'c' then 'type' else 'table' end || ' ' || c.q on_what from rel c
			union all select 'pg_class', c.oid, a.attnum, format('column %s.%I', c.q, a.attname) from rel c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
			union all select 'pg_proc', f.oid, 0, case f.prokind when 'p' then 'procedure ' else 'function ' end || f.q from func f
			union all select 'pg_type', t.oid, 0, case t.typtype when 'd' then 'domain ' else 'type ' end || t.q from typ t
			union all select 'pg_constraint', k.oid, 0, format('constraint %I on %s', k.conname, c.q) from tab c join pg_constraint k on k.conrelid = c.oid
			union all select 'pg_constraint', k.oid, 0, format('constraint %I on domain %s', k.conname, t.q) from typ t join pg_constraint k on k.contypid = t.oid
			union all select 'pg_trigger', t.oid, 0, format('trigger %I on %s', t.tgname, c.q) from rel c join pg_trigger t on t.tgrelid = c.oid and not t.tgisinternal
			union all select 'pg_rewrite', w.oid, 0, format('rule %I on %s', w.rulename, c.q) from rel c join pg_rewrite w on w.ev_class = c.oid and w.rulename <> '_RETURN'
			union all select 'pg_policy', p.oid, 0, format('policy %I on %s', p.polname, c.q) from tab c join pg_policy p on p.polrelid = c.oid
			union all select 'pg_statistic_ext', s.oid, 0, format('statistics %I', s.stxname) from pg_statistic_ext s join ns on ns.oid = s.stxnamespace
			union all select 'pg_namespace', ns.oid, 0, 'schema ` + ownName + `' from ns
		) x join pg_description d on d.classoid = x.class and d.objoid = x.oid and d.objsubid = x.sub order by 2`},
	{"grant", `,
		granted as (
			select case c.relkind when 'S' then 'sequence' else 'table' end || ' ' || c.q object, '' columns, c.relowner owner, c.relacl acl from rel c
			union all select 'table ' || c.q, format(' (%I)', a.attname), c.relowner, a.attacl from rel c join pg_attribute a on a.attrelid = c.oid and not a.attisdropped
			union all select case f.prokind when 'p' then 'procedure ' else 'function ' end || f.q, '', f.proowner, f.proacl from func f
			union all select case t.typtype when 'd' then 'domain ' else 'type ' end || t.q, '', t.typowner, t.typacl from typ t
			union all select 'schema ` + ownName + `', '', ns.nspowner, n.nspacl from ns join pg_namespace n on n.oid = ns.oid)
		select 0::oid, object, format('revoke all on %s from public', object) from granted
			where acl is not null and (object like 'function %' or object like 'procedure %' or object like 'type %' or object like 'domain %') and not exists (select from aclexplode(acl) x where x.grantee = 0)
		union all
		select 0::oid, object, format('grant %s%s on %s to %s%s', x.privilege_type, columns, object, case x.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(x.grantee)) end, case when x.is_grantable then ' with grant option' end)
			from granted, aclexplode(acl) x where x.grantee <> owner
		order by 2, 3 desc`},
	{"default privilege", `select 0::oid, x.privilege_type, format('alter default privileges for role %I in schema ` + ownName + ` grant %s on %s to %s%s', pg_get_userbyid(d.defaclrole), x.privilege_type,
			case d.defaclobjtype when 'r' then 'tables' when 'S' then 'sequences' when 'f' then 'functions' when 'T' then 'types' end,
			case x.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(x.grantee)) end, case when x.is_grantable then ' with grant option' end)
		from pg_default_acl d join ns on ns.oid = d.defaclnamespace, aclexplode(d.defaclacl) x order by 3`},
}

// description is all that makes a schema: the same for two schemas that are the same but for their names
// and rows.
type description struct {
	made, later, guards []object
	populated           []string // materialized views that have been filled
}

// describeSchema reads a schema, in two round trips, under locks that hinder nobody.
func describeSchema(ctx context.Context, tx pgx.Tx, schema string) (d description, err error) {
	if _, err := tx.Exec(ctx, "set local search_path = "+ident(schema)+", pg_temp"); err != nil {
		return d, err
	}
	batch := &pgx.Batch{}
	var objects []object
	collect := func(what, sql string, into *[]object) {
		batch.Queue(describedSchema+sql, schema).Query(func(rows pgx.Rows) error {
			return forEachObject(rows, func(o object) {
				o.name = what + " " + o.name
				*into = append(*into, o)
			})
		})
	}
	for _, p := range madeParts {
		collect(p.what, p.sql, &objects)
	}
	for _, p := range laterParts {
		collect(p.what, p.sql, &d.later)
	}
	for _, p := range guardParts {
		collect(p.what, p.sql, &d.guards)
	}
	batch.Queue(describedSchema+"select coalesce(array_agg(q order by q), '{}') from rel where relkind = 'm' and relispopulated", schema).QueryRow(func(row pgx.Row) error {
		return row.Scan(&d.populated)
	})
	needs := make(map[uint32][]uint32)
	batch.Queue(dependencies, schema).Query(func(rows pgx.Rows) error {
		var a, b uint32
		_, err := pgx.ForEachRow(rows, []any{&a, &b}, func() error {
			needs[a] = append(needs[a], b)
			return nil
		})
		return err
	})
	var refused []string
	batch.Queue(refusedObjects, schema).Query(func(rows pgx.Rows) (err error) {
		refused, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return d, fmt.Errorf("describe schema %q: %w", schema, err)
	}
	if len(refused) > 0 {
		return d, fmt.Errorf("pgxtenant: schema %q has an object of a kind that is not copied, %s; move it to a schema that all tenants share", schema, refused[0])
	}
	d.made, err = sortObjects(objects, needs)
	if err != nil {
		return d, err
	}
	return d, d.nameless(schema)
}

func forEachObject(rows pgx.Rows, f func(object)) error {
	var o object
	_, err := pgx.ForEachRow(rows, []any{&o.oid, &o.name, &o.sql}, func() error {
		f(o)
		return nil
	})
	return err
}

// sortObjects orders objects so that each comes after those that it needs, and else by name.
func sortObjects(objects []object, needs map[uint32][]uint32) ([]object, error) {
	slices.SortStableFunc(objects, func(a, b object) int { return cmp.Compare(a.name, b.name) })
	byOID := make(map[uint32]*object, len(objects))
	for i := range objects {
		byOID[objects[i].oid] = &objects[i]
	}
	for _, needed := range needs { // the order of the rows is the server's, and OIDs say nothing
		slices.SortFunc(needed, func(a, b uint32) int {
			if byOID[a] == nil || byOID[b] == nil {
				return cmp.Compare(a, b)
			}
			return cmp.Compare(byOID[a].name, byOID[b].name)
		})
	}
	var sorted []object
	const entered, left = 1, 2
	state := make(map[uint32]int, len(objects))
	var visit func(o *object) error
	visit = func(o *object) error {
		switch state[o.oid] {
		case left:
			return nil
		case entered:
			return fmt.Errorf("pgxtenant: %s depends on itself by way of others, and cannot be copied", o.name)
		}
		state[o.oid] = entered
		for _, oid := range needs[o.oid] {
			if n := byOID[oid]; n != nil {
				if err := visit(n); err != nil {
					return err
				}
			}
		}
		state[o.oid] = left
		sorted = append(sorted, *o)
		return nil
	}
	for i := range objects {
		if err := visit(&objects[i]); err != nil {
			return nil, err
		}
	}
	return sorted, nil
}

// nameless takes the schema's own name out of the settings of functions, and refuses it in the text of their
// bodies, where only a reader could tell what it means.
func (d *description) nameless(schema string) error {
	for i := range d.made {
		o := &d.made[i]
		if !strings.HasPrefix(o.name, "function ") {
			continue
		}
		head, body, found := strings.Cut(o.sql, "\nAS ")
		lines := strings.Split(head, "\n")
		for n, line := range lines {
			if strings.HasPrefix(line, " SET search_path TO ") {
				lines[n] = strings.ReplaceAll(line, literal(schema), "'"+ownName+"'")
			}
		}
		o.sql = strings.Join(lines, "\n")
		if found {
			o.sql += "\nAS " + body
			for _, name := range []string{schema + ".", ident(schema) + "."} {
				if strings.Contains(body, name) {
					return fmt.Errorf("pgxtenant: the body of %s names schema %q; leave the name out, and let the search_path find its objects", o.name, schema)
				}
			}
		}
	}
	return nil
}

// statements are all of it as text, in order; those between which rows are to be copied come apart.
func (d *description) statements(schema string) (before, after []object) {
	named := func(objects []object) []object {
		out := make([]object, len(objects))
		for i, o := range objects {
			o.sql = strings.ReplaceAll(strings.ReplaceAll(o.sql, "'"+ownName+"'", literal(schema)), ownName, ident(schema))
			out[i] = o
		}
		return out
	}
	return append(named(d.made), named(d.later)...), named(d.guards)
}

// lines are what two schemas are compared by.
func (d *description) lines() []string {
	var out []string
	for _, objects := range [][]object{d.made, d.later, d.guards} {
		for _, o := range objects {
			out = append(out, strings.ReplaceAll(o.sql, ownName, "SCHEMA"))
		}
	}
	return out
}
