package dashboardtest

import (
	"fmt"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// exported is what collectors export: series by the names that queries use, those of histograms with their suffixes.
type exported map[string][]labels.Labels

// targetLabels are those that Prometheus itself adds to each series.
var targetLabels = []string{"job", "instance"}

func newExported(families []*dto.MetricFamily) exported {
	e := exported{}
	add := func(name string, m *dto.Metric, more ...string) {
		b := labels.NewBuilder(labels.FromStrings(more...))
		for _, l := range m.GetLabel() {
			b.Set(l.GetName(), l.GetValue())
		}
		for _, name := range targetLabels {
			b.Set(name, "test")
		}
		e[name] = append(e[name], b.Labels())
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if m.GetHistogram() == nil {
				add(f.GetName(), m)
				continue
			}
			add(f.GetName()+"_sum", m)
			add(f.GetName()+"_count", m)
			for _, b := range m.GetHistogram().GetBucket() {
				add(f.GetName()+"_bucket", m, labels.BucketLabel, fmt.Sprint(b.GetUpperBound()))
			}
		}
	}
	return e
}

// check returns what a query asks for that is not exported, and the labels that its result has. Variables of Grafana's
// are filled in as Grafana would.
func (e exported) check(query string) (result []string, errs []error) {
	query = strings.NewReplacer("$__rate_interval", "5m", "$job", ".*").Replace(query)
	expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
	if err != nil {
		return nil, []error{err}
	}
	c := &checker{exported: e}
	result = c.labels(expr)
	for i, err := range c.errs {
		c.errs[i] = fmt.Errorf("%w, in %s", err, query)
	}
	return result, c.errs
}

type checker struct {
	exported
	errs []error
}

func (c *checker) fail(format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf(format, args...))
}

// labels returns the labels that the result of expr has.
func (c *checker) labels(expr parser.Expr) []string {
	switch x := expr.(type) {
	case *parser.VectorSelector:
		return c.selected(x)
	case *parser.MatrixSelector:
		return c.labels(x.VectorSelector)
	case *parser.ParenExpr:
		return c.labels(x.Expr)
	case *parser.UnaryExpr:
		return c.labels(x.Expr)
	case *parser.AggregateExpr:
		return c.aggregated(x)
	case *parser.BinaryExpr:
		return c.combined(x)
	case *parser.Call:
		return c.called(x)
	case *parser.NumberLiteral, *parser.StringLiteral:
		return nil
	}
	c.fail("%T is not understood here", expr)
	return nil
}

// selected requires that something that is exported matches, not only its name.
func (c *checker) selected(x *parser.VectorSelector) []string {
	all, ok := c.exported[x.Name]
	if !ok {
		c.fail("no metric %s", x.Name)
		return nil
	}
	has := names(all)
	for _, m := range x.LabelMatchers {
		if m.Name != model.MetricNameLabel && !slices.Contains(has, m.Name) {
			c.fail("%s has no label %s, only %v", x.Name, m.Name, has)
		}
	}
	matches := func(l labels.Labels) bool {
		for _, m := range x.LabelMatchers {
			if m.Name != model.MetricNameLabel && !m.Matches(l.Get(m.Name)) {
				return false
			}
		}
		return true
	}
	if !slices.ContainsFunc(all, matches) {
		c.fail("no series of %s is %v", x.Name, x.LabelMatchers)
	}
	return has
}

func (c *checker) aggregated(x *parser.AggregateExpr) []string {
	inner := c.labels(x.Expr)
	for _, name := range x.Grouping {
		if !slices.Contains(inner, name) {
			c.fail("%v by %s, which is not among %v", x.Op, name, inner)
		}
	}
	switch {
	case x.Op == parser.TOPK || x.Op == parser.BOTTOMK:
		return inner
	case x.Without:
		return without(inner, x.Grouping)
	}
	return x.Grouping
}

func (c *checker) combined(x *parser.BinaryExpr) []string {
	left, right := c.labels(x.LHS), c.labels(x.RHS)
	m := x.VectorMatching
	if m == nil {
		return slices.Concat(left, right) // one of them is a number
	}
	for _, name := range m.MatchingLabels {
		if !slices.Contains(left, name) && !slices.Contains(right, name) {
			c.fail("%v matches on %s, which neither side has", x.Op, name)
		}
	}
	on := func(side []string) []string {
		if m.On {
			return m.MatchingLabels
		}
		return without(side, m.MatchingLabels)
	}
	if a, b := on(left), on(right); !same(a, b) {
		c.fail("%v never finds a pair: one side has %v, the other %v", x.Op, a, b)
	}
	if m.Card == parser.CardOneToMany {
		return right
	}
	return left
}

func (c *checker) called(x *parser.Call) (result []string) {
	for _, arg := range x.Args {
		result = append(result, c.labels(arg)...)
	}
	if x.Func.Name == "histogram_quantile" {
		if !slices.Contains(result, labels.BucketLabel) {
			c.fail("histogram_quantile without le")
		}
		return without(result, []string{labels.BucketLabel})
	}
	return result
}

// names returns the names of labels that the series have.
func names(all []labels.Labels) (names []string) {
	for _, l := range all {
		l.Range(func(l labels.Label) {
			if !slices.Contains(names, l.Name) {
				names = append(names, l.Name)
			}
		})
	}
	return names
}

func without(all, some []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(some, s) })
}

func same(a, b []string) bool {
	return len(without(a, b)) == 0 && len(without(b, a)) == 0
}
