package tenantlimit

import (
	"context"
	_ "embed"
	"fmt"
	"strconv"

	"github.com/redis/go-redis/v9"
)

//go:embed take.lua
var takeText string

//go:embed give.lua
var giveText string

//go:embed renew.lua
var renewText string

var takeScript, giveScript, renewScript = redis.NewScript(takeText), redis.NewScript(giveText), redis.NewScript(renewText)

// redisStore keeps the counts in Redis.
type redisStore struct {
	*caller
	leases *leases
}

func newRedisStore(c Config) *redisStore {
	s := &redisStore{caller: newCaller(c)}
	s.leases = newLeases(s, c.Lease)
	return s
}

func (s *redisStore) close() { s.leases.close() }

func (s *redisStore) take(ctx context.Context, q *question) (answer, error) {
	r := &request{script: takeScript, keys: []string{q.rateKey},
		args: []any{q.state.Rate.Requests, float64(q.state.Rate.Period) / 1e3, q.state.Rate.Burst, q.cost, q.state.Concurrency}}
	if q.leasesKey == "" {
		reply, err := s.call(ctx, r)
		if err != nil {
			return answer{}, err
		}
		return parseAnswer(reply)
	}
	if q.rateKey == "" {
		r.keys[0] = q.leasesKey // the first key chooses the node; the script does not read it
	}
	lease := s.leases.newID()
	r.keys = append(r.keys, q.leasesKey)
	r.args = append(r.args, lease, s.leases.lasts.Microseconds())
	r.undo = &request{script: giveScript, keys: []string{q.leasesKey}, args: []any{lease}}
	reply, err := s.call(ctx, r)
	if err != nil {
		return answer{}, err
	}
	a, err := parseAnswer(reply)
	if err == nil && a.refused == 0 {
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
func (s *redisStore) giveBack(key string, ids ...any) {
	_, _ = s.call(context.Background(), &request{script: giveScript, keys: []string{key}, args: ids})
}

// renew makes leases of one key last from now on.
func (s *redisStore) renew(ctx context.Context, key string, ids []any) {
	_, _ = s.call(ctx, &request{script: renewScript, keys: []string{key}, args: append([]any{s.leases.lasts.Microseconds()}, ids...)})
}
