package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// auditSchema is a row of pgxtenant.schema.
type auditSchema struct {
	Name, State, Tenant, Template string
	Exists                        bool
}

// checkSequences looks for columns in one tenant's schema that draw from a sequence outside of it.
func (a *auditor) checkSequences(ctx context.Context, tx pgx.Tx) error {
	type shared struct {
		TableSchema, SequenceSchema string
		Table, Column, Sequence     string
		Owner                       uint32
	}
	rows, err := auditRows[shared](ctx, a, tx, `
		select n.nspname::text, m.nspname::text, format('%I.%I', n.nspname, c.relname), b.attname::text, format('%I.%I', m.nspname, s.relname), c.relowner
		from pg_attrdef d
		join pg_depend x on x.classid = 'pg_attrdef'::regclass and x.objid = d.oid and x.refclassid = 'pg_class'::regclass
		join pg_class s on s.oid = x.refobjid and s.relkind = 'S' join pg_namespace m on m.oid = s.relnamespace
		join pg_class c on c.oid = d.adrelid and c.relkind in ('r', 'p') join pg_namespace n on n.oid = c.relnamespace
		join pg_attribute b on b.attrelid = c.oid and b.attnum = d.adnum
		where s.relnamespace <> c.relnamespace order by 3, 4`)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if !a.schemas[r.TableSchema] && !a.schemas[r.SequenceSchema] {
			continue
		}
		column := ident(r.Column)
		_, table, _ := strings.Cut(r.Table, ".")
		sequence := ident(r.TableSchema, clipName(strings.Trim(table, `"`)+"_"+r.Column+"_own"))
		a.find("sequence-shared", "column "+shown(r.Column)+" of table "+r.Table, sqlText(
			"create sequence "+sequence,
			"alter sequence "+sequence+" owner to "+ident(a.roles[r.Owner].Name),
			"alter sequence "+sequence+" owned by "+r.Table+"."+column,
			"select setval("+literal(sequence)+", coalesce((select max("+column+") from "+r.Table+"), 0) + 1, false)",
			"alter table "+r.Table+" alter column "+column+" set default nextval("+literal(sequence)+")",
			"grant usage on sequence "+sequence+" to "+ident(a.login.Name)), "It draws from "+r.Sequence+".")
	}
	return nil
}

func clipName(s string) string { return s[:min(len(s), maxNameLen)] }

// checkSchemas compares the registry, the package's list of schemas, and the schemas.
func (a *auditor) checkSchemas(ctx context.Context, tx pgx.Tx) error {
	known := make(map[string]bool)
	for _, rec := range a.records {
		known[rec.ID] = true
	}
	for _, s := range a.made {
		if s.State != "live" {
			continue
		}
		if !s.Exists {
			a.find("tenant-schema-missing", "schema "+shown(s.Name), "", fmt.Sprintf("It was tenant %q's, and was dropped by other means than the package's. Provision the tenant anew, or Drop it.", s.Tenant))
		} else if a.hasRegistry() && !known[s.Tenant] {
			a.find("tenant-schema-orphan", "schema "+shown(s.Name), "", fmt.Sprintf("It is tenant %q's. Create the tenant in the registry, or Retire or Drop its schema.", s.Tenant))
		}
	}
	type schema struct{ Name string }
	names, err := auditRows[schema](ctx, a, tx, "select nspname::text from pg_namespace")
	if err != nil {
		return err
	}
	for _, rec := range a.records {
		name := rec.schema()
		if rec.Isolation != IsolationSchema || rec.Status == StatusProvisioning || rec.Status == StatusDeleting {
			continue
		}
		listed := slices.ContainsFunc(a.made, func(s auditSchema) bool { return s.Name == name && s.State == "live" })
		if !listed && !slices.Contains(names, schema{name}) {
			a.find("tenant-schema-missing", "schema "+shown(name), "", fmt.Sprintf("The registry has tenant %q in it. Provision or Deprovision the tenant.", rec.ID))
		}
	}
	return nil
}

// checkStandIns looks for shared tables that a tenant's statement might meet instead of its own.
func (a *auditor) checkStandIns(ctx context.Context, tx pgx.Tx) error {
	if a.config.Template == "" {
		return nil
	}
	type relation struct{ Schema, Name string }
	rows, err := auditRows[relation](ctx, a, tx, `
		select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
		where c.relkind in ('r', 'p', 'v', 'm', 'f') and n.nspname <> 'pgxtenant' order by 1, 2`)
	if err != nil {
		return err
	}
	there := make(map[relation]bool)
	for _, r := range rows {
		there[r] = true
	}
	for _, r := range rows {
		if r.Schema != a.config.Template {
			continue
		}
		i := slices.IndexFunc(a.config.SharedSchemas, func(s string) bool { return there[relation{s, r.Name}] })
		if i < 0 {
			continue
		}
		standIn := "table " + shown(a.config.SharedSchemas[i], r.Name)
		a.find("stand-in", standIn, "", "Rename one of the two if no service needs both.")
		for _, s := range a.copies() {
			if !there[relation{s.Name, r.Name}] {
				a.find("stand-in-used", standIn, "", fmt.Sprintf("Schema %s lacks the table: make it there as it is in %s.", shown(s.Name), shown(a.config.Template)))
			}
		}
	}
	return nil
}

// copies are tenants' schemas that are copies of Config.Template.
func (a *auditor) copies() (copies []auditSchema) {
	for _, s := range a.made {
		if s.State == "live" && s.Exists && s.Template == a.config.Template {
			copies = append(copies, s)
		}
	}
	return copies
}

// hasRegistry reports whether what the registry does not know is nobody's.
func (a *auditor) hasRegistry() bool { return a.db.registry != nil && !a.unread }

// checkDrift compares each tenant's schema with the template.
func (a *auditor) checkDrift(ctx context.Context, tx pgx.Tx) error {
	if a.start || a.config.Template == "" || a.db.admin == nil {
		return nil
	}
	copies := a.copies()
	if len(copies) == 0 {
		return nil
	}
	m, err := a.db.Schemas()
	if err != nil {
		return err
	}
	template, err := m.template(ctx, tx)
	var pgErr *pgconn.PgError
	if err != nil && !errors.As(err, &pgErr) {
		a.find("not-audited", "copies of the template", "", err.Error())
		return nil
	}
	if err != nil {
		return err
	}
	want := template.lines()
	for _, s := range copies {
		own, err := describeSchema(ctx, tx, s.Name)
		if err != nil && !errors.As(err, &pgErr) && ctx.Err() == nil {
			a.find("schema-drift", "schema "+shown(s.Name), "", err.Error())
			continue
		}
		if err != nil {
			return err
		}
		if lines := difference(want, own.lines()); len(lines) > 0 {
			a.find("schema-drift", "schema "+shown(s.Name), "", fmt.Sprintf("It is tenant %q's. SchemaManager.Diff tells all: %s", s.Tenant, some(lines)))
		}
	}
	return nil
}

// databases compares the registry and the databases on each of Config.Servers.
func (a *auditor) databases(ctx context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(a.db.servers)) {
		err := a.databasesOn(ctx, name, a.db.servers[name])
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			a.find("not-audited", "server "+name, "", err.Error())
		}
	}
	return nil
}

func (a *auditor) databasesOn(ctx context.Context, server string, m *DatabaseManager) error {
	// Those that the role has no part in may be another service's.
	rows, err := m.admin.Query(ctx, "select d.datname::text, "+m.markColumn()+` as mark,
			exists (select from aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x where x.grantee = 0 and x.privilege_type = 'CONNECT')
		from pg_catalog.pg_database d where pg_catalog.pg_has_role(d.datdba, 'USAGE') and d.datname <> pg_catalog.current_database() order by 1`)
	if err != nil {
		return err
	}
	type database struct {
		Name string
		Mark *string
		Open bool
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[database])
	if err != nil {
		return err
	}
	expected := make(map[string]Record) // by name
	for _, rec := range a.records {
		if rec.Isolation == IsolationDatabase && rec.Server == server {
			expected[DatabaseName(rec.ID)] = rec
		}
	}
	found := make(map[string]bool)
	for _, d := range list {
		if d.Mark == nil || *d.Mark == "" || strings.HasPrefix(d.Name, passingPrefix) || strings.HasPrefix(d.Name, retiredPrefix) {
			continue
		}
		found[d.Name] = true
		object := "database " + shown(d.Name) + " on server " + server
		if d.Open {
			a.find("tenant-database-open", object, sqlText("revoke connect, temporary on database "+ident(d.Name)+" from public"), "")
		}
		if _, ok := expected[d.Name]; !ok && a.hasRegistry() {
			a.find("tenant-database-orphan", object, "", fmt.Sprintf("It is tenant %q's. Create the tenant in the registry, or Retire or Drop its database.", clip(*d.Mark)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(expected)) {
		rec := expected[name]
		if !found[name] && rec.Status != StatusProvisioning && rec.Status != StatusDeleting {
			a.find("tenant-database-missing", "database "+shown(name)+" on server "+server, "", fmt.Sprintf("The registry has tenant %q in it. Provision or Deprovision the tenant.", rec.ID))
		}
	}
	return nil
}

// checkCrossings looks for what depends, in one tenant's schema, on something in another's or in the template.
func (a *auditor) checkCrossings(ctx context.Context, tx pgx.Tx) error {
	type crossing struct{ Object, On string }
	crossings, err := auditRows[crossing](ctx, a, tx, `
		with ns as (select oid from pg_namespace where nspname = any($1::text[])),
		rel as (select c.oid, c.relnamespace, c.relkind, format('%I.%I', n.nspname, c.relname) q
			from pg_class c join ns on ns.oid = c.relnamespace join pg_namespace n on n.oid = c.relnamespace),
		mine(class, oid, schema, what) as (
			select 'pg_rewrite'::regclass, w.oid, c.relnamespace, case c.relkind when 'v' then 'view ' when 'm' then 'materialized view ' else 'table ' end || c.q from pg_rewrite w join rel c on c.oid = w.ev_class
			union all select 'pg_attrdef'::regclass, d.oid, c.relnamespace, 'column ' || quote_ident(b.attname) || ' of table ' || c.q
				from pg_attrdef d join rel c on c.oid = d.adrelid join pg_attribute b on b.attrelid = d.adrelid and b.attnum = d.adnum
			union all select 'pg_constraint'::regclass, k.oid, c.relnamespace, 'constraint ' || quote_ident(k.conname) || ' on table ' || c.q from pg_constraint k join rel c on c.oid = k.conrelid
			union all select 'pg_trigger'::regclass, t.oid, c.relnamespace, 'trigger ' || quote_ident(t.tgname) || ' on table ' || c.q from pg_trigger t join rel c on c.oid = t.tgrelid and not t.tgisinternal
			union all select 'pg_proc'::regclass, f.oid, f.pronamespace, 'function ' || f.oid::regprocedure from pg_proc f join ns on ns.oid = f.pronamespace),
		theirs(class, oid, schema) as (
			select 'pg_class'::regclass, c.oid, c.relnamespace from rel c where c.relkind <> 'S'
			union all select 'pg_proc'::regclass, f.oid, f.pronamespace from pg_proc f join ns on ns.oid = f.pronamespace)
		select m.what, string_agg(distinct pg_describe_object(d.refclassid, d.refobjid, 0), ', ')
		from pg_depend d
		join mine m on m.class = d.classid and m.oid = d.objid
		join theirs t on t.class = d.refclassid and t.oid = d.refobjid
		where m.schema <> t.schema group by 1 order by 1`, slices.Sorted(maps.Keys(a.schemas)))
	for _, c := range crossings {
		a.find("schema-crossing", c.Object, "", "It depends on "+c.On+". Drop it, and make it with the tenant's schema alone in search_path.")
	}
	return err
}
