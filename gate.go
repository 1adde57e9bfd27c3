package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// AliasDirectory is a Directory that knows tenants by further names too, such as the domains that their
// users type. Registry is one. It must be safe for concurrent use.
type AliasDirectory interface {
	Directory

	// ByAlias returns the tenant that has the given alias, or an error that wraps ErrTenantNotFound if
	// none has. Callers that ask for one alias at the same moment share one call, as with Lookup.
	ByAlias(ctx context.Context, alias string) (Tenant, error)
}

// An AliasPeeker is to an AliasDirectory what a [Peeker] is to a Directory.
type AliasPeeker interface {
	// PeekAlias returns the tenant that has the given alias if it is known without waiting for anything.
	PeekAlias(alias string) (Tenant, bool)
}

// Gate lets requests of any transport act as a tenant, or refuses them. It is what [Middleware] is made of,
// for what is not HTTP: RPCs, messages from a queue, jobs. It is safe for concurrent use.
type Gate struct {
	tenants lookups
	aliases lookups // its directory is nil without an AliasDirectory
}

// NewGate makes a Gate to the tenants that directory knows. It panics if directory is nil, also if it is the
// nil *Registry of a TenantDB without Config.Registry.
func NewGate(directory Directory) *Gate {
	if err := validDirectory(directory); err != nil {
		panic(fmt.Sprintf("pgxtenant: NewGate: %v", err))
	}
	return newGate(directory, slog.New(slog.DiscardHandler))
}

func newGate(directory Directory, log *slog.Logger) *Gate {
	g := &Gate{tenants: lookups{directory: directory, log: log}, aliases: lookups{log: log, other: true}}
	switch d := directory.(type) {
	case interface {
		AliasDirectory
		AliasPeeker
	}:
		g.aliases.directory = peekedAliases{namedByAlias{d}, d}
	case AliasDirectory:
		g.aliases.directory = namedByAlias{d}
	}
	return g
}

// Admit looks the tenant up, asks authorize whether the caller may act as it, and checks the tenant's
// status, in this order, so that a stranger learns nothing about the account. authorize gets a context that
// carries the tenant already, so it may ask the tenant's own tables, and must not be nil.
//
// The result is a context that carries the tenant: whole for [FromContext], as the directory has just given
// it, while each checkout looks it up again, as with [WithTenantID], so that a suspension takes effect in the
// middle of a request. A TenantDB without a Directory uses it as it was given.
//
// Errors wrap ErrUnidentified for an empty ID, ErrInvalidTenantID, ErrTenantNotFound, ErrUnreachable where
// the directory failed, ErrUnauthenticated or ErrForbidden, ErrTenantSuspended or ErrTenantUnavailable; or
// they are ctx's own. [ProblemFor] tells them apart.
func (g *Gate) Admit(ctx context.Context, id string, authorize func(ctx context.Context, t Tenant) error) (context.Context, error) {
	t, err := g.find(ctx, id)
	if err != nil {
		return nil, err
	}
	c := &tenantContext{Context: ctx, tenant: t, kind: kindID}
	if err := authorize(c, t); err != nil {
		return nil, notAuthorized(id, err)
	}
	if err := check(&t); err != nil {
		return nil, &TenantError{id, "check", err}
	}
	return c, nil
}

// find returns the tenant with the given ID, whatever its status.
func (g *Gate) find(ctx context.Context, id string) (Tenant, error) {
	if id == "" {
		return Tenant{}, ErrUnidentified
	}
	if err := ValidateID(id); err != nil {
		return Tenant{}, &TenantError{clip(id), "check", err}
	}
	t, err := g.tenants.get(ctx, id)
	if err != nil {
		return Tenant{}, &TenantError{id, "look up", unreachable(ctx, err)}
	}
	return t, nil
}

// byAlias returns the ID of the tenant that has the given alias.
func (g *Gate) byAlias(ctx context.Context, alias string) (id string, err error) {
	t, err := g.aliases.get(ctx, alias)
	if err != nil {
		return "", fmt.Errorf("alias %q: %w", clip(alias), unreachable(ctx, err))
	}
	return t.ID, nil
}

// unreachable dresses an error of a directory's that says nothing about the tenant.
func unreachable(ctx context.Context, err error) error {
	for _, said := range []error{ErrTenantNotFound, ErrInvalidTenantID, ErrTenantSuspended, ErrTenantUnavailable} {
		if errors.Is(err, said) {
			return err
		}
	}
	if ctx.Err() != nil && err == ctx.Err() {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// notAuthorized dresses an error of a function given to Authorize.
func notAuthorized(id string, err error) error {
	switch {
	case errors.Is(err, ErrUnauthenticated), errors.Is(err, ErrUnreachable), errors.Is(err, context.Canceled):
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("%w: %w", ErrUnreachable, err)
	case !errors.Is(err, ErrForbidden):
		err = fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	return &TenantError{id, "authorize", err}
}

// validDirectory refuses what would let every well-formed ID in, or panic at the first request.
func validDirectory(directory Directory) error {
	if directory == nil {
		return errors.New("the directory is nil; without one there is nothing to tell which tenants exist")
	}
	if r, ok := directory.(*Registry); ok && r == nil {
		return errors.New("the directory is a nil *Registry; set Config.Registry to have TenantDB.Registry return one")
	}
	return nil
}

// namedByAlias is an AliasDirectory as lookups sees it.
type namedByAlias struct{ AliasDirectory }

// Lookup hides that of the AliasDirectory.
func (d namedByAlias) Lookup(ctx context.Context, alias string) (Tenant, error) {
	return d.ByAlias(ctx, alias)
}

// peekedAliases is one that is also an AliasPeeker.
type peekedAliases struct {
	namedByAlias
	peeker AliasPeeker
}

func (d peekedAliases) Peek(alias string) (Tenant, bool) { return d.peeker.PeekAlias(alias) }
