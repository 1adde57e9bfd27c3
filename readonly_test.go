package pgxtenant

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// readOnlyDB is a TenantDB of one connection a pool, and for each isolation an active and a read-only tenant
// that has a table note.
func readOnlyDB(t *testing.T, m pgx.QueryExecMode) (db *TenantDB, tenants map[string][2]Tenant) {
	d := pgtest.New(t)
	d.RLSTable("note")
	for _, s := range []string{"tenant_s1", "tenant_s2"} {
		d.Exec("create schema "+s, "create table "+s+".note (id bigint, body text)",
			"grant usage on schema "+s+" to "+ident(d.App), "grant all on "+s+".note to "+ident(d.App))
	}
	own := d.Database()
	own.Exec("create table note (id bigint, body text)", "grant all on note to "+ident(d.App))
	db = openDB(t, d.AppURL("pool_max_conns=1"), func(c *Config) { c.Shared.ConnConfig.DefaultQueryExecMode = m })
	pair := func(a, b Tenant) [2]Tenant {
		b.Status = StatusReadOnly
		return [2]Tenant{a, b}
	}
	url := own.AppURL("pool_max_conns=1")
	return db, map[string][2]Tenant{
		"row":      pair(Tenant{ID: "r1"}, Tenant{ID: "r2"}),
		"settings": pair(Tenant{ID: "r3"}, Tenant{ID: "r4", Settings: map[string]string{"transaction_read_only": "off", "app.x": "y"}}),
		"schema":   pair(Tenant{ID: "s1", Isolation: IsolationSchema}, Tenant{ID: "s2", Isolation: IsolationSchema}),
		"database": pair(Tenant{ID: "d1", Isolation: IsolationDatabase, ConnString: url}, Tenant{ID: "d1", Isolation: IsolationDatabase, ConnString: url}),
	}
}

func TestAReadOnlyTenantCannotWriteOnAnyPath(t *testing.T) {
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		db, tenants := readOnlyDB(t, m)
		const insert = "insert into note (id, body) values (1, 'x')"
		inTx := func(o pgx.TxOptions, sql ...string) func(ctx context.Context) error {
			return func(ctx context.Context) error {
				return pgx.BeginTxFunc(ctx, db, o, func(tx pgx.Tx) error {
					for _, s := range sql {
						if _, err := tx.Exec(ctx, s); err != nil {
							return err
						}
					}
					return nil
				})
			}
		}
		exec := func(sql string, args ...any) func(ctx context.Context) error {
			return func(ctx context.Context) error { _, err := db.Exec(ctx, sql, args...); return err }
		}
		writes := map[string]func(ctx context.Context) error{
			"simple":   exec(insert),
			"extended": exec("insert into note (id, body) values ($1, $2)", 1, "x"),
			"several":  exec("select 1; " + insert),
			"begin":    exec("begin read write; " + insert + "; commit"),
			"chain":    exec("begin; select 1; commit and chain; " + insert + "; commit"),
			"copy": func(ctx context.Context) error {
				_, err := db.CopyFrom(ctx, pgx.Identifier{"note"}, []string{"id"}, pgx.CopyFromRows([][]any{{1}}))
				return err
			},
			"batch": func(ctx context.Context) error {
				b := &pgx.Batch{}
				b.Queue("select 1")
				b.Queue(insert)
				return db.SendBatch(ctx, b).Close()
			},
			"read write":     inTx(pgx.TxOptions{AccessMode: pgx.ReadWrite}, insert),
			"serializable":   inTx(pgx.TxOptions{IsoLevel: pgx.Serializable, AccessMode: pgx.ReadWrite}, insert),
			"set first":      inTx(pgx.TxOptions{}, "set transaction read write", insert),
			"set off first":  inTx(pgx.TxOptions{}, "set transaction_read_only = off", insert),
			"characteristic": inTx(pgx.TxOptions{}, "set session characteristics as transaction read write", insert),
			"savepoint":      inTx(pgx.TxOptions{}, "savepoint a", "select 1", "rollback to a", insert),
		}
		undoing := map[string]func(ctx context.Context) error{
			"set":               inTx(pgx.TxOptions{}, "select 1", "set transaction read write", insert),
			"set off":           inTx(pgx.TxOptions{}, "select 1", "set transaction_read_only = off", insert),
			"set local":         inTx(pgx.TxOptions{}, "select 1", "set local transaction_read_only = off", insert),
			"config":            inTx(pgx.TxOptions{}, "select set_config('transaction_read_only', 'off', true)", insert),
			"config session":    inTx(pgx.TxOptions{}, "select set_config('transaction_read_only', 'off', false)", insert),
			"savepoint and set": inTx(pgx.TxOptions{}, "savepoint a", "set transaction read write", insert),
			"do":                exec("do $$ begin set transaction_read_only = off; insert into note (id) values (1); end $$"),
			"do begin":          exec("do $$ begin begin perform set_config('transaction_read_only', 'off', true); end; insert into note (id) values (1); end $$"),
		}
		for name, pair := range tenants {
			writer, reader := WithTenant(context.Background(), pair[0]), WithTenant(context.Background(), pair[1])
			for path, write := range writes {
				require.Equal(t, "25006", pgCode(write(reader)), "%s: %s: %v", name, path, write(reader))
				require.Zero(t, count(t, db, reader, "select count(*) from note"), "%s: %s", name, path)
				require.Equal(t, []string{"on"}, strs(t, db, reader, "show transaction_read_only"))
				require.Equal(t, []string{"off"}, strs(t, db, writer, "show transaction_read_only"))
			}
			for path, write := range undoing {
				require.NotEmpty(t, pgCode(write(reader)), "%s: %s", name, path)
				require.Zero(t, count(t, db, reader, "select count(*) from note"), "%s: %s", name, path)
			}
			require.NoError(t, exec(insert)(writer), "%s: the next tenant on the connection writes as ever", name)
			require.Equal(t, 1, count(t, db, writer, "select count(*) from note"))
		}
	})
}

// A transaction that the caller's code could end on the server would be followed by an unbound one.
func TestReadOnlyDoesNotEndInsideAStatement(t *testing.T) {
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		db, tenants := readOnlyDB(t, m)
		for name, pair := range tenants {
			reader := WithTenant(context.Background(), pair[1])
			for _, do := range []string{"do", "/* */ do", "commit; do"} {
				_, err := db.Exec(reader, do+" $$ begin commit; insert into note (id, body) values (1, 'x'); end $$")
				require.Equal(t, "2D000", pgCode(err), "%s: %v", name, err)
			}
			require.Zero(t, count(t, db, reader, "select count(*) from note"))
		}
	})
}

// The way that is known to undo it, on servers that do not refuse to reset the parameter: see StatusReadOnly.
// It undoes it for one transaction, and neither for the next nor for another tenant.
func TestReadOnlyIsUndoneByResetForOneTransactionAtMost(t *testing.T) {
	t.Parallel()
	db, tenants := readOnlyDB(t, pgx.QueryExecModeCacheStatement)
	for name, pair := range tenants {
		writer, reader := WithTenant(context.Background(), pair[0]), WithTenant(context.Background(), pair[1])
		for _, reset := range []string{"reset transaction_read_only", "set transaction_read_only to default", "select set_config('transaction_read_only', null, false)"} {
			err := pgx.BeginFunc(context.Background(), beginAs{db, reader}, func(tx pgx.Tx) error {
				_, err := tx.Exec(reader, "select 1; "+reset)
				return err
			})
			t.Logf("%s: %s: %v", name, reset, err)
			_, err = db.Exec(reader, "insert into note (id, body) values (1, 'x')")
			require.Equal(t, "25006", pgCode(err), "%s: %s: %v", name, reset, err)
			require.Equal(t, []string{"off"}, strs(t, db, writer, "show transaction_read_only"))
		}
	}
}

// beginAs begins transactions as one tenant.
type beginAs struct {
	db  *TenantDB
	ctx context.Context
}

func (b beginAs) Begin(context.Context) (pgx.Tx, error) { return b.db.Begin(b.ctx) }

func TestUnavailableTenantsAreRefused(t *testing.T) {
	t.Parallel()
	db := openDB(t, pgtest.New(t).AppURL())
	for status, says := range map[Status]string{StatusProvisioning: "being provisioned", StatusDeleting: "being deleted"} {
		ctx := WithTenant(context.Background(), Tenant{ID: "a", Status: status})
		expectAll(t, db, ctx, ErrTenantUnavailable)
		require.ErrorContains(t, db.Ping(ctx), says)
		_, err := db.Shared().Exec(ctx, "select 1")
		require.ErrorIs(t, err, ErrTenantUnavailable)
	}
}
