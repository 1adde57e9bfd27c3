package tenantlimit

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker/v2"
)

// tripAfter is how many calls in a row must fail until Redis is left alone.
const tripAfter = 3

// mostAtOnce is how many requests are sent together. Redis serves nobody else meanwhile.
const mostAtOnce = 128

// caller runs scripts, for no longer than its time-out, and leaves a Redis alone that fails.
//
// Requests that come while others are on their way wait for these, and then are sent together, in one pipeline: half a
// round trip more for some, and many more decisions a second for all. One that comes alone is sent at once.
type caller struct {
	client  redis.UniversalClient
	timeout time.Duration
	prompt  bool // the client keeps to the deadline of a context
	breaker *gobreaker.CircuitBreaker[any]
	failed  atomic.Uint64 // requests

	mu     sync.Mutex
	queue  []*request
	flight *flight // that under way, at whose end queue is looked at; nil: there is none
}

// request is a script to be run.
type request struct {
	script *redis.Script
	keys   []string
	args   []any
	undo   *request // sent if this was run when nobody waited for it any more; may be nil

	done chan result // has room for one; nil: nobody waits
	gone bool        // nobody waits any more
}

type result struct {
	reply any
	err   error
}

// flight is one goroutine's turn to send. It has a size, so that no two have one address.
type flight struct{ _ int }

func newCaller(c Config) *caller {
	return &caller{client: c.Redis, timeout: c.Timeout, prompt: isPrompt(c.Redis),
		breaker: gobreaker.NewCircuitBreaker[any](gobreaker.Settings{
			Timeout:     c.Retry,
			ReadyToTrip: func(n gobreaker.Counts) bool { return n.ConsecutiveFailures >= tripAfter },
			// A caller that went away says nothing about Redis. One that waited to its deadline does: if those did
			// not count, callers in a hurry would each wait for a dead Redis.
			IsExcluded: func(err error) bool { return errors.Is(err, context.Canceled) },
			OnStateChange: func(_ string, from, to gobreaker.State) {
				switch {
				case from == gobreaker.StateClosed:
					c.Logger.Warn("tenantlimit: Redis is lost", "calls", c.OnLoss.String())
				case to == gobreaker.StateClosed:
					c.Logger.Info("tenantlimit: Redis is back")
				}
			},
		})}
}

// isPrompt reports whether a client looks at the deadline of a context while it reads, which go-redis as a rule does
// not. One that is not known is thought not to.
func isPrompt(client redis.UniversalClient) bool {
	switch c := client.(type) {
	case *redis.Client:
		return c.Options().ContextTimeoutEnabled
	case *redis.ClusterClient:
		return c.Options().ContextTimeoutEnabled
	case *redis.Ring:
		return c.Options().ContextTimeoutEnabled
	}
	return false
}

// lost reports whether Redis is being left alone.
func (c *caller) lost() bool { return c.breaker.State() != gobreaker.StateClosed }

// call runs a request, unless Redis is left alone.
func (c *caller) call(ctx context.Context, r *request) (any, error) {
	return c.breaker.Execute(func() (any, error) {
		reply, err := c.send(ctx, r)
		if err != nil && !errors.Is(err, context.Canceled) {
			c.failed.Add(1)
		}
		return reply, err
	})
}

// send runs a request, on this goroutine if it is alone and the client will return in time. Else a client that
// keeps its own time, several times its ReadTimeout, would keep the caller.
func (c *caller) send(ctx context.Context, r *request) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	c.mu.Lock()
	f := c.flight
	if f == nil {
		f = new(flight)
		c.flight = f
		if c.prompt {
			c.mu.Unlock()
			reply, err := r.script.Run(ctx, c.client, r.keys, r.args...).Result()
			c.land(f)
			return reply, err
		}
		go c.fly(f)
	}
	r.done = make(chan result, 1)
	c.queue = append(c.queue, r)
	c.mu.Unlock()
	select {
	case result := <-r.done:
		return result.reply, result.err
	case <-ctx.Done():
		return c.leave(ctx, r, f)
	}
}

// leave is for a request that has waited long enough. The flight that it waited for is given up: it may be one
// that keeps its own time, and others need not wait for it.
func (c *caller) leave(ctx context.Context, r *request, f *flight) (any, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case result := <-r.done: // at the same moment
		return result.reply, result.err
	default:
	}
	r.gone = true
	if c.flight == f && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		c.flight = nil
	}
	return nil, ctx.Err()
}

// land ends a flight of a single request. Those that have come meanwhile are sent on another goroutine, so that this
// caller need not wait for them.
func (c *caller) land(f *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.flight != f:
	case len(c.queue) > 0:
		go c.fly(f)
	default:
		c.flight = nil
	}
}

// fly sends what is in the queue until it is empty. It ends when it has been given up, too.
func (c *caller) fly(f *flight) {
	for {
		batch := c.next(f)
		if len(batch) == 0 {
			return
		}
		c.deliver(batch, c.run(batch))
	}
}

// next takes from the queue what is still waited for.
func (c *caller) next(f *flight) []*request {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flight != nil && c.flight != f {
		return nil // the queue is another's
	}
	c.queue = slices.DeleteFunc(c.queue, func(r *request) bool { return r.gone })
	n := min(len(c.queue), mostAtOnce)
	batch := slices.Clone(c.queue[:n])
	c.queue = slices.Delete(c.queue, 0, n)
	c.flight = f
	if n == 0 {
		c.flight = nil
	}
	return batch
}

// run sends a batch in one round trip.
func (c *caller) run(batch []*request) []result {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	results := make([]result, len(batch))
	commands := make([]*redis.Cmd, len(batch))
	_, _ = c.client.Pipelined(ctx, func(pipe redis.Pipeliner) error { // each command has its own error
		for i, r := range batch {
			commands[i] = r.script.EvalSha(ctx, pipe, r.keys, r.args...)
		}
		return nil
	})
	for i, r := range batch {
		reply, err := commands[i].Result()
		if redis.HasErrorPrefix(err, "NOSCRIPT") { // a server that has just started: it was not run
			reply, err = r.script.Run(ctx, c.client, r.keys, r.args...).Result()
		}
		results[i] = result{reply, err}
	}
	return results
}

// deliver hands results to those who wait. What was run for nobody is undone with the next batch.
func (c *caller) deliver(batch []*request, results []result) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, r := range batch {
		switch {
		case !r.gone && r.done != nil:
			r.done <- results[i]
		case r.undo != nil && results[i].err == nil:
			c.queue = append(c.queue, r.undo)
		}
	}
}
