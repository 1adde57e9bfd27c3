package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Defaults of Config's fields, and of the pools of database tenants.
const (
	DefaultMaxPools    = 128
	DefaultIdleTimeout = 10 * time.Minute
	DefaultOpenTimeout = 15 * time.Second
	DefaultOpenRetry   = time.Second

	// DefaultPoolMaxConns is the size of a database tenant's pool whose connection string does not set
	// pool_max_conns.
	DefaultPoolMaxConns = 10
	// DefaultPoolMaxConnLifetimeJitter is added, at random, to the lifetime of a database tenant's
	// connections (pgxpool's default of 1 hour), so that they do not all end at once.
	DefaultPoolMaxConnLifetimeJitter = 10 * time.Minute
)

// Config describes a TenantDB. Only Shared is required; any other zero field takes its default.
// NewWithConfig copies the Config, so later edits have no effect.
type Config struct {
	// Shared configures the pool of all row- and schema-isolated tenants, and must come from
	// pgxpool.ParseConfig. Its role should own no table, and be neither superuser nor BYPASSRLS: policies
	// would not hold it. Hooks that are set on it are kept: BeforeConnect and AfterConnect run before
	// any tenant is bound, PrepareConn or BeforeAcquire after.
	//
	// Database tenants' pools take from it the tracer, AfterConnect (where types are registered) and,
	// where their own connection string does not say otherwise, the default query execution mode and the
	// capacities of the statement caches. All else, credentials and hooks that supply them included,
	// comes from the tenant's ConnString and from AdjustPool.
	Shared *pgxpool.Config

	// Admin configures a pool that is not bound to any tenant, for DDL and for work across tenants,
	// usually as the role that owns the tables. It must come from pgxpool.ParseConfig.
	//
	// Nil means there is no such pool: TenantDB.Admin returns nil.
	Admin *pgxpool.Config

	// Template is the schema that the schemas of schema tenants are copied from; see SchemaManager.
	//
	// Empty means there is none, and schemas are made by other means.
	Template string

	// TemplateReference are the tables of Template, by their bare names, whose rows each copy gets too. While one is
	// missing no copy is made: the table that a migration tool keeps its versions in is there after the first migration.
	TemplateReference []string

	// Servers are the servers that databases of database tenants are made on, by names of your own
	// choice, by which Provision and the registry place a tenant. A pool of each one's Admin is opened.
	//
	// Nil means databases are made by other means.
	Servers map[string]DatabaseServer

	// Directory resolves the IDs of WithTenantID, at each checkout.
	//
	// Nil means that each valid ID is that of an active tenant with IsolationRow.
	Directory Directory

	// Registry makes a Registry, which is the Directory then: see TenantDB.Registry. Directory must be nil.
	// With a nil RegistryConfig.Pool it uses the pool of Admin.
	//
	// Nil means there is none.
	Registry *RegistryConfig

	// Setting is the run-time parameter that carries the tenant's ID and that policies read. It must be
	// of the form prefix.name.
	//
	// Empty means DefaultSetting ("app.current_tenant_id").
	Setting string

	// Seal signs tenants, for policies that injected SQL cannot deceive. It costs the server some 25 µs a statement.
	//
	// Nil means tenants are not signed, and policies of sealed tenants let nothing through.
	Seal *SealConfig

	// SharedSchemas follow a schema tenant's own schema in its search_path, for extensions and tables
	// common to all. A table there stands in for one that the tenant's schema lacks.
	//
	// Nil means DefaultSharedSchemas ("public"); empty and not nil means none.
	SharedSchemas []string

	// Strict cleans the session at every change of tenant on a connection, whatever was seen to happen on
	// it: also what a function of your own leaves behind out of sight. It costs some 70 µs per change, in
	// the statement's own round trip, and refuses connections on which an AfterConnect hook left
	// session state, which it would erase.
	Strict bool

	// MaxPools is the most isolated pools open at one time, one for each database tenant in use. It counts
	// pools: the servers need room for MaxPools × their MaxConns connections, unless MaxConns limits all
	// of them together. At the limit the least recently used pool without a connection in use is closed
	// for a new one; if there is none, the checkout fails with ErrPoolsBusy rather than wait. A pool that is
	// being opened, or drained by those who still use it, is not counted.
	//
	// Zero means DefaultMaxPools (128). NewWithConfig rejects a negative value.
	MaxPools int

	// IdleTimeout is how long an isolated pool may go unused before it is closed; pools are checked
	// every IdleTimeout/4. A pool with a connection in use or under lease is not idle.
	//
	// Zero means DefaultIdleTimeout (10 minutes). A negative value turns the check off, leaving MaxPools
	// as the only limit.
	IdleTimeout time.Duration

	// MaxConns is the most server connections that the shared pool and all isolated pools may hold
	// together, those under construction, hijacked ones and those of draining pools included; the
	// Admin pool is not. At the limit an idle connection is given up for a new one, that of the least
	// recently used pool first. If none is idle the checkout waits, as long as its context allows, for
	// its pool's turn, except that a pool with its fair share takes no connection from another
	// that has callers waiting. The limit costs one allocation per checkout.
	//
	// Zero means no limit beyond each pool's own. NewWithConfig rejects a negative value.
	MaxConns int32

	// Limits, if not nil, returns what a tenant may use of the connections that it shares with others, by its Plan
	// for instance. It is asked once for each value of a Tenant, and must give the same for the same: change
	// the Plan to change the limits. It may be called for several tenants at once.
	//
	// Nil means that the zero Limits are those of all.
	Limits func(t Tenant) Limits

	// MaxShare is the largest part of the shared pool that one tenant may hold while others want connections
	// of it too, and of the connections under MaxConns that the pool of one may while others want them: it is
	// what keeps the way short for who comes next. Alone, a tenant may have all. It is rounded down to whole
	// connections, at least one, and only looked at while a checkout waits. A tenant that just holds a
	// connection, and has neither taken nor returned one for a second, is thought to want no other.
	//
	// Zero means DefaultMaxShare (0.75), and 1 that there is no such limit. NewWithConfig rejects a
	// negative value, and one above 1.
	MaxShare float64

	// ArrivalOrder serves checkouts in the order in which they come, as pgxpool does, so that one tenant's flood
	// makes all others wait behind it. MaxShare, and those fields of Limits that are not bound with the
	// tenant, have no effect then. It saves a checkout some 30 ns.
	//
	// By default tenants take turns while there are not enough connections for all, by connection time and by
	// Limits.Weight. docs/fairness.md tells how, and what it costs under load.
	ArrivalOrder bool

	// DisableLoad turns TenantDB.Load off, and with it what Stat and the pages tell of statements and waits. Counting
	// costs some 100 ns a statement and no allocation.
	DisableLoad bool

	// HeavyShare is the share of the time spent in the shared database within five minutes from which on a tenant is
	// heavy: Logger and OnHeavyTenant are told once, and again only after it has fallen below nine tenths of that.
	// It is looked at every ten seconds, once HeavyMinTime (30 seconds) was spent by all together, of which another
	// tenant must have a part. Database tenants are never heavy in this sense.
	//
	// Zero means DefaultHeavyShare (0.4), and 1 or more never. NewWithConfig rejects a negative value.
	HeavyShare float64

	// OnHeavyTenant, if not nil, is called when a tenant becomes heavy, with what it used in the five minutes. It is
	// called on a goroutine of its own, for several tenants at once maybe, and Close waits for it.
	OnHeavyTenant func(t TenantLoad)

	// AdjustPool, if not nil, may change the configuration of a database tenant's pool before it is
	// opened, by Plan for instance. It gets a config of its own, made from the tenant's ConnString:
	// MaxConns is DefaultPoolMaxConns (10), connections live for 1 hour plus up to
	// DefaultPoolMaxConnLifetimeJitter (10 minutes), and none is kept for the sake of MinConns, unless
	// the string says otherwise. Hooks that it sets are kept, as on Shared: credentials that change all the
	// time belong in BeforeConnect, for a new ConnString means a new pool. An error fails the opening.
	// AdjustPool may be called for several tenants at once.
	AdjustPool func(t Tenant, c *pgxpool.Config) error

	// OpenTimeout bounds the opening of an isolated pool, which includes its first connection. It does
	// not count the time spent waiting for room under MaxConns.
	//
	// Zero means DefaultOpenTimeout (15 seconds). NewWithConfig rejects a negative value.
	OpenTimeout time.Duration

	// OpenRetry is how long a failed opening of an isolated pool is remembered: until then checkouts of
	// the tenant fail at once with the same cause, and the server is left alone. A changed connection
	// string is tried at once, as is any after TenantDB.Evict.
	//
	// Zero means DefaultOpenRetry (1 second). A negative value means failures are not remembered.
	OpenRetry time.Duration

	// RequireIdentity refuses a database that does not carry its tenant's ID in Setting, as
	// ALTER DATABASE … SET puts it there. Without it, a database with no mark is accepted, and only
	// one with another tenant's mark refused.
	RequireIdentity bool

	// RequireAudit has NewWithConfig run [TenantDB.Audit], save for the comparison of tenants' schemas with the
	// template, and fail with an *AuditError if there is a finding of SeverityError that AuditAllow does
	// not have. The server must then be reachable, for the application's role as well. What the roles have no right
	// to look at does not stop it; Audit tells what that is.
	RequireAudit bool

	// AuditAllow are findings that are there on purpose. Audit reports them as allowed. NewWithConfig rejects a
	// code that there is none of.
	AuditAllow []AllowedFinding

	// Logger is told when isolated pools are opened and closed, and why, who holds a connection for longer
	// than Limits.HoldLimit, and which tenants are heavy. Neither passwords nor SQL are logged. Nil means no log.
	Logger *slog.Logger
}

// Directory knows the tenants. It is asked at each checkout of a context made by WithTenantID, so it
// should answer from memory if it can, best as a [Peeker]. It must be safe for concurrent use, and must not
// itself ask the shared pool: the checkout that asks may hold its last connection.
type Directory interface {
	// Lookup returns the tenant with the given ID, or an error that wraps ErrTenantNotFound if there is
	// none. Callers that ask for one ID at the same moment share one Lookup: its context carries the
	// values of the first of them, and is cancelled when none is left.
	Lookup(ctx context.Context, id string) (Tenant, error)
}

// A Peeker is a Directory that knows some tenants by heart. It is asked first, on the caller's own
// goroutine and without an allocation, where a Lookup takes a goroutine that outlives the caller.
type Peeker interface {
	// Peek returns the tenant with the given ID if it is known without waiting for anything, as Lookup
	// would return it just now. It reports false otherwise; Lookup is then called.
	Peek(id string) (Tenant, bool)
}

// paramPrefix begins the names of this package's parameters in a connection string.
const paramPrefix = "tenant_"

// ParseConfig builds a Config from connString, which it gives to pgxpool.ParseConfig for Shared. These
// parameters set Config's fields of like name:
//
//   - tenant_setting: name (default app.current_tenant_id)
//   - tenant_shared_schemas: comma-separated names (default public)
//   - tenant_strict: true or false (default false)
//   - tenant_max_pools: integer greater than 0 (default 128)
//   - tenant_idle_timeout: duration string (default 10 minutes; negative: never)
//   - tenant_max_conns: integer 0 or greater (default 0, meaning no limit)
//   - tenant_max_share: number above 0, and 1 at most (default 0.75)
//   - tenant_arrival_order: true or false (default false)
//   - tenant_disable_load: true or false (default false)
//   - tenant_heavy_share: number above 0 (default 0.4; 1 or more: never)
//   - tenant_open_timeout: duration string (default 15 seconds)
//   - tenant_open_retry: duration string (default 1 second; negative: at once)
//   - tenant_require_identity: true or false (default false)
//   - tenant_require_audit: true or false (default false)
//
// No error repeats any part of connString, which may hold a password, but the names and values of
// these parameters.
func ParseConfig(connString string) (*Config, error) {
	shared, err := parsePoolConfig(connString)
	if err != nil {
		return nil, err
	}
	config := &Config{Shared: shared}
	var errs []error
	params := shared.ConnConfig.RuntimeParams
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if !ownParam(name) {
			continue
		}
		if err := config.setParam(name, params[name]); err != nil {
			errs = append(errs, fmt.Errorf("pgxtenant: %s=%q in the connection string: %w", clip(name), clip(params[name]), err))
		}
		delete(params, name)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return config, nil
}

// ownParam reports whether a parameter of a connection string is meant for this package. One with a dot
// is a setting of the user's own for the server, whatever it begins with.
func ownParam(name string) bool {
	return strings.HasPrefix(name, paramPrefix) && !strings.Contains(name, ".")
}

func (c *Config) setParam(name, value string) (err error) {
	switch strings.TrimPrefix(name, paramPrefix) {
	case "setting":
		c.Setting = value
	case "shared_schemas":
		c.SharedSchemas = []string{}
		for s := range strings.SplitSeq(value, ",") {
			if s = strings.TrimSpace(s); s != "" {
				c.SharedSchemas = append(c.SharedSchemas, s)
			}
		}
	case "strict":
		c.Strict, err = strconv.ParseBool(value)
	case "max_pools":
		c.MaxPools, err = parseLimit(value, 1)
	case "idle_timeout":
		c.IdleTimeout, err = time.ParseDuration(value)
	case "max_conns":
		var n int
		n, err = parseLimit(value, 0)
		c.MaxConns = int32(n)
	case "max_share":
		c.MaxShare, err = parseShare(value)
	case "arrival_order":
		c.ArrivalOrder, err = strconv.ParseBool(value)
	case "disable_load":
		c.DisableLoad, err = strconv.ParseBool(value)
	case "heavy_share":
		c.HeavyShare, err = parseShare(value)
	case "open_timeout":
		c.OpenTimeout, err = time.ParseDuration(value)
	case "open_retry":
		c.OpenRetry, err = time.ParseDuration(value)
	case "require_identity":
		c.RequireIdentity, err = strconv.ParseBool(value)
	case "require_audit":
		c.RequireAudit, err = strconv.ParseBool(value)
	default:
		err = errors.New("there is no such parameter")
	}
	return err
}

func parseShare(value string) (float64, error) {
	share, err := strconv.ParseFloat(value, 64)
	if err == nil && share == 0 {
		err = errors.New("want more than 0")
	}
	return share, err
}

func parseLimit(value string, least int64) (int, error) {
	n, err := strconv.ParseInt(value, 10, 32)
	if err == nil && n < least {
		err = fmt.Errorf("want %d or more", least)
	}
	return int(n), err
}

// parseProblems are what pgx says in front of a cause when it cannot parse a connection string.
var parseProblems = []string{
	"failed to parse as URL", "failed to parse as keyword/value", "failed to configure TLS", "failed to read service",
	"invalid port", "invalid connect_timeout", "invalid require_auth", "invalid sslcertmode",
	"min_protocol_version cannot be greater than max_protocol_version",
	"cannot parse description_cache_capacity", "cannot parse statement_cache_capacity",
	"cannot parse pool_max_conns", "pool_max_conns too small", "cannot parse pool_min_conns", "cannot parse pool_min_idle_conns",
	"cannot parse pool_max_conn_lifetime_jitter", "cannot parse pool_max_conn_lifetime", "cannot parse pool_max_conn_idle_time",
	"cannot parse pool_health_check_period", "cannot parse pool_ping_timeout",
}

// parsePoolConfig is pgxpool.ParseConfig with errors that repeat nothing of connString. pgx masks
// passwords in its own, but only as far as they can be told in a string that is malformed, and keeps the
// whole string in a field.
func parsePoolConfig(connString string) (*pgxpool.Config, error) {
	if misplacedAt(connString) {
		return nil, errors.New("pgxtenant: invalid connection string: an @ in its host or path; write %40 for one in a password, %2F for a slash")
	}
	config, err := pgxpool.ParseConfig(connString)
	if err == nil {
		return config, nil
	}
	text := err.Error()
	for _, p := range parseProblems {
		if strings.Contains(text, "`: "+p) {
			return nil, fmt.Errorf("pgxtenant: invalid connection string: %s", p)
		}
	}
	return nil, errors.New("pgxtenant: invalid connection string")
}

// misplacedAt reports whether connString is a URL whose password pgx would take for a part of the host or
// path, because of an unescaped @ or slash in it, and then show in errors.
func misplacedAt(connString string) bool {
	scheme, rest, _ := strings.Cut(connString, "://")
	if scheme != "postgres" && scheme != "postgresql" {
		return false // keywords and values
	}
	if i := strings.IndexAny(rest, "@/"); i >= 0 && rest[i] == '@' {
		rest = rest[i+1:]
	}
	rest, _, _ = strings.Cut(rest, "?")
	return strings.Contains(rest, "@")
}

// validate reports every bad field, not only the first. It is given a Config with its defaults filled in.
func (c *Config) validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf("pgxtenant: "+format, args...)) }

	for _, err := range poolProblems(c.Shared) {
		fail("Config.Shared%w", err)
	}
	if c.Admin != nil {
		for _, err := range poolProblems(c.Admin) {
			fail("Config.Admin%w", err)
		}
	}
	if c.Template != "" {
		if err := validSchema(c.Template); err != nil {
			fail("Config.Template %q: %w", clip(c.Template), err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Servers)) {
		s := c.Servers[name]
		for _, err := range s.problems() {
			fail("Config.Servers[%q]%w", clip(name), err)
		}
	}
	if c.Registry != nil {
		if c.Directory != nil {
			fail("Config.Registry and Config.Directory are both set; the Registry is the Directory")
		}
		if c.Registry.Pool == nil && c.Admin == nil {
			fail("Config.Registry needs a Pool, or Config.Admin")
		}
		for _, err := range c.Registry.problems() {
			fail("Config.Registry%w", err)
		}
	}
	if c.Seal != nil {
		for _, err := range c.Seal.problems() {
			fail("Config.Seal%w", err)
		}
	}
	if c.MaxPools < 0 {
		fail("Config.MaxPools is %d; want 0 or more", c.MaxPools)
	}
	if c.MaxConns < 0 {
		fail("Config.MaxConns is %d; want 0 or more", c.MaxConns)
	}
	if !(c.MaxShare > 0 && c.MaxShare <= 1) { // nor is NaN
		fail("Config.MaxShare is %v; want more than 0, and 1 at most", c.MaxShare)
	}
	if !(c.HeavyShare > 0) {
		fail("Config.HeavyShare is %v; want more than 0", c.HeavyShare)
	}
	if c.Shared != nil && c.MaxConns > 0 && max(c.Shared.MinConns, c.Shared.MinIdleConns) > c.MaxConns {
		fail("Config.Shared keeps more connections than Config.MaxConns (%d) allows", c.MaxConns)
	}
	if c.OpenTimeout < 0 {
		fail("Config.OpenTimeout is %v; want 0 or more", c.OpenTimeout)
	}
	for _, allowed := range c.AuditAllow {
		if _, ok := auditCodes[allowed.Code]; !ok {
			fail("Config.AuditAllow has the code %q; there is none such", clip(allowed.Code))
		}
	}
	if _, err := newBinder(c.binderOptions()); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// withDefaults returns a copy whose zero fields are filled in and that shares nothing with c.
func (c *Config) withDefaults() *Config {
	d := c.copy()
	d.MaxPools = orDefault(d.MaxPools, DefaultMaxPools)
	d.MaxShare = orDefault(d.MaxShare, DefaultMaxShare)
	d.HeavyShare = orDefault(d.HeavyShare, DefaultHeavyShare)
	d.IdleTimeout = orDefault(d.IdleTimeout, DefaultIdleTimeout)
	d.OpenTimeout = orDefault(d.OpenTimeout, DefaultOpenTimeout)
	d.OpenRetry = orDefault(d.OpenRetry, DefaultOpenRetry)
	d.Setting = orDefault(d.Setting, DefaultSetting)
	if d.SharedSchemas == nil {
		d.SharedSchemas = slices.Clone(DefaultSharedSchemas)
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	return d
}

func orDefault[T comparable](value, byDefault T) T {
	var zero T
	if value == zero {
		return byDefault
	}
	return value
}

// copy is as deep as a caller can reach.
func (c *Config) copy() *Config {
	d := *c
	d.Shared, d.Admin = copyPoolConfig(c.Shared), copyPoolConfig(c.Admin)
	d.SharedSchemas = slices.Clone(c.SharedSchemas)
	d.TemplateReference = slices.Clone(c.TemplateReference)
	d.Servers = maps.Clone(c.Servers)
	for name, s := range d.Servers {
		s.Admin = copyPoolConfig(s.Admin)
		d.Servers[name] = s
	}
	d.Registry = c.Registry.copy()
	d.Seal = c.Seal.copy()
	d.AuditAllow = slices.Clone(c.AuditAllow)
	return &d
}

func copyPoolConfig(c *pgxpool.Config) *pgxpool.Config {
	if c == nil || c.ConnConfig == nil {
		return c // for validate to find
	}
	return c.Copy()
}

func cloneKeys(keys [][]byte) [][]byte {
	cloned := make([][]byte, len(keys))
	for i, k := range keys {
		cloned[i] = slices.Clone(k)
	}
	return cloned
}

func (c *Config) binderOptions() binderOptions {
	return binderOptions{setting: c.Setting, sharedSchemas: c.SharedSchemas, strict: c.Strict, seal: c.Seal, limits: c.Limits}
}

// poolProblems returns what would make pgxpool panic, at once or in the background, or refuse config.
func poolProblems(c *pgxpool.Config) (errs []error) {
	if !fromParseConfig(c) {
		return []error{errors.New(" must come from pgxpool.ParseConfig")}
	}
	if c.MaxConns < 1 {
		errs = append(errs, fmt.Errorf(".MaxConns is %d; want 1 or more", c.MaxConns))
	}
	if c.HealthCheckPeriod <= 0 {
		errs = append(errs, fmt.Errorf(".HealthCheckPeriod is %v; want more than 0", c.HealthCheckPeriod))
	}
	return errs
}

// fromParseConfig reports whether c and the configs in it were made by ParseConfig. pgx says so only by
// a panic, in case of the inner ones on a goroutine where nobody could catch it. So both are asked here,
// in a way that opens nothing: for a pool of no size, and for a connection that cannot be dialled.
func fromParseConfig(c *pgxpool.Config) (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	if c == nil || c.ConnConfig == nil {
		return false
	}
	probe := c.Copy()
	probe.MaxConns = 0
	probe.ConnConfig.Tracer = nil
	probe.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) { return nil, errProbe }
	probe.ConnConfig.DialFunc = func(context.Context, string, string) (net.Conn, error) { return nil, errProbe }
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if pool, err := pgxpool.NewWithConfig(ctx, probe); err == nil {
		pool.Close()
	}
	if conn, err := pgx.ConnectConfig(ctx, probe.ConnConfig); err == nil {
		_ = conn.Close(ctx)
	}
	return true
}

var errProbe = errors.New("pgxtenant: probe")
