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

// Left out, as pg_dump does: what is the server's own, such as the version of a column that the minor releases of November
// 2026 keep among its options as pg_attver.

// notNull is NOT NULL of column a of table c. From PostgreSQL 18 on it is a constraint and has a name, which is another than the
// default's in a partition, and in a table that was renamed. One that is not yet valid comes later.
const notNull = `case when a.attnotnull then coalesce((
		select case when k.convalidated then
			coalesce(' constraint ' || quote_ident(nullif(k.conname::text, format('%s_%s_not_null', c.relname, a.attname))), '')
			|| ' not null' || case when k.connoinherit then ' no inherit' else '' end else '' end
		from pg_constraint k where k.conrelid = c.oid and k.contype = 'n' and k.conkey = array[a.attnum]), ' not null') end`

// describedSchema is what every query below begins with; $1 is the schema. The catalogs have no index by schema, and all tenants' schemas are in
// them: what is in this one is found by what depends on it, and on that. "offset 0" has it looked up by OID, one after the other, whatever
// the planner takes their number for.
const describedSchema = `with ns as materialized (select oid, nspname, nspowner from pg_namespace where nspname = $1),
	own as materialized (select d.classid, d.objid from ns, lateral (
		select * from pg_depend d where d.refclassid = 'pg_namespace'::regclass and d.refobjid = ns.oid offset 0) d),
	rel as materialized (select c.*, quote_ident(c.relname) as q from (
			select objid from own where classid = 'pg_class'::regclass
			union select i.indexrelid from own, lateral (select * from pg_index i where i.indrelid = own.objid offset 0) i where own.classid = 'pg_class'::regclass
			union select t.typrelid from own, lateral (select * from pg_type t where t.oid = own.objid offset 0) t where own.classid = 'pg_type'::regclass and t.typrelid <> 0) o,
		lateral (select * from pg_class c where c.oid = o.objid offset 0) c),
	tab as (select * from rel where relkind in ('r', 'p')),
	func as (select p.*, p.oid::regprocedure::text as q from own, lateral (select * from pg_proc p where p.oid = own.objid offset 0) p
		where own.classid = 'pg_proc'::regclass
			and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'i')),
	element as (
		select objid from own where classid = 'pg_type'::regclass
		union select reltype from rel where reltype <> 0
		union select r.rngmultitypid from own, lateral (select * from pg_range r where r.rngtypid = own.objid offset 0) r where own.classid = 'pg_type'::regclass),
	typ as (select t.*, quote_ident(t.typname) as q from (
			select objid from element
			union select t.typarray from element e, lateral (select * from pg_type t where t.oid = e.objid offset 0) t where t.typarray <> 0) o,
		lateral (select * from pg_type t where t.oid = o.objid offset 0) t)
	`

// refusedObjects are what keeps a schema from being copied, with the reason.
const refusedObjects = describedSchema + `
	select pg_describe_object(classid, objid, 0) || ', ' || why from (
		select classid, objid, 'of a kind that is not copied; move it to a schema that all tenants share' as why from (
			select 'pg_class'::regclass as classid, oid as objid from rel where relkind = 'f' or reloftype <> 0
				or relkind in ('r', 'm') and relam <> (select oid from pg_am where amname = 'heap')
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
			union all select 'pg_cast'::regclass, k.oid from pg_cast k
				where (exists (select from typ where typ.oid in (k.castsource, k.casttarget)) or exists (select from func where func.oid = k.castfunc))
					and not exists (select from pg_depend d where d.classid = 'pg_cast'::regclass and d.objid = k.oid and d.deptype = 'i')
			union all select 'pg_class'::regclass, x.oid from rel x join pg_constraint k on k.conindid = x.oid and k.contype in ('p', 'u', 'x')
				where x.relkind = 'I' and x.reloptions is not null) x
		union all
		select classid, objid, 'with the name of one of the server''s own, which comes first in every search_path; rename it' from (
			select 'pg_class'::regclass as classid, oid as objid from rel where not pg_table_is_visible(oid)
			union all select 'pg_proc'::regclass, oid from func where not pg_function_is_visible(oid)
			union all select 'pg_type'::regclass, oid from typ where typtype in ('e', 'd', 'r') and not pg_type_is_visible(oid)) x
		union all
		select 'pg_class'::regclass, i.inhparent, format('of which %s is a part and in another schema; a copy would lack it', i.inhrelid::regclass)
			from pg_inherits i join tab p on p.oid = i.inhparent where not exists (select from tab where tab.oid = i.inhrelid)
		union all
		select 'pg_class'::regclass, c.oid, format('a partition of %s in another schema, which has room for one such only', i.inhparent::regclass)
			from tab c join pg_inherits i on i.inhrelid = c.oid where c.relispartition and not exists (select from tab where tab.oid = i.inhparent)
	) x order by 1 limit 1`

// storageOptions are the options of relation c and, as its own, those of its TOAST table.
const storageOptions = `(select ' with (' || string_agg(format('%s%s = %L', o.prefix, o.option_name, o.option_value), ', ' order by o.prefix, o.n) || ')' from (
				select '' prefix, x.* from pg_options_to_table(c.reloptions) with ordinality x(option_name, option_value, n)
				union all select 'toast.', x.* from pg_class toast, pg_options_to_table(toast.reloptions) with ordinality x(option_name, option_value, n) where toast.oid = c.reltoastrelid) o)`

// inheritedLater tells that all that table c has of its parents it also has of its own. It may have been made
// without them, and its columns come in an order of its own.
const inheritedLater = `not exists (select from pg_attribute a where a.attrelid = c.oid and a.attinhcount > 0 and not a.attislocal
					union all select from pg_constraint k where k.conrelid = c.oid and k.coninhcount > 0 and not k.conislocal)`

// madeParts make objects that others may depend on, in any order; sortObjects finds a right one.
var madeParts = []part{
	{"enum", `select t.oid, t.q, format('create type %s as enum (%s)', t.q,
			(select string_agg(quote_literal(e.enumlabel), ', ' order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid))
		from typ t where t.typtype = 'e'`},
	{"domain", `select t.oid, t.q, format('create domain %s as %s%s%s%s%s', t.q, format_type(t.typbasetype, t.typtypmod),
			case when t.typcollation <> b.typcollation then ' collate ' || t.typcollation::regcollation end,
			' default ' || pg_get_expr(t.typdefaultbin, 0), case when t.typnotnull then ' not null' end,
			(select string_agg(format(' constraint %I %s', k.conname, pg_get_constraintdef(k.oid)), '' order by k.conname)
				from pg_constraint k where k.contypid = t.oid and k.contype = 'c' and k.convalidated))
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
	{"sequence", `select c.oid, c.q, format('create%s sequence %s as %s increment %s minvalue %s maxvalue %s start %s cache %s%s',
			case c.relpersistence when 'u' then ' unlogged' end, c.q, format_type(s.seqtypid, null),
			s.seqincrement, s.seqmin, s.seqmax, s.seqstart, s.seqcache, case when s.seqcycle then ' cycle' end)
		from rel c join pg_sequence s on s.seqrelid = c.oid
		where not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'i')`},
	{"table", `select c.oid, c.q, format(E'create%s table %s (%s)%s%s%s', case c.relpersistence when 'u' then ' unlogged' end, c.q,
			(select string_agg(e'\n\t' || line, ',' order by k, n, line) from (
				select 1 k, a.attnum n, format('%I %s%s%s%s', a.attname, format_type(a.atttypid, a.atttypmod),
						case when a.attcollation <> y.typcollation then ' collate ' || a.attcollation::regcollation end,
						case when a.attgenerated <> '' then format(' generated always as (%s) %s', pg_get_expr(d.adbin, d.adrelid), case a.attgenerated when 's' then 'stored' else 'virtual' end) end,
						` + notNull + `) line
					from pg_attribute a join pg_type y on y.oid = a.atttypid left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
					where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and (a.attislocal or c.relispartition)
				union all
				select 2, 0, format('constraint %I %s', k.conname, pg_get_constraintdef(k.oid))
					from pg_constraint k where k.conrelid = c.oid and k.contype = 'c' and k.convalidated and (k.conislocal or c.relispartition)) x),
			(select ' inherits (' || string_agg(i.inhparent::regclass::text, ', ' order by i.inhseqno) || ')' from pg_inherits i where i.inhrelid = c.oid and not c.relispartition and not ` + inheritedLater + `),
			' partition by ' || pg_get_partkeydef(c.oid),
			` + storageOptions + `)
		from tab c`},
	{"view", `select c.oid, c.q, format(E'create view %s%s as\n%s', c.q,
			(select ' with (' || string_agg(format('%s = %L', o.option_name, o.option_value), ', ') || ')' from pg_options_to_table(c.reloptions) o),
			pg_get_viewdef(c.oid))
		from rel c where c.relkind = 'v'`},
	{"materialized view", `select c.oid, c.q, format(E'create materialized view %s%s as\n%s\nwith no data', c.q,
			` + storageOptions + `,
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
	inside as materialized (
		select oid part, class, oid whole from made
		union all select t.oid, 'pg_type'::regclass, coalesce(nullif(t.typelem, 0), nullif(t.typrelid, 0), t.oid) from typ t
			where not exists (select from pg_class c where c.oid = t.typrelid and c.relkind = 'c')
		union all select c.oid, 'pg_class'::regclass, c.reltype from rel c where c.relkind = 'c'
		union all select r.rngmultitypid, 'pg_type'::regclass, r.rngtypid from pg_range r
		union all select w.oid, 'pg_rewrite'::regclass, w.ev_class from rel c, lateral (select * from pg_rewrite w where w.ev_class = c.oid offset 0) w where w.rulename = '_RETURN'
		union all select k.oid, 'pg_constraint'::regclass, case k.contype when 'c' then c.oid else k.oid end
			from rel c, lateral (select * from pg_constraint k where k.conrelid = c.oid offset 0) k where k.contype in ('p', 'u', 'x') or k.contype = 'c' and k.convalidated
		union all select k.oid, 'pg_constraint'::regclass, k.contypid
			from typ t, lateral (select * from pg_constraint k where k.contypid = t.oid offset 0) k where k.contype = 'c' and k.convalidated
		union all select d.oid, 'pg_attrdef'::regclass, d.adrelid from rel c, lateral (select * from pg_attrdef d where d.adrelid = c.oid offset 0) d
			join pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum and a.attgenerated <> '')
	select distinct a.whole, coalesce(deeper.whole, b.whole)
	from inside a
	cross join lateral (select * from pg_depend d where d.classid = a.class and d.objid = a.part offset 0) d
	join inside b on b.part = d.refobjid and b.class = d.refclassid
	left join inside deeper on deeper.part = b.whole and deeper.class = 'pg_type'::regclass and deeper.part <> deeper.whole
	where a.whole <> b.whole and d.deptype in ('n', 'a')
		and not (d.classid = 'pg_class'::regclass and exists (select from rel s where s.oid = d.objid and s.relkind = 'S'))`

// laterParts complete what has been made.
var laterParts = []part{
	{"domain constraint", `select 0::oid, k.conname, format('alter domain %s add constraint %I %s', t.q, k.conname, pg_get_constraintdef(k.oid))
		from typ t join pg_constraint k on k.contypid = t.oid where k.contype = 'c' and not k.convalidated order by 2, 3`},
	{"identity", `select 0::oid, c.q || '.' || a.attname, format('alter table %s alter column %I add generated %s as identity (sequence name %s start with %s increment by %s minvalue %s maxvalue %s cache %s%s)',
			c.q, a.attname, case a.attidentity when 'a' then 'always' else 'by default' end, s.oid::regclass,
			q.seqstart, q.seqincrement, q.seqmin, q.seqmax, q.seqcache, case when q.seqcycle then ' cycle' end)
		from tab c join pg_attribute a on a.attrelid = c.oid and a.attidentity <> ''
		join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = c.oid and d.refobjsubid = a.attnum and d.classid = 'pg_class'::regclass and d.deptype = 'i'
		join pg_class s on s.oid = d.objid and s.relkind = 'S' join pg_sequence q on q.seqrelid = s.oid order by 2, 3`},
	// Some minor releases, 16.2 for one, make it logged.
	{"sequence of an unlogged table", `select 0::oid, s.q, format('alter sequence %s set unlogged', s.q)
		from rel s join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = s.oid and d.refclassid = 'pg_class'::regclass and d.deptype = 'i'
		where s.relkind = 'S' and s.relpersistence = 'u' order by 2`},
	{"owner of a sequence", `select 0::oid, s.q, format('alter sequence %s owned by %s.%I', s.q, d.refobjid::regclass, a.attname)
		from rel s join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = s.oid and d.refclassid = 'pg_class'::regclass and d.deptype = 'a'
		join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid where s.relkind = 'S' order by 2, 3`},
	{"inheritance", `select 0::oid, c.q, format('alter table only %s inherit %s', c.q, i.inhparent::regclass)
		from tab c join pg_inherits i on i.inhrelid = c.oid where not c.relispartition and ` + inheritedLater + ` order by 2, i.inhseqno`},
	{"inherited column", `select 0::oid, c.q || '.' || a.attname, format('alter table only %s alter column %I set not null', c.q, a.attname)
		from tab c join pg_attribute a on a.attrelid = c.oid
		where a.attnum > 0 and a.attnotnull and not a.attislocal and not c.relispartition
			and not exists (select from pg_constraint k where k.conrelid = c.oid and k.contype = 'n' and k.conkey = array[a.attnum] and not (k.conislocal and k.convalidated)) order by 2`},
	{"partition", `select 0::oid, c.q, format('alter table only %s attach partition %s %s', i.inhparent::regclass, c.q, pg_get_expr(c.relpartbound, c.oid))
		from tab c join pg_inherits i on i.inhrelid = c.oid where c.relispartition order by 2, 3`},
}

// keyParts are what views and functions may need before they can be made, and come after rows have been copied.
var keyParts = []part{
	{"constraint", `select k.oid, k.conname, format('alter table only %s add constraint %I %s', c.q, k.conname, pg_get_constraintdef(k.oid))
		from tab c join pg_constraint k on k.conrelid = c.oid where k.contype in ('p', 'u', 'x')
		order by c.relispartition, k.contype <> 'p', c.q, 2`},
	{"options of a constraint", `select 0::oid, x.q, format('alter index %s set (%s)', x.q, (select string_agg(format('%s = %L', o.option_name, o.option_value), ', ') from pg_options_to_table(x.reloptions) o))
		from rel x join pg_constraint k on k.conindid = x.oid and k.contype in ('p', 'u', 'x') where x.reloptions is not null order by 2`},
}

// guardParts come last.
var guardParts = []part{
	{"default", `select 0::oid, c.q || '.' || a.attname, format('alter %s %s alter column %I set default %s', case c.relkind when 'v' then 'view' else 'table only' end, c.q, a.attname, pg_get_expr(d.adbin, d.adrelid))
		from rel c join pg_attribute a on a.attrelid = c.oid join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
		where a.attgenerated = '' order by 2, 3`},
	{"default not inherited", `select 0::oid, c.q || '.' || a.attname, format('alter table only %s alter column %I drop default', c.q, a.attname)
		from tab c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attislocal and not a.atthasdef and not c.relispartition
		where exists (select from pg_inherits i join pg_attribute p on p.attrelid = i.inhparent and p.attname = a.attname and p.atthasdef where i.inhrelid = c.oid) order by 2`},
	{"column option", `select 0::oid, c.q || '.' || a.attname, format('alter %s %s alter column %I %s', case c.relkind when 'm' then 'materialized view' else 'table only' end, c.q, a.attname, o.sql)
		from rel c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped join pg_type y on y.oid = a.atttypid
		cross join lateral (
			select 'set storage ' || case a.attstorage when 'p' then 'plain' when 'e' then 'external' when 'm' then 'main' else 'extended' end where a.attstorage <> y.typstorage
			union all select 'set compression ' || case a.attcompression when 'p' then 'pglz' else 'lz4' end where a.attcompression in ('p', 'l')
			union all select 'set statistics ' || a.attstattarget where a.attstattarget >= 0
			union all select format('set (%s)', string_agg(format('%s = %L', x.option_name, x.option_value), ', ')) from pg_options_to_table(a.attoptions) x where x.option_name <> 'pg_attver' having count(*) > 0) o(sql)
		where c.relkind in ('r', 'p', 'm') order by 2, 3`},
	{"unchecked constraint", `select 0::oid, k.conname, format('alter table %s add constraint %I %s', c.q, k.conname, pg_get_constraintdef(k.oid))
		from tab c join pg_constraint k on k.conrelid = c.oid where k.contype in ('c', 'n') and not k.convalidated and k.conislocal order by c.q, 2`},
	{"index", `select 0::oid, x.q, pg_get_indexdef(x.oid, 0, true)
		from rel x join pg_index i on i.indexrelid = x.oid join rel c on c.oid = i.indrelid
		where not exists (select from pg_constraint k where k.conindid = x.oid and k.contype in ('p', 'u', 'x')) and (i.indisvalid or x.relkind = 'I')
		order by c.relispartition, 2`},
	{"column of an index", `select 0::oid, x.q, format('alter index %s alter column %s set statistics %s', x.q, a.attnum, a.attstattarget)
		from rel x join pg_attribute a on a.attrelid = x.oid where x.relkind in ('i', 'I') and a.attstattarget >= 0 order by 2, 3`},
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
	{"target of statistics", `select 0::oid, s.stxname, format('alter statistics %I set statistics %s', s.stxname, s.stxstattarget)
		from pg_statistic_ext s join ns on ns.oid = s.stxnamespace where s.stxstattarget >= 0 order by 2`},
	{"tablespace", `select 0::oid, x.q, format('alter %s %s set tablespace %I', case when x.relkind in ('i', 'I') then 'index' when x.relkind = 'm' then 'materialized view' else 'table' end, x.q, s.spcname)
		from rel x join pg_tablespace s on s.oid = x.reltablespace order by 2`},
	{"rule", `select 0::oid, w.rulename, pg_get_ruledef(w.oid, true) from rel c join pg_rewrite w on w.ev_class = c.oid where w.rulename <> '_RETURN' order by c.q, 2`},
	{"state of a rule", `select 0::oid, w.rulename, format('alter table %s %s rule %I', c.q, case w.ev_enabled when 'D' then 'disable' when 'R' then 'enable replica' else 'enable always' end, w.rulename)
		from rel c join pg_rewrite w on w.ev_class = c.oid where w.ev_enabled <> 'O' order by c.q, 2`},
	{"trigger", `select 0::oid, t.tgname, pg_get_triggerdef(t.oid, true) from rel c join pg_trigger t on t.tgrelid = c.oid where not t.tgisinternal and t.tgparentid = 0 order by c.q, 2`},
	{"state of a trigger", `select 0::oid, t.tgname, format('alter table only %s %s trigger %I', c.q, case t.tgenabled when 'D' then 'disable' when 'R' then 'enable replica' else 'enable always' end, t.tgname)
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
	// What a new object is open to may be more or less than the described one is, by default privileges of the role.
	{"grant", `,
		objects as (
			select case c.relkind when 'S' then 'sequence' else 'table' end || ' ' || c.q object, '' columns, case c.relkind when 'S' then 's' else 'r' end kind, c.relowner owner, c.relacl acl
				from rel c where c.relkind in ('r', 'p', 'v', 'm', 'S')
			union all select 'table ' || c.q, format(' (%I)', a.attname), 'c', c.relowner, a.attacl from rel c join pg_attribute a on a.attrelid = c.oid and not a.attisdropped and a.attacl is not null
			union all select case f.prokind when 'p' then 'procedure ' else 'function ' end || f.q, '', 'f', f.proowner, f.proacl from func f
			union all select case t.typtype when 'd' then 'domain ' else 'type ' end || t.q, '', 'T', t.typowner, t.typacl from typ t left join pg_class c on c.oid = t.typrelid
				where t.typtype in ('e', 'd', 'r') or c.relkind = 'c'
			union all select 'schema ` + ownName + `', '', 'n', ns.nspowner, n.nspacl from ns join pg_namespace n on n.oid = ns.oid),
		sides as (
			select *, true wanted, coalesce(acl, acldefault(kind::"char", owner)) has from objects
			union all
			select *, false, coalesce((select d.defaclacl from pg_default_acl d where d.defaclrole = owner and d.defaclnamespace = 0 and d.defaclobjtype = replace(kind, 's', 'S')::"char"),
				acldefault(kind::"char", owner)) from objects where kind <> 'c'),
		rights as (
			select object, columns, wanted, x.grantee, x.is_grantable, min(x.n) n, string_agg(x.privilege_type || columns, ', ' order by x.privilege_type) what
				from sides, aclexplode(has) with ordinality x(grantor, grantee, privilege_type, is_grantable, n) group by 1, 2, 3, 4, 5),
		holders as (
			select object, columns, wanted, grantee, string_agg(is_grantable || what, ';' order by is_grantable) has from rights group by 1, 2, 3, 4),
		changes as (
			select object, columns, grantee, n.has is not null revoked from (select * from holders where wanted) w
				full join (select * from holders where not wanted) n using (object, columns, grantee) where w.has is distinct from n.has)
		select 0::oid, object, sql from (
			select object, 0 n, format('revoke all on %s from %s', object, case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end) sql from changes where revoked
			union all
			select object, r.n, format('grant %s on %s to %s%s', r.what, object, case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end, case when r.is_grantable then ' with grant option' end)
				from changes join rights r using (object, columns, grantee) where r.wanted) x
		order by object, n, sql`},
	{"default privilege", `select 0::oid, x.privilege_type, format('alter default privileges for role %I in schema ` + ownName + ` grant %s on %s to %s%s', pg_get_userbyid(d.defaclrole), x.privilege_type,
			case d.defaclobjtype when 'r' then 'tables' when 'S' then 'sequences' when 'f' then 'functions' when 'T' then 'types' end,
			case x.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(x.grantee)) end, case when x.is_grantable then ' with grant option' end)
		from pg_default_acl d join ns on ns.oid = d.defaclnamespace, aclexplode(d.defaclacl) x order by 3`},
}

// description is all that makes a schema: the same for two schemas that are the same but for their names
// and rows.
type description struct {
	made, later []object // before rows are copied
	keys        []object
	late        []object // made objects that need a key: GROUP BY of one is enough
	guards      []object
	populated   []string // materialized views that have been filled, in an order in which they can be
}

// describeSchema reads a schema, in two round trips, under locks that hinder nobody.
func describeSchema(ctx context.Context, tx pgx.Tx, schema string) (d description, err error) {
	// Queries of the catalogue are short, whatever the planner takes them for: compiling one takes longer than running it.
	if _, err := tx.Exec(ctx, "set local search_path = "+ident(schema)+", pg_temp; set local jit = off"); err != nil {
		return d, err
	}
	batch := &pgx.Batch{}
	var objects []object
	collect := func(parts []part, into *[]object) {
		for _, p := range parts {
			batch.Queue(describedSchema+p.sql, schema).Query(func(rows pgx.Rows) error {
				return forEachObject(rows, func(o object) {
					o.name = p.what + " " + o.name
					*into = append(*into, o)
				})
			})
		}
	}
	collect(madeParts, &objects)
	collect(laterParts, &d.later)
	collect(keyParts, &d.keys)
	collect(guardParts, &d.guards)
	var populated []uint32
	var names, refused []string
	batch.Queue(describedSchema+`select array(select oid from rel where relkind = 'm' and relispopulated),
		array(select relname from rel union select proname from func union select typname from typ)`, schema).QueryRow(func(row pgx.Row) error {
		return row.Scan(&populated, &names)
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
	batch.Queue(refusedObjects, schema).Query(func(rows pgx.Rows) (err error) {
		refused, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return d, fmt.Errorf("describe schema %q: %w", schema, err)
	}
	if len(refused) > 0 {
		return d, fmt.Errorf("pgxtenant: schema %q cannot be copied: it has %s", schema, refused[0])
	}
	if objects, err = sortObjects(objects, needs); err != nil {
		return d, err
	}
	for _, o := range objects {
		if strings.HasPrefix(o.name, "materialized view ") && slices.Contains(populated, o.oid) {
			d.populated = append(d.populated, strings.TrimPrefix(o.name, "materialized view "))
		}
	}
	if err := d.divide(objects, needs); err != nil {
		return d, err
	}
	return d, d.nameless(schema, names)
}

// divide tells the objects that need a key, be it by way of others, from those that do not.
func (d *description) divide(objects []object, needs map[uint32][]uint32) error {
	late := make(map[uint32]bool, len(d.keys))
	for _, key := range d.keys {
		late[key.oid] = true
	}
	delete(late, 0)
	for _, o := range objects { // what one needs comes before it
		switch {
		case !slices.ContainsFunc(needs[o.oid], func(oid uint32) bool { return late[oid] }):
			d.made = append(d.made, o)
		case strings.HasPrefix(o.name, "table "):
			return fmt.Errorf("pgxtenant: %s depends on a view or function that needs a key of another table, and cannot be copied", o.name)
		default:
			late[o.oid] = true
			d.late = append(d.late, o)
		}
	}
	return nil
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

// statements are all of it as text, in order; those between which rows are to be copied come apart.
func (d *description) statements(schema string) (before, after []object) {
	named := func(parts ...[]object) (out []object) {
		for _, objects := range parts {
			for _, o := range objects {
				o.sql = strings.ReplaceAll(strings.ReplaceAll(o.sql, "'"+ownName+"'", literal(schema)), ownName, ident(schema))
				out = append(out, o)
			}
		}
		return out
	}
	return named(d.made, d.later), named(d.keys, d.late, d.guards)
}

// naming are the statements that say the schema's name, and say the old one after a rename. All are functions.
func (d *description) naming(schema string) (out []object) {
	before, after := d.statements(schema)
	for i, o := range d.made {
		if strings.Contains(o.sql, ownName) {
			out = append(out, before[i])
		}
	}
	for i, o := range d.late {
		if strings.Contains(o.sql, ownName) {
			out = append(out, after[len(d.keys)+i])
		}
	}
	return out
}

// lines are what two schemas are compared by.
func (d *description) lines() []string {
	var out []string
	for _, objects := range [][]object{d.made, d.later, d.keys, d.late, d.guards} {
		for _, o := range objects {
			out = append(out, strings.ReplaceAll(o.sql, ownName, "SCHEMA"))
		}
	}
	return out
}
