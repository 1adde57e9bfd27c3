package pgxtenant

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// checkTables looks at row-level security itself and at the tenant column.
func (a *auditor) checkTables(context.Context, pgx.Tx) error {
	for _, t := range a.tables {
		switch {
		case !t.tenant:
			if t.Kind == "f" && t.Open {
				a.find("foreign-table", "foreign "+t.String(), "", "If its rows belong to tenants, revoke all on it from the application.")
			}
			continue
		case t.Kind == "f":
			if t.Open {
				a.find("foreign-tenant-table", "foreign "+t.String(), sqlText("revoke all on "+t.Qualified+" from "+a.actors()), "")
			}
			continue
		}
		a.checkSecurity(t)
		if t.column != nil && t.Open && !t.single && a.tenantParent(t) == nil {
			a.checkColumn(t)
		}
	}
	return nil
}

// actors are the application's roles and public, for revoke.
func (a *auditor) actors() string {
	names := []string{"public"}
	for _, oid := range a.acts {
		if r := a.roles[oid]; r != nil {
			names = append(names, ident(r.Name))
		}
	}
	return strings.Join(names, ", ")
}

// checkSecurity looks at whether policies hold at all.
func (a *auditor) checkSecurity(t *auditTable) {
	switch {
	case !t.Enabled && t.Open: // else it is as DisableRLS leaves it
		code := "rls-off"
		if a.tenantParent(t) != nil {
			code = "child-unguarded"
		}
		mend, decide := a.enable(t)
		a.find(code, t.String(), mend, decide)
	case t.Enabled && !t.Forced:
		a.find("rls-not-forced", t.String(), sqlText("alter table "+t.Qualified+" force row level security"), "")
	}
	if t.Enabled && t.Open && !slices.ContainsFunc(t.policies, func(p *auditPolicy) bool { return p.Permissive && p.ForApp }) {
		mend, decide := a.enable(t)
		a.find("no-policy", t.String(), mend, decide)
	}
}

// enable is SQL that gives a table what it lacks of row-level security, or else what to say instead.
func (a *auditor) enable(t *auditTable) (sql, decide string) {
	s := securedTable{name: t.Qualified, enabled: t.Enabled, forced: t.Forced}
	expression := a.expression(t)
	guarded := slices.ContainsFunc(t.policies, func(p *auditPolicy) bool { return p.Permissive && p.ForApp })
	named := slices.ContainsFunc(t.policies, func(p *auditPolicy) bool { return p.Name == PolicyName })
	switch {
	case guarded:
		s.policy, expression = &rlsPolicy{right: true}, "" // what it says is judged elsewhere
	case expression == "":
		return "", "There is no tenant column of a type that TenantDB.EnableRLS knows: give the table one, or revoke all on it from the application."
	case named:
		s.policy = &rlsPolicy{}
	}
	return sqlText(s.secure(expression)...), ""
}

// checkColumn looks at the tenant column of a table that is no partition or child.
func (a *auditor) checkColumn(t *auditTable) {
	c := t.column
	object := "column " + shown(c.Name) + " of " + t.String()
	alter := "alter table " + t.Qualified + " alter column " + ident(c.Name)
	if !c.NotNull {
		a.find("tenant-column-nullable", object, sqlText(alter+" set not null"), "It fails as long as rows have no tenant: give them one first.")
	}
	switch _, fit := tenantTypes[c.Type]; {
	case c.Loose:
		mend, decide := "", "Drop the policies that ask for the column, alter its type to text with a deterministic collation, and make the policies anew."
		if len(t.policies) == 1 && len(a.children(t)) == 0 {
			expression := policyExpression(a.config.Setting, c.Name, "text", a.config.Seal != nil)
			mend = sqlText("drop policy "+ident(t.policies[0].Name)+" on "+t.Qualified, alter+` type text collate pg_catalog."default"`,
				"create policy "+ident(PolicyName)+" on "+t.Qualified+" using ("+expression+") with check ("+expression+")")
			decide = ""
		}
		a.find("tenant-column-loose", object, mend, decide)
	case !fit:
		a.find("tenant-column-type", object, "", "It has type "+c.Type+"; TenantDB.EnableRLS knows text, varchar, uuid, integer and bigint.")
	}
	if !c.Indexed {
		a.find("tenant-column-unindexed", object, sqlText("create index on "+t.Qualified+" ("+ident(c.Name)+")"), "")
	}
}

func (a *auditor) children(t *auditTable) (children []*auditTable) {
	for _, c := range a.tables {
		if slices.Contains(c.Parents, t.OID) {
			children = append(children, c)
		}
	}
	return children
}

// auditKey is an index that lets no two rows have the same.
type auditKey struct {
	Table      uint32
	Qualified  string // of the index
	Constraint string // its name, if it is one's
	Definition string // of the constraint, else of the index
	Columns    []int16
	Generated  bool // it has a UUID in it, or a number that the server counts: others' cannot be guessed
	Referenced bool // by foreign keys
	Exclusion  bool
}

// readKeys reads them for all tables.
func (a *auditor) readKeys(ctx context.Context, tx pgx.Tx) error {
	keys, err := auditRows[auditKey](ctx, a, tx, `
		select i.indrelid, format('%I.%I', n.nspname, x.relname), coalesce(k.conname, ''), coalesce(pg_get_constraintdef(k.oid), pg_get_indexdef(i.indexrelid)),
			array(select i.indkey[g] from generate_series(0, i.indnkeyatts - 1) g),
			exists (select from generate_series(0, i.indnkeyatts - 1) g join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[g] and a.attnum > 0
				left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
				where a.atttypid = 'uuid'::regtype or a.attidentity <> '' or pg_get_expr(d.adbin, d.adrelid) like 'nextval(%'),
			i.indexrelid in (select f.conindid from pg_constraint f where f.contype = 'f'),
			i.indisexclusion
		from pg_index i
		join pg_class x on x.oid = i.indexrelid
		join pg_class c on c.oid = i.indrelid and c.relkind in ('r', 'p')
		join pg_namespace n on n.oid = c.relnamespace
		left join pg_constraint k on k.conindid = i.indexrelid and k.conrelid = i.indrelid and k.contype in ('p', 'u', 'x')
		where (i.indisunique or i.indisexclusion) and `+ofUser+`
		order by 2`)
	a.keys = make(map[uint32][]auditKey)
	for _, k := range keys {
		a.keys[k.Table] = append(a.keys[k.Table], k)
	}
	return err
}

// checkKeys looks for unique constraints and indexes that hold over all tenants.
func (a *auditor) checkKeys(context.Context, pgx.Tx) error {
	for _, t := range a.tables {
		if !t.tenant || t.single || t.column == nil || a.tenantParent(t) != nil || !t.Open {
			continue
		}
		for _, k := range a.keys[t.OID] {
			if slices.Contains(k.Columns, t.column.Num) {
				continue
			}
			object := "index " + k.Qualified + " of " + t.String()
			if k.Constraint != "" {
				object = "constraint " + shown(k.Constraint) + " on " + t.String()
			}
			if k.Generated {
				a.find("key-without-tenant", object, "", "")
				continue
			}
			mend, decide := k.withTenant(t)
			a.find("unique-without-tenant", object, mend, decide)
		}
	}
	return nil
}

var indexColumns = regexp.MustCompile(` USING \w+ \(`)

// withTenant is SQL that makes a key anew with the tenant in it, or else what to say instead.
func (k *auditKey) withTenant(t *auditTable) (sql, decide string) {
	column := ident(t.column.Name) + ", "
	switch {
	case k.Referenced:
		return "", "Foreign keys refer to it: add a key that begins with the tenant, have them refer to that by the tenant too, and drop this one."
	case k.Exclusion:
		return "", "Add " + ident(t.column.Name) + " with = to the constraint; with GiST it takes the extension btree_gist."
	case k.Constraint != "":
		definition := strings.Replace(k.Definition, "(", "("+column, 1)
		return sqlText("alter table " + t.Qualified + " drop constraint " + ident(k.Constraint) + ", add constraint " + ident(k.Constraint) + " " + definition), ""
	}
	at := indexColumns.FindStringIndex(k.Definition)
	return sqlText("drop index "+k.Qualified, k.Definition[:at[1]]+column+k.Definition[at[1]:]), ""
}

// auditForeignKey is a foreign key, that of a partition left out where it is its parent's.
type auditForeignKey struct {
	Name                   string
	Child, Parent          uint32
	Columns, Referenced    []int16
	ColumnList, ParentList string // quoted
	Match, Delete, Update  string
	Deferrable, Deferred   bool
}

// referentialActions are those of pg_constraint.confdeltype.
var referentialActions = map[string]string{"a": "no action", "r": "restrict", "c": "cascade", "n": "set null", "d": "set default"}

// checkForeignKeys looks for foreign keys between tenant tables that do not hold the tenants together.
func (a *auditor) checkForeignKeys(ctx context.Context, tx pgx.Tx) error {
	keys, err := auditRows[auditForeignKey](ctx, a, tx, `
		select k.conname::text, k.conrelid, k.confrelid, k.conkey, k.confkey,
			(select string_agg(quote_ident(a.attname), ', ' order by u.n) from unnest(k.conkey) with ordinality u(num, n) join pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.num),
			(select string_agg(quote_ident(a.attname), ', ' order by u.n) from unnest(k.confkey) with ordinality u(num, n) join pg_attribute a on a.attrelid = k.confrelid and a.attnum = u.num),
			k.confmatchtype::text, k.confdeltype::text, k.confupdtype::text, k.condeferrable, k.condeferred
		from pg_constraint k join pg_class c on c.oid = k.conrelid join pg_namespace n on n.oid = c.relnamespace
		where k.contype = 'f' and k.conparentid = 0 and `+ofUser+` order by 1, 2`)
	if err != nil {
		return err
	}
	for _, k := range keys {
		child, parent := a.byOID[k.Child], a.byOID[k.Parent]
		if child == nil || parent == nil || !child.tenant || !parent.tenant || child.single || child.column == nil || parent.column == nil {
			continue
		}
		if slices.ContainsFunc(k.pairs(), func(p [2]int16) bool { return p == [2]int16{child.column.Num, parent.column.Num} }) {
			continue
		}
		code, detail := "fk-without-tenant", "It refers to "+parent.String()+"."
		if strings.ContainsAny(k.Delete+k.Update, "cnd") {
			code = "fk-across-tenants"
			detail = fmt.Sprintf("It refers to %v, on delete %s, on update %s.", parent, referentialActions[k.Delete], referentialActions[k.Update])
		}
		mend := a.tieTenants(&k, child, parent)
		if mend == "" {
			detail += " Make it anew with the tenant in it."
		}
		a.find(code, "constraint "+shown(k.Name)+" on "+child.String(), mend, detail)
	}
	return nil
}

func (k *auditForeignKey) pairs() [][2]int16 {
	pairs := make([][2]int16, len(k.Columns))
	for i := range k.Columns {
		pairs[i] = [2]int16{k.Columns[i], k.Referenced[i]}
	}
	return pairs
}

// tieTenants is SQL that makes a foreign key anew with the tenant in it; empty where there is no telling how.
func (a *auditor) tieTenants(k *auditForeignKey, child, parent *auditTable) string {
	sets := strings.ContainsAny(k.Delete, "nd")
	if child.column.Type != parent.column.Type || strings.ContainsAny(k.Update, "nd") || sets && a.version < 150000 || parent.Kind == "p" {
		return ""
	}
	var mend []string
	parentList := ident(parent.column.Name) + ", " + k.ParentList
	want := append([]int16{parent.column.Num}, k.Referenced...)
	if !slices.ContainsFunc(a.keys[parent.OID], func(key auditKey) bool { return sameColumns(key.Columns, want) && !key.Exclusion }) {
		mend = append(mend, "alter table "+parent.Qualified+" add unique ("+parentList+")")
	}
	sql := "alter table " + child.Qualified + " drop constraint " + ident(k.Name) + ", add constraint " + ident(k.Name) +
		" foreign key (" + ident(child.column.Name) + ", " + k.ColumnList + ") references " + parent.Qualified + " (" + parentList + ")"
	if k.Match == "f" {
		sql += " match full"
	}
	sql += " on delete " + referentialActions[k.Delete]
	if sets {
		sql += " (" + k.ColumnList + ")" // and not the tenant
	}
	sql += " on update " + referentialActions[k.Update]
	if k.Deferrable {
		sql += " deferrable"
	}
	if k.Deferred {
		sql += " initially deferred"
	}
	return sqlText(append(mend, sql)...)
}

func sameColumns(a, b []int16) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}
