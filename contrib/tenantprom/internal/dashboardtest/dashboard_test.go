package dashboardtest

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/pgxtenant/pgxtenant/contrib/tenantprom"
)

// Every expression of the dashboard and every alert ask for series that there are, and the documentation lists all.
func TestQueriesAndDocumentation(t *testing.T) {
	t.Parallel()
	families := live(t)
	e := newExported(families)
	doc, err := os.ReadFile("../../../../docs/metrics.md")
	require.NoError(t, err)
	t.Run("dashboard", func(t *testing.T) { checkDashboard(t, e) })
	t.Run("alerts", func(t *testing.T) { checkAlerts(t, e, string(doc)) })
	t.Run("table", func(t *testing.T) { checkTable(t, families, string(doc)) })
}

// panel is what matters here of a panel.
type panel struct {
	Type, Title string
	GridPos     struct{ X, Y, W, H int }
	Targets     []target

	Transformations []struct {
		ID      string
		Options struct {
			Sort []struct{ Field string }
		}
	}
}

type target struct{ RefID, Expr, LegendFormat string }

var inLegend = regexp.MustCompile(`{{\s*(\w+)\s*}}`)

func checkDashboard(t *testing.T, e exported) {
	var d struct {
		Panels     []panel
		Templating struct{ List []struct{ Definition string } }
	}
	require.NoError(t, json.Unmarshal(tenantprom.Dashboard, &d))
	asked := 0
	for i, p := range d.Panels {
		require.LessOrEqual(t, p.GridPos.X+p.GridPos.W, 24, p.Title)
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			require.False(t, a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H, "%s lies on %s", p.Title, q.Title)
		}
		for _, target := range p.Targets {
			result, errs := e.check(target.Expr)
			require.Empty(t, errs, p.Title)
			for _, m := range inLegend.FindAllStringSubmatch(target.LegendFormat, -1) {
				require.Contains(t, result, m[1], "the legend of %s", p.Title)
			}
			asked++
		}
		// Transformations come before a panel's names for its fields: there a query's values are called by its letter.
		for _, tr := range p.Transformations {
			for _, by := range tr.Options.Sort {
				letter, ok := strings.CutPrefix(by.Field, "Value #")
				require.True(t, ok, "%s is sorted by %s", p.Title, by.Field)
				require.True(t, slices.ContainsFunc(p.Targets, func(q target) bool { return q.RefID == letter }), by.Field)
			}
		}
	}
	require.Equal(t, asked, strings.Count(string(tenantprom.Dashboard), `"expr"`), "there are expressions elsewhere")
	require.Greater(t, asked, 50)
	for _, v := range d.Templating.List {
		if variable := regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`).FindStringSubmatch(v.Definition); variable != nil {
			require.Contains(t, names(e[variable[1]]), variable[2])
		}
	}

	// What is exported and asked for by nobody is likely forgotten.
	for name := range e {
		base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_sum"), "_count")
		if !slices.Contains(notOnDashboard, name) {
			require.Contains(t, string(tenantprom.Dashboard), base, "nothing on the dashboard shows it")
		}
	}
}

// notOnDashboard is for who looks for the cause of something.
var notOnDashboard = []string{
	"pgxtenant_audit_allowed_findings", "pgxtenant_cache_stale_total", "pgxtenant_cache_undecodable_total", "pgxtenant_cache_refreshes_total",
	"pgxtenant_cache_overtaken_total", "pgxtenant_cache_too_large_total", "pgxtenant_cache_invalidations_total", "pgxtenant_cache_redis_spared_total",
	"pgxtenant_cache_breaker_opens_total", "pgxtenant_cache_tenants", "pgxtenant_cache_entries", "pgxtenant_cache_evictions_total",
}

// checkAlerts checks the rules in the documentation.
func checkAlerts(t *testing.T, e exported, doc string) {
	_, rest, ok := strings.Cut(doc, "```yaml\n")
	require.True(t, ok, "the documentation has alerts")
	text, _, _ := strings.Cut(rest, "```")
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	require.NoError(t, yaml.Unmarshal([]byte(text), &rules))
	n := 0
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			result, errs := e.check(r.Expr)
			require.Empty(t, errs, r.Alert)
			for _, m := range regexp.MustCompile(`{{ \$labels\.(\w+) }}`).FindAllStringSubmatch(r.Annotations["summary"], -1) {
				require.Contains(t, result, m[1], r.Alert)
			}
			require.NotEmpty(t, r.Annotations["summary"], r.Alert)
			n++
		}
	}
	require.GreaterOrEqual(t, n, 3)
}

// checkTable requires that the table of the documentation has what is exported: name, type and labels.
func checkTable(t *testing.T, families []*dto.MetricFamily, doc string) {
	documented := map[string][2]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(pgxtenant_\\w+)` \\| (\\w+) \\|([^|]*)\\|([^|]+)\\|$").FindAllStringSubmatch(doc, -1) {
		require.NotContains(t, documented, row[1])
		documented[row[1]] = [2]string{row[2], strings.NewReplacer("`", "", ",", "").Replace(strings.TrimSpace(row[3]))}
		require.NotEmpty(t, strings.TrimSpace(row[4]), row[1])
	}
	want := map[string][2]string{}
	for _, f := range families {
		var has []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			has = append(has, l.GetName())
		}
		slices.Sort(has)
		want[f.GetName()] = [2]string{strings.ToLower(f.GetType().String()), strings.Join(has, " ")}
	}
	for name, row := range documented {
		sorted := strings.Fields(row[1])
		slices.Sort(sorted)
		documented[name] = [2]string{row[0], strings.Join(sorted, " ")}
	}
	require.Equal(t, want, documented)
}
