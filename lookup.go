package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
)

// lookups asks a Directory once for all who want the same tenant at the same moment.
type lookups struct {
	directory Directory
	log       *slog.Logger
	other     bool // keys are no tenant IDs

	hits, misses atomic.Int64

	// mu guards calls and the waiting of each. The directory is never asked under it.
	mu    sync.Mutex
	calls map[string]*lookup
}

type lookup struct {
	done    chan struct{} // closed once tenant and err are set
	tenant  Tenant
	err     error
	waiting int
	cancel  context.CancelFunc
}

// get returns the tenant with the given ID, which is valid. The look-up survives the cancellation of
// the caller that began it, and ends with that of the last.
func (l *lookups) get(ctx context.Context, id string) (Tenant, error) {
	if err := ctx.Err(); err != nil {
		return Tenant{}, err
	}
	if p, ok := l.directory.(Peeker); ok {
		if t, ok := p.Peek(id); ok {
			l.hits.Add(1)
			return t, l.sameTenant(id, t)
		}
	}
	l.misses.Add(1)
	l.mu.Lock()
	call := l.calls[id]
	if call == nil {
		detached, cancel := context.WithCancel(context.WithoutCancel(ctx))
		call = &lookup{done: make(chan struct{}), cancel: cancel}
		if l.calls == nil {
			l.calls = make(map[string]*lookup)
		}
		l.calls[id] = call
		go l.run(detached, id, call)
	}
	call.waiting++
	l.mu.Unlock()

	select {
	case <-call.done:
		return call.tenant, call.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	if call.waiting--; call.waiting == 0 {
		l.forgetLocked(id, call) // who comes now shall not get an answer that was called off
		call.cancel()
	}
	l.mu.Unlock()
	return Tenant{}, ctx.Err()
}

func (l *lookups) run(ctx context.Context, id string, call *lookup) {
	defer call.cancel()
	defer func() {
		// A panic here would end the process, since no caller's recover sees this goroutine.
		if p := recover(); p != nil {
			call.err = fmt.Errorf("pgxtenant: the directory panicked: %v", p)
			l.log.Error("directory panicked", "tenant", id, "panic", p, "stack", string(debug.Stack()))
		}
		l.mu.Lock()
		l.forgetLocked(id, call)
		l.mu.Unlock()
		close(call.done)
	}()
	call.err = errors.New("pgxtenant: the directory ended the goroutine that asked it") // unless it returns
	call.tenant, call.err = l.directory.Lookup(ctx, id)
	if call.err == nil {
		call.err = l.sameTenant(id, call.tenant)
	}
}

func (l *lookups) sameTenant(id string, t Tenant) error {
	if !l.other && t.ID != id {
		return fmt.Errorf("%w: the directory answered with tenant %q", ErrWrongTenant, clip(t.ID))
	}
	return nil
}

func (l *lookups) forgetLocked(id string, call *lookup) {
	if l.calls[id] == call {
		delete(l.calls, id)
	}
}
