package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Ledgers is for a ForEachOptions.Versions: it looks into the same table of many tenants, such as the one in which a migration
// library notes what it has applied, and returns what expression is for each, by tenant ID. It takes conn and tenants as
// that function gets them, and two queries for a few hundred tenants.
//
// The table is a bare name. It is looked for where the tenant's data are: in Tenant.Schema, in the first of Config.SharedSchemas that
// exists, or in the current schema of a tenant's database. A tenant that has no such table there is missing from
// what is returned. The expression is SQL over all rows of it, such as max(version), put into the query as
// it is, so it must not come from a tenant. Its value is returned as text; null as "".
func (db *TenantDB) Ledgers(ctx context.Context, conn *pgx.Conn, tenants []Tenant, table, expression string) (map[string]string, error) {
	places := make(map[string]string, len(tenants)) // schema to tenant
	for _, t := range tenants {
		schema := t.Schema
		if t.Isolation != IsolationSchema {
			var candidates []string // nil is the session's own
			if t.Isolation == IsolationRow {
				candidates = append([]string{}, db.config.SharedSchemas...)
			}
			err := conn.QueryRow(ctx, `select coalesce(case when $1::text[] is null then pg_catalog.current_schema()::text
				else (select s from unnest($1::text[]) with ordinality x (s, i) join pg_catalog.pg_namespace on nspname = s order by i limit 1) end, '')`,
				pgx.QueryExecModeDescribeExec, candidates).Scan(&schema)
			if err != nil {
				return nil, fmt.Errorf("pgxtenant: find the schema of table %q: %w", table, err)
			}
		}
		if schema != "" {
			places[schema] = t.ID
		}
	}
	for attempt := 1; ; attempt++ {
		found, err := ledgers(ctx, conn, places, table, expression)
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000") {
			if len(places) == 1 { // and is asked without a look for the table first
				return map[string]string{}, nil
			}
			if attempt < 3 { // a schema may be dropped between the two queries
				continue
			}
		}
		if err != nil {
			return nil, fmt.Errorf("pgxtenant: read table %q of %d tenants: %w", table, len(tenants), err)
		}
		return found, nil
	}
}

// ledgerBatch is how many tables one statement reads. Each is locked with its indexes until the statement ends, and the server
// has room for some thousands of locks in all.
const ledgerBatch = 250

func ledgers(ctx context.Context, conn *pgx.Conn, places map[string]string, table, expression string) (map[string]string, error) {
	schemas := slices.Collect(maps.Keys(places))
	if len(schemas) > 1 {
		rows, err := conn.Query(ctx, `select n.nspname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
			where c.relname = $1 and c.relkind in ('r', 'p') and n.nspname = any ($2::text[]) order by n.nspname`, pgx.QueryExecModeExec, table, schemas)
		if err != nil {
			return nil, err
		}
		if schemas, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return nil, err
		}
	}
	found := make(map[string]string, len(schemas))
	for len(schemas) > 0 {
		batch := schemas[:min(ledgerBatch, len(schemas))]
		schemas = schemas[len(batch):]
		var sql strings.Builder
		for i, schema := range batch {
			if i > 0 {
				sql.WriteString(" union all ")
			}
			sql.WriteString("select " + strconv.Itoa(i) + ", (" + expression + ")::text from " + ident(schema) + "." + ident(table))
		}
		rows, err := conn.Query(ctx, sql.String(), pgx.QueryExecModeExec)
		if err != nil {
			return nil, err
		}
		var i int
		var value *string
		_, err = pgx.ForEachRow(rows, []any{&i, &value}, func() error {
			found[places[batch[i]]] = ""
			if value != nil {
				found[places[batch[i]]] = *value
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}
