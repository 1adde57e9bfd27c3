package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Defaults of RegistryConfig's fields.
const (
	DefaultRegistryCacheSize   = 10_000
	DefaultRegistryTTL         = 30 * time.Second
	DefaultRegistryNegativeTTL = 5 * time.Second
)

// RegistryConfig describes a Registry. NewRegistry copies it.
type RegistryConfig struct {
	// Pool configures the pool that the registry is read with. It must come from pgxpool.ParseConfig. A
	// registry of its own also installs and changes its tables with it, so its role must own them; that
	// of a TenantDB does so with Config.Admin, and Install grants Pool's role SELECT and no more.
	// Both must lead to the same database, and not to a standby, which nothing can listen on.
	//
	// Nil means Config.Admin's pool. NewRegistry needs it.
	Pool *pgxpool.Config

	// ListenConn leads to the same database for the one connection that listens for changes. It must be a
	// direct one: behind a pooler in transaction mode LISTEN hears nothing, and changes are then seen
	// when TTL is over. The connection counts towards no pool, nor towards Config.MaxConns.
	//
	// Nil means the connection configuration of the pool, its BeforeConnect hook included.
	ListenConn *pgx.ConnConfig

	// CacheSize is the most tenants kept in memory, and the most aliases. Those least recently used go first.
	//
	// Zero means DefaultRegistryCacheSize (10,000). A negative value is refused.
	CacheSize int

	// TTL is how long a tenant is served from memory, should the notification of a change never come.
	//
	// Zero means DefaultRegistryTTL (30 seconds). A negative value is refused.
	TTL time.Duration

	// NegativeTTL is the same for what was not found.
	//
	// Zero means DefaultRegistryNegativeTTL (5 seconds). A negative value means it is not remembered.
	NegativeTTL time.Duration

	// StaleOnError is how long beyond TTL a tenant is still served while the registry cannot be read. A
	// suspension in that time takes effect only afterwards.
	//
	// Zero means not at all: when TTL is over, checkouts fail with the registry's error. A negative value
	// is refused.
	StaleOnError time.Duration

	// Key encrypts ConnString at rest: 32 bytes, for AES-256-GCM, with the tenant's ID as additional data,
	// so that one tenant's cannot be moved to another. It must not be set together with Resolve.
	//
	// Nil, without Resolve, means that a ConnString is kept as it is, and refused if it holds a password.
	Key []byte

	// OldKeys only decrypt; see Registry.Reseal for the rotation.
	OldKeys [][]byte

	// Resolve turns what is stored, a reference without a password, into the connection string. It is called
	// at each read of a database tenant by Lookup and ByAlias, with the tenant as stored, for several at
	// once. Records have the reference itself in ConnString. Its errors must hold no secret.
	//
	// Nil means that what is stored is the connection string, encrypted or without a password.
	Resolve func(ctx context.Context, ref string, t Tenant) (connString string, err error)

	// Logger is told when the listener's connection is lost and found. Nil means no log; a TenantDB's
	// Registry takes Config.Logger then.
	Logger *slog.Logger
}

// Registry is a Directory on PostgreSQL: it keeps the tenants in a table of schema pgxtenant, with a cache
// in front, and hears of every change that any process makes, most often within milliseconds. It is safe for
// concurrent use.
//
// When the listening connection is lost, entries are served for TTL at most; when it is back, the cache is
// emptied, since changes may have been missed. IDs and aliases of changed tenants travel as notifications,
// which every role that may connect to the registry's database could listen to.
type Registry struct {
	config   RegistryConfig // with defaults
	pool     *pgxpool.Pool
	write    *pgxpool.Pool // the admin pool, or pool
	ownsPool bool
	vault    *vault
	validate func(*Tenant) error
	// place is where TenantDB.Provision makes databases; nil without a TenantDB.
	place    func(server, tenantID string) (connString string, err error)
	epoch    time.Time
	tenants  registryCache // by ID
	aliases  registryCache // by alias; only the ID is set
	listener registryListener

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
}

// NewRegistry opens a registry without a TenantDB. Like pgxpool it connects in the background. Its tables
// must be there, or be made by Install, before it is asked. Close it.
func NewRegistry(ctx context.Context, config RegistryConfig) (*Registry, error) {
	c := config.copy()
	problems := c.problems()
	if c.Pool == nil {
		problems = append(problems, errors.New(".Pool is nil; it is required"))
	}
	for i := range problems {
		problems[i] = fmt.Errorf("pgxtenant: RegistryConfig%w", problems[i])
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	b, err := newBinder(binderOptions{})
	if err != nil {
		return nil, err
	}
	return newRegistry(ctx, c, nil, b.validate, nil)
}

// openRegistry makes the registry of a TenantDB.
func (db *TenantDB) openRegistry(ctx context.Context) (err error) {
	c := db.config.Registry.copy()
	c.Logger = orDefault(c.Logger, db.config.Logger)
	if db.registry, err = newRegistry(ctx, c, db.admin, db.binder.validate, db.tenantChanged); err != nil {
		return err
	}
	db.registry.place = db.place
	db.config.Directory, db.lookups.directory = db.registry, db.registry
	db.registry.start()
	return nil
}

// newRegistry makes a registry; with changed it must still be started.
func newRegistry(ctx context.Context, c *RegistryConfig, admin *pgxpool.Pool, validate func(*Tenant) error, changed func(ctx context.Context, id string)) (*Registry, error) {
	c.CacheSize = orDefault(c.CacheSize, DefaultRegistryCacheSize)
	c.TTL = orDefault(c.TTL, DefaultRegistryTTL)
	c.NegativeTTL = orDefault(c.NegativeTTL, DefaultRegistryNegativeTTL)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	v, err := newVault(c)
	if err != nil {
		return nil, err
	}
	r := &Registry{config: *c, pool: admin, write: admin, vault: v, validate: validate, epoch: time.Now()}
	if c.Pool != nil {
		if r.pool, err = pgxpool.NewWithConfig(ctx, c.Pool.Copy()); err != nil {
			return nil, fmt.Errorf("pgxtenant: registry's pool: %w", err)
		}
		r.ownsPool = true
	}
	if r.write == nil {
		r.write = r.pool
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.tenants.init(r, r.readTenant, false)
	r.aliases.init(r, r.readAlias, true)
	r.listener.init(r, changed)
	if changed == nil {
		r.start()
	}
	return r, nil
}

func (r *Registry) start() {
	r.wg.Go(r.listener.run)
	if r.listener.changed != nil {
		r.wg.Go(r.listener.tell)
	}
}

// Close stops listening and closes the registry's own pool. It blocks until that is done. Afterwards all
// methods fail with ErrClosed or the pool's own error.
func (r *Registry) Close() {
	r.once.Do(func() {
		r.cancel()
		r.wg.Wait()
		if r.ownsPool {
			r.pool.Close()
		}
	})
}

// Lookup returns the tenant with the given ID, from memory if it is there. It implements Directory.
func (r *Registry) Lookup(ctx context.Context, id string) (Tenant, error) {
	if err := ValidateID(id); err != nil {
		return Tenant{}, err
	}
	return r.tenants.get(ctx, id)
}

// Peek returns the tenant with the given ID if it is in memory. It implements Peeker.
func (r *Registry) Peek(id string) (Tenant, bool) { return r.tenants.peek(id) }

// ByAlias returns the tenant that has the given alias, in whatever case, from memory if it is there. If there
// is none the error wraps ErrTenantNotFound, and ErrInvalidAlias as well where there can be none.
func (r *Registry) ByAlias(ctx context.Context, alias string) (Tenant, error) {
	name, err := normalAlias(alias)
	if err != nil {
		return Tenant{}, fmt.Errorf("%w (%w)", err, ErrTenantNotFound)
	}
	key, ok := r.aliases.peek(name)
	if !ok {
		if key, err = r.aliases.get(ctx, name); err != nil {
			return Tenant{}, err
		}
	}
	if t, ok := r.tenants.peek(key.ID); ok {
		return t, nil
	}
	return r.tenants.get(ctx, key.ID)
}

// PeekAlias returns the tenant that has the given alias, in whatever case, if that is in memory. It
// implements AliasPeeker.
func (r *Registry) PeekAlias(alias string) (Tenant, bool) {
	name, err := normalAlias(alias)
	if err != nil {
		return Tenant{}, false
	}
	key, ok := r.aliases.peek(name)
	if !ok {
		return Tenant{}, false
	}
	return r.tenants.peek(key.ID)
}

func (r *Registry) readTenant(ctx context.Context, id string) (Tenant, error) {
	rec, err := r.readRecord(ctx, r.pool, id, "")
	if err != nil {
		return Tenant{}, err
	}
	t := rec.Tenant
	if t.Isolation == IsolationDatabase && t.ConnString == "" && r.place != nil {
		t.ConnString, err = r.place(rec.Server, id)
		return t, err
	}
	if t.ConnString != "" && r.config.Resolve != nil {
		if t.ConnString, err = r.config.Resolve(ctx, t.ConnString, t); err != nil {
			return Tenant{}, fmt.Errorf("pgxtenant: resolve the reference to tenant %q's database: %w", id, err)
		}
	}
	return t, nil
}

func (r *Registry) readAlias(ctx context.Context, alias string) (t Tenant, err error) {
	err = r.pool.QueryRow(ctx, "select tenant_id from pgxtenant.tenant_alias where alias = $1", alias).Scan(&t.ID)
	if errors.Is(err, pgx.ErrNoRows) {
		return t, fmt.Errorf("%w: no tenant has the alias %q", ErrTenantNotFound, alias)
	}
	return t, r.explain("look up alias", err)
}

// explain says what an error of the server's means for the registry.
func (r *Registry) explain(op string, err error) error {
	var pgErr *pgconn.PgError
	switch {
	case err == nil:
		return nil
	case r.ctx.Err() != nil:
		return ErrClosed
	case errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000"):
		return fmt.Errorf("pgxtenant: registry: %s: its tables are not in this database; call Registry.Install: %w", op, err)
	case errors.As(err, &pgErr) && pgErr.Code == "42501":
		return fmt.Errorf("pgxtenant: registry: %s: the role lacks a right; Registry.Install grants it, run as the tables' owner: %w", op, err)
	}
	return fmt.Errorf("pgxtenant: registry: %s: %w", op, err)
}

// registryCache keeps what was read, found or not, for a time.
type registryCache struct {
	r     *Registry
	read  func(ctx context.Context, key string) (Tenant, error)
	calls lookups
	known *lru.Cache[string, *registryEntry]

	// mu makes one step of looking at changes and changing known. It is not held while reading.
	mu      sync.Mutex
	changes uint64 // notifications so far, of any key
}

type registryEntry struct {
	tenant  Tenant
	missing error         // why there is none
	until   time.Duration // since Registry.epoch
}

func (c *registryCache) init(r *Registry, read func(context.Context, string) (Tenant, error), other bool) {
	c.r, c.read = r, read
	c.known, _ = lru.New[string, *registryEntry](r.config.CacheSize) // fails only below 1
	c.calls = lookups{directory: reader{c}, log: r.config.Logger, other: other}
}

func (c *registryCache) peek(key string) (Tenant, bool) {
	e, ok := c.known.Get(key)
	if !ok || e.missing != nil || time.Since(c.r.epoch) >= e.until || c.r.ctx.Err() != nil {
		return Tenant{}, false
	}
	return e.tenant, true
}

func (c *registryCache) get(ctx context.Context, key string) (Tenant, error) {
	if c.r.ctx.Err() != nil {
		return Tenant{}, ErrClosed
	}
	if e, ok := c.known.Get(key); ok && time.Since(c.r.epoch) < e.until {
		return e.tenant, e.missing
	}
	return c.calls.get(ctx, key)
}

// reader is the registryCache as lookups sees it: what is asked when the answer is not in memory.
type reader struct{ c *registryCache }

// Lookup reads until nothing has changed meanwhile: an answer from before a change must not be kept, nor be
// given to those who joined after it. Under changes without end the last answer is given and not kept.
func (rd reader) Lookup(ctx context.Context, key string) (t Tenant, err error) {
	c := rd.c
	for range 3 {
		c.mu.Lock()
		before := c.changes
		c.mu.Unlock()
		if t, err = c.read(ctx, key); err != nil && !errors.Is(err, ErrTenantNotFound) {
			return c.stale(ctx, key, err)
		}
		if c.keep(key, t, err, before) {
			break
		}
	}
	return t, err
}

// keep reports whether nothing has changed since before.
func (c *registryCache) keep(key string, t Tenant, missing error, before uint64) bool {
	ttl := c.r.config.TTL
	if missing != nil {
		ttl = c.r.config.NegativeTTL
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changes != before {
		return false
	}
	if ttl < 0 {
		c.known.Remove(key) // it may be there from the time when it was found
	} else {
		c.known.Add(key, &registryEntry{t, missing, time.Since(c.r.epoch) + ttl})
	}
	return true
}

func (c *registryCache) stale(ctx context.Context, key string, cause error) (Tenant, error) {
	if e, ok := c.known.Peek(key); ok && ctx.Err() == nil && e.missing == nil && time.Since(c.r.epoch) < e.until+c.r.config.StaleOnError {
		c.r.config.Logger.Warn("registry cannot be read; served from memory", "key", key, "error", cause)
		return e.tenant, nil
	}
	return Tenant{}, cause
}

func (c *registryCache) drop(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	c.known.Remove(key)
}

func (c *registryCache) purge() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	c.known.Purge()
}

func (c *RegistryConfig) copy() *RegistryConfig {
	if c == nil {
		return nil
	}
	d := *c
	d.Pool = copyPoolConfig(c.Pool)
	if c.ListenConn != nil {
		d.ListenConn = c.ListenConn.Copy()
	}
	d.Key, d.OldKeys = slices.Clone(c.Key), cloneKeys(c.OldKeys)
	return &d
}

// problems are about all fields but a missing Pool.
func (c *RegistryConfig) problems() (errs []error) {
	if c.Pool != nil {
		for _, err := range poolProblems(c.Pool) {
			errs = append(errs, fmt.Errorf(".Pool%w", err))
		}
	}
	if c.CacheSize < 0 {
		errs = append(errs, fmt.Errorf(".CacheSize is %d; want 0 or more", c.CacheSize))
	}
	if c.TTL < 0 {
		errs = append(errs, fmt.Errorf(".TTL is %v; want 0 or more", c.TTL))
	}
	if c.StaleOnError < 0 {
		errs = append(errs, fmt.Errorf(".StaleOnError is %v; want 0 or more", c.StaleOnError))
	}
	if c.Key != nil && c.Resolve != nil {
		errs = append(errs, errors.New(".Key and .Resolve are both set; want one at most"))
	}
	if _, err := newVault(c); err != nil {
		errs = append(errs, err)
	}
	return errs
}
