package tenantlimit

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker/v2"
)

//go:embed take.lua
var takeText string

//go:embed renew.lua
var renewText string

var takeScript, renewScript = redis.NewScript(takeText), redis.NewScript(renewText)

// tripAfter is how many calls in a row must fail until Redis is left alone.
const tripAfter = 3

// redisStore keeps the counts in Redis.
type redisStore struct {
	client  redis.UniversalClient
	breaker *gobreaker.CircuitBreaker[any]
	timeout time.Duration
	leases  *leases
	failed  atomic.Uint64 // commands
}

func newRedisStore(c Config) *redisStore {
	s := &redisStore{client: c.Redis, timeout: c.Timeout}
	s.leases = newLeases(s, c.Lease)
	s.breaker = gobreaker.NewCircuitBreaker[any](gobreaker.Settings{
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
	})
	return s
}

func (s *redisStore) close() { s.leases.close() }

// lost reports whether Redis is being left alone.
func (s *redisStore) lost() bool { return s.breaker.State() != gobreaker.StateClosed }

func (s *redisStore) take(ctx context.Context, q *question) (answer, error) {
	r, lease := q.state.Rate, ""
	keys := []string{q.rateKey, q.leasesKey}
	if q.leasesKey == "" {
		keys = keys[:1]
	} else {
		lease = s.leases.newID()
		if q.rateKey == "" {
			keys[0] = q.leasesKey // the first key chooses the node; the script does not read it
		}
	}
	reply, err := s.do(ctx, func(ctx context.Context) (any, error) {
		return takeScript.Run(ctx, s.client, keys, r.Requests, float64(r.Period)/1e3, r.Burst, q.cost,
			q.state.Concurrency, lease, s.leases.lasts.Microseconds()).Result()
	}, func(reply any) {
		// Nobody waits for the slot any more. Redis is there, it has just answered.
		if a, err := parseAnswer(reply); err == nil && a.refused == 0 && lease != "" {
			_, _ = s.within(context.Background(), s.removal(q.leasesKey, lease), nil)
		}
	})
	if err != nil {
		return answer{}, err
	}
	a, err := parseAnswer(reply)
	if err == nil && a.refused == 0 && lease != "" {
		s.leases.add(q.leasesKey, lease)
		a.release = func() {
			s.leases.remove(q.leasesKey, lease)
			s.giveBack(q.leasesKey, lease)
		}
	}
	return a, err
}

// parseAnswer reads what take.lua returns.
func parseAnswer(reply any) (a answer, err error) {
	if values, ok := reply.([]any); ok && len(values) == 3 {
		refused, ok1 := values[0].(int64)
		text, ok2 := values[1].(string)
		taken, ok3 := values[2].(int64)
		a = answer{refused: Kind(refused), taken: int(taken)}
		if a.tokens, err = strconv.ParseFloat(text, 64); err == nil && ok1 && ok2 && ok3 {
			return a, nil
		}
	}
	return a, fmt.Errorf("tenantlimit: Redis answered %v", reply)
}

// giveBack frees slots, or leaves them to the end of their leases if that cannot be done in time.
func (s *redisStore) giveBack(key string, ids ...string) {
	_, _ = s.do(context.Background(), s.removal(key, ids...), nil)
}

// removal is the command that frees slots.
func (s *redisStore) removal(key string, ids ...string) command {
	return func(ctx context.Context) (any, error) { return s.client.ZRem(ctx, key, anys(ids)...).Result() }
}

// renew makes leases of one key last from now on.
func (s *redisStore) renew(ctx context.Context, key string, ids []string) {
	args := append([]any{s.leases.lasts.Microseconds()}, anys(ids)...)
	_, _ = s.do(ctx, func(ctx context.Context) (any, error) {
		return renewScript.Run(ctx, s.client, []string{key}, args...).Result()
	}, nil)
}

// do runs a command unless Redis is left alone. What the command returns after everybody has stopped to wait for it is
// handed to late, if that is not nil.
func (s *redisStore) do(ctx context.Context, run command, late func(any)) (any, error) {
	return s.breaker.Execute(func() (any, error) {
		reply, err := s.within(ctx, run, late)
		if err != nil && !errors.Is(err, context.Canceled) {
			s.failed.Add(1)
		}
		return reply, err
	})
}

// within waits for a command no longer than the time-out.
//
// The command has a goroutine of its own, since go-redis as a rule does not look at the context while it reads: a
// Redis that keeps silent would hold the caller for the client's ReadTimeout, several times over. The goroutine ends
// by these.
func (s *redisStore) within(ctx context.Context, run command, late func(any)) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	done, gone := make(chan result), make(chan struct{})
	go func() {
		defer cancel()
		reply, err := run(ctx)
		select {
		case done <- result{reply, err}:
		case <-gone:
			if err == nil && late != nil {
				late(reply)
			}
		}
	}()
	select {
	case r := <-done:
		return r.reply, r.err
	case <-ctx.Done():
		close(gone)
		return nil, ctx.Err()
	}
}

// command is something to ask Redis.
type command func(context.Context) (any, error)

type result struct {
	reply any
	err   error
}

func anys(texts []string) []any {
	values := make([]any, len(texts))
	for i, text := range texts {
		values[i] = text
	}
	return values
}
