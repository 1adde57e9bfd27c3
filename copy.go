package pgxtenant

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// CopyFrom inserts the rows of rowSrc into a table as ctx's tenant, as [pgxpool.Pool.CopyFrom] does: all
// of them or none, with the same rules for what a value may be. It works on tables with row-level
// security in force too, for which PostgreSQL refuses COPY: there it sends INSERT statements, in one
// transaction if they are several, and a row that a policy does not allow fails it with the policy's own
// error (42501). rowSrc is read once and not kept in memory; it is not read beyond a row that fails, but for
// some hundreds of rows that are then on their way.
//
// The table is a name, looked up in the tenant's search_path, or a schema and a name. Under row-level
// security, unlike COPY, rules of the table apply. To know which way to take costs one more round trip.
func (db *TenantDB) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Release()
	t, err := describeTable(ctx, conn.Conn(), tableName)
	if err != nil {
		return 0, err
	}
	if !t.policies {
		src := &guardedSource{CopyFromSource: rowSrc, ctx: ctx}
		n, err := conn.Conn().CopyFrom(ctx, tableName, columnNames, src)
		if src.panicked != nil {
			panic(src.panicked)
		}
		return n, err
	}
	c := &tableCopy{conn: conn.Conn(), src: rowSrc}
	if c.batch, err = t.batch(ctx, conn.Conn(), columnNames); err != nil {
		return 0, err
	}
	if tracer, ok := conn.Conn().Config().Tracer.(pgx.CopyFromTracer); ok {
		ctx = tracer.TraceCopyFromStart(ctx, conn.Conn(), pgx.TraceCopyFromStartData{TableName: tableName, ColumnNames: columnNames})
		defer func() { // a panic of the source's included
			tag := pgconn.NewCommandTag(fmt.Sprintf("COPY %d", c.rows))
			tracer.TraceCopyFromEnd(ctx, conn.Conn(), pgx.TraceCopyFromEndData{CommandTag: tag, Err: err})
		}()
	}
	if err = c.run(ctx); err != nil {
		return 0, err
	}
	return c.rows, nil
}

// copyTable is what must be known of a table to copy into it.
type copyTable struct {
	name     string // quoted
	policies bool   // row-level security is in force for the current role; otherwise nothing below is set

	rowType, rowArray uint32 // OIDs of the table's row type and of arrays of it
	columns           []copyColumn
}

type copyColumn struct {
	name     string
	typ      uint32 // OID
	base     uint32 // the same, unless typ is a domain
	nullable bool   // null can be given for it in a row of the table's type, whatever its constraints
}

// One statement, prepared once per connection: the columns come with the answer that they are needed.
const describeTableSQL = `select t.active, coalesce(c.reltype, 0), coalesce(rt.typarray, 0), coalesce(a.attname::text, ''),
	coalesce(y.oid, 0), coalesce(b.oid, 0), coalesce(y.typtype <> 'd' and y.typreceive <> 0, false)
from (select r.oid, pg_catalog.row_security_active(r.oid) as active from (select $1::pg_catalog.regclass::pg_catalog.oid as oid) r) t
left join pg_catalog.pg_class c on t.active and c.oid = t.oid
left join pg_catalog.pg_type rt on rt.oid = c.reltype
left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
left join pg_catalog.pg_type y on y.oid = a.atttypid
left join lateral (
	with recursive d as (
		select y.oid, y.typtype, y.typbasetype
		union all
		select n.oid, n.typtype, n.typbasetype from d join pg_catalog.pg_type n on n.oid = d.typbasetype where d.typtype = 'd'
	)
	select d.oid from d where d.typtype <> 'd'
) b on true
order by a.attnum`

func describeTable(ctx context.Context, conn *pgx.Conn, name pgx.Identifier) (*copyTable, error) {
	t := &copyTable{name: name.Sanitize()}
	rows, err := conn.Query(ctx, describeTableSQL, t.name)
	if err != nil {
		return nil, err
	}
	var c copyColumn
	_, err = pgx.ForEachRow(rows, []any{&t.policies, &t.rowType, &t.rowArray, &c.name, &c.typ, &c.base, &c.nullable}, func() error {
		t.columns = append(t.columns, c)
		return nil
	})
	return t, err
}

// batch returns what gathers rows of the given columns into statements.
func (t *copyTable) batch(ctx context.Context, conn *pgx.Conn, names []string) (copyBatch, error) {
	insert := insertion{types: conn.TypeMap(), columns: make([]copyColumn, len(names))}
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = pgx.Identifier{name}.Sanitize()
		at := slices.IndexFunc(t.columns, func(c copyColumn) bool { return c.name == name })
		if at < 0 {
			// The server knows best what to say about it.
			_, err := conn.PgConn().Prepare(ctx, "", fmt.Sprintf("select %s from %s", quoted[i], t.name), nil)
			if err == nil {
				err = fmt.Errorf("pgxtenant: column %s of %s cannot be copied into", quoted[i], t.name)
			}
			return nil, err
		}
		insert.columns[i] = t.columns[at]
	}
	// As COPY does, whatever is given for an identity column is taken.
	insert.head = fmt.Sprintf("insert into %s (%s) overriding system value ", t.name, strings.Join(quoted, ", "))

	rowTyped := t.rowArray != 0
	fields := make([]rowField, len(t.columns))
	for i, c := range t.columns {
		fields[i] = rowField{typ: c.typ, from: slices.Index(names, c.name)}
		rowTyped = rowTyped && (fields[i].from >= 0 || c.nullable)
	}
	if !rowTyped {
		return &valuesBatch{insertion: insert, size: max(1, min(batchRows, maxParams/max(1, len(names))))}, nil
	}
	b := &rowsBatch{insertion: insert, table: t, fields: fields}
	for i := range quoted {
		quoted[i] = "r." + quoted[i]
	}
	b.sql = insert.head + fmt.Sprintf("select %s from pg_catalog.unnest($1) r", strings.Join(quoted, ", "))
	return b, nil
}

// tableCopy inserts the rows of a source.
type tableCopy struct {
	conn  *pgx.Conn
	src   pgx.CopyFromSource
	batch copyBatch
	ahead bool  // the source stands on a row that is not in the batch yet
	rows  int64 // inserted
}

// run is all or nothing: one statement, or several in a transaction. While the server works on one batch
// the next is gathered.
func (c *tableCopy) run(ctx context.Context) error {
	more, err := c.fill()
	if err != nil {
		return err
	}
	var tx pgx.Tx
	if more {
		if tx, err = c.conn.Begin(ctx); err != nil {
			return err
		}
		defer func() { // after an error, or a panic of the source's; it does nothing after Commit
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			_ = tx.Rollback(ctx)
		}()
	}
	p := c.conn.PgConn().StartPipeline(ctx)
	defer p.Close() // before the Rollback
	for inFlight := 0; ; {
		c.batch.send(p)
		if err := p.Sync(); err != nil {
			return err
		}
		inFlight++
		if more {
			if more, err = c.fill(); err != nil {
				return err
			}
			if err := c.read(p, &inFlight, 1); err != nil {
				return err
			}
			continue
		}
		if err := c.read(p, &inFlight, 0); err != nil {
			return err
		}
		break
	}
	if err := p.Close(); err != nil || tx == nil {
		return err
	}
	return tx.Commit(ctx)
}

// fill gathers rows until the batch is full, and reports whether there are more.
func (c *tableCopy) fill() (more bool, err error) {
	for {
		if !c.ahead && !c.src.Next() {
			return false, c.src.Err()
		}
		if c.ahead = c.batch.full(); c.ahead {
			return true, nil
		}
		values, err := c.src.Values()
		if err != nil {
			return false, err
		}
		if err := c.batch.add(values); err != nil {
			return false, err
		}
	}
}

// read reads results until no more than most batches are in flight.
func (c *tableCopy) read(p *pgconn.Pipeline, inFlight *int, most int) error {
	for *inFlight > most {
		result, err := p.GetResults()
		if err != nil {
			return err
		}
		switch r := result.(type) {
		case *pgconn.ResultReader:
			tag, err := r.Close()
			if err != nil {
				return err
			}
			c.rows += tag.RowsAffected()
		case *pgconn.PipelineSync:
			*inFlight--
		case nil:
			return errors.New("pgxtenant: copy: a result is missing")
		}
	}
	return nil
}

// copyBatch gathers rows into one INSERT statement.
type copyBatch interface {
	add(values []any) error
	full() bool
	// send queues the statement, even if there are no rows for it, and empties the batch.
	send(p *pgconn.Pipeline)
}

// Small enough to stay in the processor's caches, and large enough for the statement itself not to count.
const (
	batchRows  = 1000
	batchBytes = 128 << 10
	maxParams  = 65535 // of one statement
)

// insertion is what the two kinds of batch have in common.
type insertion struct {
	types   *pgtype.Map
	columns []copyColumn // as the caller named them
	head    string       // insert into table (columns)
}

func (ins *insertion) checkCount(values []any) error {
	if len(values) != len(ins.columns) {
		return fmt.Errorf("pgxtenant: copy: expected %d values, got %d values", len(ins.columns), len(values))
	}
	return nil
}

// rowsBatch sends rows as one parameter, an array of the table's row type, which unnest takes apart again.
// It is the fastest of the ways that were tried (an array per column, a long VALUES list, a statement per
// row), and each value travels in the very form that COPY would send. Arrays per column cannot carry
// array columns, since unnest flattens them.
type rowsBatch struct {
	insertion
	table  *copyTable
	fields []rowField // of the row type

	sql      string
	prepared bool
	count    int
	buf      []byte
}

type rowField struct {
	typ  uint32
	from int // index in insertion.columns, or -1 for null
}

func (b *rowsBatch) full() bool { return b.count >= batchRows || len(b.buf) >= batchBytes }

func (b *rowsBatch) add(values []any) (err error) {
	if err := b.checkCount(values); err != nil {
		return err
	}
	if b.count == 0 {
		b.begin()
	}
	start := len(b.buf)
	b.buf = binary.BigEndian.AppendUint32(b.buf, 0)
	b.buf = binary.BigEndian.AppendUint32(b.buf, uint32(len(b.fields)))
	for _, f := range b.fields {
		b.buf = binary.BigEndian.AppendUint32(b.buf, f.typ)
		if f.from < 0 {
			b.buf = append(b.buf, 0xff, 0xff, 0xff, 0xff)
			continue
		}
		if b.buf, err = b.appendValue(b.buf, f.from, values[f.from]); err != nil {
			return err
		}
	}
	binary.BigEndian.PutUint32(b.buf[start:], uint32(len(b.buf)-start-4))
	b.count++
	return nil
}

// begin writes the array's header: one dimension, its length (put in by send), and lower bound 1.
func (b *rowsBatch) begin() {
	if cap(b.buf) > 4*batchBytes { // a huge value's
		b.buf = nil
	}
	b.buf = b.buf[:0]
	for _, v := range []uint32{1, 0, b.table.rowType, 0, 1} {
		b.buf = binary.BigEndian.AppendUint32(b.buf, v)
	}
}

func (b *rowsBatch) send(p *pgconn.Pipeline) {
	if b.count == 0 {
		b.begin()
	}
	binary.BigEndian.PutUint32(b.buf[12:], uint32(b.count))
	if !b.prepared {
		p.SendPrepare("", b.sql, []uint32{b.table.rowArray})
		b.prepared = true
	}
	p.SendQueryPrepared("", [][]byte{b.buf}, []int16{pgx.BinaryFormatCode}, nil)
	b.count, b.buf = 0, b.buf[:0] // the pipeline has copied it
}

// valuesBatch sends rows as a VALUES list with a parameter for each value. It is slower, but has no need
// of a row of the whole table: a column that is not copied may be of a type that has no null, such as
// a domain, or that cannot be sent at all.
type valuesBatch struct {
	insertion
	size int // rows in a full batch

	prepared bool
	count    int
	bytes    int
	values   [][]byte
	formats  []int16
}

func (b *valuesBatch) full() bool { return b.count >= b.size || b.bytes >= 32*batchBytes }

func (b *valuesBatch) add(values []any) error {
	if err := b.checkCount(values); err != nil {
		return err
	}
	for i, v := range values {
		field, err := b.appendValue(nil, i, v)
		if err != nil {
			return err
		}
		b.bytes += len(field)
		if binary.BigEndian.Uint32(field) == 1<<32-1 {
			field = nil
		} else {
			field = field[4:]
		}
		b.values = append(b.values, field)
	}
	b.count++
	return nil
}

func (b *valuesBatch) send(p *pgconn.Pipeline) {
	for len(b.formats) < len(b.values) {
		b.formats = append(b.formats, pgx.BinaryFormatCode)
	}
	if b.count != b.size {
		p.SendPrepare("", b.sql(), b.oids())
		b.prepared = false
	} else if !b.prepared {
		p.SendPrepare("", b.sql(), b.oids())
		b.prepared = true
	}
	p.SendQueryPrepared("", b.values, b.formats[:len(b.values)], nil)
	clear(b.values)
	b.count, b.bytes, b.values = 0, 0, b.values[:0]
}

// sql is the statement for as many rows as there are.
func (b *valuesBatch) sql() string {
	if b.count == 0 { // no row, but as much of a statement as is needed to be refused where COPY would be
		return b.head + "select " + strings.TrimSuffix(strings.Repeat("null, ", len(b.columns)), ", ") + " where false"
	}
	var sb strings.Builder
	sb.WriteString(b.head)
	sb.WriteString("values ")
	for i := range b.count * len(b.columns) {
		switch {
		case i == 0:
			sb.WriteString("(")
		case i%len(b.columns) == 0:
			sb.WriteString("), (")
		default:
			sb.WriteString(", ")
		}
		fmt.Fprintf(&sb, "$%d", i+1)
	}
	sb.WriteString(")")
	return sb.String()
}

func (b *valuesBatch) oids() []uint32 {
	oids := make([]uint32, len(b.values))
	for i := range oids {
		oids[i] = b.columns[i%len(b.columns)].base
	}
	return oids
}

// appendValue appends v's length and binary form for column i, or -1 for null. As pgx's CopyFrom, it takes
// what can only be had as text by way of that.
func (ins *insertion) appendValue(buf []byte, i int, v any) ([]byte, error) {
	start := len(buf)
	buf = append(buf, 0xff, 0xff, 0xff, 0xff)
	oid := ins.columns[i].base
	out, err := ins.types.Encode(oid, pgx.BinaryFormatCode, v, buf)
	if err != nil {
		var err2 error
		if out, err2 = ins.appendText(buf, oid, v); err2 != nil {
			return nil, fmt.Errorf("pgxtenant: copy: column %q: %w", ins.columns[i].name, err)
		}
	}
	if out == nil {
		return buf, nil
	}
	binary.BigEndian.PutUint32(out[start:], uint32(len(out)-start-4))
	return out, nil
}

func (ins *insertion) appendText(buf []byte, oid uint32, v any) ([]byte, error) {
	s, ok := v.(string)
	if !ok {
		text, err := ins.types.Encode(oid, pgx.TextFormatCode, v, nil)
		if err != nil {
			return nil, err
		}
		s = string(text)
	}
	if typ, ok := ins.types.TypeForOID(oid); ok {
		if _, ok := typ.Codec.(*pgtype.ArrayCodec); ok { // keep its dimensions
			var array pgtype.Array[any]
			if err := ins.types.Scan(oid, pgx.TextFormatCode, []byte(s), &array); err == nil {
				return ins.types.Encode(oid, pgx.BinaryFormatCode, array, buf)
			}
		}
	}
	var value any
	if err := ins.types.Scan(oid, pgx.TextFormatCode, []byte(s), &value); err != nil {
		return nil, err
	}
	return ins.types.Encode(oid, pgx.BinaryFormatCode, value, buf)
}

// guardedSource stands between a source and pgx, which reads it on a goroutine of its own. There a panic
// would end the process, and a copy that is cancelled might be complete before the server hears of it.
type guardedSource struct {
	pgx.CopyFromSource
	ctx      context.Context
	panicked any
}

func (s *guardedSource) guard() {
	if p := recover(); p != nil {
		s.panicked = p
	}
}

func (s *guardedSource) Next() (ok bool) {
	defer s.guard()
	return s.panicked == nil && s.ctx.Err() == nil && s.CopyFromSource.Next()
}

func (s *guardedSource) Values() (values []any, err error) {
	defer s.guard()
	err = errSourcePanicked // unless it returns
	return s.CopyFromSource.Values()
}

func (s *guardedSource) Err() (err error) {
	if s.panicked != nil {
		return errSourcePanicked
	}
	if err := s.ctx.Err(); err != nil {
		return err
	}
	defer s.guard()
	err = errSourcePanicked
	return s.CopyFromSource.Err()
}

var errSourcePanicked = errors.New("pgxtenant: copy: the source panicked")
