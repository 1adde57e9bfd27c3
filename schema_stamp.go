package pgxtenant

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// fingerprint tells whether the template has changed, or the rows that are copied with it.
func (m *SchemaManager) fingerprint(ctx context.Context, tx pgx.Tx, template *description) ([]byte, error) {
	rows, err := m.referenceSums(ctx, tx)
	sum := sha256.Sum256([]byte(strings.Join(append(template.lines(), rows...), "\x00")))
	return sum[:], err
}

func (m *SchemaManager) referenceSums(ctx context.Context, tx pgx.Tx) (sums []string, err error) {
	for _, table := range m.o.Reference {
		var sum string
		err := tx.QueryRow(ctx, "select coalesce(pg_catalog.md5(pg_catalog.string_agg((r.*)::text, '\n' order by (r.*)::text)), '') from "+ident(m.o.Template, table)+" r").Scan(&sum)
		var pgErr *pgconn.PgError
		switch {
		case errors.As(err, &pgErr) && pgErr.Code == "42P01":
			return nil, fmt.Errorf("pgxtenant: the template, schema %q, has no table %q yet, which Config.TemplateReference names; "+
				"run the migrations, or create it there, before tenants are made: %w", m.o.Template, table, err)
		case err != nil:
			return nil, fmt.Errorf("read the rows of reference table %q: %w", table, err)
		}
		sums = append(sums, sum)
	}
	return sums, nil
}

// stampSQL sums up which transactions have written the catalog's rows about the objects of a schema: whatever changes one of them
// changes it, and to read it takes a small part of what it takes to describe the schema. What they refer to elsewhere, such as the name of a role,
// is the same for them and their copies. Objects are found by what depends on the schema, since the catalogs have no index by schema.
const stampSQL = `
	with n as materialized (select oid from pg_catalog.pg_namespace where nspname = $1),
	d as materialized (select classid, objid from pg_catalog.pg_depend where refclassid = 'pg_catalog.pg_namespace'::regclass and refobjid = (select oid from n)),
	t as materialized (select objid as oid from d where classid = 'pg_catalog.pg_type'::regclass),
	r as materialized (select objid as oid from d where classid = 'pg_catalog.pg_class'::regclass
		union all select typrelid from pg_catalog.pg_type where oid in (select oid from t) and typrelid <> 0),
	i as materialized (select indexrelid as oid from pg_catalog.pg_index where indrelid in (select oid from r)),
	ri as materialized (select oid from r union all select oid from i),
	x(what, oid, part, xmin) as materialized (
		select 'namespace', oid, 0, xmin from pg_catalog.pg_namespace where oid in (select oid from n)
		union all select 'class', oid, 0, xmin from pg_catalog.pg_class where oid in (select oid from ri)
		union all select 'attribute', attrelid, attnum, xmin from pg_catalog.pg_attribute where attrelid in (select oid from ri)
		union all select 'attrdef', oid, 0, xmin from pg_catalog.pg_attrdef where adrelid in (select oid from r)
		union all select 'constraint', oid, 0, xmin from pg_catalog.pg_constraint where conrelid in (select oid from r) or contypid in (select oid from t)
		union all select 'index', indexrelid, 0, xmin from pg_catalog.pg_index where indrelid in (select oid from r)
		union all select 'trigger', oid, 0, xmin from pg_catalog.pg_trigger where tgrelid in (select oid from r)
		union all select 'policy', oid, 0, xmin from pg_catalog.pg_policy where polrelid in (select oid from r)
		union all select 'rewrite', oid, 0, xmin from pg_catalog.pg_rewrite where ev_class in (select oid from r)
		union all select 'statistics', oid, 0, xmin from pg_catalog.pg_statistic_ext where oid in (select objid from d)
		union all select 'inherits', inhrelid, inhseqno, xmin from pg_catalog.pg_inherits where inhrelid in (select oid from ri)
		union all select 'partitioned', partrelid, 0, xmin from pg_catalog.pg_partitioned_table where partrelid in (select oid from r)
		union all select 'sequence', seqrelid, 0, xmin from pg_catalog.pg_sequence where seqrelid in (select oid from r)
		union all select 'type', oid, 0, xmin from pg_catalog.pg_type where oid in (select oid from t)
		union all select 'enum', oid, 0, xmin from pg_catalog.pg_enum where enumtypid in (select oid from t)
		union all select 'range', rngtypid, 0, xmin from pg_catalog.pg_range where rngtypid in (select oid from t)
		union all select 'proc', oid, 0, xmin from pg_catalog.pg_proc where oid in (select objid from d)
		union all select 'default_acl', oid, 0, xmin from pg_catalog.pg_default_acl where defaclnamespace in (select oid from n)
		union all select 'other', objid, 0, '0'::xid from d)
	select coalesce(pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', what, oid, part, xmin), ',' order by what, oid, part)
		|| coalesce((select pg_catalog.string_agg(pg_catalog.concat_ws(' ', objoid, objsubid, description), ',' order by classoid, objoid, objsubid)
			from pg_catalog.pg_description where objoid in (select oid from x)), '')), '')
	from x`

// stamp tells that nothing has changed in the template, nor in the rows that are copied with it. Another one tells nothing.
func (m *SchemaManager) stamp(ctx context.Context, tx pgx.Tx) (string, error) {
	rows, err := m.referenceSums(ctx, tx)
	if err != nil {
		return "", err
	}
	var stamp string
	err = tx.QueryRow(ctx, stampSQL, m.o.Template).Scan(&stamp)
	return strings.Join(append(rows, stamp), " "), err
}

// fromStamped gives a ready-made copy the tenant's name, if there is one that was made of the template as it is and says its own name
// nowhere. It returns its fingerprint, or nil. The template need not be described for that, which takes longer than all else.
func (m *SchemaManager) fromStamped(ctx context.Context, tx pgx.Tx, schema string) (fingerprint []byte, err error) {
	var some bool
	err = tx.QueryRow(ctx, "select exists (select from pgxtenant.schema where state = 'stock' and template = $1 and stamp <> '')", m.o.Template).Scan(&some)
	if err != nil || !some {
		return nil, err
	}
	stamp, err := m.stamp(ctx, tx)
	if err != nil {
		return nil, err
	}
	var name string
	err = tx.QueryRow(ctx, `select name, fingerprint from pgxtenant.schema where state = 'stock' and template = $1 and stamp = $2
		order by name limit 1 for update skip locked`, m.o.Template, stamp).Scan(&name, &fingerprint)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = tx.Exec(ctx, "delete from pgxtenant.schema where name = "+literal(name)+"; alter schema "+ident(name)+" rename to "+ident(schema))
	return fingerprint, err
}
