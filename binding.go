package pgxtenant

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// DefaultSetting is the run-time parameter that carries the tenant's ID to the server, and that
// policies compare with the tenant column.
const DefaultSetting = "app.current_tenant_id"

// DefaultSharedSchemas follow a schema tenant's own schema in its search_path.
var DefaultSharedSchemas = []string{"public"}

// readOnlySetting is bound for tenants with StatusReadOnly.
const readOnlySetting = "transaction_read_only"

// binder makes bindings and installs them on pools. It is immutable and safe for concurrent use.
type binder struct {
	setting       string
	sharedSchemas []string
	strict        bool
	fenced        bool                // each transaction takes the lock of the tenant's run; see runPlace
	sealer        *sealer             // nil without Config.Seal
	limits        func(Tenant) Limits // may be nil
	none          *binding
	cache         *lru.Cache[string, *binding] // by tenant ID
	shapes        [2 * maxShapes]atomic.Pointer[shape]
}

// binderOptions are the parts of a Config that a binding depends on.
type binderOptions struct {
	setting       string   // "" is DefaultSetting
	sharedSchemas []string // nil is DefaultSharedSchemas
	strict        bool     // clean the session at every change of tenant
	seal          *SealConfig
	limits        func(Tenant) Limits
}

func newBinder(o binderOptions) (*binder, error) {
	if o.setting == "" {
		o.setting = DefaultSetting
	}
	if o.sharedSchemas == nil {
		o.sharedSchemas = DefaultSharedSchemas
	}
	var errs []error
	if err := validTenantSetting(o.setting); err != nil {
		errs = append(errs, err)
	}
	for _, s := range o.sharedSchemas {
		if err := validSchema(s); err != nil {
			errs = append(errs, fmt.Errorf("pgxtenant: shared schema %q: %w", clip(s), err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	b := &binder{
		setting: o.setting, sharedSchemas: slices.Clone(o.sharedSchemas), strict: o.strict,
		sealer: newSealer(o.seal, o.setting), limits: o.limits,
	}
	b.cache, _ = lru.New[string, *binding](cachedBindings) // fails only below 1
	b.none = b.encode(Tenant{}, Limits{}.withDefaults())
	return b, nil
}

// binding is what makes a statement run as one tenant: messages and text that set the tenant's
// settings for the length of a transaction. It is encoded once per tenant value and immutable, but for what it caches.
type binding struct {
	// A checkout touches these and the tenant's ID, and no more; see isolatedPool.
	binder   *binder
	pool     atomic.Pointer[isolatedPool] // the last that served it, which may have ended
	hash     uint64                       // of the tenant's ID, for the loadMeter
	served   bool                         // check finds nothing against its status
	database bool                         // the tenant has IsolationDatabase
	watched  bool                         // the tenant has a HoldLimit

	tenant Tenant
	limits Limits // the tenant's, with defaults

	// For the extended protocol: Bind and Execute of shape's prepared statement.
	shape *shape
	exec  []byte
	renew time.Time // when the signature in exec is to be renewed; zero for never

	text atomic.Pointer[string] // see query

	_ [16]byte // to the end of a cache line
}

// shape is the prepared statement that all tenants with as many settings share, so that what the server
// sees does not vary by tenant. It is named, so that the caller's unnamed statement survives.
type shape struct {
	sql     string
	prepare []byte // Close and Parse; see appendPrepare
	name    string
	bit     uint64 // of wireConn.prepared; 0 for a shape too rare to be kept prepared
}

// maxShapes is how many settings beyond the tenant's own are still kept prepared.
const maxShapes = 16

// cachedBindings is how many tenants' bindings a binder keeps, so that a context made anew for each
// request does not have its tenant encoded anew. They take some 500 bytes each.
const cachedBindings = 8192

// without returns the binding of a context made by WithoutTenant.
func (b *binder) without() *binding { return b.none }

// bind returns the binding of t, which may come from c. It checks everything about t but its status.
func (b *binder) bind(c *tenantContext, t *Tenant) (*binding, error) {
	if c != nil {
		if bd := c.bound.Load(); bd != nil && bd.binder == b && (t == &c.tenant || bd.tenant.equal(t)) {
			return bd, nil
		}
	}
	bd, ok := b.cache.Get(t.ID)
	if !ok || !bd.tenant.equal(t) {
		if err := b.validate(t); err != nil {
			return nil, err
		}
		bd = b.encode(*t, b.limitsOf(*t))
		b.cache.Add(t.ID, bd)
	}
	if c != nil {
		c.bound.Store(bd)
	}
	return bd, nil
}

// fresh returns bd, or its successor if the time of its signature is running out.
func (bd *binding) fresh() *binding {
	if bd.renew.IsZero() || time.Now().Before(bd.renew) {
		return bd
	}
	b := bd.binder
	if kept, ok := b.cache.Get(bd.tenant.ID); ok && kept.tenant.equal(&bd.tenant) && time.Now().Before(kept.renew) {
		return kept
	}
	bd = b.encode(bd.tenant, bd.limits)
	b.cache.Add(bd.tenant.ID, bd)
	return bd
}

// sealed reports whether exec has a signature, which must not be seen in a statement's text: that is
// shown to every session of the same role, by pg_stat_activity.
func (bd *binding) sealed() bool { return bd.binder.sealer != nil }

// validate reports whether t can be bound.
func (b *binder) validate(t *Tenant) error {
	if err := ValidateID(t.ID); err != nil {
		return err
	}
	var errs []error
	fail := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalidTenant}, args...)...))
	}
	switch t.Isolation {
	case IsolationRow, IsolationDatabase:
		if t.Schema != "" {
			fail("it has a Schema but %v isolation", t.Isolation)
		}
	case IsolationSchema:
		if err := validSchema(t.schema()); err != nil {
			fail("Schema %q: %w", clip(t.Schema), err)
		} else if slices.Contains(b.sharedSchemas, t.schema()) {
			fail("Schema %q is shared by all tenants", t.Schema)
		}
	default:
		fail("unknown isolation %v", t.Isolation)
	}
	if (t.ConnString != "") != (t.Isolation == IsolationDatabase) {
		if t.ConnString == "" {
			fail("it has database isolation but no ConnString")
		} else {
			fail("it has a ConnString but %v isolation", t.Isolation)
		}
	}
	for name, value := range t.Settings {
		switch {
		case !validSettingName(name):
			fail("setting %q is not a name of letters, digits and _, with one dot at most", clip(name))
		case strings.EqualFold(name, b.setting), strings.EqualFold(name, "search_path"), strings.EqualFold(name, sealSetting):
			fail("setting %q is bound by the package itself", name)
		case strings.IndexByte(value, 0) >= 0 || !utf8.ValidString(value):
			fail("the value of setting %q has a NUL byte or is not UTF-8", name)
		}
	}
	return errors.Join(errs...)
}

// limitsOf asks the user's function, once for each value of a tenant.
func (b *binder) limitsOf(t Tenant) Limits {
	if b.limits == nil {
		return Limits{}.withDefaults()
	}
	return b.limits(t).withDefaults()
}

// encode builds the binding of a tenant that has been validated. The zero Tenant binds the empty string.
func (b *binder) encode(t Tenant, limits Limits) *binding {
	bd := &binding{tenant: t, limits: limits, binder: b, hash: loadHash(t.ID)}
	bd.served, bd.database, bd.watched = check(&t) == nil, t.Isolation == IsolationDatabase, limits.HoldLimit > 0
	bound := bd.bound()
	bd.shape = b.shape(t.Isolation == IsolationSchema, b.settings(&bound))
	var seal string
	seal, bd.renew = b.sealer.seal(t.ID)
	bd.exec = appendExecute(nil, bd.shape.name, b.params(&bound, seal)...)
	return bd
}

// bound is the tenant with the Settings of its limits.
func (bd *binding) bound() Tenant {
	t := bd.tenant
	t.Settings = bd.limits.addTo(t.Settings)
	return t
}

// bindTx binds a row tenant to a transaction on a connection that nothing binds.
func (b *binder) bindTx(ctx context.Context, tx pgx.Tx, tenantID string) error {
	t := Tenant{ID: tenantID}
	seal, _ := b.sealer.seal(tenantID)
	var args []any
	for _, p := range b.params(&t, seal) {
		if p == seal {
			args = append(args, concealed(p))
		} else {
			args = append(args, p)
		}
	}
	_, err := tx.Exec(ctx, b.shape(false, b.settings(&t)).sql, args...)
	return err
}

// settings is how many settings are bound besides those of the tenant's isolation.
func (b *binder) settings(t *Tenant) int {
	n := len(t.Settings)
	if b.sealer != nil {
		n++
	}
	if t.Status == StatusReadOnly {
		n++
	}
	return n
}

// params are the values of t's binding, in the order in which statement asks for them.
func (b *binder) params(t *Tenant, seal string) []string {
	params := append(make([]string, 0, 6), t.ID)
	if b.sealer != nil {
		params = append(params, sealSetting, seal)
	}
	if len(t.Settings) > 0 {
		for _, name := range slices.Sorted(maps.Keys(t.Settings)) {
			value := t.Settings[name]
			if t.Status == StatusReadOnly && strings.EqualFold(name, readOnlySetting) {
				value = "on" // "off" would fail where the transaction is read-only already
			}
			params = append(params, name, value)
		}
	}
	if t.Status == StatusReadOnly {
		// Last, so that none of Settings undoes it. The server itself refuses to go back to read-write in a
		// transaction that has run a query, which the binding is.
		params = append(params, readOnlySetting, "on")
	}
	if t.Isolation == IsolationSchema {
		schema := t.schema()
		params = append(params, schema, searchPath(append([]string{schema}, b.sharedSchemas...)...), `"the role may not use schema `+schema+"; grant it usage")
	}
	if b.fenced {
		params = append(params, fenceOf(t))
	}
	return params
}

// query is the binding for the simple protocol: the same as text, which the server must parse each time. It
// has no signature; see sealed.
func (bd *binding) query() string {
	if text := bd.text.Load(); text != nil {
		return *text
	}
	bound := bd.bound()
	params := bd.binder.params(&bound, "")
	next := 0
	text := bd.binder.statement(bound.Isolation == IsolationSchema, bd.binder.settings(&bound), func() string {
		next++
		return literal(params[next-1])
	}) + ";"
	bd.text.Store(&text)
	return text
}

// statement writes the SQL of a binding, calling param for each of its values in turn. Functions are
// qualified, since the session's search_path is not to be trusted here.
func (b *binder) statement(schema bool, settings int, param func() string) string {
	var sb strings.Builder
	sb.WriteString("select pg_catalog.set_config(" + literal(b.setting) + "," + param() + ",true)")
	for range settings {
		sb.WriteString(",pg_catalog.set_config(" + param() + "," + param() + ",true)")
	}
	if schema { // behind the settings, of which one may be the role
		// A schema that is missing, or that the role may not use, is skipped in silence when names are
		// looked up, and they would be found in a shared schema instead. So the binding itself fails:
		// has_schema_privilege raises 3F000 for the one, and for the other search_path is given a value
		// with an open quote, which it refuses and which says why.
		sb.WriteString(",pg_catalog.set_config('search_path',case when pg_catalog.has_schema_privilege(" + param() +
			"::text,'usage') then " + param() + "::text else " + param() + " end,true)")
	}
	if b.fenced { // behind lock_timeout, which is one of the settings
		sb.WriteString(",pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended(" + param() + "::text,0))")
	}
	return sb.String()
}

// shape returns the prepared statement for so many settings, made on first use.
func (b *binder) shape(schema bool, settings int) *shape {
	s := &shape{name: "pgxtenant_row"}
	i := settings
	if schema {
		s.name, i = "pgxtenant_schema", maxShapes+settings
	}
	if settings < maxShapes {
		if kept := b.shapes[i].Load(); kept != nil {
			return kept
		}
		s.bit = 1 << i
	}
	if settings > 0 {
		s.name += "_" + strconv.Itoa(settings)
	}
	if b.fenced {
		s.name += "_fenced"
	}
	n := 0
	s.sql = b.statement(schema, settings, func() string {
		n++
		return "$" + strconv.Itoa(n)
	})
	s.prepare = appendPrepare(nil, s.name, s.sql)
	if s.bit != 0 {
		b.shapes[i].Store(s) // another goroutine's is the same
	}
	return s
}

// searchPath is the search_path of a schema tenant: its own schema, the shared ones, and the temporary
// schema last, since it would otherwise be searched before all others.
func searchPath(schemas ...string) string {
	var sb strings.Builder
	for _, s := range schemas {
		sb.WriteString(pgx.Identifier{s}.Sanitize())
		sb.WriteString(", ")
	}
	sb.WriteString("pg_temp")
	return sb.String()
}

// validSchema refuses names that search_path would not take for the one schema they name.
func validSchema(name string) error {
	if err := validName(name); err != nil {
		return err
	}
	switch {
	case name == "$user":
		return errors.New("the server replaces it by the role's name, even in quotes")
	case strings.HasPrefix(strings.ToLower(name), "pg_"), strings.EqualFold(name, "information_schema"):
		return errors.New("it is the server's own")
	}
	return nil
}

// validTenantSetting refuses what cannot name the setting that carries the tenant's ID: the server takes
// a name without a dot for its own.
func validTenantSetting(name string) error {
	if _, last, ok := strings.Cut(name, "."); !ok || last == "" || !validSettingName(name) {
		return fmt.Errorf("pgxtenant: the tenant setting is %q; want a name of the form prefix.name, of letters, digits and _", clip(name))
	}
	return nil
}

// validSettingName reports whether name is one or two identifiers joined by a dot.
func validSettingName(name string) bool {
	if len(name) > maxNameLen {
		return false
	}
	for part := range strings.SplitSeq(name, ".") {
		for i := range len(part) {
			c := part[i]
			if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || i > 0 && '0' <= c && c <= '9') {
				return false
			}
		}
		if part == "" {
			return false
		}
	}
	return strings.Count(name, ".") <= 1
}

// literal quotes s in the one form that reads the same whatever standard_conforming_strings says.
func literal(s string) string {
	s = strings.ReplaceAll(s, "'", "''")
	if strings.Contains(s, `\`) {
		return "E'" + strings.ReplaceAll(s, `\`, `\\`) + "'"
	}
	return "'" + s + "'"
}

// clip shortens text from outside for an error message.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}

// The messages of the extended protocol that a binding is made of. Each begins with its type and the
// length of what follows; strings end with a zero byte.

func appendMessage(dst []byte, typ byte, body func([]byte) []byte) []byte {
	dst = append(dst, typ, 0, 0, 0, 0)
	start := len(dst) - 4
	dst = body(dst)
	binary.BigEndian.PutUint32(dst[start:], uint32(len(dst)-start))
	return dst
}

func appendCString(dst []byte, s string) []byte { return append(append(dst, s...), 0) }

// appendPrepare makes statement name anew, whether or not it exists: closing one that does not is no
// error, which makes the pair right on any server connection that a pooler may choose.
func appendPrepare(dst []byte, name, sql string) []byte {
	dst = appendMessage(dst, 'C', func(d []byte) []byte { return appendCString(append(d, 'S'), name) })
	return appendMessage(dst, 'P', func(d []byte) []byte {
		return append(appendCString(appendCString(d, name), sql), 0, 0)
	})
}

// appendExecute binds statement name to the unnamed portal, with text parameters, and executes it. No
// portal of the caller's is alive where it is put: at the start of a transaction.
func appendExecute(dst []byte, name string, params ...string) []byte {
	dst = appendMessage(dst, 'B', func(d []byte) []byte {
		d = appendCString(append(d, 0), name)
		d = append(d, 0, 0) // all parameters are text
		d = binary.BigEndian.AppendUint16(d, uint16(len(params)))
		for _, p := range params {
			d = binary.BigEndian.AppendUint32(d, uint32(len(p)))
			d = append(d, p...)
		}
		return append(d, 0, 0)
	})
	return append(dst, executeUnnamed...)
}

// executeUnnamed executes the unnamed portal, to its end.
const executeUnnamed = "E\x00\x00\x00\x09\x00\x00\x00\x00\x00"

// appendStatement parses, binds, describes and executes a statement without parameters or a name.
func appendStatement(dst []byte, sql string) []byte {
	dst = appendMessage(dst, 'P', func(d []byte) []byte { return append(appendCString(append(d, 0), sql), 0, 0) })
	dst = append(dst, 'B', 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0)
	dst = append(dst, 'D', 0, 0, 0, 6, 'P', 0)
	return append(dst, executeUnnamed...)
}

// Bind makes every statement on the pools made from config run as the tenant of the context it was
// checked out under, and refuses to check out without one. It is the binding of a TenantDB alone, for a
// caller that makes its own pool: row and schema tenants are served, a database tenant is refused with
// ErrInvalidTenant, and without a directory an ID stands for an active row tenant. setting names the
// run-time parameter that policies read; empty means DefaultSetting.
//
// Hooks that config already has are kept: AfterNetConnect runs before the binding's own, PrepareConn or
// BeforeAcquire after it, AfterConnect before any tenant is bound. Bind changes config, which must come
// from pgxpool.ParseConfig, and must be called once, before the pool is made: connections of a config
// that was bound twice are refused.
func Bind(config *pgxpool.Config, setting string) error {
	if config == nil || config.ConnConfig == nil {
		return errors.New("pgxtenant: Bind: config must come from pgxpool.ParseConfig")
	}
	b, err := newBinder(binderOptions{setting: setting})
	if err != nil {
		return err
	}
	b.install(config, nil, b.resolve)
	return nil
}

// resolve returns the binding of ctx's tenant for a pool that knows no directory.
func (b *binder) resolve(ctx context.Context) (*binding, error) {
	c := carried(ctx)
	switch {
	case c == nil:
		return nil, ErrNoTenant
	case c.kind == kindWithout:
		return b.without(), nil
	case c.tenant.Isolation == IsolationDatabase:
		return nil, &TenantError{clip(c.tenant.ID), "acquire", fmt.Errorf("%w: it has a database of its own; use a TenantDB", ErrInvalidTenant)}
	}
	bd, err := b.bind(c, &c.tenant)
	if err == nil {
		err = check(&c.tenant)
	}
	if err != nil {
		return nil, &TenantError{clip(c.tenant.ID), "check", err}
	}
	return bd, nil
}
