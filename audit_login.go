package pgxtenant

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// serverAccess are the server's own roles and functions that reach past the database.
var serverAccess = []string{"pg_read_server_files", "pg_write_server_files", "pg_execute_server_program"}

// checkLogin looks at what the application's role is, owns, and can become.
func (a *auditor) checkLogin(context.Context, pgx.Tx) error {
	object, alter := "role "+shown(a.login.Name), "alter role "+ident(a.login.Name)
	const firstSuperuser = 10 // which initdb makes, and which stays what it is
	switch {
	case a.login.Super && a.login.OID == firstSuperuser:
		a.find("app-superuser", object, "", "Let Config.Shared log in as a role of the application's own.")
	case a.login.Super:
		a.find("app-superuser", object, sqlText(alter+" nosuperuser"), "")
	}
	if a.login.Bypass {
		a.find("app-bypassrls", object, sqlText(alter+" nobypassrls"), "")
	}
	if a.login.CreateRole {
		a.find("app-createrole", object, sqlText(alter+" nocreaterole"), "")
	}
	if a.login.Replicates {
		a.find("app-replication", object, sqlText(alter+" noreplication"), "")
	}
	for _, oid := range a.acts {
		r := a.roles[oid]
		if r == nil || oid == a.login.OID {
			continue
		}
		as := object + " as a member of " + shown(r.Name)
		mend, decide := a.leave(oid)
		switch {
		case r.exempt():
			a.find("app-member-exempt", as, mend, decide)
		case r.CreateRole:
			a.find("app-createrole", as, mend, decide)
		case slices.Contains(serverAccess, r.Name):
			a.find("app-server-access", as, mend, decide)
		}
	}
	a.checkOwner(object)
	return nil
}

// checkServerFunctions looks for functions of the server's that an administrator has opened to the application.
func (a *auditor) checkServerFunctions(ctx context.Context, tx pgx.Tx) error {
	type function struct{ Signature, Grantees string }
	functions, err := auditRows[function](ctx, a, tx, `
		select f.oid::regprocedure::text, `+grantees+`
		from pg_proc f cross join aclexplode(f.proacl) x
		where f.pronamespace = 'pg_catalog'::regnamespace and x.grantee <> f.proowner and `+grantedToApp+`
			and f.proname in ('pg_read_file', 'pg_read_binary_file', 'pg_ls_dir', 'pg_stat_file', 'lo_import', 'lo_export')
			and x.privilege_type = 'EXECUTE' group by f.oid order by 1`)
	for _, f := range functions {
		a.find("app-server-access", "function "+f.Signature, sqlText("revoke execute on function "+f.Signature+" from "+f.Grantees), "")
	}
	return err
}

// checkOwner looks for tenant tables that belong to the application.
func (a *auditor) checkOwner(object string) {
	owned := make(map[uint32]int)
	for _, t := range a.tables {
		if !t.tenant || !a.isApp(t.Owner) {
			continue
		}
		owned[t.Owner]++
		if t.Owner == a.login.OID {
			mend, decide := a.giveAway("table "+t.Qualified, t.Owner)
			a.find("app-owner", t.String(), mend, decide)
		}
	}
	for owner, n := range owned {
		if r := a.roles[owner]; r != nil && owner != a.login.OID {
			mend, decide := a.leave(owner)
			a.find("app-member-owner", object+" as a member of "+shown(r.Name), mend, strings.TrimSpace(fmt.Sprintf("It owns %d of the tenants' tables. %s", n, decide)))
		}
	}
}

// giveAway is SQL that takes an object of the application's, which owns it by a role, from it, and gives it
// to the role of Config.Admin if there is another; else what to say instead.
func (a *auditor) giveAway(object string, owner uint32) (sql, decide string) {
	switch {
	case owner != a.login.OID:
		return a.leave(owner)
	case a.config.Admin == nil || a.config.Admin.ConnConfig.User == a.login.Name:
		return "", "Give it to a role that the application does not log in as, which Config.Admin should be."
	}
	return sqlText("alter " + object + " owner to " + ident(a.config.Admin.ConnConfig.User)), ""
}

// leave is SQL that ends the application's membership in a role, direct or by way of others.
func (a *auditor) leave(role uint32) (sql, decide string) {
	var revokes []string
	for _, direct := range a.login.Memberships {
		if r := a.roles[direct]; r != nil && slices.Contains(a.memberships(direct), role) {
			revokes = append(revokes, "revoke "+ident(r.Name)+" from "+ident(a.login.Name))
		}
	}
	if len(revokes) == 0 {
		return "", "Config.Shared's connections become it by a setting or a hook: let them not."
	}
	return sqlText(revokes...), ""
}

// checkPresets looks for places other than the package that give a connection a tenant.
func (a *auditor) checkPresets(ctx context.Context, tx pgx.Tx) error {
	type preset struct {
		Database, Role *string
		Value          string
	}
	presets, err := auditRows[preset](ctx, a, tx, `
		select d.datname::text, r.rolname::text, substr(c, strpos(c, '=') + 1)
		from pg_db_role_setting s cross join unnest(s.setconfig) c
		left join pg_database d on d.oid = s.setdatabase left join pg_roles r on r.oid = s.setrole
		where lower(split_part(c, '=', 1)) = SETTING and (s.setdatabase = 0 or d.datname = current_database())
			and (s.setrole = 0 or s.setrole = any(ROLES)) and substr(c, strpos(c, '=') + 1) not in ('', '""')
		order by 1, 2`)
	if err != nil {
		return err
	}
	reset := " reset " + settingIdent(a.config.Setting)
	for _, p := range presets {
		var object, alter string
		switch {
		case p.Role != nil && p.Database != nil:
			object = "role " + shown(*p.Role) + " in database " + shown(*p.Database)
			alter = "alter role " + ident(*p.Role) + " in database " + ident(*p.Database)
		case p.Role != nil:
			object, alter = "role "+shown(*p.Role), "alter role "+ident(*p.Role)
		case p.Database != nil:
			object, alter = "database "+shown(*p.Database), "alter database "+ident(*p.Database)
		default:
			object, alter = "all roles", "alter role all"
		}
		a.find("setting-preset", object, sqlText(alter+reset), a.config.Setting+" is "+literal(clip(p.Value)))
	}
	for name, value := range a.config.Shared.ConnConfig.RuntimeParams {
		if strings.EqualFold(name, a.config.Setting) && value != "" || name == "options" && strings.Contains(strings.ToLower(value), strings.ToLower(a.config.Setting)+"=") {
			a.find("setting-preset", "parameter "+name+" of Config.Shared", "", "Leave it out of the connection string.")
		}
	}
	return nil
}
