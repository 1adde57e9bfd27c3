package tenantgoose

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// openDB returns a *sql.DB all of whose connections are conn, since goose wants one, and a function that takes conn away
// from it. That waits for the statement that runs, which may be a rollback of database/sql's own after a
// cancellation; later ones fail. pgx's stdlib only makes connections of its own.
//
// There may be several at once: goose keeps one out while a Go migration without a transaction asks for another. They
// must not be used at once: what would have to wait fails.
func openDB(conn *pgx.Conn) (*sql.DB, func()) {
	s := &session{conn: conn}
	db := sql.OpenDB(connector{s})
	return db, func() {
		s.mu.Lock()
		s.ended = true
		s.mu.Unlock()
		_ = db.Close()
	}
}

var (
	errBusy  = errors.New("tenantgoose: the tenant's one connection is busy; close the rows, or end the transaction, before the next statement")
	errEnded = errors.New("tenantgoose: the connection is no longer this migration's")
)

// session lends one connection to statements, one after another.
type session struct {
	mu    sync.Mutex // held while a statement runs, and until its rows are closed
	conn  *pgx.Conn
	ended bool // under mu
}

func (s *session) enter() error {
	if !s.mu.TryLock() {
		return errBusy
	}
	if s.ended {
		s.mu.Unlock()
		return errEnded
	}
	return nil
}

type connector struct{ s *session }

func (c connector) Connect(context.Context) (driver.Conn, error) { return lentConn(c), nil }
func (c connector) Driver() driver.Driver                        { return noDriver{} }

type noDriver struct{}

func (noDriver) Open(string) (driver.Conn, error) {
	return nil, errors.New("tenantgoose: a migration has one connection, which is open")
}

// lentConn is the connection as database/sql sees it. It never returns driver.ErrBadConn, upon which database/sql would try again.
type lentConn struct{ s *session }

func (c lentConn) Close() error                             { return nil }
func (c lentConn) CheckNamedValue(*driver.NamedValue) error { return nil } // pgx knows more types than database/sql
func (c lentConn) Begin() (driver.Tx, error) {
	return c.BeginTx(context.Background(), driver.TxOptions{})
}
func (c lentConn) Prepare(query string) (driver.Stmt, error) { return lentStmt{c, query}, nil }

var isoLevels = map[sql.IsolationLevel]pgx.TxIsoLevel{
	sql.LevelDefault: "", sql.LevelReadUncommitted: pgx.ReadUncommitted, sql.LevelReadCommitted: pgx.ReadCommitted,
	sql.LevelRepeatableRead: pgx.RepeatableRead, sql.LevelSnapshot: pgx.RepeatableRead, sql.LevelSerializable: pgx.Serializable,
}

func (c lentConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	level, ok := isoLevels[sql.IsolationLevel(o.Isolation)]
	if !ok {
		return nil, fmt.Errorf("tenantgoose: PostgreSQL has no isolation level %v", sql.IsolationLevel(o.Isolation))
	}
	if err := c.s.enter(); err != nil {
		return nil, err
	}
	defer c.s.mu.Unlock()
	if c.s.conn.PgConn().TxStatus() != 'I' {
		return nil, errBusy
	}
	options := pgx.TxOptions{IsoLevel: level}
	if o.ReadOnly {
		options.AccessMode = pgx.ReadOnly
	}
	tx, err := c.s.conn.BeginTx(ctx, options)
	if err != nil {
		return nil, err
	}
	return lentTx{c.s, ctx, tx}, nil
}

func (c lentConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	given, err := arguments(args)
	if err != nil {
		return nil, err
	}
	if err := c.s.enter(); err != nil {
		return nil, err
	}
	defer c.s.mu.Unlock()
	tag, err := c.s.conn.Exec(ctx, query, given...)
	if err != nil {
		return nil, err
	}
	return driver.RowsAffected(tag.RowsAffected()), nil
}

func (c lentConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	given, err := arguments(args)
	if err != nil {
		return nil, err
	}
	if err := c.s.enter(); err != nil {
		return nil, err
	}
	if len(given) == 0 {
		given = []any{pgx.QueryExecModeExec}
	}
	// As text every type can be had as a string.
	rows, err := c.s.conn.Query(ctx, query, append([]any{pgx.QueryResultFormats{pgx.TextFormatCode}}, given...)...)
	if err != nil {
		c.s.mu.Unlock()
		return nil, err
	}
	// The columns are known with the first row.
	r := &lentRows{s: c.s, rows: rows, ahead: true, more: rows.Next()}
	if err := rows.Err(); err != nil {
		_ = r.Close()
		return nil, err
	}
	return r, nil
}

// arguments are those of database/sql as pgx takes them. Statements are never kept prepared: a migration changes what they
// were planned for. Those with arguments of the few types that leave no choice, as goose's own have, take one round trip, all others
// ask the server for the types.
func arguments(args []driver.NamedValue) ([]any, error) {
	if len(args) == 0 {
		return nil, nil
	}
	given := []any{pgx.QueryExecModeExec}
	for _, a := range args {
		if a.Name != "" {
			return nil, fmt.Errorf("tenantgoose: PostgreSQL has no named arguments, such as %q", a.Name)
		}
		switch a.Value.(type) {
		case int64, bool:
		default:
			given[0] = pgx.QueryExecModeDescribeExec
		}
		given = append(given, a.Value)
	}
	return given, nil
}

type lentTx struct {
	s   *session
	ctx context.Context // driver.Tx's methods get none
	tx  pgx.Tx
}

func (t lentTx) Commit() error   { return t.end(t.tx.Commit) }
func (t lentTx) Rollback() error { return t.end(t.tx.Rollback) }

func (t lentTx) end(how func(context.Context) error) error {
	if err := t.s.enter(); err != nil {
		return err
	}
	defer t.s.mu.Unlock()
	return how(t.ctx)
}

// lentStmt is a statement as text: it is planned each time.
type lentStmt struct {
	c     lentConn
	query string
}

func (s lentStmt) Close() error  { return nil }
func (s lentStmt) NumInput() int { return -1 }

func (s lentStmt) Exec([]driver.Value) (driver.Result, error) { return nil, driver.ErrSkip }
func (s lentStmt) Query([]driver.Value) (driver.Rows, error)  { return nil, driver.ErrSkip }

func (s lentStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return s.c.ExecContext(ctx, s.query, args)
}

func (s lentStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return s.c.QueryContext(ctx, s.query, args)
}

type lentRows struct {
	s           *session
	rows        pgx.Rows
	ahead, more bool // the first row is read
	closed      bool
}

func (r *lentRows) Columns() []string {
	var names []string
	for _, f := range r.rows.FieldDescriptions() {
		names = append(names, f.Name)
	}
	return names
}

func (r *lentRows) Close() error {
	if !r.closed {
		r.closed = true
		r.rows.Close()
		r.s.mu.Unlock()
	}
	return r.rows.Err()
}

func (r *lentRows) Next(to []driver.Value) error {
	if r.ahead {
		r.ahead = false
	} else {
		r.more = r.rows.Next()
	}
	if !r.more {
		if err := r.rows.Err(); err != nil {
			return err
		}
		return io.EOF
	}
	values, err := r.rows.Values()
	if err != nil {
		return err
	}
	for i, raw := range r.rows.RawValues() {
		to[i] = driverValue(values[i], raw, r.rows.FieldDescriptions()[i])
	}
	return nil
}

// driverValue is a column as one of the types that database/sql converts from: what is no number, time, boolean or bytes is its text.
func driverValue(v any, text []byte, f pgconn.FieldDescription) driver.Value {
	if text == nil {
		return nil
	}
	if f.DataTypeOID == pgtype.JSONOID || f.DataTypeOID == pgtype.JSONBOID {
		return append([]byte(nil), text...) // 1 is valid JSON, and no number to those who ask for it
	}
	switch v := v.(type) {
	case int16:
		return int64(v)
	case int32:
		return int64(v)
	case uint32:
		return int64(v)
	case float32:
		return float64(v)
	case int64, float64, bool, []byte, time.Time:
		return v
	}
	return string(text)
}
