package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"regexp"
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
	indexed   bool // some index begins with the column
	unchecked bool // a text column may be empty
	granted   bool // the role has all that it needs
	excess    []string
	sequences []string // that columns draw from, and the role may not use
	hasRows   bool
	hasNulls  bool
	secured   []securedTable // the table, then its partitions and those that inherit from it
	others    []string       // permissive policies that are not ours
	views     []string       // that show the rows past the policy
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
	for _, read := range []func(context.Context, pgx.Tx) error{t.readColumn, t.readRights, t.readPolicies, t.readViews, t.readRows} {
		if err := read(ctx, tx); err != nil {
			return err
		}
	}
	return nil
}

func (t *rlsTable) readColumn(ctx context.Context, tx pgx.Tx) error {
	err := tx.QueryRow(ctx, `
		select format_type(a.atttypid, null), a.attnotnull, coalesce(pg_get_expr(d.adbin, d.adrelid), ''),
			coalesce(not l.collisdeterministic, false),
			exists (select from pg_index i where i.indrelid = a.attrelid and i.indisvalid and i.indpred is null and i.indkey[0] = a.attnum),
			not exists (select from pg_constraint k where k.conrelid = a.attrelid and k.contype = 'c' and k.convalidated
				and k.conkey = array[a.attnum] and pg_get_constraintdef(k.oid) ~ $3)
		from pg_attribute a
		left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
		left join pg_collation l on l.oid = a.attcollation
		where a.attrelid = $1 and a.attname = $2 and not a.attisdropped`, t.oid, t.Column, `^CHECK \(\(+"?[^ ]+"?(\)::text)? <> ''::text\)\)$`).
		Scan(&t.column.typ, &t.column.notNull, &t.column.byDefault, &t.column.loose, &t.indexed, &t.unchecked)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
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
	return tx.QueryRow(ctx, `
		select has_table_privilege($2, $1::oid, 'SELECT') and has_table_privilege($2, $1::oid, 'INSERT')
				and has_table_privilege($2, $1::oid, 'UPDATE') and has_table_privilege($2, $1::oid, 'DELETE'),
			array(select distinct format('%s on %s from %s', lower(x.privilege_type), c.oid::regclass, case x.grantee when 0 then 'public' else quote_ident($2) end)
				from pg_class c, aclexplode(c.relacl) x
				where c.oid in (with recursive d as (select $1::oid oid union select i.inhrelid from pg_inherits i join d on d.oid = i.inhparent) select oid from d)
					and x.privilege_type in ('TRUNCATE', 'REFERENCES', 'TRIGGER')
					and (x.grantee = 0 or x.grantee = (select oid from pg_roles where rolname = $2)) order by 1),
			array(select distinct s.oid::regclass::text from pg_depend d join pg_class s on s.oid = d.objid and s.relkind = 'S'
				where d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = $1::oid and d.deptype = 'a'
					and case s.relkind when 'S' then not has_sequence_privilege($2, s.oid, 'USAGE') end order by 1)`, t.oid, t.role).
		Scan(&t.granted, &t.excess, &t.sequences)
}

func (t *rlsTable) readPolicies(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, `
		with recursive d as (select $1::oid oid, 0 depth union select i.inhrelid, depth + 1 from pg_inherits i join d on d.oid = i.inhparent)
		select format('%I.%I', n.nspname, c.relname), c.relrowsecurity, c.relforcerowsecurity, c.relkind::text,
			p.polname, coalesce(pg_get_expr(p.polqual, p.polrelid), ''), coalesce(pg_get_expr(p.polwithcheck, p.polrelid), ''),
			p.polpermissive, p.polpermissive and p.polcmd = '*' and p.polroles = '{0}'
		from d join pg_class c on c.oid = d.oid join pg_namespace n on n.oid = c.relnamespace left join pg_policy p on p.polrelid = c.oid
		order by d.depth, 1, p.polname`, t.oid)
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

// readViews finds what shows the table's rows to the role by rights of somebody whom no policy holds.
func (t *rlsTable) readViews(ctx context.Context, tx pgx.Tx) error {
	return tx.QueryRow(ctx, `
		with recursive above as (
			select v.oid from pg_depend d join pg_rewrite w on w.oid = d.objid join pg_class v on v.oid = w.ev_class
				where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = $1::oid and v.oid <> $1::oid
			union
			select v.oid from above b, pg_depend d join pg_rewrite w on w.oid = d.objid join pg_class v on v.oid = w.ev_class
				where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = b.oid and v.oid <> b.oid)
		select array(select format('%s %s (revoke select on %s from %s, public%s)',
				case v.relkind when 'm' then 'materialized view' else 'view' end, v.oid::regclass, v.oid::regclass, quote_ident($2),
				case v.relkind when 'm' then '' else ', or alter view ' || v.oid::regclass || ' set (security_invoker = true)' end)
			from pg_class v join pg_roles o on o.oid = v.relowner
			where v.oid in (select oid from above) and has_any_column_privilege($2, v.oid, 'SELECT')
				and (v.relkind = 'm' or (o.rolsuper or o.rolbypassrls) and not exists (
					select from pg_options_to_table(v.reloptions) x where x.option_name = 'security_invoker' and x.option_value in ('true', 'on', '1', 'yes')))
			order by 1)`, t.oid, t.role).Scan(&t.views)
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
	if !t.indexed {
		do("create index on ", t.qualified, " (", column, ")")
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
