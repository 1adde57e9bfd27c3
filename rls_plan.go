package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// rlsTable is a table as the catalogue has it, and what is wanted of it.
type rlsTable struct {
	RLSTable
	setting string
	sealed  bool   // the policy takes only tenants that are
	role    string // the service's

	oid       uint32
	qualified string // quoted
	kind      string // of pg_class.relkind
	parent    *string
	column    rlsColumn
	unchecked bool     // a text column may be empty
	unindexed []string // the table and those that inherit from it, where no index begins with the column
	granted   bool     // the role has all that it needs
	excess    []string // rights that go past policies
	through   []string // the same, of roles that the role is a member of
	groups    []string // all rights of such roles
	sequences []string // that columns draw from, and the role may not use
	hasRows   bool
	hasNulls  bool
	secured   []securedTable // the table, then its partitions and those that inherit from it
	others    []string       // permissive policies that are not ours
	views     []string       // that show the rows past any policy
	shown     []string       // that show them where there is no policy
}

// rlsColumn is the tenant column. Its typ is empty if it is not there.
type rlsColumn struct {
	typ       string
	notNull   bool
	byDefault string
	loose     bool // its collation calls different texts equal
}

// securedTable is what a table or one of its descendants has of row-level security.
type securedTable struct {
	name            string // qualified and quoted
	enabled, forced bool
	policy          *rlsPolicy
	further         int // policies that are not ours
}

type rlsPolicy struct {
	using, check string
	right        bool // permissive, for all commands, for everybody
}

// read fills in what the catalogue says, with the table locked against changes if they are to be made.
func (t *rlsTable) read(ctx context.Context, tx pgx.Tx, lock bool) error {
	var owned bool
	err := tx.QueryRow(ctx, `
		select c.oid, format('%I.%I', n.nspname, c.relname), c.relkind::text, pg_has_role(c.relowner, 'USAGE'),
			(select i.inhparent::regclass::text from pg_inherits i where i.inhrelid = c.oid limit 1)
		from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = $1::regclass`, t.Name).
		Scan(&t.oid, &t.qualified, &t.kind, &owned, &t.parent)
	switch {
	case err != nil:
		return err
	case strings.HasPrefix(t.qualified, "pgxtenant."):
		return fmt.Errorf("%s is the package's own, which no tenant's rows are in", t.qualified)
	case t.kind != "r" && t.kind != "p":
		return fmt.Errorf("%s is not a table, which alone can have policies", t.qualified)
	case t.parent != nil:
		return fmt.Errorf("%s is a partition of, or inherits from, %s; name that one, and this is seen to", t.qualified, *t.parent)
	case !owned:
		return fmt.Errorf("the role of Config.Admin is not the owner of %s, nor a member of the owner, who alone may change it", t.qualified)
	}
	if lock {
		if _, err := tx.Exec(ctx, "lock table "+t.qualified+" in access exclusive mode"); err != nil {
			return err
		}
	}
	for _, read := range []func(context.Context, pgx.Tx) error{t.readColumn, t.readIndexes, t.readRights, t.readPolicies, t.readViews, t.readRows} {
		if err := read(ctx, tx); err != nil {
			return err
		}
	}
	return nil
}

func (t *rlsTable) readColumn(ctx context.Context, tx pgx.Tx) error {
	var checks []string
	err := tx.QueryRow(ctx, `
		select format_type(a.atttypid, null), a.attnotnull, coalesce(pg_get_expr(d.adbin, d.adrelid), ''),
			coalesce(not l.collisdeterministic, false),
			array(select pg_get_constraintdef(k.oid) from pg_constraint k where k.conrelid = a.attrelid and k.contype = 'c' and k.convalidated and k.conkey = array[a.attnum])
		from pg_attribute a
		left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
		left join pg_collation l on l.oid = a.attcollation
		where a.attrelid = $1 and a.attname = $2 and not a.attisdropped`, t.oid, t.Column).
		Scan(&t.column.typ, &t.column.notNull, &t.column.byDefault, &t.column.loose, &checks)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	t.unchecked = !slices.ContainsFunc(checks, func(check string) bool { return sameExpression(check, "check ("+ident(t.Column)+" <> '')") })
	return err
}

func (t *rlsTable) readRights(ctx context.Context, tx pgx.Tx) error {
	var there bool
	if err := tx.QueryRow(ctx, "select exists (select from pg_roles where rolname = $1)", t.role).Scan(&there); err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("there is no role %q, which Config.Shared logs in as, to grant it to", t.role)
	}
	return tx.QueryRow(ctx, descendants+`,
		held as (
			select format('%I.%I', n.nspname, c.relname) name, x.grantee, x.privilege_type right
			from d join pg_class c on c.oid = d.oid join pg_namespace n on n.oid = c.relnamespace, lateral (
				select * from aclexplode(c.relacl)
				union all select x.* from pg_attribute a, aclexplode(a.attacl) x where a.attrelid = c.oid and not a.attisdropped) x
			where x.grantee <> c.relowner or x.grantee = (select oid from pg_roles where rolname = $2)),
		groups as (
			select format('%s on %s from %I', lower(h.right), h.name, o.rolname) what, h.right from held h join pg_roles o on o.oid = h.grantee, pg_roles app
			where app.rolname = $2 and not app.rolsuper and o.oid <> app.oid and pg_has_role(app.oid, o.oid, 'MEMBER'))
		select has_table_privilege($2, $1::oid, 'SELECT') and has_table_privilege($2, $1::oid, 'INSERT')
				and has_table_privilege($2, $1::oid, 'UPDATE') and has_table_privilege($2, $1::oid, 'DELETE'),
			array(select distinct format('%s on %s from %s', lower(h.right), h.name, case h.grantee when 0 then 'public' else quote_ident($2) end) from held h
				where h.right in ('TRUNCATE', 'REFERENCES', 'TRIGGER') and (h.grantee = 0 or h.grantee = (select oid from pg_roles where rolname = $2)) order by 1),
			array(select distinct what from groups g where g.right in ('TRUNCATE', 'REFERENCES', 'TRIGGER') order by 1),
			array(select distinct what from groups order by 1),
			array(select distinct format('%I.%I', n.nspname, s.relname)
				from pg_depend d join pg_class s on s.oid = d.objid and s.relkind = 'S' join pg_namespace n on n.oid = s.relnamespace
				where d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = $1::oid and d.deptype = 'a'
					and case s.relkind when 'S' then not has_sequence_privilege($2, s.oid, 'USAGE') end order by 1)`, t.oid, t.role).
		Scan(&t.granted, &t.excess, &t.through, &t.groups, &t.sequences)
}

// descendants begins a query about the table $1, its partitions, and those that inherit from it.
const descendants = "with recursive d as (select $1::oid oid, 0 depth union select i.inhrelid, depth + 1 from pg_inherits i join d on d.oid = i.inhparent)"

// readIndexes looks at partitions no more than the server does: their parent's index is theirs.
func (t *rlsTable) readIndexes(ctx context.Context, tx pgx.Tx) error {
	return tx.QueryRow(ctx, descendants+`
		select array(select format('%I.%I', n.nspname, c.relname) from d join pg_class c on c.oid = d.oid join pg_namespace n on n.oid = c.relnamespace
			where not c.relispartition and c.relkind in ('r', 'p') and not exists (
				select from pg_attribute a join pg_index i on i.indrelid = a.attrelid and i.indkey[0] = a.attnum join pg_class x on x.oid = i.indexrelid
				where a.attrelid = c.oid and a.attname = $2 and not a.attisdropped and i.indisvalid and i.indpred is null
					and x.relam in (select oid from pg_am where amname in ('btree', 'hash')))
			order by d.depth, 1)`, t.oid, t.Column).Scan(&t.unindexed)
}

func (t *rlsTable) readPolicies(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, descendants+`
		select format('%I.%I', n.nspname, c.relname), c.relrowsecurity, c.relforcerowsecurity, c.relkind::text,
			p.polname, coalesce(pg_get_expr(p.polqual, p.polrelid), ''), coalesce(pg_get_expr(p.polwithcheck, p.polrelid), ''),
			p.polpermissive and exists (select from unnest(p.polroles) r where case r when 0 then true else pg_has_role($2, r, 'MEMBER') end),
			p.polpermissive and p.polcmd = '*' and p.polroles = '{0}'
		from d join pg_class c on c.oid = d.oid join pg_namespace n on n.oid = c.relnamespace left join pg_policy p on p.polrelid = c.oid
		order by d.depth, 1, p.polname`, t.oid, t.role)
	if err != nil {
		return err
	}
	var s securedTable
	var kind string
	var name, using, check *string
	var permissive, right *bool
	_, err = pgx.ForEachRow(rows, []any{&s.name, &s.enabled, &s.forced, &kind, &name, &using, &check, &permissive, &right}, func() error {
		if kind == "f" {
			return fmt.Errorf("%s is a foreign table, which can have no policies", s.name)
		}
		if n := len(t.secured); n == 0 || t.secured[n-1].name != s.name {
			t.secured = append(t.secured, securedTable{name: s.name, enabled: s.enabled, forced: s.forced})
		}
		last := &t.secured[len(t.secured)-1]
		switch {
		case name == nil:
		case *name == PolicyName:
			last.policy = &rlsPolicy{using: *using, check: *check, right: *right}
		default:
			last.further++
			if *permissive {
				t.others = append(t.others, ident(*name)+" on "+s.name)
			}
		}
		return nil
	})
	return err
}

// readViews finds what shows the table's rows to the role, itself or by way of further views, by rights of
// somebody else: of one whom no policy holds, or of anybody, once there is no policy.
func (t *rlsTable) readViews(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, descendants+`,
		edge as (
			select distinct d.refobjid base, v.oid higher from pg_depend d join pg_rewrite w on w.oid = d.objid join pg_class v on v.oid = w.ev_class and v.relkind in ('v', 'm')
			where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid <> v.oid),
		above as (select e.higher oid from edge e join d on d.oid = e.base union select e.higher from above b join edge e on e.base = b.oid),
		shows as (
			select v.oid, v.relkind = 'm' or o.rolsuper or o.rolbypassrls past from above b join pg_class v on v.oid = b.oid join pg_roles o on o.oid = v.relowner
			where not exists (select from pg_options_to_table(v.reloptions) x where x.option_name = 'security_invoker' and x.option_value::boolean)),
		reach as (select oid shown, oid from shows union select r.shown, e.higher from reach r join edge e on e.base = r.oid)
		select s.past, format('%s %s (revoke all on %s from %I, public%s)', case v.relkind when 'm' then 'materialized view' else 'view' end, s.oid::regclass, r.tops, $2,
			case v.relkind when 'm' then '' else ', or alter view ' || s.oid::regclass || ' set (security_invoker = true)' end)
		from shows s join pg_class v on v.oid = s.oid join (
			select shown, string_agg(oid::regclass::text, ', ' order by oid::regclass::text) tops from reach
			where has_table_privilege($2, oid, 'INSERT, UPDATE, DELETE') or has_any_column_privilege($2, oid, 'SELECT, INSERT, UPDATE') group by 1) r on r.shown = s.oid
		order by 2`, t.oid, t.role)
	if err != nil {
		return err
	}
	var past bool
	var view string
	_, err = pgx.ForEachRow(rows, []any{&past, &view}, func() error {
		t.shown = append(t.shown, view)
		if past {
			t.views = append(t.views, view)
		}
		return nil
	})
	return err
}

func (t *rlsTable) readRows(ctx context.Context, tx pgx.Tx) error {
	// The owner is under a forced policy too, and would not see rows that have no tenant.
	nulls := "null"
	if t.column.typ != "" && !t.column.notNull {
		nulls = ident(t.Column)
	}
	if t.column.typ != "" && t.column.notNull {
		return nil
	}
	if t.secured[0].forced {
		t.hasRows, t.hasNulls = true, true // for all that can be told
		return nil
	}
	err := tx.QueryRow(ctx, "select exists (select from "+t.qualified+"), exists (select from "+t.qualified+" where "+nulls+" is null)").Scan(&t.hasRows, &t.hasNulls)
	return err
}

// enable plans what the table lacks.
func (t *rlsTable) enable() ([]string, error) {
	if err := t.admissible(); err != nil {
		return nil, err
	}
	var plan []string
	do := func(sql ...string) { plan = append(plan, strings.Join(sql, "")) }
	alter := "alter table " + t.qualified + " "
	column := ident(t.Column)

	typ := orDefault(t.column.typ, t.Type)
	byDefault := tenantExpression(t.setting, typ)
	if t.column.typ == "" {
		if t.hasRows {
			// A constant is stored once for all rows that are there, and not written into each.
			do(alter, "add column ", column, " ", typ, " not null default ", literal(t.Backfill))
			do(alter, "alter column ", column, " set default ", byDefault)
		} else {
			do(alter, "add column ", column, " ", typ, " not null default ", byDefault)
		}
		t.unchecked = true
	} else {
		if !t.column.notNull {
			if t.hasNulls && t.Backfill != "" {
				if t.secured[0].forced {
					do(alter, "no force row level security")
					t.secured[0].forced = false
				}
				// A trigger that waits for the end of the transaction would keep the table from being altered.
				do("set constraints all immediate")
				do("update ", t.qualified, " set ", column, " = ", literal(t.Backfill), " where ", column, " is null")
			}
			do(alter, "alter column ", column, " set not null")
		}
		if !sameExpression(t.column.byDefault, byDefault) {
			do(alter, "alter column ", column, " set default ", byDefault)
		}
	}
	if t.unchecked && (typ == "text" || typ == "character varying") {
		do(alter, "add check (", column, " <> '')")
	}
	for _, table := range t.unindexed {
		do("create index on ", table, " (", column, ")")
	}
	for _, s := range t.secured {
		plan = append(plan, s.secure(policyExpression(t.setting, t.Column, typ, t.sealed))...)
	}
	for _, excess := range t.excess {
		do("revoke ", excess)
	}
	if !t.granted {
		do("grant select, insert, update, delete on ", t.qualified, " to ", ident(t.role))
	}
	if len(t.sequences) > 0 {
		do("grant usage on sequence ", quoted(t.sequences), " to ", ident(t.role))
	}
	return plan, nil
}

// admissible refuses what enable could not make safe.
func (t *rlsTable) admissible() error {
	_, fit := tenantTypes[t.column.typ]
	switch {
	case len(t.others) > 0:
		return fmt.Errorf("it has permissive policies besides, each of which lets rows through on its own: drop policy %s, or make them restrictive", strings.Join(t.others, "; drop policy "))
	case len(t.views) > 0:
		return fmt.Errorf("its rows can be seen past any policy through %s", strings.Join(t.views, ", "))
	case len(t.through) > 0:
		return fmt.Errorf("role %q may go past any policy as a member of another: revoke %s", t.role, strings.Join(t.through, "; revoke "))
	case t.column.typ == "" && t.hasRows && t.Backfill == "":
		return fmt.Errorf("it has rows, and no column %q that says whose they are; set Backfill to the tenant that gets them", t.Column)
	case t.column.typ == "":
		return nil
	case !fit:
		return fmt.Errorf("column %q has type %s; want text, varchar, uuid, integer or bigint", t.Column, t.column.typ)
	case t.column.loose:
		return fmt.Errorf("column %q has a collation that calls different texts equal, and with them different tenants", t.Column)
	case t.column.typ != t.Type && t.Backfill != "" && !regexp.MustCompile(tenantTypes[t.column.typ].texts).MatchString(t.Backfill):
		return fmt.Errorf("backfill %q: no tenant of that ID has rows where the column is of type %s", t.Backfill, t.column.typ)
	case !t.column.notNull && t.hasNulls && t.Backfill == "":
		return fmt.Errorf("column %q may be NULL, and is or may be in some rows; set Backfill to the tenant that gets them", t.Column)
	}
	return nil
}

// secure plans the policy of one table.
func (s *securedTable) secure(expression string) (plan []string) {
	p := s.policy
	switch {
	case p == nil:
	case p.right && sameExpression(p.using, expression) && sameExpression(p.check, expression):
		expression = ""
	default:
		plan = append(plan, "drop policy "+ident(PolicyName)+" on "+s.name)
	}
	if expression != "" {
		plan = append(plan, "create policy "+ident(PolicyName)+" on "+s.name+"\n\tusing ("+expression+")\n\twith check ("+expression+")")
	}
	if !s.enabled {
		plan = append(plan, "alter table "+s.name+" enable row level security")
	}
	if !s.forced {
		plan = append(plan, "alter table "+s.name+" force row level security")
	}
	return plan
}

// disable plans the way back.
func (t *rlsTable) disable() (plan []string, _ error) {
	open := false
	for _, s := range t.secured {
		open = open || s.further == 0 && (s.enabled || s.policy != nil)
	}
	if open && len(t.shown) > 0 {
		return nil, fmt.Errorf("all its rows could be seen through %s", strings.Join(t.shown, ", "))
	}
	if open && len(t.groups) > 0 {
		return nil, fmt.Errorf("role %q could see all its rows as a member of another: revoke %s", t.role, strings.Join(t.groups, "; revoke "))
	}
	if open {
		for _, s := range t.secured {
			plan = append(plan, "revoke all on "+s.name+" from "+ident(t.role)+", public")
		}
	}
	for _, s := range t.secured {
		if s.policy != nil {
			plan = append(plan, "drop policy "+ident(PolicyName)+" on "+s.name)
		}
		if s.further > 0 {
			continue
		}
		if s.forced {
			plan = append(plan, "alter table "+s.name+" no force row level security")
		}
		if s.enabled {
			plan = append(plan, "alter table "+s.name+" disable row level security")
		}
	}
	return plan, nil
}
