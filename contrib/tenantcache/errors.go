package tenantcache

import (
	"errors"
	"fmt"
)

var (
	// ErrUnavailable means that Redis could not be asked: it is down, too slow, or was so a moment ago and the
	// circuit breaker is open. Whether a write was done is not known.
	ErrUnavailable = errors.New("tenantcache: Redis cannot be asked")

	// ErrTooLarge means a value that the store does not take. Nothing is kept under its key.
	ErrTooLarge = errors.New("tenantcache: the value is too large for the cache")

	// ErrClosed means that the Store has been closed.
	ErrClosed = errors.New("tenantcache: closed")

	// ErrTTL means a negative time to live.
	ErrTTL = errors.New("tenantcache: the time to live is negative")

	// ErrCodec means that the codec fails on a value that the caller or its loader has given.
	ErrCodec = errors.New("tenantcache: the codec failed")

	// ErrLoadTimeout means a loader that did not return within Config.LoadTimeout.
	ErrLoadTimeout = errors.New("tenantcache: the loader took longer than Config.LoadTimeout")
)

// PanicError is what all who wait for a load get when its loader, or MemoryConfig.TenantBytes, panics or calls
// runtime.Goexit. The process goes on.
type PanicError struct {
	Value any    // what panic was given; nil for runtime.Goexit
	Stack []byte // of the load's goroutine; nil for runtime.Goexit
}

func (e *PanicError) Error() string {
	if e.Value == nil {
		return "tenantcache: the load called runtime.Goexit"
	}
	return fmt.Sprintf("tenantcache: the load panicked: %v", e.Value)
}
