package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgxtenant/pgxtenant"
)

// attempt is a statement that must not reach another tenant's rows.
type attempt struct {
	tenant string // empty: no tenant in the context
	sql    string

	// What must come of it: an error of pgxtenant, or of the server by its code, or so many rows.
	err  error
	code string
	rows int64
}

var attempts = []attempt{
	{tenant: "acme", sql: "select * from invoice", rows: 3},
	{tenant: "acme", sql: "select * from invoice where tenant_id = 'globex'", rows: 0},
	{tenant: "acme", sql: "update invoice set item = 'x' where tenant_id = 'globex'", rows: 0},
	{tenant: "acme", sql: "delete from invoice where tenant_id <> 'acme'", rows: 0},
	{tenant: "acme", sql: "insert into invoice values ('globex', 9, 'x')", code: "42501"},
	{tenant: "acme", sql: "update invoice set tenant_id = 'globex'", code: "42501"},
	{tenant: "initech", sql: "select * from public.invoice", rows: 0},
	{tenant: "", sql: "select * from invoice", err: pgxtenant.ErrNoTenant},
	{tenant: "nobody", sql: "select * from invoice", err: pgxtenant.ErrTenantNotFound},
	{tenant: "x' or 'a'='a", sql: "select * from invoice", err: pgxtenant.ErrInvalidTenantID},
	{tenant: "vandelay", sql: "select * from invoice", err: pgxtenant.ErrTenantSuspended},
	{tenant: "hooli", sql: "select * from invoice", code: "3F000"},
	{tenant: "wayne", sql: "select * from invoice", err: pgxtenant.ErrWrongTenant},
}

// reach makes all attempts, and looks from outside whether any row has changed.
func reach(ctx context.Context, db *pgxtenant.TenantDB, s *shop) error {
	before, err := everything(ctx, s)
	if err != nil {
		return err
	}
	fmt.Printf("\n3. REACHING FOR ANOTHER TENANT'S ROWS, of all %d in the shared table\n\n", len(before))
	for _, a := range attempts {
		if err := a.make(ctx, db); err != nil {
			return err
		}
	}
	after, err := everything(ctx, s)
	if err != nil {
		return err
	}
	if strings.Join(before, "\n") != strings.Join(after, "\n") {
		return fmt.Errorf("the shared table was %q and is now %q", before, after)
	}
	fmt.Printf("\nThe shared table still has its %d rows, unchanged.\n", len(after))
	return nil
}

// everything is the shared table as a role sees it that policies do not hold.
func everything(ctx context.Context, s *shop) (rows []string, err error) {
	conn, err := pgx.Connect(ctx, s.reader())
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	err = conn.QueryRow(ctx, "select array_agg(i::text order by i) from invoice i").Scan(&rows)
	return rows, err
}

func (a attempt) make(ctx context.Context, db *pgxtenant.TenantDB) error {
	who := "no tenant"
	if a.tenant != "" {
		who, ctx = a.tenant, pgxtenant.WithTenantID(ctx, a.tenant)
	}
	tag, err := db.Exec(ctx, a.sql)
	outcome := fmt.Sprintf("%d rows", tag.RowsAffected())
	if err != nil {
		outcome = "refused: " + err.Error()
	}
	fmt.Printf("%s: %s\n%s\n", who, a.sql, indented(outcome))

	var pgErr *pgconn.PgError
	var asExpected bool
	switch {
	case a.err != nil:
		asExpected = errors.Is(err, a.err)
	case a.code != "":
		asExpected = errors.As(err, &pgErr) && pgErr.Code == a.code
	default:
		asExpected = err == nil && tag.RowsAffected() == a.rows
	}
	if !asExpected {
		return fmt.Errorf("%s: %s: that is not what must come of it", who, a.sql)
	}
	return nil
}

// indented breaks text into lines that fit a terminal of 80 columns.
func indented(text string) string {
	const indent, width = "    ", 78
	var lines []string
	for _, word := range strings.Fields(text) {
		if last := len(lines) - 1; last >= 0 && len(lines[last])+1+len(word) <= width {
			lines[last] += " " + word
		} else {
			lines = append(lines, indent+word)
		}
	}
	return strings.Join(lines, "\n")
}
