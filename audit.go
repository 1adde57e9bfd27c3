package pgxtenant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Severity is how much a finding of Audit matters.
type Severity string

const (
	// SeverityError means that a tenant's statements can reach another tenant's rows, read or write, or can
	// make that so for themselves. Config.RequireAudit refuses to start on it.
	SeverityError Severity = "error"
	// SeverityWarning means a weakness that takes something else to become a leak, that tells a tenant something
	// about others, or that breaks or slows statements.
	SeverityWarning Severity = "warning"
	// SeverityInfo means what is safe as long as it was meant, and what could not be looked at.
	SeverityInfo Severity = "info"
)

// A Finding is one thing that Audit has found in the database.
type Finding struct {
	Code     string   `json:"code"` // stable; docs/audit.md has them all
	Severity Severity `json:"severity"`
	Object   string   `json:"object"` // such as "table public.invoice" or "policy p on table public.invoice"
	Allows   string   `json:"allows"` // what it lets happen
	Detail   string   `json:"detail,omitempty"`

	// Mend is SQL that ends it, to be run as the owner of the object or as a superuser. It is empty where only a
	// human can decide; Detail says what then.
	Mend string `json:"mend,omitempty"`

	// Allowed is set where Config.AuditAllow has it.
	Allowed bool `json:"allowed,omitempty"`
}

// An AllowedFinding is one that is there on purpose; see Config.AuditAllow.
type AllowedFinding struct {
	Code   string
	Object string // as in Finding.Object; empty means any
}

// Report is what Audit has found.
type Report struct {
	Database     string    `json:"database"`
	Role         string    `json:"role"`          // the application's
	TenantTables int       `json:"tenant_tables"` // tables that tenants share, partitions and children counted
	Findings     []Finding `json:"findings"`      // the gravest first, then by code and object
}

// Count returns how many findings have the given severity, those that are allowed not counted.
func (r *Report) Count(s Severity) (n int) {
	for _, f := range r.Findings {
		if f.Severity == s && !f.Allowed {
			n++
		}
	}
	return n
}

// Err returns an *AuditError if there is a finding of SeverityError that is not allowed, else nil.
func (r *Report) Err() error {
	if r.Count(SeverityError) == 0 {
		return nil
	}
	return &AuditError{r}
}

// String returns the report as text for a terminal.
func (r *Report) String() string {
	var sb strings.Builder
	tables := "tables"
	if r.TenantTables == 1 {
		tables = "table"
	}
	fmt.Fprintf(&sb, "Audit of database %s for role %s, with %d %s of tenants. Errors: %d, warnings: %d, notes: %d.\n",
		r.Database, r.Role, r.TenantTables, tables, r.Count(SeverityError), r.Count(SeverityWarning), r.Count(SeverityInfo))
	for _, f := range r.Findings {
		allowed := ""
		if f.Allowed {
			allowed = " (allowed)"
		}
		fmt.Fprintf(&sb, "\n%s%s: %s: %s\n", f.Severity, allowed, f.Code, f.Object)
		writeWrapped(&sb, f.Allows)
		writeWrapped(&sb, f.Detail)
		for line := range strings.Lines(f.Mend) {
			sb.WriteString("        " + strings.TrimSuffix(line, "\n") + "\n")
		}
	}
	return sb.String()
}

// WriteTo writes String's text to w.
func (r *Report) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, r.String())
	return int64(n), err
}

// writeWrapped writes text indented, in lines of at most 100 characters where its words allow.
func writeWrapped(sb *strings.Builder, text string) {
	const indent, most = "    ", 100
	width := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case width == 0:
			sb.WriteString(indent)
			width = len(indent)
		case width+1+len(word) > most:
			sb.WriteString("\n" + indent)
			width = len(indent)
		default:
			sb.WriteByte(' ')
			width++
		}
		sb.WriteString(word)
		width += len(word)
	}
	if width > 0 {
		sb.WriteByte('\n')
	}
}

// AuditError means that Audit has found errors that are not allowed. Its text names them.
type AuditError struct {
	Report *Report
}

func (e *AuditError) Error() string {
	const most = 20
	var sb strings.Builder
	fmt.Fprintf(&sb, "pgxtenant: the audit of database %s for role %s found errors (%d):", e.Report.Database, e.Report.Role, e.Report.Count(SeverityError))
	n := 0
	for _, f := range e.Report.Findings {
		if f.Severity != SeverityError || f.Allowed {
			continue
		}
		if n++; n > most {
			fmt.Fprintf(&sb, "\n\tand %d more", e.Report.Count(SeverityError)-most)
			break
		}
		fmt.Fprintf(&sb, "\n\t%s: %s: %s", f.Code, f.Object, f.Allows)
	}
	sb.WriteString("\nTenantDB.Audit tells how each is mended; Config.AuditAllow lists what is meant to be so")
	return sb.String()
}

// Audit looks at the shared database, and at the registry and the servers that Config names, for ways past the
// isolation of tenants. It changes nothing, and takes no lock but on the template's tables, to read. It
// reads the catalogue, and has the server evaluate each policy on rows made up for it, as the role
// of Config.Shared with the setting unset, empty, and set to a tenant; of the tables' own rows it reads none, but for
// what policies look up.
//
// The catalogue is read with the Admin pool, in one snapshot. Without Config.Admin the application's own login sees nearly
// as much: the registry and tenants' schemas are left out. What could not be looked at is a finding too, with the code
// "not-audited". The policies are evaluated over one connection of the audit's own, made from Config.Shared, which
// Config.MaxConns does not count.
//
// An error means that the audit itself failed: what it has found is in the Report alone. 1,000 tables take about 0.3 s; the
// comparison of each tenant's schema with the template comes on top.
func (db *TenantDB) Audit(ctx context.Context) (*Report, error) {
	r, err := db.audit(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: audit: %w", err)
	}
	return r, nil
}

// LastAudit returns what the last audit found that did not fail, Config.RequireAudit's included, and when it ended. It runs
// none: without one the Report is nil. The Report must not be changed.
func (db *TenantDB) LastAudit() (*Report, time.Time) {
	last := db.lastAudit.Load()
	if last == nil {
		return nil, time.Time{}
	}
	return last.report, last.at
}

// auditRun is an audit that has been run.
type auditRun struct {
	report *Report
	at     time.Time
}

// passAudit fails if there are errors that are not allowed.
func (db *TenantDB) passAudit(ctx context.Context) error {
	r, err := db.audit(ctx, true)
	if err != nil {
		return fmt.Errorf("pgxtenant: audit, which Config.RequireAudit asks for: %w", err)
	}
	return r.Err()
}

// audit leaves out, at the start, what only finds warnings and takes its time; nor is it content then with less
// than all that can find errors.
func (db *TenantDB) audit(ctx context.Context, start bool) (*Report, error) {
	if db.closed.Load() {
		return nil, ErrClosed
	}
	a := &auditor{db: db, config: db.config, start: start}
	app, err := db.connectUnbound(ctx)
	switch {
	case err == nil:
		a.app = app
		defer app.Close(context.WithoutCancel(ctx))
	case db.admin == nil || start || ctx.Err() != nil:
		return nil, fmt.Errorf("connect as the application: %w", err)
	default:
		a.find("not-audited", "policies, as the application meets them", "", "the role of Config.Shared could not connect: "+err.Error())
	}
	// Before a connection is held that the registry might wait for.
	if err := a.readRegistry(ctx); err != nil {
		return nil, err
	}
	options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	if db.admin != nil {
		err = pgx.BeginTxFunc(ctx, db.admin, options, func(tx pgx.Tx) error { return a.catalogue(ctx, tx) })
	} else {
		err = pgx.BeginTxFunc(ctx, app, options, func(tx pgx.Tx) error { return a.catalogue(ctx, tx) })
	}
	if err == nil && a.app != nil {
		err = a.probePolicies(ctx)
	}
	if err == nil {
		a.judgePolicies()
		err = a.databases(ctx)
	}
	if err != nil {
		return nil, err
	}
	report := a.report()
	db.lastAudit.Store(&auditRun{report, time.Now()})
	return report, nil
}

// connectUnbound opens a connection as the shared pool would, but for the binding.
func (db *TenantDB) connectUnbound(ctx context.Context) (*pgx.Conn, error) {
	shared := db.config.Shared
	config := shared.ConnConfig.Copy()
	if shared.BeforeConnect != nil {
		if err := shared.BeforeConnect(ctx, config); err != nil {
			return nil, err
		}
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil || shared.AfterConnect == nil {
		return conn, err
	}
	if err := shared.AfterConnect(ctx, conn); err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	return conn, nil
}

// auditor gathers findings, and what they are found in.
type auditor struct {
	db     *TenantDB
	config *Config
	start  bool
	app    *pgx.Conn // as the application, and bound to nothing; nil if it cannot connect

	database string
	version  int
	roles    map[uint32]*auditRole
	login    *auditRole // that the application logs in as
	acts     []uint32   // the roles that it has rights of, or can take by SET ROLE
	tables   []*auditTable
	byOID    map[uint32]*auditTable
	schemas  map[string]bool // that belong to one tenant, or are templates of such
	made     []auditSchema   // of them, that the package has made
	records  []Record        // of the registry
	unread   bool            // there is a registry, and it could not be read
	keys     map[uint32][]auditKey

	findings []Finding
}

// catalogue runs the checks that take nothing but the catalogue.
func (a *auditor) catalogue(ctx context.Context, tx pgx.Tx) error {
	// Names come out qualified, and no temporary table stands in for one of the catalogue's.
	if _, err := tx.Exec(ctx, "set local search_path = pg_catalog, pg_temp"); err != nil {
		return err
	}
	for _, read := range []func(context.Context, pgx.Tx) error{a.readRoles, a.readTables, a.readPolicies, a.readKeys} {
		if err := read(ctx, tx); err != nil {
			return err
		}
	}
	for _, check := range []struct {
		what string
		run  func(context.Context, pgx.Tx) error
	}{
		{"tenants' schemas", a.readSchemas},
		{"tenant columns", a.readColumns},
		{"the login", a.checkLogin},
		{"preset settings", a.checkPresets},
		{"row-level security", a.checkTables},
		{"unique constraints", a.checkKeys},
		{"foreign keys", a.checkForeignKeys},
		{"views", a.checkViews},
		{"functions", a.checkFunctions},
		{"the server's files", a.checkServerFunctions},
		{"rules", a.checkRules},
		{"grants", a.checkGrants},
		{"default privileges", a.checkDefaults},
		{"large objects", a.checkLargeObjects},
		{"publications", a.checkPublications},
		{"schema pgxtenant", a.checkOwnSchema},
		{"sequences", a.checkSequences},
		{"schemas of tenants", a.checkSchemas},
		{"what crosses schemas", a.checkCrossings},
		{"tables that stand in", a.checkStandIns},
		{"copies of the template", a.checkDrift},
	} {
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { return check.run(ctx, tx) })
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Code == "42501" {
			a.find("not-audited", check.what, "", err.Error())
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", check.what, err)
		}
	}
	return nil
}

// auditRows collects what a query returns. ROLES in its text stands for the roles that the application acts as, and
// SETTING for the tenant setting, so no name from the database may be in it.
func auditRows[T any](ctx context.Context, a *auditor, tx pgx.Tx, sql string, args ...any) ([]T, error) {
	oids := make([]string, len(a.acts))
	for i, oid := range a.acts {
		oids[i] = fmt.Sprint(oid)
	}
	sql = strings.NewReplacer("ROLES", "'{"+strings.Join(oids, ",")+"}'::oid[]", "SETTING", literal(strings.ToLower(a.config.Setting))).Replace(sql)
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[T])
}

// find adds a finding. The code must be one of auditCodes.
func (a *auditor) find(code, object, mend, detail string) {
	c := auditCodes[code]
	a.findings = append(a.findings, Finding{Code: code, Severity: c.severity, Object: object, Allows: c.allows, Detail: detail, Mend: mend})
}

// report brings the findings in order.
func (a *auditor) report() *Report {
	rank := map[Severity]int{SeverityError: 0, SeverityWarning: 1, SeverityInfo: 2}
	slices.SortFunc(a.findings, func(x, y Finding) int {
		return cmp.Or(cmp.Compare(rank[x.Severity], rank[y.Severity]), cmp.Compare(x.Code, y.Code),
			cmp.Compare(x.Object, y.Object), cmp.Compare(x.Detail, y.Detail), cmp.Compare(x.Mend, y.Mend))
	})
	r := &Report{Database: a.database, Role: a.login.Name, Findings: slices.Compact(a.findings)}
	for i, f := range r.Findings {
		r.Findings[i].Allowed = slices.ContainsFunc(a.config.AuditAllow, func(allowed AllowedFinding) bool {
			return allowed.Code == f.Code && (allowed.Object == "" || allowed.Object == f.Object)
		})
	}
	for _, t := range a.tables {
		if t.tenant {
			r.TenantTables++
		}
	}
	return r
}

// shown is a name as findings have it, quoted if it would need it anywhere but in a keyword's place.
func shown(parts ...string) string {
	for i, p := range parts {
		if !plainName.MatchString(p) {
			parts[i] = ident(p)
		}
	}
	return strings.Join(parts, ".")
}

var plainName = regexp.MustCompile(`^[a-z_][a-z0-9_]*$`)

// sqlText ends each statement and joins them.
func sqlText(statements ...string) string {
	if len(statements) == 0 {
		return ""
	}
	return strings.Join(statements, ";\n") + ";"
}
