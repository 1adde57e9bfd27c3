package tenantcache

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/pgxtenant/pgxtenant"
)

// Defaults of MemoryConfig's fields.
const (
	DefaultMaxBytes      = 64 << 20
	DefaultTenantBytes   = 4 << 20
	DefaultMaxValueBytes = 4 << 20 // of RedisConfig too
)

// MemoryConfig describes a Memory. The zero value will do.
type MemoryConfig struct {
	// MaxBytes bounds the memory for all tenants. When it is used up, the tenant that was asked for least
	// recently loses its least recently used entry.
	//
	// Zero means DefaultMaxBytes (64 MiB). A negative value is refused.
	MaxBytes int64

	// TenantBytes bounds the memory for one tenant, by its plan for instance. When it is used up, the tenant's
	// least recently used entries make room. It is called at each write with the context's tenant, of which
	// after pgxtenant.WithTenantID only the ID is known. It must be safe for concurrent use.
	//
	// A result of zero means DefaultTenantBytes (4 MiB), one below that nothing is kept for the tenant. Nil means
	// DefaultTenantBytes for all.
	TenantBytes func(t pgxtenant.Tenant) int64

	// MaxValueBytes is the longest encoded value that is kept.
	//
	// Zero means DefaultMaxValueBytes (4 MiB). A negative value is refused.
	MaxValueBytes int
}

// Memory is a Store in this process's memory. Each entry counts with the lengths of its key, namespace and encoded value
// and 250 bytes more, about what Go's maps and lists need. An expired entry is removed when it is asked for, or when its
// turn comes to make room.
//
// Other processes' changes are not seen: with more than one, TTLs bound how old a value may be.
type Memory struct {
	*core
	config MemoryConfig // with defaults

	mu        sync.Mutex
	tenants   *simplelru.LRU[string, *memoryTenant]
	bytes     int64
	entries   int
	evictions uint64
}

const (
	entryBytes  = 250 // about what an entry costs beside its texts
	tenantBytes = 600 // about what a tenant costs without entries
)

type memoryTenant struct {
	generation string
	namespaces map[string]string // generations
	entries    *simplelru.LRU[memoryKey, memoryEntry]
	bytes      int64
}

type memoryKey struct{ namespace, key string }

type memoryEntry struct {
	raw []byte
	end time.Time
}

func sizeOfNamespace(namespace string) int64 { return int64(len(namespace) + entryBytes) }

func sizeOf(k memoryKey, raw []byte) int64 {
	return int64(len(k.namespace) + len(k.key) + len(raw) + entryBytes)
}

// NewMemory makes an empty Memory. Close it, to end loads that are going on.
func NewMemory(config MemoryConfig) (*Memory, error) {
	var problems []error
	if config.MaxBytes < 0 {
		problems = append(problems, fmt.Errorf("MaxBytes is %d; want 0 or more", config.MaxBytes))
	}
	if config.MaxValueBytes < 0 {
		problems = append(problems, fmt.Errorf("MaxValueBytes is %d; want 0 or more", config.MaxValueBytes))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, fmt.Errorf("tenantcache: NewMemory: %w", err)
	}
	config.MaxBytes = orDefault(config.MaxBytes, DefaultMaxBytes)
	m := &Memory{config: config, core: newCore(orDefault(config.MaxValueBytes, DefaultMaxValueBytes))}
	m.tenants = newLRU[string, *memoryTenant]()
	return m, nil
}

// newLRU makes one that is bounded by whoever uses it, in bytes.
func newLRU[K comparable, E any]() *simplelru.LRU[K, E] {
	lru, err := simplelru.NewLRU[K, E](math.MaxInt, nil)
	if err != nil {
		panic(err) // unreachable: the size is positive
	}
	return lru
}

// InvalidateTenant implements Store. The tenant's memory is free at once.
func (m *Memory) InvalidateTenant(ctx context.Context) error {
	t, err := tenantOf(ctx)
	if err != nil {
		return err
	}
	if err := m.check(ctx); err != nil {
		return failed(&entry{tenant: t}, "invalidate the cache", err)
	}
	m.invalidations.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	if mt, ok := m.tenants.Peek(t.ID); ok {
		m.drop(t.ID, mt)
	}
	return nil
}

// Stats implements Store.
func (m *Memory) Stats() Stats {
	s := m.stats()
	m.mu.Lock()
	defer m.mu.Unlock()
	s.Tenants, s.Entries, s.Bytes, s.Evictions = m.tenants.Len(), m.entries, m.bytes, m.evictions
	return s
}

func (m *Memory) proceed() bool { return false } // it fails only when it is closed or the context is done

func (m *Memory) look(ctx context.Context, e *entry) (found, error) {
	if err := m.check(ctx); err != nil {
		return found{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	mt, ok := m.tenants.Get(e.tenant.ID)
	if !ok {
		return found{}, nil
	}
	f := found{generations: generations{tenant: mt.generation}}
	f.namespace, f.known = mt.namespaces[e.namespace]
	k := memoryKey{e.namespace, e.key}
	if stored, ok := mt.entries.Get(k); ok {
		if time.Until(stored.end) > 0 {
			f.raw = stored.raw
		} else {
			m.remove(mt, k)
		}
	}
	return f, nil
}

func (m *Memory) ensure(ctx context.Context, e *entry, _ time.Duration) (generations, error) {
	if err := m.check(ctx); err != nil {
		return generations{}, err
	}
	limit := m.limit(e.tenant)
	m.mu.Lock()
	defer m.mu.Unlock()
	mt, ok := m.tenants.Get(e.tenant.ID)
	if !ok {
		mt = &memoryTenant{generation: newGeneration(), namespaces: map[string]string{}, entries: newLRU[memoryKey, memoryEntry]()}
		m.tenants.Add(e.tenant.ID, mt)
		m.account(mt, tenantBytes, 0)
	}
	namespace, ok := mt.namespaces[e.namespace]
	if !ok {
		namespace = newGeneration()
		mt.namespaces[e.namespace] = namespace
		m.account(mt, sizeOfNamespace(e.namespace), 0)
	}
	g := generations{tenant: mt.generation, namespace: namespace, known: true}
	m.shrink(mt, limit)
	return g, nil
}

func (m *Memory) put(ctx context.Context, e *entry, raw []byte, ttl, _ time.Duration) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	limit := m.limit(e.tenant)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.store(e, raw, ttl, limit)
}

func (m *Memory) replace(ctx context.Context, e *entry, head string, raw []byte, ttl, _ time.Duration) (bool, error) {
	if err := m.check(ctx); err != nil {
		return false, err
	}
	limit := m.limit(e.tenant)
	m.mu.Lock()
	defer m.mu.Unlock()
	var present found
	if mt, ok := m.tenants.Peek(e.tenant.ID); ok {
		stored, _ := mt.entries.Peek(memoryKey{e.namespace, e.key})
		if time.Until(stored.end) > 0 {
			present.raw = stored.raw
		}
	}
	if present.head() != head {
		return false, nil
	}
	if err := m.store(e, raw, ttl, limit); err != nil {
		return false, err
	}
	return true, nil
}

func (m *Memory) bury(ctx context.Context, entries []entry, keep time.Duration) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	if len(entries) == 0 {
		return nil
	}
	limit := m.limit(entries[0].tenant) // they are all one tenant's
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range entries {
		mt, ok := m.tenants.Peek(entries[i].tenant.ID)
		if !ok {
			continue // a load that is going on has generations that are gone
		}
		m.add(mt, memoryKey{entries[i].namespace, entries[i].key}, memoryEntry{tombstone(), time.Now().Add(keep)})
		m.shrink(mt, limit)
	}
	return nil
}

func (m *Memory) invalidate(ctx context.Context, tenantID, namespace string) error {
	if err := m.check(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if mt, ok := m.tenants.Peek(tenantID); ok {
		if _, ok := mt.namespaces[namespace]; ok {
			delete(mt.namespaces, namespace)
			m.account(mt, -sizeOfNamespace(namespace), 0)
		}
	}
	return nil
}

// store keeps an entry within the tenant's limit. If the tenant is gone, so are the generations of the entry.
func (m *Memory) store(e *entry, raw []byte, ttl time.Duration, limit int64) error {
	mt, ok := m.tenants.Get(e.tenant.ID)
	if !ok {
		return nil
	}
	k := memoryKey{e.namespace, e.key}
	if limit < 0 {
		m.remove(mt, k)
		return nil
	}
	if size := sizeOf(k, raw); size > limit || size > m.config.MaxBytes-tenantBytes {
		return ErrTooLarge
	}
	m.add(mt, k, memoryEntry{raw, time.Now().Add(ttl)})
	m.shrink(mt, limit)
	return nil
}

// limit is how many bytes a tenant may have. It is the user's function, so m.mu must not be held.
func (m *Memory) limit(t pgxtenant.Tenant) int64 {
	if m.config.TenantBytes == nil {
		return DefaultTenantBytes
	}
	return orDefault(m.config.TenantBytes(t), DefaultTenantBytes)
}

func (m *Memory) add(mt *memoryTenant, k memoryKey, stored memoryEntry) {
	m.remove(mt, k)
	mt.entries.Add(k, stored)
	m.account(mt, sizeOf(k, stored.raw), 1)
}

func (m *Memory) remove(mt *memoryTenant, k memoryKey) {
	if stored, ok := mt.entries.Peek(k); ok {
		mt.entries.Remove(k)
		m.account(mt, -sizeOf(k, stored.raw), -1)
	}
}

func (m *Memory) account(mt *memoryTenant, bytes int64, entries int) {
	mt.bytes += bytes
	m.bytes += bytes
	m.entries += entries
}

// drop forgets a tenant with all that it has.
func (m *Memory) drop(id string, mt *memoryTenant) {
	m.tenants.Remove(id)
	m.account(mt, -mt.bytes, -mt.entries.Len())
}

// shrink makes room in mt, which was used last, and then among all tenants.
func (m *Memory) shrink(mt *memoryTenant, limit int64) {
	for mt.bytes-tenantBytes > limit && m.evict(mt) {
	}
	for m.bytes > m.config.MaxBytes {
		id, oldest, ok := m.tenants.GetOldest()
		if !ok {
			return
		}
		if !m.evict(oldest) {
			m.drop(id, oldest)
		}
	}
}

// evict removes the least recently used entry of a tenant, and reports false if it has none.
func (m *Memory) evict(mt *memoryTenant) bool {
	k, _, ok := mt.entries.GetOldest()
	if ok {
		m.remove(mt, k)
		m.evictions++
	}
	return ok
}
