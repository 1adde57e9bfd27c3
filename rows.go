package pgxtenant

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The types here return a connection to its pool when the result made on it ends, as pgxpool's own do.
// Those cannot be had for a connection that is already checked out. Release may be called twice.

type pooledRows struct {
	pgx.Rows
	conn *pgxpool.Conn
}

func (r *pooledRows) Close() {
	r.Rows.Close()
	r.conn.Release()
}

func (r *pooledRows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

func (r *pooledRows) Scan(dest ...any) error {
	err := r.Rows.Scan(dest...)
	if err != nil {
		r.Close()
	}
	return err
}

func (r *pooledRows) Values() ([]any, error) {
	values, err := r.Rows.Values()
	if err != nil {
		r.Close()
	}
	return values, err
}

type pooledRow struct {
	row  pgx.Row
	conn *pgxpool.Conn
}

func (r *pooledRow) Scan(dest ...any) error {
	defer r.conn.Release() // even if a Scanner panics
	return r.row.Scan(dest...)
}

type pooledBatch struct {
	pgx.BatchResults
	conn *pgxpool.Conn // nil if tx has it
	tx   *pooledTx     // nil unless the batch began a transaction
}

func (b *pooledBatch) Close() error {
	err := b.BatchResults.Close()
	if b.conn != nil {
		b.conn.Release()
	}
	return err
}

func (b *pooledBatch) Tx() pgx.Tx {
	if b.tx == nil {
		return nil // and not a *pooledTx of nil
	}
	return b.tx
}

type pooledTx struct {
	pgx.Tx
	conn *pgxpool.Conn
}

func (tx *pooledTx) Commit(ctx context.Context) error {
	err := tx.Tx.Commit(ctx)
	tx.conn.Release()
	return err
}

func (tx *pooledTx) Rollback(ctx context.Context) error {
	err := tx.Tx.Rollback(ctx)
	tx.conn.Release()
	return err
}

// errRows is the result of a query that was never sent.
type errRows struct{ err error }

func (errRows) Close()                                       {}
func (r errRows) Err() error                                 { return r.err }
func (errRows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (errRows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (errRows) Next() bool                                   { return false }
func (r errRows) Scan(...any) error                          { return r.err }
func (r errRows) Values() ([]any, error)                     { return nil, r.err }
func (errRows) RawValues() [][]byte                          { return nil }
func (errRows) Conn() *pgx.Conn                              { return nil }
func (errRows) TypeMap() *pgtype.Map                         { return nil }
