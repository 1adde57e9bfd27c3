package pgxtenant

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// checkGrants looks for rights of the application's that go past policies, on tables, schemas and the database.
func (a *auditor) checkGrants(ctx context.Context, tx pgx.Tx) error {
	type grant struct {
		Table     uint32
		Privilege string
		Grantees  string
	}
	grants, err := auditRows[grant](ctx, a, tx, `
		select c.oid, lower(x.privilege_type), `+grantees+`
		from pg_class c join pg_namespace n on n.oid = c.relnamespace cross join aclexplode(c.relacl) x
		where c.relkind in ('r', 'p', 'f') and `+schemaOpen+` and x.privilege_type in ('TRUNCATE', 'REFERENCES', 'TRIGGER') and x.grantee <> c.relowner and `+grantedToApp+`
		group by 1, 2 order by 1, 2`)
	if err != nil {
		return err
	}
	for _, g := range grants {
		if t := a.byOID[g.Table]; t != nil && t.tenant && !t.single {
			a.find(g.Privilege+"-granted", t.String(), sqlText("revoke "+g.Privilege+" on "+t.Qualified+" from "+g.Grantees), "")
		}
	}
	if err := a.checkSchemaGrants(ctx, tx); err != nil {
		return err
	}
	type database struct {
		Name      string
		Owner     uint32
		Privilege *string
		Grantees  *string
	}
	rights, err := auditRows[database](ctx, a, tx, `
		select quote_ident(d.datname), d.datdba, lower(x.privilege_type), `+grantees+`
		from pg_database d
		left join aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x on x.privilege_type in ('TEMPORARY', 'CREATE') and x.grantee <> d.datdba and `+grantedToApp+`
		where d.datname = current_database() group by 1, 2, 3 order by 3`)
	if err != nil {
		return err
	}
	for i, r := range rights {
		object := "database " + r.Name
		if i == 0 && a.isApp(r.Owner) {
			mend, decide := a.giveAway(object, r.Owner)
			a.find("app-owns-database", object, mend, decide)
		}
		if r.Privilege == nil {
			continue
		}
		code := "temp-granted"
		if *r.Privilege == "create" {
			code = "create-on-database"
		}
		a.find(code, object, sqlText("revoke "+*r.Privilege+" on "+object+" from "+*r.Grantees), "")
	}
	return nil
}

func (a *auditor) checkSchemaGrants(ctx context.Context, tx pgx.Tx) error {
	type schema struct {
		Name     string
		Owner    uint32
		Grantees *string
	}
	schemas, err := auditRows[schema](ctx, a, tx, `
		select quote_ident(n.nspname), n.nspowner, `+grantees+`
		from pg_namespace n
		left join aclexplode(n.nspacl) x on x.privilege_type = 'CREATE' and x.grantee <> n.nspowner and `+grantedToApp+`
		where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
		group by n.oid, n.nspname, n.nspowner order by 1`)
	if err != nil {
		return err
	}
	for _, s := range schemas {
		if a.isApp(s.Owner) {
			mend, decide := a.giveAway("schema "+s.Name, s.Owner)
			a.find("app-owns-schema", "schema "+s.Name, mend, decide)
		}
		if s.Grantees != nil {
			a.find("create-on-schema", "schema "+s.Name, sqlText("revoke create on schema "+s.Name+" from "+*s.Grantees), "")
		}
	}
	return nil
}

// checkDefaults looks at the rights that come with each new table.
func (a *auditor) checkDefaults(ctx context.Context, tx pgx.Tx) error {
	type privilege struct {
		Role            string
		Schema          *string
		Past            bool // it goes past policies
		Privileges, Who string
	}
	defaults, err := auditRows[privilege](ctx, a, tx, `
		select quote_ident(pg_get_userbyid(d.defaclrole)), n.nspname::text, x.privilege_type in ('TRUNCATE', 'REFERENCES', 'TRIGGER'),
			string_agg(distinct lower(x.privilege_type), ', '), `+grantees+`
		from pg_default_acl d left join pg_namespace n on n.oid = d.defaclnamespace cross join aclexplode(d.defaclacl) x
		where d.defaclobjtype = 'r' and x.grantee <> d.defaclrole and x.privilege_type <> 'MAINTAIN' and `+grantedToApp+`
		group by 1, 2, 3 order by 1, 2, 3`)
	if err != nil {
		return err
	}
	for _, d := range defaults {
		object, in := "default privileges of role "+d.Role, ""
		if d.Schema != nil {
			if a.schemas[*d.Schema] {
				continue // what is made there is one tenant's
			}
			in = " in schema " + ident(*d.Schema)
			object += " in schema " + shown(*d.Schema)
		}
		code := "default-access"
		if d.Past {
			code = "default-privileges"
		}
		a.find(code, object, sqlText("alter default privileges for role "+d.Role+in+" revoke "+d.Privileges+" on tables from "+d.Who), "")
	}
	return nil
}

// checkLargeObjects looks for those that the application may use.
func (a *auditor) checkLargeObjects(ctx context.Context, tx pgx.Tx) error {
	type large struct {
		OID      uint32
		Owned    bool
		Grantees *string
	}
	objects, err := auditRows[large](ctx, a, tx, `
		select m.oid, m.lomowner = any(ROLES), `+grantees+`
		from pg_largeobject_metadata m left join aclexplode(m.lomacl) x on x.grantee <> m.lomowner and `+grantedToApp+`
		group by 1, 2 having m.lomowner = any(ROLES) or count(x.grantee) > 0 order by 1`)
	if err != nil || len(objects) == 0 {
		return err
	}
	var revokes []string
	owned := 0
	for _, o := range objects {
		if o.Owned {
			owned++
		}
		if o.Grantees != nil {
			revokes = append(revokes, fmt.Sprintf("revoke all on large object %d from %s", o.OID, *o.Grantees))
		}
	}
	detail := fmt.Sprintf("There are %d that the application may use.", len(objects))
	if owned > 0 {
		revokes = nil
		detail += fmt.Sprintf(" Of these it owns %d: keep what they hold in a bytea column of a table with policies, and unlink them.", owned)
	}
	a.find("large-objects", "large objects", sqlText(revokes...), detail)
	return nil
}

// checkPublications names those that send tenants' rows away.
func (a *auditor) checkPublications(ctx context.Context, tx pgx.Tx) error {
	type published struct{ Publication, Table string }
	rows, err := auditRows[published](ctx, a, tx, `
		select quote_ident(p.pubname), format('%I.%I', p.schemaname, p.tablename) from pg_publication_tables p order by 1, 2`)
	if err != nil {
		return err
	}
	tables := make(map[string][]string)
	for _, r := range rows {
		if slices.ContainsFunc(a.tables, func(t *auditTable) bool { return t.tenant && t.Qualified == r.Table }) {
			tables[r.Publication] = append(tables[r.Publication], r.Table)
		}
	}
	for name, of := range tables {
		a.find("publication", "publication "+name, "", "It publishes "+some(of)+". Drop it if nobody should have them.")
	}
	return nil
}

// some lists the first of many names.
func some(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// checkOwnSchema looks at who may read and write what the package keeps for itself.
func (a *auditor) checkOwnSchema(ctx context.Context, tx pgx.Tx) error {
	type relation struct {
		Name, Qualified string
		Owner           uint32
		Privileges      []string
		Grantees        *string
	}
	relations, err := auditRows[relation](ctx, a, tx, `
		select c.relname::text, format('%I.%I', n.nspname, c.relname), c.relowner,
			coalesce(array_agg(distinct x.privilege_type) filter (where x.privilege_type is not null), '{}'), `+grantees+`
		from pg_class c join pg_namespace n on n.oid = c.relnamespace
		left join lateral (select * from aclexplode(c.relacl)
			union all select y.* from pg_attribute b, aclexplode(b.attacl) y where b.attrelid = c.oid and b.attacl is not null) x
			on x.grantee <> c.relowner and `+grantedToApp+`
		where n.nspname = 'pgxtenant' and c.relkind in ('r', 'p', 'v', 'S')
		group by 1, 2, 3 order by 1`)
	if err != nil {
		return err
	}
	reader := ""
	if r := a.config.Registry; r != nil && r.Pool != nil {
		reader = r.Pool.ConnConfig.User
	}
	for _, r := range relations {
		object := "table " + r.Qualified
		revoke := ""
		if r.Grantees != nil {
			revoke = sqlText("revoke all on " + r.Qualified + " from " + *r.Grantees)
		}
		owned, reads := a.isApp(r.Owner), slices.Contains(r.Privileges, "SELECT")
		writes := slices.ContainsFunc(r.Privileges, func(p string) bool { return p != "SELECT" && p != "USAGE" })
		switch {
		case owned:
			mend, decide := a.giveAway(object, r.Owner)
			a.find("own-schema-writable", object, mend, decide)
		case writes:
			a.find("own-schema-writable", object, revoke, "")
		}
		switch {
		case owned || !reads:
		case r.Name == "seal_key":
			a.find("seal-key-readable", object, revoke, "")
		case r.Name == "tenant" || r.Name == "tenant_alias" || r.Name == "schema":
			if reader != a.login.Name {
				a.find("registry-readable", object, revoke, "")
			}
		}
	}
	return nil
}
