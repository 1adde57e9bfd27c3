package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// PolicyPlan is how the server runs a query under one form of a policy.
type PolicyPlan struct {
	Form   string `json:"form"`
	Tenant string `json:"tenant"`
	Shape  string `json:"shape"` // the kinds of nodes, from the top

	// Estimated and Actual are the rows of table doc that the policy lets through, per loop.
	Estimated float64 `json:"estimated"`
	Actual    float64 `json:"actual"`

	// PerRow is set if the setting, or the function that reads it, is evaluated for each row.
	PerRow bool `json:"per_row"`

	// Generic is set if the server uses one plan whatever the arguments are.
	Generic bool    `json:"generic"`
	Millis  float64 `json:"millis"` // the server's own time, of one execution
}

// Explain tells the plans of each of the job's ways; none unless it is one of PolicyJobs.
func (j *Job) Explain(ctx context.Context, l *Lab) ([]PolicyPlan, error) {
	if j.explain == nil {
		return nil, nil
	}
	return j.explain(ctx, l)
}

func explainPolicy(ctx context.Context, l *Lab, q policyQuery) (plans []PolicyPlan, err error) {
	if err := l.fillPolicies(ctx); err != nil {
		return nil, err
	}
	forms := append([]policyForm{{name: "hand", what: "tenant_id = $1 by hand"}}, policyForms...)
	for _, t := range []policyTenant{smallTenant(), largeTenant()} {
		for _, f := range forms {
			url, sql, args := l.policyURL(f.name), q.bound, q.args(0, t)
			if f.name == "hand" {
				url, sql, args = l.near().bypass, q.byHand, append([]any{t.id}, args...)
			}
			plan, err := explain(ctx, url, t.id, sql, args)
			if err != nil {
				return nil, fmt.Errorf("explain %s: %w", f.name, err)
			}
			plan.Form, plan.Tenant = f.what, t.name
			plans = append(plans, plan)
		}
	}
	return plans, nil
}

// explain prepares sql, uses it until the server has settled on a kind of plan, and looks at that.
func explain(ctx context.Context, url, tenant, sql string, args []any) (p PolicyPlan, err error) {
	one, err := pool(ctx, url, func(c *pgxpool.Config) { c.MaxConns = 1 })
	if err != nil {
		return p, err
	}
	defer one.Close()
	conn, err := one.Acquire(ctx)
	if err != nil {
		return p, err
	}
	defer conn.Release()
	if _, err := conn.Exec(ctx, "select set_config('app.current_tenant_id', $1, false)", tenant); err != nil {
		return p, err
	}
	values := make([]string, len(args))
	for i, arg := range args {
		values[i] = fmt.Sprintf("'%v'", arg)
	}
	call := "execute p"
	if len(values) > 0 {
		call += " (" + strings.Join(values, ", ") + ")"
	}
	if _, err := conn.Exec(ctx, "prepare p as "+sql); err != nil {
		return p, err
	}
	for range 7 {
		if _, err := conn.Exec(ctx, call); err != nil {
			return p, err
		}
	}
	var text string
	if err := conn.QueryRow(ctx, "explain (analyze, timing off, format json) "+call, pgx.QueryExecModeSimpleProtocol).Scan(&text); err != nil {
		return p, err
	}
	var explained []struct {
		Plan   planNode
		Millis float64 `json:"Execution Time"`
	}
	if err := json.Unmarshal([]byte(text), &explained); err != nil || len(explained) != 1 {
		return p, fmt.Errorf("bench: not one plan: %s", text)
	}
	p.Millis = explained[0].Millis
	p.read(&explained[0].Plan)
	err = conn.QueryRow(ctx, "select generic_plans > 1 from pg_prepared_statements where name = 'p'").Scan(&p.Generic)
	return p, err
}

// planNode is what is looked at of a node of EXPLAIN's JSON.
type planNode struct {
	Kind         string  `json:"Node Type"`
	Relationship string  `json:"Parent Relationship"`
	Relation     string  `json:"Relation Name"`
	Parallel     bool    `json:"Parallel Aware"`
	Estimated    float64 `json:"Plan Rows"`
	Actual       float64 `json:"Actual Rows"`
	Filter       string
	JoinFilter   string `json:"Join Filter"`
	Plans        []planNode
}

func (p *PolicyPlan) read(n *planNode) {
	if n.Relationship == "InitPlan" {
		return
	}
	kind := n.Kind
	if n.Parallel && !strings.HasPrefix(kind, "Parallel") {
		kind = "Parallel " + kind
	}
	if n.Relation != "" {
		kind += " " + n.Relation
	}
	if p.Shape != "" {
		p.Shape += ", "
	}
	p.Shape += kind
	if n.Relation == "doc" {
		p.Estimated, p.Actual = n.Estimated, n.Actual
	}
	for _, condition := range []string{n.Filter, n.JoinFilter} {
		if strings.Contains(condition, "current_setting(") || strings.Contains(condition, "tenant_by_") {
			p.PerRow = true
		}
	}
	for i := range n.Plans {
		p.read(&n.Plans[i])
	}
}
