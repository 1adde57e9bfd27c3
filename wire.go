package pgxtenant

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// wireConn is the net.Conn under a pgx connection, above TLS. It follows the frontend/backend protocol
// in both directions and keeps one rule: whenever the connection leaves the idle state, the tenant's
// settings are sent first, for the length of the transaction, in the same protocol segment as the
// caller's own message; their replies are swallowed. No round trip is added, nothing has to be reset,
// and nothing above it, down to a hijacked pgconn, can send a statement without them.
//
// Like the connection above it, it takes one writer and one reader at a time, which may be different
// goroutines (pgconn reads in the background while a write is slow). Writing is in wire_write.go,
// reading in wire_read.go.
type wireConn struct {
	net.Conn

	// What a checkout touches is the end of permit, the beginning of meter, and what stands between: two cache lines. With
	// hundreds of pools in turn it is cache lines that take its time.
	permit permit // of the gate before the pool

	// mu guards what both sides share. It is never held during I/O.
	mu       sync.Mutex
	current  *binding // nil until the first checkout: set-up by hooks runs unbound
	broken   error    // why nothing may be sent any more
	setup    leavings // what hooks left before the first checkout: it is the caller's own, for all tenants
	dirty    leavings // what the current tenant may have left
	stale    leavings // what earlier tenants may have left, and no committed transaction has removed
	cleaned  leavings // what the transaction under way removes once it commits
	doomed   bool     // not to be used by the next checkout
	status   byte     // of the transaction, as of the last ReadyForQuery
	closed   bool
	ready    bool // start-up is over
	open     bool // the last segment has no Sync yet
	need     bool // the next ordinary statement must be preceded by the binding
	escapes  bool // standard_conforming_strings is off
	strict   bool // clean at every change of tenant, whatever was seen
	inFlight segments

	meter connMeter // of what runs on it

	keepsPrepared bool // false behind a pooler that may switch servers between transactions

	controls int       // segments in flight that may begin or end a transaction
	prepared uint64    // shapes and cleanings whose prepared statement exists
	settled  sync.Cond // signalled after a read while waiting is set; L is &mu
	waiting  atomic.Bool

	// Statements that are more than ordinary, by the name they were prepared under, and portals that
	// hold one that runs unbound, which may be executed long after they were bound.
	statements map[string]statementInfo
	portals    map[string]class
	unnamed    bool // the unnamed portal has been bound and not executed

	writer wireWriter // of the one writing
	rmu    sync.Mutex // held while reading
	reader wireReader
}

type statementInfo struct {
	class    class
	leavings leavings
}

func newWireConn(conn net.Conn, keepsPrepared, strict bool) *wireConn {
	w := &wireConn{
		Conn: conn, keepsPrepared: keepsPrepared, strict: strict,
		statements: make(map[string]statementInfo), portals: make(map[string]class),
	}
	w.settled.L = &w.mu
	return w
}

// install puts wireConns under the connections of config and has each checkout bound to what resolve
// makes of its context. An error of resolve fails the checkout and leaves the connection as it was.
// What runs on the connections is told to load, which may be nil.
func (b *binder) install(config *pgxpool.Config, load *loadMeter, resolve func(context.Context) (*binding, error)) {
	cc := config.ConnConfig
	// In the other modes the caller expects a pooler that knows no prepared statements, or does without them.
	keepsPrepared := cc.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement || cc.DefaultQueryExecMode == pgx.QueryExecModeDescribeExec
	wrap := cc.AfterNetConnect
	cc.AfterNetConnect = func(ctx context.Context, c *pgconn.Config, conn net.Conn) (net.Conn, error) {
		if wrap != nil {
			wrapped, err := wrap(ctx, c, conn)
			if err != nil {
				return conn, err // pgconn closes what it is given
			}
			conn = wrapped
		}
		if _, twice := conn.(*wireConn); twice {
			return conn, errors.New("pgxtenant: Bind was called twice on this config")
		}
		w := newWireConn(conn, keepsPrepared, b.strict)
		w.meter.load, w.meter.holder = load, &w.permit.holder
		return w, nil
	}

	guardConnections(config)
	then := config.PrepareConn
	//lint:ignore SA1019 pgxpool still honours it, so the binding must not disable it
	if before := config.BeforeAcquire; then == nil && before != nil {
		then = func(ctx context.Context, conn *pgx.Conn) (bool, error) { return before(ctx, conn), nil }
	}
	config.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		bd, err := resolve(ctx)
		if err != nil {
			return true, err // nothing has been sent: the connection is as good as before
		}
		w, ok := conn.PgConn().Conn().(*wireConn)
		if !ok {
			return false, errors.New("pgxtenant: AfterNetConnect was replaced after Bind; set it before")
		}
		if ok, err := w.assign(bd); !ok || err != nil || then == nil {
			return ok, err
		}
		ok, err = then(ctx, conn)
		if !ok || err != nil {
			w.meter.released()
		}
		return ok, err
	}
}

// assign makes bd the tenant of whatever is sent from now on. It costs no I/O. It reports false if the
// connection must be closed instead, because of what an earlier tenant left on it.
func (w *wireConn) assign(bd *binding) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken != nil || w.doomed || w.status != 'I' || w.inFlight.len() > 0 {
		return false, nil
	}
	switch {
	case w.current == nil:
		w.meter.begin()
		w.setup, w.dirty = w.dirty, 0
		if w.strict && w.setup != 0 {
			return false, errors.New("pgxtenant: an AfterConnect hook left state on the session, which the strict setting would erase; set it by RuntimeParams or ALTER ROLE instead")
		}
	case w.current.tenant.ID != bd.tenant.ID:
		w.stale |= w.dirty
		w.dirty = 0
		if w.stale&leavesSession != 0 {
			w.prepared = 0 // SQL may have put another statement in the place of ours
		}
		if w.strict {
			// Without a sign of that, only the one that removes such statements is not trusted: if it removes
			// ours, the binding fails, and the connection goes.
			w.stale |= leavesAll
			w.prepared &^= cleanings[deallocating].bit
		}
		// What cannot be cleaned, or not without erasing what the caller's hook set up.
		if w.stale&leavesForGood != 0 || w.stale&w.setup&leavesSession != 0 {
			return false, nil
		}
	}
	w.current = bd
	w.meter.user = bd
	return true, nil
}

// Close closes the connection and wakes a writer that waits for the server.
func (w *wireConn) Close() error {
	err := w.Conn.Close()
	w.mu.Lock()
	w.closed = true
	w.settled.Broadcast()
	gate := w.permit.gate
	w.mu.Unlock()
	w.meter.end()
	if gate != nil {
		gate.gone(&w.permit)
		w.permit.unwatch()
	}
	return err
}

// breakOff makes err the answer to all further use. mu must be held.
func (w *wireConn) breakOff(err error) error {
	if w.broken == nil {
		w.broken = err
	}
	return w.broken
}

// frameLen returns the length of the message that b begins with, type byte and all; b has 5 bytes or more.
func frameLen(b []byte) (int, error) {
	n := binary.BigEndian.Uint32(b[1:])
	if n < 4 || n > 1<<31-2 {
		return 0, fmt.Errorf("pgxtenant: a message of type %q claims a length of %d", b[0], n)
	}
	return 1 + int(n), nil
}

// cString splits b behind its first zero byte, and reports false if there is none.
func cString(b []byte) (s, rest []byte, ok bool) {
	for i, c := range b {
		if c == 0 {
			return b[:i], b[i+1:], true
		}
	}
	return nil, nil, false
}
