package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The states in which policies are evaluated, and the rows that they are asked about. The unset one comes first:
// a session in which the setting was ever set has it empty ever after.
const (
	unset, empty, bound                 = "unset", "empty", "bound"
	others, own, withEmpty, withNothing = "b", "a", "empty", "NULL"
)

// samples are two tenants' IDs, as values of a column's type. Of other types only NULL is tried.
var samples = map[string][2]string{
	"text": {"a", "b"}, "character varying": {"a", "b"}, "character": {"a", "b"}, "citext": {"a", "b"}, "name": {"a", "b"},
	"uuid":    {"00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"},
	"integer": {"1", "2"}, "bigint": {"1", "2"}, "smallint": {"1", "2"}, "numeric": {"1", "2"},
}

// sampleIDs finds them for a type, which may be an extension's.
func sampleIDs(typ string) [2]string {
	return samples[typ[strings.LastIndexByte(typ, '.')+1:]]
}

// probe is one question to the server: what the policies of some tables, which are the same but for the
// tables' names, make of some rows.
type probe struct {
	sql      string
	rows     []string // what each row is
	tenant   string   // the ID that is bound
	policies []*auditPolicy
	fresh    []bool // of each policy, which side is asked
}

// probePolicies has the server evaluate the policies.
func (a *auditor) probePolicies(ctx context.Context) error {
	probes := make(map[string]*probe)
	var order []*probe
	for _, t := range a.tables {
		for _, p := range t.policies {
			if !t.tenant || !p.Permissive || !p.ForApp {
				continue
			}
			for _, fresh := range []bool{false, true} {
				q := t.probe(p, fresh)
				if q == nil {
					continue
				}
				if same := probes[q.sql+q.tenant]; same != nil {
					q = same
				} else {
					probes[q.sql+q.tenant] = q
					order = append(order, q)
				}
				q.policies, q.fresh = append(q.policies, p), append(q.fresh, fresh)
			}
		}
	}
	states := []string{unset, empty, bound}
	var preset string
	if err := a.app.QueryRow(ctx, "select coalesce(pg_catalog.current_setting("+literal(a.config.Setting)+", true), '')").Scan(&preset); err != nil {
		return err
	}
	if preset != "" { // so it cannot be unset
		states = states[1:]
		if !slices.ContainsFunc(a.findings, func(f Finding) bool { return f.Code == "setting-preset" }) {
			a.find("setting-preset", "the application's connections", "", "Neither a role nor the database has it: look at the server's configuration, at the pooler, and at the hooks of Config.Shared.")
		}
	}
	for _, state := range states {
		for _, q := range order {
			if err := a.ask(ctx, q, state); err != nil {
				return fmt.Errorf("evaluate %v: %w", q.policies[0], err)
			}
		}
	}
	return nil
}

// probe writes the query that asks a policy, together with the restrictive ones that always hold with it, about rows of
// the columns that they read. It is nil if the policy says nothing about such rows.
func (t *auditTable) probe(p *auditPolicy, fresh bool) *probe {
	side := (*auditPolicy).old
	if fresh {
		side = (*auditPolicy).fresh
	}
	if side(p) == "" {
		return nil
	}
	conditions, columns := []string{"(" + side(p) + ")"}, slices.Clone(p.Columns)
	for _, r := range t.policies {
		if !r.Permissive && r.ForApp && r.covers(p) && side(r) != "" {
			conditions, columns = append(conditions, "("+side(r)+")"), append(columns, r.Columns...)
		}
	}
	condition := strings.Join(conditions, " and ")
	slices.SortFunc(columns, func(x, y policyColumn) int { return strings.Compare(x.Name, y.Name) })
	columns = slices.Compact(columns)

	q := &probe{tenant: "a"}
	names := []string{`"pgxtenant row"`}
	var kinds []string
	for _, c := range columns {
		names = append(names, ident(c.Name))
		if t.column != nil && c.Name == t.column.Name {
			kinds = t.column.kinds()
			q.tenant = orDefault(sampleIDs(t.column.Type)[0], "a")
		}
	}
	if kinds == nil {
		kinds = []string{others}
	}
	var values []string
	for _, kind := range kinds {
		for _, variant := range variants(condition) {
			row := fmt.Sprint(len(q.rows))
			for _, c := range columns {
				if t.column != nil && c.Name == t.column.Name {
					row += ", " + t.column.sample(kind)
				} else {
					row += ", " + c.sample(variant)
				}
			}
			values, q.rows = append(values, "("+row+")"), append(q.rows, kind)
		}
	}
	alias := "t"
	if strings.Contains(condition, ident(t.Name)+".") || strings.Contains(condition, t.Name+".") {
		alias = t.Name
	}
	q.sql = fmt.Sprintf(`select coalesce(%s, false) from (values %s) as %s(%s) order by "pgxtenant row"`,
		condition, strings.Join(values, ", "), ident(alias), strings.Join(names, ", "))
	return q
}

// kinds are the rows that there can be, by their tenant.
func (c *auditColumn) kinds() (kinds []string) {
	if sampleIDs(c.Type)[0] == "" {
		return []string{others} // by a NULL, for want of anything else
	}
	kinds = []string{others, own}
	if (c.Type == "text" || c.Type == "character varying") && !c.NeverEmpty {
		kinds = append(kinds, withEmpty)
	}
	if !c.NotNull {
		kinds = append(kinds, withNothing)
	}
	return kinds
}

func (c *auditColumn) sample(kind string) string {
	ids, value := sampleIDs(c.Type), "null"
	switch {
	case kind == others && ids[1] != "":
		value = literal(ids[1])
	case kind == own:
		value = literal(ids[0])
	case kind == withEmpty:
		value = "''"
	}
	return value + "::" + c.Type
}

// variants are what the other columns hold: nothing, then true, then each of the texts that the condition has in it.
func variants(condition string) []string {
	texts := []string{"", "some"}
	for _, m := range textInPolicy.FindAllStringSubmatch(condition, 8) {
		if !slices.Contains(texts, m[1]) {
			texts = append(texts, m[1])
		}
	}
	return texts
}

var textInPolicy = regexp.MustCompile(`'((?:[^'\\]|'')+)'::text`)

// sample is a value of a column that does not say whose the row is. The text is quoted already.
func (c *policyColumn) sample(text string) string {
	value := "null"
	switch {
	case c.Type == "boolean":
		if value = "true"; text == "" && c.NotNull {
			value = "false"
		} else if text == "" {
			value = "null"
		}
	case text != "" && (c.Type == "text" || c.Type == "character varying"):
		value = "'" + text + "'"
	case c.NotNull && sampleIDs(c.Type)[0] != "":
		value = literal(sampleIDs(c.Type)[0])
	}
	return value + "::" + c.Type
}

// ask evaluates a probe in one state, in a transaction that is rolled back.
func (a *auditor) ask(ctx context.Context, q *probe, state string) error {
	tx, err := a.app.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
	if err != nil {
		return err
	}
	admitted, err := a.evaluate(ctx, tx, q, state)
	if rolledBack := tx.Rollback(ctx); rolledBack != nil {
		return rolledBack // the connection is gone
	}
	for i, p := range q.policies {
		if err != nil {
			p.refused(state, err)
			continue
		}
		for n, yes := range admitted {
			if yes {
				p.seen[admits(state, q.rows[n], q.fresh[i])] = true
			}
		}
	}
	return ctx.Err()
}

func (a *auditor) evaluate(ctx context.Context, tx pgx.Tx, q *probe, state string) ([]bool, error) {
	if _, err := tx.Exec(ctx, "set local statement_timeout = '5s'"); err != nil {
		return nil, err
	}
	switch state {
	case empty:
		if _, err := tx.Exec(ctx, "select pg_catalog.set_config("+literal(a.config.Setting)+", '', true)"); err != nil {
			return nil, err
		}
	case bound:
		if err := a.db.binder.bindTx(ctx, tx, q.tenant); err != nil {
			return nil, err
		}
	}
	// Not prepared: a plan that was kept would show what an IMMUTABLE function returned in another state.
	rows, err := tx.Query(ctx, q.sql, pgx.QueryExecModeExec)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[bool])
}

// admits names what was seen: in a state, a row of a kind, read or written.
func admits(state, row string, fresh bool) string { return fmt.Sprintf("%s/%s/%t", state, row, fresh) }

// refused notes why a policy could not be evaluated. The package's own function refuses what is not signed,
// as it should, and without Config.Seal nothing is.
func (p *auditPolicy) refused(state string, err error) {
	var pgErr *pgconn.PgError
	switch {
	case p.sealed && errors.As(err, &pgErr):
	case errors.As(err, &pgErr) && pgErr.Code != "42501" && pgErr.Code != "57014" && state != bound:
		p.raised = fmt.Sprintf("Evaluated with the setting %s: %s (%s).", state, pgErr.Message, pgErr.Code)
	default:
		p.unseen = err.Error()
	}
}
