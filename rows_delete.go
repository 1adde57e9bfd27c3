package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// tenantTable is a table that a policy on the tenant setting guards.
type tenantTable struct {
	oid     uint32
	name    string // qualified and quoted
	columns []string
	column  string // the tenant's
	typ     string // without a length, to which a cast would cut an ID off
	policy  string // what the policies ask of a row
}

// tenantTables finds the tables whose rows belong to tenants: those with a policy that reads the tenant
// setting, or the function of sealed tenants. The tenant column is the one that the policy depends on. A
// table that is a partition, or inherits, is left out: its rows are its parent's.
func tenantTables(ctx context.Context, on interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}, setting string) ([]tenantTable, error) {
	rows, err := on.Query(ctx, `
		select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname),
			pg_catalog.array_agg(distinct a.attname::text), pg_catalog.min(pg_catalog.format_type(a.atttypid, -1)),
			pg_catalog.string_agg(distinct '(' || pg_catalog.pg_get_expr(p.polqual, p.polrelid) || ')', ' or ')
		from pg_catalog.pg_policy p
		join pg_catalog.pg_class c on c.oid = p.polrelid
		join pg_catalog.pg_namespace n on n.oid = c.relnamespace
		join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_policy'::regclass and d.objid = p.oid
			and d.refclassid = 'pg_catalog.pg_class'::regclass and d.refobjid = c.oid and d.refobjsubid > 0
		join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid
		where c.relrowsecurity and p.polpermissive
			and not exists (select from pg_catalog.pg_inherits i where i.inhrelid = c.oid)
			and (pg_catalog.strpos(pg_catalog.lower(pg_catalog.pg_get_expr(p.polqual, p.polrelid)), $1) > 0
				or pg_catalog.strpos(pg_catalog.pg_get_expr(p.polqual, p.polrelid), 'pgxtenant.sealed_tenant(') > 0)
		group by 1, 2
		order by 2`, literal(strings.ToLower(setting)))
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (t tenantTable, err error) {
		err = row.Scan(&t.oid, &t.name, &t.columns, &t.typ, &t.policy)
		if err == nil && len(t.columns) != 1 {
			err = fmt.Errorf("pgxtenant: the policies of table %s read columns %q, of which any might be the tenant's; delete its rows yourself, or give it the policy of EnableRLS", t.name, t.columns)
		}
		if err == nil {
			t.column = t.columns[0]
		}
		return t, err
	})
}

// childrenFirst orders tables so that each comes before those that its foreign keys refer to. Within a
// circle there is no such order; deferrable constraints see to that.
func childrenFirst(ctx context.Context, tx pgx.Tx, tables []tenantTable) error {
	oids := make([]uint32, len(tables))
	for i, t := range tables {
		oids[i] = t.oid
	}
	rows, err := tx.Query(ctx, `select conrelid, confrelid from pg_catalog.pg_constraint
		where contype = 'f' and conrelid = any($1) and confrelid = any($1) and conrelid <> confrelid`, oids)
	if err != nil {
		return err
	}
	parents := make(map[uint32][]uint32)
	var child, parent uint32
	if _, err := pgx.ForEachRow(rows, []any{&child, &parent}, func() error {
		parents[child] = append(parents[child], parent)
		return nil
	}); err != nil {
		return err
	}
	// Depth first: a table is finished after all that it refers to, and deleted before them.
	finished := make(map[uint32]int, len(tables))
	seen := make(map[uint32]bool, len(tables))
	var walk func(oid uint32)
	walk = func(oid uint32) {
		if seen[oid] {
			return
		}
		seen[oid] = true
		for _, p := range parents[oid] {
			walk(p)
		}
		finished[oid] = len(finished) + 1
	}
	for _, t := range tables {
		walk(t.oid)
	}
	slices.SortFunc(tables, func(a, b tenantTable) int { return finished[b.oid] - finished[a.oid] })
	return nil
}

// deleteRows removes every row of a tenant from the tables that policies guard, all or none.
func (db *TenantDB) deleteRows(ctx context.Context, on beginner, tenantID string) error {
	return pgx.BeginFunc(ctx, on, func(tx pgx.Tx) error {
		// The tables' owner is under their policies too, so it acts as the tenant.
		if err := db.binder.bindTx(ctx, tx, tenantID); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "set constraints all deferred"); err != nil {
			return err
		}
		tables, err := tenantTables(ctx, tx, db.config.Setting)
		if err != nil {
			return err
		}
		if err := childrenFirst(ctx, tx, tables); err != nil {
			return err
		}
		for _, t := range tables {
			if err := t.deleteRows(ctx, tx, tenantID); err != nil {
				return fmt.Errorf("delete from %s: %w", t.name, adminError(err))
			}
		}
		return nil
	})
}

// deleteRows asks the policy as well as the column: an admin whom no policy holds would else delete those of
// tenant "7" for "007", where the column holds a number.
func (t *tenantTable) deleteRows(ctx context.Context, tx pgx.Tx, tenantID string) error {
	err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
		return destroy(ctx, tx, "delete from "+t.name+" where "+ident(t.column)+" = $1::text::"+t.typ+" and ("+t.policy+")", tenantID)
	})
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && (pgErr.Code == "22P02" || pgErr.Code == "22003") {
		return nil // the ID is none that the column could hold
	}
	return err
}
