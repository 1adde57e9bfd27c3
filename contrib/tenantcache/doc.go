// Package tenantcache caches values per tenant, in Redis or in the process:
//
//	store, err := tenantcache.NewRedis(redis.NewClient(&redis.Options{Addr: "localhost:6379"}), tenantcache.RedisConfig{})
//	...
//	projects, err := tenantcache.New(store, tenantcache.Config[Project]{Namespace: "project/1"})
//	...
//	p, err := projects.GetOrLoad(ctx, id, 0, func(ctx context.Context) (Project, error) { return readProject(ctx, db, id) })
//
// Whose value is meant comes from the context, never from the key: no combination of tenant, namespace and key names
// another's entry. Without a tenant there is nothing to read, and pgxtenant.ErrNoTenant says so.
//
// # Invalidation
//
// An entry is valid under the generations, random texts, of its tenant and its namespace that it was written under. To
// invalidate all of a tenant is to remove its generation: one command, however many entries there are. These expire
// by their TTLs, or go by [Redis.Sweep]. What a load had read before Set, Delete or an invalidation is not kept.
//
// # When Redis is down or slow
//
// A call waits for Redis no longer than RedisConfig.Timeout, and not at all while the circuit breaker is open.
// Then reads load from the source, or fail with [ErrUnavailable], as RedisConfig.OnFailure says. Writes and
// invalidations always tell.
package tenantcache
