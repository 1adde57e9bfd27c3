package bench

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// The Policy jobs compare forms of a policy on two tables of 1,000,000 rows and 1,000 tenants, of which the
// first has half the rows. They show what the policy alone costs, with the tenant fixed for the session, and
// what EnableRLS's costs end to end, each against the same query with the tenant written into it by hand, as a
// role that no policy holds.
var (
	PolicyPoint = policyJob(policyQuery{
		name: "PolicyPoint", unit: "row by its primary key", warm: 2 * policyIDs,
		byHand: "select body from doc where tenant_id = $1 and id = $2",
		bound:  "select body from doc where id = $1",
		arg:    func(n int, t policyTenant) any { return t.ids[spread(n, len(t.ids))] },
	})
	PolicyRange = policyJob(policyQuery{
		name: "PolicyRange", unit: "50 rows in the order of an index", warm: 2 * policyDays,
		byHand: "select id, body from doc where tenant_id = $1 and created >= $2 order by created limit 50",
		bound:  "select id, body from doc where created >= $1 order by created limit 50",
		arg:    func(n int, _ policyTenant) any { return policyDay(spread(n, policyDays-1)) },
	})
	PolicyAggregate = policyJob(policyQuery{
		name: "PolicyAggregate", unit: "count and sum over all rows", warm: 8,
		byHand: "select count(*), sum(amount) from doc where tenant_id = $1",
		bound:  "select count(*), sum(amount) from doc",
	})
	PolicyJoin = policyJob(policyQuery{
		name: "PolicyJoin", unit: "a tenth of the rows with another table's", warm: 8,
		byHand: "select d.kind, sum(l.qty) from doc d join line l on l.doc_id = d.id where d.tenant_id = $1 and l.tenant_id = $1 and d.created >= $2 group by d.kind",
		bound:  "select d.kind, sum(l.qty) from doc d join line l on l.doc_id = d.id where d.created >= $1 group by d.kind",
		arg:    func(int, policyTenant) any { return policyDay(policyDays * 9 / 10) },
	})
)

// PolicyJobs are those of which ExplainPolicies tells the plans.
var PolicyJobs = []*Job{&PolicyPoint, &PolicyRange, &PolicyAggregate, &PolicyJoin}

const (
	policyRows    = 1_000_000
	policyTenants = 1_000
	policyDays    = 100 // over which the rows were made
	policyIDs     = 500 // of each tenant's rows that are asked for
)

// policyForm is a way to write the policy of a table. Each has a role of its own, so that they share the tables.
type policyForm struct {
	name, what  string
	permissive  string
	restrictive string
}

// enableRLS is the form that EnableRLS makes, as the catalogue has it.
const enableRLS = "enablerls"

var policyForms = []policyForm{
	{name: enableRLS, what: "EnableRLS"},
	{name: "bare", what: "setting itself", permissive: "tenant_id = nullif(current_setting('app.current_tenant_id', true), '')"},
	{name: "nonullif", what: "setting, no nullif", permissive: "tenant_id = current_setting('app.current_tenant_id', true)"},
	{name: "sql", what: "SQL function", permissive: "tenant_id = tenant_by_sql()"},
	{name: "plpgsql", what: "PL/pgSQL function", permissive: "tenant_id = tenant_by_plpgsql()"},
	{name: "wrapped", what: "(select PL/pgSQL function)", permissive: "tenant_id = (select tenant_by_plpgsql())"},
	{name: "array", what: "= any (array(select …))", permissive: "tenant_id = any (array(select nullif(current_setting('app.current_tenant_id', true), '')))"},
	{name: "both", what: "EnableRLS and setting",
		permissive: "tenant_id = (select nullif(current_setting('app.current_tenant_id', true), '')) and tenant_id = nullif(current_setting('app.current_tenant_id', true), '')"},
	{name: "twin", what: "EnableRLS, restrictive too",
		permissive:  "tenant_id = (select nullif(current_setting('app.current_tenant_id', true), ''))",
		restrictive: "tenant_id = (select nullif(current_setting('app.current_tenant_id', true), ''))"},
}

// afterForms are compared on a connection that has served the large tenant first.
var afterForms = policyForms[:2]

// policyTenant is one of the two tenants that the jobs ask for.
type policyTenant struct {
	name, id string
	ids      []int // of rows of its
}

func largeTenant() policyTenant {
	t := policyTenant{name: "large", id: tenantID(0)}
	for i := range policyIDs {
		t.ids = append(t.ids, 2*spread(i, policyRows/2))
	}
	return t
}

func smallTenant() policyTenant {
	t := policyTenant{name: "small", id: tenantID(7)}
	for i := range policyIDs {
		t.ids = append(t.ids, 2*(7+i*(policyTenants-1))+1)
	}
	return t
}

// policyQuery is one query in its two spellings. arg is its argument beside the tenant; nil if there is none.
type policyQuery struct {
	name, unit    string
	warm          int // operations that touch every page, and after which the server has chosen its plans
	byHand, bound string
	arg           func(n int, t policyTenant) any
}

func (q policyQuery) args(n int, t policyTenant) []any {
	if q.arg == nil {
		return nil
	}
	return []any{q.arg(n, t)}
}

func policyJob(q policyQuery) Job {
	job := Job{Name: q.name, Unit: q.unit, Warm: q.warm}
	job.open = func(ctx context.Context, l *Lab) ([]Way, error) { return openPolicy(ctx, l, q) }
	job.explain = func(ctx context.Context, l *Lab) ([]PolicyPlan, error) { return explainPolicy(ctx, l, q) }
	for _, tenant := range []string{"small", "large"} {
		job.Rows = append(job.Rows, Row{What: tenant + ": EnableRLS, end to end", Base: "hand-" + tenant, Way: "tenant-" + tenant, Limit: 1.1, Allocs: noLimit})
		for _, f := range policyForms {
			job.Rows = append(job.Rows, Row{What: tenant + ", policy alone: " + f.what, Base: "hand-" + tenant, Way: f.name + "-" + tenant, Allocs: noLimit, Form: f.name != enableRLS})
		}
	}
	for _, f := range afterForms {
		job.Rows = append(job.Rows, Row{What: "small after large, end to end: " + f.what, Base: "hand-after", Way: f.name + "-after", Allocs: noLimit, Form: true})
	}
	return job
}

func openPolicy(ctx context.Context, l *Lab, q policyQuery) (ways []Way, err error) {
	if err := l.fillPolicies(ctx); err != nil {
		return nil, err
	}
	small, large := smallTenant(), largeTenant()
	for _, t := range []policyTenant{small, large} {
		hand, err := pool(ctx, l.near().bypass, nil)
		if err != nil {
			return ways, err
		}
		ways = append(ways, Way{Name: "hand-" + t.name, Close: hand.Close, Do: func(n int) error {
			return drain(hand.Query(ctx, q.byHand, append([]any{t.id}, q.args(n, t)...)...))
		}})
		db, err := tenantDB(ctx, l.policyURL(enableRLS), nil)
		if err != nil {
			return ways, err
		}
		bound := pgxtenant.WithTenantID(ctx, t.id)
		ways = append(ways, Way{Name: "tenant-" + t.name, Close: db.Close, Do: func(n int) error {
			return drain(db.Query(bound, q.bound, q.args(n, t)...))
		}})
		for _, f := range policyForms {
			session, err := pool(ctx, l.policyURL(f.name), func(c *pgxpool.Config) {
				c.ConnConfig.RuntimeParams["app.current_tenant_id"] = t.id
			})
			if err != nil {
				return ways, err
			}
			ways = append(ways, Way{Name: f.name + "-" + t.name, Close: session.Close, Do: func(n int) error {
				return drain(session.Query(ctx, q.bound, q.args(n, t)...))
			}})
		}
	}
	after, err := openAfter(ctx, l, q, small, large)
	return append(ways, after...), err
}

// openAfter sets up connections that serve the large tenant until the server has its plans, and the small one
// from then on, as any connection of a shared pool may.
func openAfter(ctx context.Context, l *Lab, q policyQuery, small, large policyTenant) (ways []Way, err error) {
	who := func(n int) policyTenant {
		if n < 6 {
			return large
		}
		return small
	}
	hand, err := pool(ctx, l.near().bypass, nil)
	if err != nil {
		return nil, err
	}
	ways = append(ways, Way{Name: "hand-after", Close: hand.Close, Do: func(n int) error {
		t := who(n)
		return drain(hand.Query(ctx, q.byHand, append([]any{t.id}, q.args(n, t)...)...))
	}})
	for _, f := range afterForms {
		db, err := tenantDB(ctx, l.policyURL(f.name), nil)
		if err != nil {
			return ways, err
		}
		ways = append(ways, Way{Name: f.name + "-after", Close: db.Close, Do: func(n int) error {
			t := who(n)
			return drain(db.Query(pgxtenant.WithTenantID(ctx, t.id), q.bound, q.args(n, t)...))
		}})
	}
	return ways, nil
}

// drain reads a result to its end. One without rows is an error: somebody else's rows would be nobody's.
func drain(rows pgx.Rows, err error) error {
	if err != nil {
		return err
	}
	count := 0
	for rows.Next() {
		count++
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if count == 0 {
		return errNoRow
	}
	return nil
}

// policyDay is as PostgreSQL writes it, which suits a parameter and EXPLAIN alike.
func policyDay(n int) string {
	return time.Date(2026, 1, 1+n, 0, 0, 0, 0, time.UTC).Format(time.RFC3339)
}

func (l *Lab) policyRole(form string) string { return l.db.App + "_" + form }

func (l *Lab) policyURL(form string) string {
	return strings.Replace(l.near().bypass, "//"+l.bypass+":", "//"+l.policyRole(form)+":", 1)
}

// fillPolicies makes the tables of the Policy jobs, and a role for each form of a policy.
func (l *Lab) fillPolicies(ctx context.Context) error {
	if l.filledPolicies {
		return nil
	}
	l.filledPolicies = true
	made, err := l.enabledPolicy(ctx)
	if err != nil {
		return err
	}
	statements := []string{
		`create table doc (tenant_id text not null, id bigint not null, kind int not null, amount int not null, created timestamptz not null, body text)`,
		`create table line (tenant_id text not null, id bigint not null, doc_id bigint not null, qty int not null)`,
		fmt.Sprintf(`insert into doc select 't' || lpad(case i %% 2 when 0 then 0 else 1 + (i / 2 + %[1]d - 2) %% (%[1]d - 1) end::text, 6, '0'), i, i %% 100, i %% 1000,
			timestamptz '2026-01-01 00:00:00+00' + abs(hashint8(i)::bigint) %% (%[2]d * 86400) * interval '1 s', md5(i::text)
			from generate_series(0, %[3]d) i`, policyTenants, policyDays, policyRows-1),
		`insert into line select tenant_id, id, id, id % 10 from doc`,
		`alter table doc add primary key (tenant_id, id)`, `create index on doc (tenant_id, created)`,
		`alter table line add primary key (tenant_id, id)`, `create index on line (tenant_id, doc_id)`,
		`create function tenant_by_sql() returns text stable parallel safe language sql as
			$$ select nullif(current_setting('app.current_tenant_id', true), '') $$`,
		`create function tenant_by_plpgsql() returns text stable parallel safe language plpgsql as
			$$ begin return nullif(current_setting('app.current_tenant_id', true), ''); end $$`,
		`alter table doc enable row level security, force row level security`,
		`alter table line enable row level security, force row level security`,
		"grant select on doc, line to " + ident(l.bypass),
	}
	for _, f := range policyForms {
		role := ident(l.policyRole(f.name))
		statements = append(statements, "create role "+role+" login password '"+l.password+"'", "grant select on doc, line to "+role)
		if f.name == enableRLS {
			f.permissive = made
		}
		for _, table := range []string{"doc", "line"} {
			statements = append(statements, "create policy "+ident(f.name)+" on "+table+" to "+role+" using ("+f.permissive+")")
			if f.restrictive != "" {
				statements = append(statements, "create policy "+ident(f.name+"_too")+" on "+table+" as restrictive to "+role+" using ("+f.restrictive+")")
			}
		}
	}
	return execute(ctx, l.db.SuperURL(), append(statements, "vacuum analyze doc, line")...)
}

// enabledPolicy is what EnableRLS has a table's policy ask of its rows.
func (l *Lab) enabledPolicy(ctx context.Context) (expression string, err error) {
	if err := execute(ctx, l.db.OwnerURL(), "create table enabled ()"); err != nil {
		return "", err
	}
	db, err := tenantDB(ctx, l.db.AppURL(), func(c *pgxtenant.Config) { c.Admin, err = pgxpool.ParseConfig(l.db.OwnerURL()) })
	if err != nil {
		return "", err
	}
	defer db.Close()
	if err := db.EnableRLS(ctx, pgxtenant.Tables("enabled")...); err != nil {
		return "", err
	}
	err = db.Admin().QueryRow(ctx, "select qual from pg_policies where tablename = 'enabled' and policyname = $1", pgxtenant.PolicyName).Scan(&expression)
	return expression, err
}
