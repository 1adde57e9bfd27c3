package cli

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

func (a *app) auditCommand() *cobra.Command {
	var format, failOn string
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Look for ways past the isolation of tenants",
		Long: `Looks at the database for ways past the isolation of tenants, as TenantDB.Audit
does, and changes nothing. docs/audit.md explains each code.

Formats:
    table  a line for each finding
    text   what each finding lets happen, and the SQL that mends it
    json   the report as one object
    sarif  SARIF 2.1.0, for code scanning

What is meant to be so is listed in the config file, under audit.allow, with
its code and object. Exits with 3 if there is a finding, not allowed, that is at
least as grave as --fail-on says.`,
		Example: `  pgxtenant audit
  pgxtenant audit --format text --fail-on warning
  pgxtenant audit --format sarif > audit.sarif`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, ok := map[string]func(*pgxtenant.Report) error{
				"table": a.auditTable, "text": a.auditText, "sarif": a.auditSARIF,
				"json": func(r *pgxtenant.Report) error { return a.indented(r) },
			}[format]
			if !ok {
				return usagef("there is no format %q; want table, text, json or sarif", format)
			}
			grave, err := gravest(failOn)
			if err != nil {
				return err
			}
			db, err := a.open(cmd.Context(), needs{database: true})
			if err != nil {
				return err
			}
			defer db.Close()
			report, err := db.Audit(cmd.Context())
			if err != nil {
				return err
			}
			if err := write(report); err != nil {
				return err
			}
			n := 0
			for _, severity := range grave {
				n += report.Count(severity)
			}
			if n > 0 {
				return &exitError{exitFound, fmt.Errorf("the audit has found %s of severity %s", count(n, "thing"), orHigher(failOn))}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "`table`, text, json or sarif")
	cmd.Flags().StringVar(&failOn, "fail-on", "error", "exit with 3 from this severity on: `error`, warning, info, or never")
	choices(cmd, "format", "table", "text", "json", "sarif")
	choices(cmd, "fail-on", "error", "warning", "info", "never")
	return cmd
}

var severities = []pgxtenant.Severity{pgxtenant.SeverityError, pgxtenant.SeverityWarning, pgxtenant.SeverityInfo}

// gravest returns the severities from the gravest down to one.
func gravest(least string) ([]pgxtenant.Severity, error) {
	for i, s := range severities {
		if string(s) == least {
			return severities[:i+1], nil
		}
	}
	if least == "never" {
		return nil, nil
	}
	return nil, usagef("there is no severity %q; want error, warning, info or never", least)
}

func orHigher(severity string) string {
	if severity == "error" {
		return severity
	}
	return severity + " or higher"
}

func (a *app) indented(value any) error {
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(value)
}

func (a *app) auditHead(r *pgxtenant.Report) {
	a.out.line("Audit of database %s for role %s, with %s of tenants. Errors: %d, warnings: %d, notes: %d.",
		printable(r.Database), printable(r.Role), count(r.TenantTables, "table"),
		r.Count(pgxtenant.SeverityError), r.Count(pgxtenant.SeverityWarning), r.Count(pgxtenant.SeverityInfo))
}

func (a *app) auditTable(r *pgxtenant.Report) error {
	a.auditHead(r)
	if len(r.Findings) == 0 {
		return nil
	}
	g := &grid{o: a.out, header: []string{"SEVERITY", "CODE", "OBJECT"}, paint: paintSeverity}
	for _, f := range r.Findings {
		g.add(severityOf(&f), f.Code, f.Object)
	}
	fmt.Fprint(a.out, "\n"+g.String())
	a.out.line("\nWhat each means, and what mends it: pgxtenant audit --format text")
	return nil
}

func severityOf(f *pgxtenant.Finding) string {
	if f.Allowed {
		return "allowed"
	}
	return string(f.Severity)
}

func paintSeverity(_ int, cell string) (color, bool) {
	switch cell {
	case "error":
		return red, true
	case "warning":
		return yellow, true
	case "allowed":
		return faint, true
	}
	return 0, false
}

func (a *app) auditText(r *pgxtenant.Report) error {
	a.auditHead(r)
	width := 100
	if a.out.terminal() {
		width = a.out.width
	}
	indented := func(s string) {
		if s == "" {
			return
		}
		for line := range strings.Lines(wrap(printableLines(s), width-4)) {
			a.out.line("    %s", strings.TrimRight(line, "\n"))
		}
	}
	for _, f := range r.Findings {
		severity := severityOf(&f)
		if c, ok := paintSeverity(0, severity); ok {
			severity = a.out.paint(c, severity)
		}
		a.out.line("\n%s: %s: %s", severity, f.Code, printable(f.Object))
		indented(f.Allows)
		indented(f.Detail)
		for line := range strings.Lines(strings.ReplaceAll(f.Mend, "\t", "    ")) {
			for _, part := range wrapSQL(printable(strings.TrimRight(line, "\n")), width-8) {
				a.out.line("        %s", part)
			}
		}
	}
	return nil
}

// wrapSQL breaks a line of SQL at spaces that are not within quotes, so that it stays what it is.
func wrapSQL(line string, width int) (parts []string) {
	for {
		at, quote := -1, byte(0)
		for i := range len(line) {
			switch c := line[i]; {
			case quote != 0 && c == quote:
				quote = 0
			case quote == 0 && (c == '\'' || c == '"'):
				quote = c
			case quote == 0 && c == ' ' && (i <= width || at < 0):
				at = i
			}
		}
		if len(line) <= width || at < 0 {
			return append(parts, line)
		}
		parts, line = append(parts, line[:at]), "  "+strings.TrimLeft(line[at:], " ")
		if strings.TrimSpace(line) == "" {
			return parts
		}
	}
}
