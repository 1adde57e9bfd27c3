package pgxtenant

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// events are the latest things that happened, for DebugHandler. They hold IDs and codes, and no text of any error, which
// may have values of rows in it, or secrets.
type events struct {
	mu     sync.Mutex
	pools  eventRing
	errors eventRing
}

type event struct {
	at     time.Time
	tenant string
	what   string
	n      int // of the same in a row
}

// eventRing keeps the latest events.
type eventRing struct {
	kept [debugEvents]event
	n    int // so far
}

const debugEvents = 32

func (e *events) pool(tenant, what string) { e.add(&e.pools, tenant, what) }

func (e *events) failed(tenant string, err error) { e.add(&e.errors, tenant, errorCode(err)) }

func (e *events) add(r *eventRing, tenant, what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r.n > 0 {
		if last := &r.kept[(r.n-1)%debugEvents]; last.tenant == tenant && last.what == what {
			last.at = time.Now()
			last.n++
			return
		}
	}
	r.kept[r.n%debugEvents] = event{time.Now(), tenant, what, 1}
	r.n++
}

// latest returns the events, the latest first.
func (e *events) latest(r *eventRing) []event {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []event
	for i := r.n - 1; i >= max(0, r.n-debugEvents); i-- {
		all = append(all, r.kept[i%debugEvents])
	}
	return all
}

// errorCode says what kind of error err is: the server's SQLSTATE, or a word.
func errorCode(err error) string {
	var pgErr *pgconn.PgError
	var netErr net.Error
	switch {
	case errors.As(err, &pgErr) && validSQLState(pgErr.Code):
		return pgErr.Code
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, ErrWrongTenant):
		return "wrong tenant"
	case errors.Is(err, ErrInvalidTenant):
		return "invalid tenant"
	case errors.As(err, &netErr):
		return "connection"
	}
	return "client"
}

func validSQLState(code string) bool {
	for i := range len(code) {
		if c := code[i]; !('0' <= c && c <= '9' || 'A' <= c && c <= 'Z') {
			return false
		}
	}
	return len(code) == 5
}
