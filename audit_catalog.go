package pgxtenant

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Parts of the queries below. A query of the catalogue that says acl has x in scope, of aclexplode.
const (
	grantedToApp = "(x.grantee = 0 or x.grantee = any(ROLES))"

	// ofUser holds for relations c, in schema n, that are neither the server's, an extension's nor the package's.
	ofUser = `n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'pgxtenant')
		and not exists (select from pg_depend e where e.classid = 'pg_class'::regclass and e.objid = c.oid and e.deptype = 'e')`

	// schemaOpen holds where the application may use schema n.
	schemaOpen = "exists (select from aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) x where x.privilege_type = 'USAGE' and " + grantedToApp + ")"

	// relationOpen holds where it may read or write relation c in schema n, or some column.
	relationOpen = "(" + schemaOpen + ` and (
			exists (select from aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
				where x.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and ` + grantedToApp + `)
			or exists (select from pg_attribute a, aclexplode(a.attacl) x where a.attrelid = c.oid and a.attacl is not null and ` + grantedToApp + `))
		or exists (select from pg_roles r where r.rolname in ('pg_read_all_data', 'pg_write_all_data') and r.oid = any(ROLES)))`

	// grantees are whom something must be taken from.
	grantees = "string_agg(distinct case x.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(x.grantee)) end, ', ')"
)

type auditRole struct {
	OID                                   uint32
	Name                                  string
	Super, Bypass, CreateRole, Replicates bool
	Memberships                           []uint32 // direct ones
}

// exempt reports whether no policy at all holds the role.
func (r *auditRole) exempt() bool { return r.Super || r.Bypass }

// auditTable is a table that users have made, foreign ones included.
type auditTable struct {
	OID             uint32
	Schema, Name    string
	Qualified       string // quoted
	Kind            string // of pg_class.relkind
	Owner           uint32
	Enabled, Forced bool
	Open            bool // the application may read or write it, by its own name
	Parents         []uint32

	tenant   bool // its rows belong to tenants who share it
	single   bool // it is in a schema of one tenant, or the template of such
	policies []*auditPolicy
	column   *auditColumn // the tenant column, if there is one
}

func (t *auditTable) String() string { return "table " + t.Qualified }

// auditColumn is a column that says whose a row is.
type auditColumn struct {
	Table      uint32
	Num        int16
	Name       string
	Type       string // of a domain, that under it
	NotNull    bool
	Loose      bool // calls different texts equal
	NeverEmpty bool // a check sees to it
	Indexed    bool // some index begins with it
	Key        bool // it alone is the table's primary key
}

// auditFunction is a function that a policy calls, unless it is the server's.
type auditFunction struct {
	Policy     uint32
	Schema     string
	Name       string // qualified and quoted
	Signature  string
	Volatility string
	Args       int16
	Reads      bool // its text has the tenant setting in it
	Settings   bool // its text reads some setting
}

// readRoles finds who the application is, and whose rights it has.
func (a *auditor) readRoles(ctx context.Context, tx pgx.Tx) error {
	if err := tx.QueryRow(ctx, "select current_database(), current_setting('server_version_num')::int").Scan(&a.database, &a.version); err != nil {
		return err
	}
	login, current := a.db.appRole(), a.db.appRole()
	if a.app != nil {
		var on interface {
			QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
		} = a.app
		if a.db.admin == nil {
			on = tx // which is on that connection
		}
		if err := on.QueryRow(ctx, "select session_user::text, current_user::text").Scan(&login, &current); err != nil {
			return err
		}
	}
	roles, err := auditRows[auditRole](ctx, a, tx, `
		select r.oid, r.rolname::text, r.rolsuper, r.rolbypassrls, r.rolcreaterole, r.rolreplication,
			array(select m.roleid from pg_auth_members m where m.member = r.oid order by 1)
		from pg_roles r`)
	if err != nil {
		return err
	}
	a.roles = make(map[uint32]*auditRole, len(roles))
	var other *auditRole
	for i := range roles {
		r := &roles[i]
		a.roles[r.OID] = r
		if r.Name == login {
			a.login = r
		}
		if r.Name == current {
			other = r
		}
	}
	if a.login == nil {
		return errors.New("there is no role " + ident(login) + ", which Config.Shared logs in as")
	}
	a.acts = a.memberships(a.login.OID)
	if other != nil && other != a.login { // by SET ROLE in a hook, or a setting of the role's
		a.acts = append(a.acts, a.memberships(other.OID)...)
	}
	slices.Sort(a.acts)
	a.acts = slices.Compact(a.acts)
	return nil
}

// memberships are the role itself and all that it is a member of, whether it inherits their rights or must
// take them by SET ROLE.
func (a *auditor) memberships(role uint32) []uint32 {
	all := []uint32{role}
	for i := 0; i < len(all); i++ {
		if r := a.roles[all[i]]; r != nil && !r.exempt() {
			for _, m := range r.Memberships {
				if !slices.Contains(all, m) {
					all = append(all, m)
				}
			}
		}
	}
	return all
}

// isApp reports whether the application has the rights of a role.
func (a *auditor) isApp(role uint32) bool { return slices.Contains(a.acts, role) }

// exemptFrom reports whether no policy of the table holds a role.
func (a *auditor) exemptFrom(role uint32, t *auditTable) bool {
	r := a.roles[role]
	return r != nil && r.exempt() || !t.Forced && slices.Contains(a.memberships(role), t.Owner) || !t.Enabled
}

// readSchemas finds the schemas that belong to one tenant each.
func (a *auditor) readSchemas(ctx context.Context, tx pgx.Tx) error {
	a.schemas = make(map[string]bool)
	if a.config.Template != "" {
		a.schemas[a.config.Template] = true
	}
	for _, rec := range a.records {
		if rec.Isolation == IsolationSchema {
			a.schemas[rec.schema()] = true
		}
	}
	there, err := a.ownTable(ctx, tx, "schema")
	if err != nil || !there {
		return err
	}
	a.made, err = auditRows[auditSchema](ctx, a, tx, `
		select s.name, s.state, coalesce(s.tenant, ''), s.template, n.oid is not null
		from pgxtenant.schema s left join pg_namespace n on n.nspname = s.name order by 1`)
	for _, s := range a.made {
		a.schemas[s.Name], a.schemas[s.Template] = true, true
	}
	return err
}

// ownTable reports whether the package has made a table of that name.
func (a *auditor) ownTable(ctx context.Context, tx pgx.Tx, name string) (there bool, err error) {
	err = tx.QueryRow(ctx, `select exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
		where n.nspname = 'pgxtenant' and c.relname = `+literal(name)+`)`).Scan(&there)
	return there, err
}

// readRegistry reads the registry of the TenantDB.
func (a *auditor) readRegistry(ctx context.Context) error {
	if a.db.registry == nil {
		return nil
	}
	for rec, err := range a.db.registry.All(ctx) {
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) {
			a.find("not-audited", "the registry", "", err.Error())
			a.unread = true
			return nil
		}
		if err != nil {
			return err
		}
		a.records = append(a.records, rec)
	}
	return nil
}

func (a *auditor) readTables(ctx context.Context, tx pgx.Tx) error {
	tables, err := auditRows[auditTable](ctx, a, tx, `
		select c.oid, n.nspname::text, c.relname::text, format('%I.%I', n.nspname, c.relname), c.relkind::text, c.relowner,
			c.relrowsecurity, c.relforcerowsecurity, `+relationOpen+`,
			array(select i.inhparent from pg_inherits i where i.inhrelid = c.oid order by 1)
		from pg_class c join pg_namespace n on n.oid = c.relnamespace
		where c.relkind in ('r', 'p', 'f') and `+ofUser+`
		order by 2, 3`)
	if err != nil {
		return err
	}
	a.byOID = make(map[uint32]*auditTable, len(tables))
	for i := range tables {
		t := &tables[i]
		a.tables = append(a.tables, t)
		a.byOID[t.OID] = t
	}
	return nil
}

// readColumns finds each table's tenant column, and with it the tables that tenants share: those under
// row-level security, those with a policy on the tenant, those with a tenant column, and the partitions and
// children of all these. In a schema of one tenant a column means nothing.
func (a *auditor) readColumns(ctx context.Context, tx pgx.Tx) error {
	names := a.tenantColumnNames()
	columns, err := auditRows[auditColumn](ctx, a, tx, `
		select a.attrelid, a.attnum, a.attname::text, format_type(case b.typtype when 'd' then b.typbasetype else b.oid end, null), a.attnotnull,
			coalesce(not l.collisdeterministic, false) or b.typname in ('citext', 'bpchar'),
			exists (select from pg_constraint k where k.conrelid = a.attrelid and k.contype = 'c' and k.conkey = array[a.attnum]
				and pg_get_constraintdef(k.oid) ~ '<> ''''::'),
			exists (select from pg_index i where i.indrelid = a.attrelid and i.indisvalid and i.indpred is null and i.indkey[0] = a.attnum),
			exists (select from pg_index i where i.indrelid = a.attrelid and i.indisprimary and i.indnkeyatts = 1 and i.indkey[0] = a.attnum)
		from pg_attribute a
		join pg_class c on c.oid = a.attrelid and c.relkind in ('r', 'p', 'f')
		join pg_namespace n on n.oid = c.relnamespace
		join pg_type b on b.oid = a.atttypid
		left join pg_collation l on l.oid = a.attcollation
		where a.attnum > 0 and not a.attisdropped and a.attname = any($1::text[]) and `+ofUser, names)
	if err != nil {
		return err
	}
	byTable := make(map[uint32][]*auditColumn)
	for i := range columns {
		byTable[columns[i].Table] = append(byTable[columns[i].Table], &columns[i])
	}
	shared := a.sharedColumns(byTable)
	for _, t := range a.tables {
		t.column = t.tenantColumn(byTable[t.OID], shared)
	}
	a.guessSchemas()
	for _, t := range a.tables {
		t.single = a.schemas[t.Schema]
		t.tenant = t.guarded() || t.column != nil && !t.single
	}
	for again := true; again; {
		again = false
		for _, t := range a.tables {
			if !t.tenant && a.tenantParent(t) != nil {
				t.tenant, again = true, true
			}
		}
	}
	return nil
}

// guessSchemas takes those for one tenant's that nothing lists, have a tenant's name, and no table that
// knows of tenants.
func (a *auditor) guessSchemas() {
	shared, doubtful := make(map[string]bool), make(map[string]bool)
	for _, t := range a.tables {
		shared[t.Schema] = shared[t.Schema] || t.guarded()
	}
	for _, t := range a.tables {
		if !shared[t.Schema] && (!a.schemas[t.Schema] || doubtful[t.Schema]) && strings.HasPrefix(t.Schema, schemaPrefix) {
			a.schemas[t.Schema] = true
			doubtful[t.Schema] = doubtful[t.Schema] || t.column != nil && t.Open
		}
	}
	var names []string
	for schema, doubt := range doubtful {
		if doubt {
			names = append(names, shown(schema))
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		a.find("not-audited", "schemas that have a tenant's name", "", "Nothing lists "+some(names)+
			" as a tenant's. If tenants share it, its tables with a tenant column have no row-level security.")
	}
}

// guarded reports whether the table is under row-level security, or should be by its policies.
func (t *auditTable) guarded() bool {
	return t.Enabled || slices.ContainsFunc(t.policies, func(p *auditPolicy) bool { return p.onTenant })
}

// tenantColumnNames are the names that a tenant column may have: the usual one, and those that policies on
// the tenant ask.
func (a *auditor) tenantColumnNames() []string {
	names := []string{DefaultTenantColumn}
	for _, t := range a.tables {
		for _, p := range t.policies {
			if p.onTenant {
				names = append(names, p.columnNames()...)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// sharedColumns are the names by which a table without policies is taken for one of tenants. A column that
// is a table's primary key there says which row it is, and would be found in every table.
func (a *auditor) sharedColumns(byTable map[uint32][]*auditColumn) map[string]bool {
	shared := map[string]bool{DefaultTenantColumn: true}
	for _, t := range a.tables {
		for _, p := range t.policies {
			names := p.columnNames()
			if !p.onTenant || len(names) != 1 {
				continue
			}
			for _, c := range byTable[t.OID] {
				if c.Name == names[0] && !c.Key {
					shared[c.Name] = true
				}
			}
		}
	}
	return shared
}

// tenantColumn chooses among the columns that have the name of a tenant column somewhere.
func (t *auditTable) tenantColumn(columns []*auditColumn, shared map[string]bool) (found *auditColumn) {
	asked := make(map[string]bool)
	for _, p := range t.policies {
		if p.onTenant {
			for _, name := range p.columnNames() {
				asked[name] = true
			}
		}
	}
	for _, c := range columns {
		switch {
		case len(asked) > 0 && !asked[c.Name], len(asked) != 1 && !shared[c.Name]:
		case found == nil || c.Name == DefaultTenantColumn:
			found = c
		}
	}
	return found
}

// tenantParent returns a table that t is a partition of, or inherits from, and that tenants share.
func (a *auditor) tenantParent(t *auditTable) *auditTable {
	for _, oid := range t.Parents {
		if p := a.byOID[oid]; p != nil && p.tenant {
			return p
		}
	}
	return nil
}
