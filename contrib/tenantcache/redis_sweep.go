package tenantcache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/redis/go-redis/v9"
)

// sweepPage is about how many names Redis looks at before it serves others again: well below a millisecond.
const sweepPage = 500

// sweeper holds the tenants whose entries are to be swept in the background.
type sweeper struct {
	mu      sync.Mutex
	waiting map[string]bool
	running bool
}

// Sweep frees the memory of ctx's tenant's entries that are invalid, which otherwise happens when they expire, and
// returns how many. It is never needed for correctness. It walks over all names in Redis, whoever's they are, in small
// steps and with UNLINK, and takes as long as ctx allows.
func (r *Redis) Sweep(ctx context.Context) (removed int, err error) {
	t, err := tenantOf(ctx)
	if err != nil {
		return 0, err
	}
	removed, err = r.sweep(ctx, map[string]bool{t.ID: true})
	return removed, failed(&entry{tenant: t}, "sweep the cache", err)
}

// sweepLater has the tenant swept by the one goroutine that does.
func (r *Redis) sweepLater(tenantID string) {
	s := &r.sweeper
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting == nil {
		s.waiting = map[string]bool{}
	}
	s.waiting[tenantID] = true
	if !s.running {
		s.running = r.spawn(r.sweepAll)
	}
}

// sweepAll sweeps until nobody waits for it. Those who come meanwhile share the next walk.
func (r *Redis) sweepAll() {
	s := &r.sweeper
	for {
		s.mu.Lock()
		tenants := s.waiting
		s.waiting = map[string]bool{}
		s.running = len(tenants) > 0
		s.mu.Unlock()
		if len(tenants) == 0 || r.ctx.Err() != nil {
			return
		}
		if _, err := r.sweep(r.ctx, tenants); err != nil && r.ctx.Err() == nil {
			r.config.Logger.Warn("tenantcache: sweep failed: invalid entries are left to their TTLs", "tenants", len(tenants), "error", err)
		}
	}
}

func (r *Redis) sweep(ctx context.Context, tenants map[string]bool) (removed int, err error) {
	pattern := r.config.Prefix + "{*"
	if len(tenants) == 1 {
		for id := range tenants {
			pattern = r.layout.tenant(id) + "e*" // neither a prefix nor an ID has anything that a pattern would read as one
		}
	}
	var mu sync.Mutex // a cluster's nodes are swept at the same time
	node := func(ctx context.Context, client redis.Cmdable) error {
		n, err := r.sweepNode(ctx, client, pattern, tenants)
		mu.Lock()
		defer mu.Unlock()
		removed += n
		return err
	}
	switch client := r.client.(type) {
	case *redis.ClusterClient:
		err = client.ForEachMaster(ctx, func(ctx context.Context, c *redis.Client) error { return node(ctx, c) })
	case *redis.Ring:
		err = client.ForEachShard(ctx, func(ctx context.Context, c *redis.Client) error { return node(ctx, c) })
	default:
		err = node(ctx, r.client)
	}
	return removed, err
}

func (r *Redis) sweepNode(ctx context.Context, client redis.Cmdable, pattern string, tenants map[string]bool) (removed int, err error) {
	for cursor := uint64(0); ; {
		if err := r.check(ctx); err != nil {
			return removed, err
		}
		var names []string
		if names, cursor, err = client.Scan(ctx, cursor, pattern, sweepPage).Result(); err != nil {
			return removed, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		n, err := r.sweepNames(ctx, names, tenants)
		removed += n
		if err != nil {
			return removed, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		if cursor == 0 {
			return removed, nil
		}
	}
}

// sweepNames removes those of the names that are entries of the tenants and invalid. One that is written anew in the
// meantime may go with them: it is a miss, no more.
func (r *Redis) sweepNames(ctx context.Context, names []string, tenants map[string]bool) (removed int, err error) {
	entries := map[string]entry{}
	read := map[string]*redis.StringCmd{} // heads of entries, and generations
	_, err = r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, name := range names {
			e, ok := r.layout.parse(name)
			if !ok || !tenants[e.tenant.ID] {
				continue
			}
			entries[name] = e
			read[name] = p.GetRange(ctx, name, 0, headerLen-1)
			for _, generation := range []string{r.layout.tenantGeneration(e.tenant.ID), r.layout.namespaceGeneration(e.tenant.ID, e.namespace)} {
				if read[generation] == nil {
					read[generation] = p.Get(ctx, generation)
				}
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, redis.Nil) {
		return 0, err
	}
	for name, e := range entries {
		f := found{raw: []byte(read[name].Val())}
		tenant, err1 := read[r.layout.tenantGeneration(e.tenant.ID)].Result()
		namespace, err2 := read[r.layout.namespaceGeneration(e.tenant.ID, e.namespace)].Result()
		f.generations = generations{tenant, namespace, err1 == nil && err2 == nil}
		if _, _, ok := f.open(&e); ok || len(f.raw) == 0 || f.raw[0] == kindDeleted {
			delete(entries, name)
		}
	}
	if len(entries) == 0 {
		return 0, nil
	}
	_, err = r.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, name := range slices.Sorted(maps.Keys(entries)) {
			p.Unlink(ctx, name)
		}
		return nil
	})
	return len(entries), err
}
