package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

// leaking is a shop with a table that has no policies, and a view past those of another.
func leaking(t *testing.T) *shop {
	t.Helper()
	s := installed(t)
	s.Exec("create table invoice (tenant_id text not null, id bigint, note text)", "create table payment (tenant_id text not null, id bigint)",
		"grant select on payment to "+s.App)
	s.ok("rls", "enable", "invoice")
	s.SuperExec("create view all_invoices as select * from invoice", "grant select on all_invoices to "+s.App)
	return s
}

func TestAuditTellsAndExitsBySeverity(t *testing.T) {
	t.Parallel()
	s := leaking(t)
	r := s.run("audit")
	r.fails(exitFound, "of severity error")
	require.Regexp(t, `error +view-past-policy +view public.all_invoices\n`, r.out)
	r = s.run("audit", "--format", "text", "--fail-on", "never")
	require.Zero(t, r.code, r.err)
	require.Contains(t, r.out, "error: view-past-policy: view public.all_invoices\n    The view reads with the rights of its owner")

	s.ok("tenant", "create", "acme", "--isolation", "schema")
	s.Exec("alter table tenant_acme.note add by_hand text")
	text := s.run("audit", "--format", "text").out
	require.Contains(t, text, "schema-drift: schema tenant_acme\n")
	require.Regexp(t, `\+ create table note \(\n +id bigint not null,\n +body text,\n +by_hand text\)`, text, "the difference, line by line")

	r = s.run("audit", "--format", "json")
	r.fails(exitFound)
	var report pgxtenant.Report
	require.NoError(t, json.Unmarshal([]byte(r.out), &report))
	require.Equal(t, s.App, report.Role)

	// What is meant to be so is allowed.
	var allow strings.Builder
	for _, f := range report.Findings {
		if f.Severity == pgxtenant.SeverityError {
			allow.WriteString("    - {code: " + f.Code + ", object: \"" + f.Object + "\"}\n")
		}
	}
	config := file(t, "c.yaml", "audit:\n  allow:\n"+allow.String())
	require.Regexp(t, `allowed +view-past-policy`, s.ok("audit", "--config", config))
	s.run("audit", "--config", config, "--fail-on", "info").fails(exitFound, "of severity info or higher")
	require.Contains(t, s.ok("audit", "--config", config, "--format", "sarif"), `"kind": "external"`)

	s.run("audit", "--format", "xml").fails(exitUsage, `there is no format "xml"`)
	s.run("audit", "--fail-on", "x").fails(exitUsage, `there is no severity "x"`)
	run(t, []string{"PGXTENANT_ADMIN=" + s.OwnerURL()}, "audit").fails(exitUsage, "PGXTENANT_DATABASE")
}

// What SARIF 2.1.0's schema requires of each object, and what refers to what.
func TestAuditAsSARIF(t *testing.T) {
	t.Parallel()
	s := leaking(t)
	r := s.run("audit", "--format", "sarif")
	r.fails(exitFound)
	type object = map[string]any
	var log object
	require.NoError(t, json.Unmarshal([]byte(r.out), &log))
	require.Equal(t, "2.1.0", log["version"])
	require.Equal(t, sarifSchema, log["$schema"])
	runs := log["runs"].([]any)
	require.Len(t, runs, 1)
	driver := runs[0].(object)["tool"].(object)["driver"].(object)
	require.Equal(t, "pgxtenant", driver["name"])
	ids := make(map[string]bool)
	rules := driver["rules"].([]any)
	for _, rule := range rules {
		id := rule.(object)["id"].(string)
		require.NotEmpty(t, id)
		require.False(t, ids[id], "rules are unique")
		ids[id] = true
		require.NotEmpty(t, rule.(object)["shortDescription"].(object)["text"])
	}
	results := runs[0].(object)["results"].([]any)
	require.NotEmpty(t, results)
	prints := make(map[any]bool)
	for _, result := range results {
		r := result.(object)
		require.NotEmpty(t, r["message"].(object)["text"])
		require.Contains(t, []any{"error", "warning", "note"}, r["level"])
		require.Equal(t, r["ruleId"], rules[int(r["ruleIndex"].(float64))].(object)["id"])
		require.NotEmpty(t, r["locations"].([]any)[0].(object)["logicalLocations"].([]any)[0].(object)["fullyQualifiedName"])
		fingerprint := r["partialFingerprints"].(object)["codeAndObject/v1"]
		require.False(t, prints[fingerprint], "findings are told apart")
		prints[fingerprint] = true
	}
}

func TestAuditOnATerminal(t *testing.T) {
	t.Parallel()
	s := leaking(t)
	for _, args := range [][]string{{"audit"}, {"audit", "--format", "text"}} {
		term := onScreen(t, s.env, args...)
		require.Equal(t, "3", term.ended())
		text := term.text()
		fits(t, text)
		require.Contains(t, text, "view-past-policy")
		require.Contains(t, term.text("-e"), "\x1b[31merror")
	}
}

func TestSQLIsBrokenOutsideOfQuotes(t *testing.T) {
	t.Parallel()
	for _, line := range []string{
		`alter table "a b c d" add check (x <> 'e f g h i j k'), add check (y <> 'l m n o p q r')`, "select", "", strings.Repeat("x", 200),
		`revoke all on a, b, c, d, e, f, g, h from x`,
	} {
		parts := wrapSQL(line, 20)
		require.Equal(t, strings.Join(strings.Fields(line), " "), strings.Join(strings.Fields(strings.Join(parts, "\n")), " "))
		for _, part := range parts {
			require.Zero(t, strings.Count(part, "'")%2, part)
			require.Zero(t, strings.Count(part, `"`)%2, part)
		}
	}
}
