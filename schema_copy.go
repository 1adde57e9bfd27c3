package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// template reads the template, whose tables cannot be changed from then on to the end of the transaction, and
// can be read and written all the while. No run of ForEach is at work on it meanwhile: what that adds, and the
// mark of it in a table of reference, would be in the copy one without the other.
func (m *SchemaManager) template(ctx context.Context, tx pgx.Tx) (*description, error) {
	fence := fenceOf(&Tenant{Isolation: IsolationSchema, Schema: m.o.Template})
	if _, err := tx.Exec(ctx, "select pg_catalog.pg_advisory_xact_lock_shared(pg_catalog.hashtextextended($1, 0))", fence); err != nil {
		return nil, err
	}
	var exists bool
	var foreign *string
	var tables []string
	err := tx.QueryRow(ctx, `
		select exists (select from pg_catalog.pg_namespace where nspname = $1),
			(select pg_catalog.format('%s belongs to role %s', pg_catalog.pg_describe_object(o.class, o.oid, 0), pg_catalog.pg_get_userbyid(o.owner))
				from pg_catalog.pg_namespace n, lateral (
					select 'pg_catalog.pg_namespace'::regclass, n.oid, n.nspowner
					union all select 'pg_catalog.pg_class'::regclass, c.oid, c.relowner from pg_catalog.pg_class c where c.relnamespace = n.oid and c.relkind not in ('i', 'I', 'c')
					union all select 'pg_catalog.pg_proc'::regclass, f.oid, f.proowner from pg_catalog.pg_proc f where f.pronamespace = n.oid
						and not exists (select from pg_catalog.pg_depend d where d.classid = 'pg_catalog.pg_proc'::regclass and d.objid = f.oid and d.deptype = 'i')
					union all select 'pg_catalog.pg_type'::regclass, t.oid, t.typowner from pg_catalog.pg_type t where t.typnamespace = n.oid
					union all select 'pg_catalog.pg_statistic_ext'::regclass, s.oid, s.stxowner from pg_catalog.pg_statistic_ext s where s.stxnamespace = n.oid) o(class, oid, owner)
				where n.nspname = $1 and o.owner <> current_user::regrole order by 1 limit 1),
			array(select pg_catalog.format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
				where n.nspname = $1 and c.relkind in ('r', 'p') order by 1)`, m.o.Template).Scan(&exists, &foreign, &tables)
	switch {
	case err != nil:
		return nil, err
	case !exists:
		return nil, fmt.Errorf("pgxtenant: there is no schema %q to be the template; create it, with the tables that each tenant is to have", m.o.Template)
	case foreign != nil:
		return nil, fmt.Errorf("pgxtenant: in the template, %s; all of it must belong to the role of Config.Admin", *foreign)
	}
	if len(tables) > 0 {
		if _, err := tx.Exec(ctx, "lock table "+strings.Join(tables, ", ")+" in access share mode"); err != nil {
			return nil, err
		}
	}
	d, err := describeSchema(ctx, tx, m.o.Template)
	if err != nil {
		return nil, err
	}
	if len(d.made) == 0 {
		return nil, fmt.Errorf("pgxtenant: the template, schema %q, is empty; run the migrations, or create the tables in it that each tenant is to have", m.o.Template)
	}
	return &d, nil
}

// copy makes a schema as it is described, with the rows of reference.
func (m *SchemaManager) copy(ctx context.Context, tx pgx.Tx, template *description, schema string) error {
	before, after := template.statements(schema)
	begin := []object{
		{sql: "create schema " + ident(schema)},
		// Nothing else is searched, so what does not come qualified is the copy's own. Functions may come before
		// what their bodies name.
		{sql: "set local search_path = " + ident(schema) + ", pg_temp"},
		{sql: "set local check_function_bodies = off"},
		{sql: "set local client_min_messages = warning"},
	}
	if err := run(ctx, tx, append(begin, before...)); err != nil {
		return err
	}
	for _, table := range m.o.Reference {
		if err := m.copyRows(ctx, tx, schema, table); err != nil {
			return fmt.Errorf("copy the rows of reference table %q: %w", table, err)
		}
	}
	for _, view := range template.populated {
		after = append(after, object{name: "rows of materialized view " + view, sql: "refresh materialized view " + view})
	}
	if err := run(ctx, tx, after); err != nil {
		return err
	}
	return m.standsAlone(ctx, tx, schema)
}

// terminator ends each statement of a text, and is in none of them.
const terminator = ";\n--\n"

// run sends statements as one text, and tells which one failed.
func run(ctx context.Context, tx pgx.Tx, statements []object) error {
	if len(statements) == 0 {
		return nil
	}
	var text strings.Builder
	for _, o := range statements {
		text.WriteString(strings.TrimRight(o.sql, "; \n"))
		text.WriteString(terminator)
	}
	noteStatement(tx, text.String())
	results := tx.Conn().PgConn().Exec(ctx, text.String())
	done := 0
	for results.NextResult() {
		if _, err := results.ResultReader().Close(); err == nil {
			done++
		}
	}
	err := results.Close()
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	if done == 0 && pgErr.Position > 0 { // the text was not even parsed
		upTo := []rune(text.String())[:pgErr.Position-1]
		done = min(strings.Count(string(upTo), terminator), len(statements)-1)
	}
	return fmt.Errorf("copy %s: %w in: %s", statements[min(done, len(statements)-1)].name, err, statements[min(done, len(statements)-1)].sql)
}

func (m *SchemaManager) copyRows(ctx context.Context, tx pgx.Tx, schema, table string) error {
	var columns, sequences []string
	var only string // for the rows of tables that inherit are not this one's, but those of partitions are
	err := tx.QueryRow(ctx, `
		select array(select pg_catalog.quote_ident(a.attname) from pg_catalog.pg_attribute a
				where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' order by a.attnum),
			array(select pg_catalog.quote_ident(s.relname) from pg_catalog.pg_class s where s.relkind = 'S' and s.relnamespace = c.relnamespace and s.oid in (
				select d.objid from pg_catalog.pg_depend d
					where d.classid = 'pg_catalog.pg_class'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass and d.refobjid = c.oid and d.refobjsubid > 0
				union all select d.refobjid from pg_catalog.pg_depend d join pg_catalog.pg_attrdef e on e.oid = d.objid
					where d.classid = 'pg_catalog.pg_attrdef'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass and e.adrelid = c.oid) order by 1),
			case c.relkind when 'r' then 'only ' else '' end
		from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
		where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')`, m.o.Template, table).Scan(&columns, &sequences, &only)
	if err != nil {
		return err // of a table that is not there, that there are no rows
	}
	list := strings.Join(columns, ", ")
	// Rows that a policy hides from the owner are an error then, and not left out.
	text := "set local row_security = off; insert into " + ident(schema, table) + " (" + list + ") overriding system value select " + list + " from " + only + ident(m.o.Template, table)
	for _, s := range sequences {
		text += "; select pg_catalog.setval(" + literal(ident(schema)+"."+s) + ", last_value, is_called) from " + ident(m.o.Template) + "." + s
	}
	_, err = tx.Exec(ctx, text+"; set local row_security = on")
	return err
}

// standsAlone makes sure that nothing in a copy depends on anything in the template.
func (m *SchemaManager) standsAlone(ctx context.Context, tx pgx.Tx, schema string) error {
	var tie *string
	err := tx.QueryRow(ctx, `
		with ns as materialized (select oid, nspname = $1 as mine from pg_catalog.pg_namespace where nspname in ($1, $2)),
		rel as materialized (select c.oid, ns.mine from pg_catalog.pg_class c join ns on ns.oid = c.relnamespace),
		part(class, oid, mine) as materialized (
			select 'pg_catalog.pg_class'::regclass::oid, oid, mine from rel
			union all select 'pg_catalog.pg_proc'::regclass, p.oid, mine from pg_catalog.pg_proc p join ns on ns.oid = p.pronamespace
			union all select 'pg_catalog.pg_type'::regclass, t.oid, mine from pg_catalog.pg_type t join ns on ns.oid = t.typnamespace
			union all select 'pg_catalog.pg_constraint'::regclass, k.oid, mine from pg_catalog.pg_constraint k join ns on ns.oid = k.connamespace
			union all select 'pg_catalog.pg_attrdef'::regclass, d.oid, mine from pg_catalog.pg_attrdef d join rel on rel.oid = d.adrelid
			union all select 'pg_catalog.pg_rewrite'::regclass, d.oid, mine from pg_catalog.pg_rewrite d join rel on rel.oid = d.ev_class
			union all select 'pg_catalog.pg_trigger'::regclass, d.oid, mine from pg_catalog.pg_trigger d join rel on rel.oid = d.tgrelid
			union all select 'pg_catalog.pg_policy'::regclass, d.oid, mine from pg_catalog.pg_policy d join rel on rel.oid = d.polrelid
			union all select 'pg_catalog.pg_namespace'::regclass, oid, mine from ns),
		-- Of each dependency of the copy's, by the index on who depends.
		tie as materialized (
			select d.* from part, lateral (select * from pg_catalog.pg_depend d where d.classid = part.class and d.objid = part.oid offset 0) d where part.mine)
		select pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid) || ' depends on ' || pg_catalog.pg_describe_object(d.refclassid, d.refobjid, d.refobjsubid)
		from tie d join part theirs on theirs.class = d.refclassid and theirs.oid = d.refobjid and not theirs.mine
		order by 1 limit 1`, schema, m.o.Template).Scan(&tie)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("pgxtenant: in the copy of the template, %s", *tie)
	}
	return err
}
