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

const (
	// DefaultTenantColumn is the column of a shared table that tells whose a row is.
	DefaultTenantColumn = "tenant_id"

	// PolicyName is the name of the policy that EnableRLS makes, on each table.
	PolicyName = "pgxtenant"
)

// RLSTable is a table whose rows belong to tenants.
type RLSTable struct {
	// Name is the table's name, as SQL has it: invoice, billing.invoice, "Invoice". Without a schema it is
	// looked up as Config.Admin's search_path says.
	Name string

	// Column tells whose a row is. It is added if it is not there.
	//
	// Empty means DefaultTenantColumn ("tenant_id").
	Column string

	// Type is that of a column that is added: text, uuid, integer or bigint. One that is there may have any
	// of these, or varchar. In a uuid or number column only that spelling of an ID counts which the server itself
	// would print: a tenant "007" has no rows in an integer column, and not those of "7".
	//
	// Empty means text.
	Type string

	// Backfill is the tenant that rows without one are given, those of a table that gets its column now.
	// Without it such rows are an error.
	Backfill string
}

// Tables is a list of tables whose column is DefaultTenantColumn, for EnableRLS and its like.
func Tables(names ...string) []RLSTable {
	tables := make([]RLSTable, len(names))
	for i, name := range names {
		tables[i].Name = name
	}
	return tables
}

// EnableRLS puts tables under row-level security, each in a transaction of its own that also gives it what
// is missing of
//
//   - the tenant column: NOT NULL, never empty, and by default the bound tenant, so that INSERT need not name it;
//   - an index that begins with the tenant column, for tables that inherit as well;
//   - a policy, PolicyName, that lets the bound tenant read and write its own rows, and refuses all where
//     the setting is unset or empty, or with Config.Seal, where the tenant is not sealed;
//   - row-level security itself, forced, so that it holds the table's owner too;
//   - SELECT, INSERT, UPDATE and DELETE for the role of Config.Shared, and USAGE of the sequences that the
//     table's columns draw from. TRUNCATE, REFERENCES and TRIGGER, which go past policies, are taken from it.
//
// Partitions and inheriting tables get the policy too, for it is theirs that counts where they are named
// themselves; Audit reports tables that are attached later. A table that has all that is left alone, so EnableRLS
// may be called at each start. It runs what PlanEnableRLS returns, on the Admin pool.
//
// It is an error, and nothing is done to the table, if another permissive policy that holds for the role
// would let rows through besides; if rows have no tenant and there is no Backfill; if the column has a type whose values
// are equal without being the same; if a view by an owner whom no policy holds, or a materialized view, opens the
// table's rows to the role, be it by way of further views; or if the role may TRUNCATE and the like as a member of
// another. The error says what to do. A Backfill of NULLs is an UPDATE, with its triggers.
func (db *TenantDB) EnableRLS(ctx context.Context, tables ...RLSTable) error {
	return db.changeRLS(ctx, "enable", (*rlsTable).enable, tables)
}

// PlanEnableRLS returns the SQL that EnableRLS would run now, for a migration to keep. It is empty if there is
// nothing to do.
func (db *TenantDB) PlanEnableRLS(ctx context.Context, tables ...RLSTable) (string, error) {
	return db.planRLS(ctx, "enable", (*rlsTable).enable, tables)
}

// DisableRLS removes the policy and turns row-level security off, also for partitions and inheriting tables.
// Since every tenant's rows are then open to everyone who may read the table, it first takes all rights
// to it from the role of Config.Shared, and is an error if the role could still see them through a view or as a
// member of another role. The tenant column stays, with its index and the rows'
// tenants, and EnableRLS brings all back. A table with further policies keeps them, and row-level security.
func (db *TenantDB) DisableRLS(ctx context.Context, tables ...RLSTable) error {
	return db.changeRLS(ctx, "disable", (*rlsTable).disable, tables)
}

// PlanDisableRLS returns the SQL that DisableRLS would run now.
func (db *TenantDB) PlanDisableRLS(ctx context.Context, tables ...RLSTable) (string, error) {
	return db.planRLS(ctx, "disable", (*rlsTable).disable, tables)
}

type planner func(t *rlsTable) ([]string, error)

func (db *TenantDB) changeRLS(ctx context.Context, op string, plan planner, tables []RLSTable) error {
	admin, err := db.adminPool()
	if err != nil {
		return err
	}
	for _, table := range tables {
		if err := db.changeTable(ctx, admin, plan, table); err != nil {
			return fmt.Errorf("pgxtenant: %s row-level security on table %s: %w", op, clip(table.Name), rlsError(err))
		}
	}
	return nil
}

func (db *TenantDB) changeTable(ctx context.Context, admin beginner, plan planner, table RLSTable) error {
	statements, err := db.planTable(ctx, admin, plan, table, false)
	if err != nil || len(statements) == 0 {
		return err // nobody is locked out for nothing
	}
	return pgx.BeginFunc(ctx, admin, func(tx pgx.Tx) error {
		// Under the lock that the changes need, the plan is that of the table as it will be changed.
		statements, err := db.planTable(ctx, tx, plan, table, true)
		if err != nil {
			return err
		}
		for _, sql := range statements {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return fmt.Errorf("%w in: %s", err, sql)
			}
		}
		return nil
	})
}

func (db *TenantDB) planRLS(ctx context.Context, op string, plan planner, tables []RLSTable) (string, error) {
	admin, err := db.adminPool()
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, table := range tables {
		statements, err := db.planTable(ctx, admin, plan, table, false)
		if err != nil {
			return "", fmt.Errorf("pgxtenant: plan to %s row-level security on table %s: %w", op, clip(table.Name), rlsError(err))
		}
		for _, sql := range statements {
			text.WriteString(sql + ";\n")
		}
	}
	return text.String(), nil
}

func (db *TenantDB) planTable(ctx context.Context, on beginner, plan planner, table RLSTable, lock bool) (statements []string, err error) {
	table.Column = orDefault(table.Column, DefaultTenantColumn)
	table.Type = orDefault(table.Type, "text")
	if err := table.check(); err != nil {
		return nil, err
	}
	err = pgx.BeginFunc(ctx, on, func(tx pgx.Tx) error {
		t := rlsTable{RLSTable: table, setting: db.config.Setting, sealed: db.config.Seal != nil, role: db.appRole()}
		if err := t.read(ctx, tx, lock); err != nil {
			return err
		}
		statements, err = plan(&t)
		return err
	})
	return statements, err
}

func (t *RLSTable) check() error {
	if err := validName(t.Column); err != nil {
		return fmt.Errorf("column %q: %w", clip(t.Column), err)
	}
	if _, ok := tenantTypes[t.Type]; !ok || t.Type == "character varying" {
		return fmt.Errorf("a column of type %q; want text, uuid, integer or bigint", clip(t.Type))
	}
	if t.Backfill != "" {
		if err := ValidateID(t.Backfill); err != nil {
			return fmt.Errorf("backfill %q: %w", clip(t.Backfill), err)
		}
		if ok, _ := regexp.MatchString(tenantTypes[t.Type].texts, t.Backfill); !ok {
			return fmt.Errorf("backfill %q: no tenant of that ID has rows where the column is of type %s", clip(t.Backfill), t.Type)
		}
	}
	return nil
}

// tenantTypes are the types of a tenant column, with the texts that each prints of its values, how SQL tells them,
// and the largest of numbers. Only such a text is taken for a value: no two tenants shall be one in a column,
// nor an ID be an error in one that cannot hold it. SQL tells them without counted repetitions ({8}), which
// take the server longer than all the rest of a policy.
var tenantTypes = map[string]struct{ texts, told, most string }{
	"text":              {},
	"character varying": {},
	"uuid": {texts: "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
		told: "ID ~~ '________-____-____-____-____________' and translate(ID, '0123456789abcdef', '') = '----'"},
	"integer": {texts: "^(0|[1-9][0-9]{0,9})$", told: "ID ~ '^(0|[1-9][0-9]*)$'", most: "2147483647"},
	"bigint":  {texts: "^(0|[1-9][0-9]{0,18})$", told: "ID ~ '^(0|[1-9][0-9]*)$'", most: "9223372036854775807"},
}

// tenantExpression is the bound tenant as a value of a tenant column's type; NULL if the setting is unset,
// empty, or holds no value's text.
func tenantExpression(setting, columnType string) string {
	return tenantValue("current_setting("+literal(setting)+", true)", columnType)
}

// tenantValue turns an expression for the tenant's ID into a value of a tenant column's type.
func tenantValue(id, columnType string) string {
	t := tenantTypes[columnType]
	if t.texts == "" {
		return "nullif(" + id + ", '')"
	}
	value := id + "::" + columnType
	if t.most != "" { // asked only of what is a number
		value = "case when " + id + "::numeric <= '" + t.most + "'::numeric then " + value + " else null::" + columnType + " end"
	}
	return "case when " + strings.ReplaceAll(t.told, "ID", id) + " then " + value + " else null::" + columnType + " end"
}

// policyExpression is what the policy asks of a row. In a sub-select of its own the setting is read once in
// a statement: bare, or in a function, it is read for each row that no index has sorted out. And the planner does
// not look into it, as it would otherwise into the setting of whoever comes first, for a plan that then serves all
// tenants: see docs/row-level-security.md, and make policy-forms. A seal is checked
// there too, by a function that is called once, whatever is made of its result.
func policyExpression(setting, column, columnType string, sealed bool) string {
	tenant := tenantExpression(setting, columnType)
	if sealed {
		tenant = tenantValue("t.t", columnType) + " from " + sealFunction + "(" + literal(setting) + ") t(t)"
	}
	return ident(column) + " = (select " + tenant + ")"
}

// rlsError says what the server's refusals mean.
func rlsError(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	switch pgErr.Code {
	case "42P01":
		return fmt.Errorf("there is no such table: %w", err)
	case "3F000", "42883":
		if strings.Contains(pgErr.Message, ownSchema) {
			return fmt.Errorf("the check of seals is not in this database; call InstallSeal: %w", err)
		}
	case "23514":
		return fmt.Errorf("there are rows with an empty tenant; give them one: %w", err)
	}
	return adminError(err)
}

// sameExpression reports whether the server's text of an expression is that of ours. It may say no
// where it should say yes, after which the policy is made anew.
func sameExpression(theirs, ours string) bool {
	return looseText(theirs) == looseText(ours)
}

var decoration = regexp.MustCompile(`(?i)pg_catalog\.|::text|\bas "?(nullif|case|current_setting|tenant)"?|[()\s"]`)

func looseText(s string) string { return strings.ToLower(decoration.ReplaceAllString(s, "")) }

// quoted joins names that are quoted already.
func quoted(names []string) string {
	return strings.Join(slices.Compact(slices.Sorted(slices.Values(names))), ", ")
}
