package tenantcache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sony/gobreaker/v2"
)

// errNotCounted is the end of a call that says nothing about Redis.
var errNotCounted = errors.New("not counted")

func (r *Redis) newBreaker() *gobreaker.TwoStepCircuitBreaker[struct{}] {
	return gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Timeout: r.config.BreakerPause,
		ReadyToTrip: func(counts gobreaker.Counts) bool {
			return r.config.BreakerFailures > 0 && int64(counts.ConsecutiveFailures) >= int64(r.config.BreakerFailures)
		},
		IsExcluded: func(err error) bool { return errors.Is(err, errNotCounted) },
		OnStateChange: func(_ string, _, to gobreaker.State) {
			switch to {
			case gobreaker.StateOpen:
				r.opens.Add(1)
				r.config.Logger.Warn("tenantcache: circuit breaker open: Redis is not asked", "pause", r.config.BreakerPause)
			case gobreaker.StateClosed:
				r.config.Logger.Info("tenantcache: circuit breaker closed: Redis is asked again")
			}
		},
	})
}

// readBudget leaves half of the caller's time for a load.
func (r *Redis) readBudget(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return min(r.config.Timeout, time.Until(end)/2)
	}
	return r.config.Timeout
}

// guarded is timed behind the circuit breaker. A caller who left, or who had less than the whole time to wait, does
// not open it.
func guarded[T any](ctx context.Context, r *Redis, budget time.Duration, op func(context.Context) (T, error)) (T, error) {
	var zero T
	if err := r.check(ctx); err != nil {
		return zero, err
	}
	done, err := r.breaker.Allow()
	if err != nil {
		r.refused.Add(1)
		return zero, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	value, err := timed(ctx, r, budget, op)
	switch {
	case err == nil:
		done(nil)
	case ctx.Err() != nil, r.ctx.Err() != nil, budget < r.config.Timeout && isTimeout(err):
		done(errNotCounted)
	default:
		done(err)
	}
	return value, err
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
}

// always is timed without the circuit breaker.
func (r *Redis) always(ctx context.Context, op func(context.Context) error) error {
	_, err := timed(ctx, r, r.config.Timeout, func(ctx context.Context) (struct{}, error) { return struct{}{}, op(ctx) })
	return err
}

// timed does op and waits for it no longer than budget and ctx say. go-redis does not heed a context while it reads
// from a connection, or only its deadline and if told so: hence the goroutine, which ends when the client's own
// timeouts do.
func timed[T any](ctx context.Context, r *Redis, budget time.Duration, op func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var got result
	if err := r.check(ctx); err != nil {
		return got.value, err
	}
	limited, cancel := context.WithTimeout(ctx, budget)
	results := make(chan result, 1)
	if !r.spawn(func() {
		value, err := op(limited)
		results <- result{value, err}
	}) {
		cancel()
		return got.value, ErrClosed
	}
	defer cancel()
	select {
	case got = <-results:
	case <-limited.Done():
		got.err = limited.Err()
	case <-r.ctx.Done():
		return got.value, ErrClosed
	}
	switch {
	case got.err == nil:
		return got.value, nil
	case ctx.Err() != nil:
		return got.value, ctx.Err()
	}
	r.failures.Add(1)
	return got.value, fmt.Errorf("%w: %w", ErrUnavailable, got.err)
}
