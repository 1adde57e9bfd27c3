package pgxtenant

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// auditPolicy is a policy of a table, with what the server made of it.
type auditPolicy struct {
	OID          uint32
	Table        uint32
	Name         string
	Command      string // of pg_policy.polcmd
	Permissive   bool
	ForApp       bool // it applies to a role that the application acts as
	Using, Check string
	Columns      []policyColumn // of its own table, that it reads

	table     *auditTable
	functions []*auditFunction
	onTenant  bool // it reads the tenant setting, or a function of the package's
	sealed    bool // it calls a function of the package's

	seen   map[string]bool // what the evaluation showed, by the names of admits
	raised string          // the server's refusal, with no tenant bound
	unseen string          // why it could not be evaluated
}

type policyColumn struct {
	Name    string `json:"name"`
	Type    string `json:"type"`
	NotNull bool   `json:"not_null"`
}

func (p *auditPolicy) String() string {
	return "policy " + shown(p.Name) + " on " + p.table.String()
}

func (p *auditPolicy) columnNames() []string {
	names := make([]string, len(p.Columns))
	for i, c := range p.Columns {
		names[i] = c.Name
	}
	return names
}

// old is what the policy asks of rows that are read, changed or deleted; empty if it does not say.
func (p *auditPolicy) old() string {
	if p.Command == "a" {
		return ""
	}
	return p.Using
}

// fresh is what it asks of rows that are written.
func (p *auditPolicy) fresh() string {
	switch {
	case p.Command == "r" || p.Command == "d":
		return ""
	case p.Check != "":
		return p.Check
	}
	return p.Using
}

// covers reports whether p applies wherever q does.
func (p *auditPolicy) covers(q *auditPolicy) bool { return p.Command == "*" || p.Command == q.Command }

func (a *auditor) readPolicies(ctx context.Context, tx pgx.Tx) error {
	policies, err := auditRows[auditPolicy](ctx, a, tx, `
		select p.oid, p.polrelid, p.polname::text, p.polcmd::text, p.polpermissive, p.polroles = '{0}' or p.polroles && ROLES,
			coalesce(pg_get_expr(p.polqual, p.polrelid), ''), coalesce(pg_get_expr(p.polwithcheck, p.polrelid), ''),
			(select coalesce(json_agg(json_build_object('name', a.attname, 'not_null', a.attnotnull,
					'type', format_type(case y.typtype when 'd' then y.typbasetype else y.oid end, null)) order by a.attnum), '[]')
				from pg_attribute a join pg_type y on y.oid = a.atttypid where a.attrelid = p.polrelid and a.attnum in (
					select d.refobjsubid from pg_depend d where d.classid = 'pg_policy'::regclass and d.objid = p.oid
						and d.refclassid = 'pg_class'::regclass and d.refobjid = p.polrelid and d.refobjsubid > 0))
		from pg_policy p join pg_class c on c.oid = p.polrelid
		order by p.polrelid, p.polname`)
	if err != nil {
		return err
	}
	functions, err := auditRows[auditFunction](ctx, a, tx, `
		with used as (select distinct d.objid policy, d.refobjid oid from pg_depend d where d.classid = 'pg_policy'::regclass and d.refclassid = 'pg_proc'::regclass),
		text as (select f.oid, lower(case when f.prokind in ('f', 'p') then pg_get_functiondef(f.oid) else '' end) def
			from pg_proc f where f.oid in (select oid from used))
		select u.policy, n.nspname::text, format('%I.%I', n.nspname, f.proname), f.oid::regprocedure::text, f.provolatile::text, f.pronargs,
			strpos(t.def, SETTING) > 0, t.def ~ 'current_setting'
		from used u join pg_proc f on f.oid = u.oid join pg_namespace n on n.oid = f.pronamespace join text t on t.oid = f.oid
		where n.nspname <> 'pg_catalog' order by 1, 4`)
	if err != nil {
		return err
	}
	byOID := make(map[uint32]*auditPolicy, len(policies))
	for i := range policies {
		p := &policies[i]
		p.seen = make(map[string]bool)
		if p.table = a.byOID[p.Table]; p.table == nil {
			continue
		}
		p.table.policies = append(p.table.policies, p)
		byOID[p.OID] = p
		p.onTenant = strings.Contains(strings.ToLower(p.Using+p.Check), literal(strings.ToLower(a.config.Setting)))
	}
	for i := range functions {
		f := &functions[i]
		if p := byOID[f.Policy]; p != nil {
			p.functions = append(p.functions, f)
			p.sealed = p.sealed || f.Schema == ownSchema
			p.onTenant = p.onTenant || p.sealed || f.Reads
		}
	}
	return nil
}

// judgePolicies says what the policies' texts, and their evaluation, mean.
func (a *auditor) judgePolicies() {
	for _, t := range a.tables {
		if !t.tenant || !t.Open || len(t.policies) == 0 {
			continue
		}
		onTenant := t.column != nil
		for _, p := range t.policies {
			onTenant = onTenant || p.onTenant
		}
		if !onTenant {
			if t.Enabled {
				a.find("rls-not-on-tenant", t.String(), "", "If its rows belong to tenants, give it a tenant column by TenantDB.EnableRLS.")
			}
			continue
		}
		for _, p := range t.policies {
			a.judgeFunctions(p)
			a.judgeCost(p)
			if p.Permissive && p.ForApp {
				a.judge(p)
			}
		}
	}
}

// judge says what a permissive policy lets through.
func (a *auditor) judge(p *auditPolicy) {
	mend, decide := a.alterPolicy(p)
	nobody := func(rows ...string) string {
		for _, state := range []string{unset, empty} {
			for _, row := range rows {
				if p.seen[admits(state, row, false)] {
					return fmt.Sprintf("Evaluated with the setting %s, on a row whose tenant is %s: it is read.", state, row)
				}
				if p.seen[admits(state, row, true)] {
					return fmt.Sprintf("Evaluated with the setting %s, on a row whose tenant is %s: it is written.", state, row)
				}
			}
		}
		return ""
	}
	othersOld, othersNew := p.seen[admits(bound, others, false)], p.seen[admits(bound, others, true)]
	anybody := nobody(others, own)
	switch {
	case othersOld:
		a.find("policy-admits-others", p.String(), mend, "Evaluated as one tenant on another's row: "+p.old()+decide)
	case othersNew:
		a.find("policy-check-open", p.String(), mend, "Evaluated as one tenant on another's row: "+p.fresh()+decide)
	case anybody != "":
		a.find("policy-admits-unset", p.String(), mend, anybody+decide)
	case nobody(withEmpty, withNothing) != "":
		a.find("policy-admits-empty", p.String(), mend, nobody(withEmpty, withNothing)+decide)
	case p.raised != "":
		a.find("policy-raises", p.String(), mend, p.raised+decide)
	case a.config.Seal != nil && p.onTenant && !p.sealed:
		a.find("policy-unsealed", p.String(), mend, "It does not call "+sealFunction+", as Config.Seal would have it."+decide)
	case p.unseen != "":
		a.find("not-audited", p.String(), "", "It could not be evaluated: "+p.unseen)
	}
	if !othersOld && !othersNew && anybody == "" && !p.asksForTenant() {
		a.find("policy-besides", p.String(), mend, "It reads: "+orDefault(p.Using, p.Check)+decide)
	}
}

// asksForTenant reports whether the policy, or a restrictive one that always holds with it, depends on the tenant.
func (p *auditPolicy) asksForTenant() bool {
	if p.onTenant || p.toldApart() || orDefault(p.Using, "false") == "false" && orDefault(p.Check, "false") == "false" {
		return true
	}
	return slices.ContainsFunc(p.table.policies, func(r *auditPolicy) bool {
		return !r.Permissive && r.ForApp && r.onTenant && r.covers(p)
	})
}

// toldApart reports whether the policy, evaluated as one tenant, let its own row through, and not another's.
func (p *auditPolicy) toldApart() bool {
	for _, fresh := range []bool{false, true} {
		if p.seen[admits(bound, own, fresh)] && !p.seen[admits(bound, others, fresh)] {
			return true
		}
	}
	return false
}

// alterPolicy is SQL that makes a policy ask for the tenant and nothing else, or else what to say instead.
func (a *auditor) alterPolicy(p *auditPolicy) (sql, decide string) {
	expression := a.expression(p.table)
	if expression == "" {
		return "", " There is no tenant column of a type that EnableRLS knows: write the policy anew, or drop it."
	}
	sql = "alter policy " + ident(p.Name) + " on " + p.table.Qualified
	if p.Command != "a" {
		sql += " using (" + expression + ")"
	}
	if p.Command != "r" && p.Command != "d" {
		sql += " with check (" + expression + ")"
	}
	return sqlText(sql), ""
}

// expression is what EnableRLS would have a policy ask; empty if the tenant column is not fit for it.
func (a *auditor) expression(t *auditTable) string {
	if t.column == nil {
		return ""
	}
	if _, ok := tenantTypes[t.column.Type]; !ok {
		return ""
	}
	return policyExpression(a.config.Setting, t.column.Name, t.column.Type, a.config.Seal != nil)
}

func (a *auditor) judgeFunctions(p *auditPolicy) {
	for _, f := range p.functions {
		// One without arguments that tells tenants apart, where nothing else does, asks another that does.
		byOther := f.Args == 0 && !p.onTenant && p.toldApart()
		if f.Volatility == "i" && (f.Reads || f.Settings || byOther) {
			a.find("policy-immutable-function", "function "+f.Signature, sqlText("alter function "+f.Signature+" stable"), "Called by policies.")
		}
	}
}

// judgeCost looks for what is evaluated anew for each row: the setting, or a function that is not
// IMMUTABLE, outside of a sub-select.
func (a *auditor) judgeCost(p *auditPolicy) {
	outside := outsideSelects(p.Using) + " " + outsideSelects(p.Check)
	found := ""
	if strings.Contains(outside, "current_setting(") {
		found = "current_setting"
	}
	for _, f := range p.functions {
		_, bare, _ := strings.Cut(f.Name, ".")
		if f.Volatility != "i" && (f.Reads || f.Settings || f.Args == 0 || f.Schema == ownSchema) &&
			(strings.Contains(outside, f.Name+"(") || strings.Contains(outside, bare+"(")) {
			found = f.Name
		}
	}
	if found == "" {
		return
	}
	detail := found + " stands outside of a sub-select in: " + orDefault(p.Using, p.Check)
	if mend, _ := a.alterPolicy(p); mend != "" && p.onTenant && len(p.Columns) == 1 && !compound.MatchString(p.Using+" "+p.Check) {
		a.find("policy-per-row", p.String(), mend, detail)
		return
	}
	a.find("policy-per-row", p.String(), "", detail+" Put it into a scalar sub-select: (select "+found+"(…)).")
}

var subSelect = regexp.MustCompile(`\(\s*SELECT\s`)

var compound = regexp.MustCompile(`\b(AND|OR|NOT|CASE|COALESCE|IS)\b`)

// outsideSelects is the text of an expression without its sub-selects.
func outsideSelects(expression string) string {
	var sb strings.Builder
	for {
		start := subSelect.FindStringIndex(expression)
		if start == nil {
			return sb.String() + expression
		}
		sb.WriteString(expression[:start[0]])
		depth, quoted, i := 0, false, start[0]
		for ; i < len(expression); i++ {
			switch c := expression[i]; {
			case c == '\'':
				quoted = !quoted
			case quoted:
			case c == '(':
				depth++
			case c == ')':
				depth--
			}
			if depth == 0 {
				break
			}
		}
		expression = expression[min(i+1, len(expression)):]
	}
}
