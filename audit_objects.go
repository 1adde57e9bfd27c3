package pgxtenant

import (
	"context"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// auditView is a view, materialized or not.
type auditView struct {
	OID       uint32
	Qualified string
	Kind      string
	Owner     uint32
	Invoker   bool
	Open      bool
	Grantees  string
	Reads     []uint32 // relations
}

func (v *auditView) String() string {
	if v.Kind == "m" {
		return "materialized view " + v.Qualified
	}
	return "view " + v.Qualified
}

// checkViews follows each view that the application may use down to the tables under it.
func (a *auditor) checkViews(ctx context.Context, tx pgx.Tx) error {
	views, err := auditRows[auditView](ctx, a, tx, `
		select c.oid, format('%I.%I', n.nspname, c.relname), c.relkind::text, c.relowner,
			exists (select from pg_options_to_table(c.reloptions) o where o.option_name = 'security_invoker' and o.option_value in ('true', 'on', '1', 'yes')),
			`+relationOpen+`,
			coalesce((select `+grantees+` from aclexplode(c.relacl) x where `+grantedToApp+` and x.grantee <> c.relowner), ''),
			array(select distinct d.refobjid from pg_rewrite w join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid
				and d.refclassid = 'pg_class'::regclass and d.refobjid <> c.oid where w.ev_class = c.oid order by 1)
		from pg_class c join pg_namespace n on n.oid = c.relnamespace
		where c.relkind in ('v', 'm') and `+ofUser+` order by 2`)
	if err != nil {
		return err
	}
	w := viewWalk{a: a, views: make(map[uint32]*auditView), found: make(map[*auditView]string)}
	for i := range views {
		w.views[views[i].OID] = &views[i]
	}
	for i := range views {
		if v := &views[i]; v.Open {
			w.from, w.seen = v, make(map[viewStep]bool)
			w.walk(v, nil)
		}
	}
	for v, code := range w.found {
		mend, decide := "", ""
		switch {
		case v.Kind != "m" && a.version >= 150000:
			mend = sqlText("alter view " + v.Qualified + " set (security_invoker = true)")
		case v.Grantees != "":
			mend = sqlText("revoke all on " + v.Qualified + " from " + v.Grantees)
		default:
			decide = "The application reaches it by rights that others have: take them from it."
		}
		a.find(code, v.String(), mend, decide)
	}
	return nil
}

// viewWalk goes down from a view to tables, by way of other views.
type viewWalk struct {
	a     *auditor
	views map[uint32]*auditView
	from  *auditView // which the application uses
	seen  map[viewStep]bool
	found map[*auditView]string
}

// viewStep is a view that is read with the rights of the owner of another, or of the caller.
type viewStep struct{ view, as *auditView }

func (w *viewWalk) walk(v, as *auditView) {
	if w.seen[viewStep{v, as}] {
		return
	}
	w.seen[viewStep{v, as}] = true
	if !v.Invoker || v.Kind == "m" {
		as = v
	}
	for _, oid := range v.Reads {
		if t := w.a.byOID[oid]; t != nil && t.tenant {
			w.table(t, v, as)
		} else if next := w.views[oid]; next != nil {
			if v.Kind == "m" { // what it holds was read when it was filled
				w.filled(next, v)
				continue
			}
			w.walk(next, as)
		}
	}
}

func (w *viewWalk) table(t *auditTable, v, as *auditView) {
	switch {
	case v.Kind == "m":
		w.filled(v, v)
	case as == nil: // the caller, whom policies hold or who is a finding himself
	case w.a.exemptFrom(as.Owner, t):
		w.found[as] = "view-past-policy"
	case w.found[as] == "" && w.a.version >= 150000:
		w.found[as] = "view-not-invoker"
	}
}

// filled notes a materialized view with tenants' rows, by what the application uses it through.
func (w *viewWalk) filled(v, m *auditView) {
	reads := slices.ContainsFunc(v.Reads, func(oid uint32) bool {
		t := w.a.byOID[oid]
		return t != nil && t.tenant
	})
	if reads {
		if m.Open {
			w.found[m] = "matview-past-policy"
		} else {
			w.found[w.from] = "matview-past-policy"
		}
		return
	}
	for _, oid := range v.Reads {
		if next := w.views[oid]; next != nil && !w.seen[viewStep{next, m}] {
			w.seen[viewStep{next, m}] = true
			w.filled(next, m)
		}
	}
}

// checkFunctions looks for functions that run with others' rights, and for those that run before policies.
func (a *auditor) checkFunctions(ctx context.Context, tx pgx.Tx) error {
	type function struct {
		OID                      uint32
		Signature, Schema        string
		Owner                    uint32
		Path                     *string
		Definer, Leakproof, Open bool
		Trigger, Temp            bool
		Grantees                 string
		Guards                   []uint32 // tables that it is a trigger of
	}
	functions, err := auditRows[function](ctx, a, tx, `
		select f.oid, f.oid::regprocedure::text, n.nspname::text, f.proowner,
			(select substr(s, strpos(s, '=') + 1) from unnest(f.proconfig) s where s like 'search_path=%'), f.prosecdef, f.proleakproof,
			`+schemaOpen+` and exists (select from aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) x where `+grantedToApp+`),
			f.prorettype = 'trigger'::regtype,
			exists (select from pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x
				where d.datname = current_database() and x.privilege_type = 'TEMPORARY' and `+grantedToApp+`),
			coalesce((select `+grantees+` from aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) x where `+grantedToApp+` and x.grantee <> f.proowner), ''),
			array(select distinct t.tgrelid from pg_trigger t where t.tgfoid = f.oid and not t.tgisinternal order by 1)
		from pg_proc f join pg_namespace n on n.oid = f.pronamespace
		where (f.prosecdef or f.proleakproof) and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'pgxtenant')
			and not exists (select from pg_depend e where e.classid = 'pg_proc'::regclass and e.objid = f.oid and e.deptype = 'e')
		order by 2`)
	if err != nil {
		return err
	}
	for _, f := range functions {
		object := "function " + f.Signature
		guards := slices.ContainsFunc(f.Guards, func(oid uint32) bool { return a.byOID[oid] != nil && a.byOID[oid].tenant })
		if f.Leakproof {
			a.find("leakproof-function", object, sqlText("alter function "+f.Signature+" not leakproof"), "")
		}
		if !f.Definer || a.isApp(f.Owner) || f.Trigger && !guards || !f.Trigger && !f.Open {
			continue
		}
		switch {
		case !a.exemptOwner(f.Owner):
		case f.Trigger:
			a.find("definer-trigger", object, sqlText("alter function "+f.Signature+" security invoker"), "Its owner is "+shown(a.roles[f.Owner].Name)+".")
		default:
			mend, decide := "", "The application may call it by rights that others have: take them from it."
			if f.Grantees != "" {
				mend, decide = sqlText("revoke execute on routine "+f.Signature+" from "+f.Grantees), ""
			}
			a.find("definer-exempt-owner", object, mend, strings.TrimSpace("Its owner is "+shown(a.roles[f.Owner].Name)+". "+decide))
		}
		if !fixedPath(f.Path, f.Temp) {
			a.find("definer-search-path", object, sqlText("alter routine "+f.Signature+" set search_path = pg_catalog, "+ident(f.Schema)+", pg_temp"),
				"Name pg_temp last, for it is searched first otherwise.")
		}
	}
	return nil
}

// exemptOwner reports whether some tenant table's policies do not hold a role.
func (a *auditor) exemptOwner(role uint32) bool {
	if r := a.roles[role]; r == nil || r.exempt() {
		return true
	}
	return slices.ContainsFunc(a.tables, func(t *auditTable) bool {
		return t.tenant && t.Enabled && a.exemptFrom(role, t)
	})
}

// fixedPath reports whether a function's search_path leaves its caller nothing to put in the way.
func fixedPath(path *string, temp bool) bool {
	if path == nil || strings.Contains(*path, "$user") {
		return false
	}
	var names []string
	for name := range strings.SplitSeq(*path, ",") {
		names = append(names, strings.Trim(strings.TrimSpace(name), `"`))
	}
	if at := slices.Index(names, "pg_temp"); at >= 0 {
		return at > 0 || len(names) == 1
	}
	return !temp || len(names) == 1 && names[0] == ""
}

// checkRules looks for rewrite rules on tenant tables.
func (a *auditor) checkRules(ctx context.Context, tx pgx.Tx) error {
	type rule struct {
		Table      uint32
		Name       string
		Definition string
	}
	rules, err := auditRows[rule](ctx, a, tx, `
		select w.ev_class, w.rulename::text, pg_get_ruledef(w.oid) from pg_rewrite w join pg_class c on c.oid = w.ev_class and c.relkind in ('r', 'p')
		where w.rulename <> '_RETURN' order by 1, 2`)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if t := a.byOID[r.Table]; t != nil && t.tenant {
			a.find("rewrite-rule", "rule "+shown(r.Name)+" on "+t.String(), sqlText("drop rule "+ident(r.Name)+" on "+t.Qualified), r.Definition)
		}
	}
	return nil
}
