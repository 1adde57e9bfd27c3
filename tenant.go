package pgxtenant

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"strings"
	"sync/atomic"
)

// A Tenant is one customer of the service: whose rows a statement may see, and where they are kept.
// It is a plain value, safe to copy and to share once made; its Settings must not be changed after it
// has been put into a context.
type Tenant struct {
	// ID names the tenant, once and for all. [ValidateID] gives its form. It is compared byte by byte:
	// "acme" and "Acme" are two tenants.
	ID string

	// Plan is the caller's own name for what the tenant has bought. The package passes it on to the
	// functions in Config that adjust limits per tenant, and reads nothing into it.
	Plan string

	// Isolation is where the tenant's data live. The zero value is IsolationRow.
	Isolation Isolation

	// Schema is the schema of a tenant with IsolationSchema. Empty means SchemaName(ID), which no other
	// tenant's ID leads to; a schema named here is the tenant's because you say so, and nothing in the
	// database contradicts. Tenants with another isolation must leave it empty.
	Schema string

	// ConnString leads to the database of a tenant with IsolationDatabase, in any form that
	// pgxpool.ParseConfig takes. It is required there, and must be empty for other tenants.
	// It may hold a password and is never part of an error or a log line.
	ConnString string

	// Status tells whether the tenant may be served. The zero value is StatusActive.
	Status Status

	// Settings are further run-time parameters that are bound together with the tenant, such as
	// statement_timeout, app.user_id or role: each lives exactly as long as the statement's transaction.
	// Names are one or two identifiers joined by a dot. The tenant setting itself and search_path are
	// the package's own and are refused here, as is any value with a NUL byte.
	Settings map[string]string
}

// Isolation is the way in which a tenant's data are kept apart from other tenants'.
type Isolation uint8

const (
	// IsolationRow keeps the tenant's rows in tables shared by all, guarded by row-level security.
	IsolationRow Isolation = iota
	// IsolationSchema gives the tenant a schema of its own in the shared database.
	IsolationSchema
	// IsolationDatabase gives the tenant a database, and a connection pool, of its own.
	IsolationDatabase
)

// String returns "row", "schema" or "database".
func (i Isolation) String() string {
	switch i {
	case IsolationRow:
		return "row"
	case IsolationSchema:
		return "schema"
	case IsolationDatabase:
		return "database"
	}
	return fmt.Sprintf("Isolation(%d)", uint8(i))
}

// Status is the state of a tenant's account. Only active and read-only tenants get a connection.
type Status uint8

const (
	// StatusActive tenants are served.
	StatusActive Status = iota
	// StatusSuspended tenants are refused with ErrTenantSuspended.
	StatusSuspended
	// StatusProvisioning tenants are being made and refused with ErrTenantUnavailable.
	StatusProvisioning
	// StatusReadOnly tenants are served, each of their transactions as a read-only one: a statement that
	// writes fails at the server with 25006, as does SET TRANSACTION READ WRITE after a query. It keeps a
	// service from writing. It is no wall against foreign SQL: PostgreSQL 15 lets RESET transaction_read_only,
	// and SET … TO DEFAULT, undo it for the rest of a transaction.
	StatusReadOnly
	// StatusDeleting tenants are being removed and refused with ErrTenantUnavailable.
	StatusDeleting
)

// String returns "active", "suspended", "provisioning", "read-only" or "deleting".
func (s Status) String() string {
	switch s {
	case StatusActive:
		return "active"
	case StatusSuspended:
		return "suspended"
	case StatusProvisioning:
		return "provisioning"
	case StatusReadOnly:
		return "read-only"
	case StatusDeleting:
		return "deleting"
	}
	return fmt.Sprintf("Status(%d)", uint8(s))
}

// MaxIDLen is the length of the longest tenant ID, in bytes.
const MaxIDLen = 128

// ValidateID reports whether id may name a tenant: 1 to 128 bytes of A-Z a-z 0-9 _ . - of which the
// first is a letter or a digit. It returns nil or an error that wraps [ErrInvalidTenantID] and says
// what is wrong. IDs are never trimmed, folded or otherwise mended: of two spellings one is refused.
func ValidateID(id string) error {
	if id == "" {
		return fmt.Errorf("%w: it is empty", ErrInvalidTenantID)
	}
	if len(id) > MaxIDLen {
		return fmt.Errorf("%w: it has %d bytes, more than %d", ErrInvalidTenantID, len(id), MaxIDLen)
	}
	for i := range len(id) {
		switch c := id[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '_' || c == '.' || c == '-':
			if i == 0 {
				return fmt.Errorf("%w: it begins with %q; want a letter or digit", ErrInvalidTenantID, c)
			}
		default:
			return fmt.Errorf("%w: byte %d is %q; want A-Z a-z 0-9 _ . or -", ErrInvalidTenantID, i+1, id[i:i+1])
		}
	}
	return nil
}

const (
	schemaPrefix = "tenant_"
	maxNameLen   = 63 // NAMEDATALEN - 1: the server cuts longer names off, in silence
)

var schemaHash = base32.HexEncoding.WithPadding(base32.NoPadding)

// SchemaName returns the name of the schema of the tenant with the given ID, for tenants that do not
// name one themselves. It is at most 63 bytes long, and no two valid IDs share one.
//
// An ID of lower-case letters, digits, '_' and '-' that fits is kept readable: "acme" is in
// "tenant_acme". Any other is replaced by its SHA-256 in base 32 behind "tenant__", which no readable
// name begins with. Upper case is replaced since a name written without quotes is folded to lower case,
// and a dot since it would then separate a schema from a table; either could reach another tenant.
func SchemaName(tenantID string) string {
	plain := len(tenantID) <= maxNameLen-len(schemaPrefix)
	for i := 0; plain && i < len(tenantID); i++ {
		switch c := tenantID[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case c == '_' || c == '-':
			plain = i > 0
		default:
			plain = false
		}
	}
	if plain && tenantID != "" {
		return schemaPrefix + tenantID
	}
	sum := sha256.Sum256([]byte(tenantID))
	return schemaPrefix + "_" + strings.ToLower(schemaHash.EncodeToString(sum[:]))
}

// schema returns the schema that a tenant with IsolationSchema lives in.
func (t *Tenant) schema() string {
	if t.Schema != "" {
		return t.Schema
	}
	return SchemaName(t.ID)
}

// equal reports whether t and o would be served in the same way.
func (t *Tenant) equal(o *Tenant) bool {
	return t.ID == o.ID && t.Plan == o.Plan && t.Isolation == o.Isolation && t.Schema == o.Schema &&
		t.ConnString == o.ConnString && t.Status == o.Status && maps.Equal(t.Settings, o.Settings)
}

// tenantContext is a context that carries a tenant. Being the context itself, and not a value in one,
// it costs one allocation, and the encoded binding of the tenant can be kept beside it.
type tenantContext struct {
	context.Context

	// bound caches what the last checkout made of tenant, so that a request with many statements
	// encodes it once. Whoever reads it checks that it was made by its own binder.
	bound atomic.Pointer[binding]

	kind   contextKind
	tenant Tenant
}

type contextKind uint8

const (
	kindTenant  contextKind = iota // a whole Tenant
	kindID                         // an ID, to be looked up in the directory; the rest, if there is any, is as of an earlier look-up
	kindWithout                    // deliberately no tenant
)

type tenantContextKey struct{}

func (c *tenantContext) Value(key any) any {
	if _, ok := key.(tenantContextKey); ok {
		return c
	}
	return c.Context.Value(key)
}

// carried returns the innermost tenantContext of ctx, or nil.
func carried(ctx context.Context) *tenantContext {
	switch c := ctx.(type) { // what a checkout comes with most often takes half the time so
	case *tenantContext:
		return c
	case *checkout:
		return carried(c.Context)
	}
	c, _ := ctx.Value(tenantContextKey{}).(*tenantContext)
	return c
}

// WithTenant returns a context under which every statement runs as tenant t. The tenant is checked when
// a connection is checked out, not here, so that an error appears where errors are handled.
// It takes the place of a tenant that ctx already carries.
//
// The Tenant is taken as it is: no directory is asked, and a change of its status or place is not seen
// by work that goes on under this context. [WithTenantID] asks at each checkout.
func WithTenant(ctx context.Context, t Tenant) context.Context {
	return &tenantContext{Context: ctx, tenant: t, kind: kindTenant}
}

// WithTenantID is like [WithTenant] for a tenant known by its ID alone. Each checkout looks it up in
// Config.Directory, so suspension and moves take effect between two statements. Without a directory
// the ID is that of an active tenant with IsolationRow.
func WithTenantID(ctx context.Context, id string) context.Context {
	return &tenantContext{Context: ctx, tenant: Tenant{ID: id}, kind: kindID}
}

// WithoutTenant returns a context under which statements deliberately run as no tenant: on the shared
// pool, with the tenant setting bound to the empty string, which every policy refuses. It is for tables
// that belong to no tenant. Work across tenants needs a role that policies do not bind: see
// TenantDB.Admin.
func WithoutTenant(ctx context.Context) context.Context {
	return &tenantContext{Context: ctx, kind: kindWithout}
}

// FromContext returns the tenant that ctx carries. It reports false if there is none, or if it was
// removed by [WithoutTenant]. After [WithTenantID] only the ID is set. Under [Middleware] and [Gate] the
// tenant is as the directory knew it when the request came in; checkouts ask again.
func FromContext(ctx context.Context) (Tenant, bool) {
	c := carried(ctx)
	if c == nil || c.kind == kindWithout {
		return Tenant{}, false
	}
	return c.tenant, true
}

// Detach returns a context that carries ctx's tenant and nothing else of it: no deadline, no
// cancellation, no other value. It is for work that outlives a request, which would otherwise either be
// cancelled with it or, begun from context.Background, have no tenant. If ctx carries no tenant, nor does
// the result, and its checkouts fail with ErrNoTenant.
func Detach(ctx context.Context) context.Context {
	c := carried(ctx)
	if c == nil {
		return context.Background()
	}
	return &tenantContext{Context: context.Background(), tenant: c.tenant, kind: c.kind}
}
