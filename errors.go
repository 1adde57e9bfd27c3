package pgxtenant

import (
	"errors"
	"fmt"
)

var (
	// ErrNoTenant means the context carries no tenant. Nothing was sent to the server.
	ErrNoTenant = errors.New("pgxtenant: no tenant in the context; use WithTenant or WithTenantID, or WithoutTenant to run as none")

	// ErrInvalidTenantID means an ID that ValidateID refuses. Nothing was sent to the server.
	ErrInvalidTenantID = errors.New("pgxtenant: invalid tenant ID")

	// ErrInvalidTenant means a Tenant whose fields contradict each other or cannot be bound, such as a
	// database tenant without a connection string. Nothing was sent to the server.
	ErrInvalidTenant = errors.New("pgxtenant: invalid tenant")

	// ErrTenantNotFound means Config.Directory knows no such tenant. A Directory returns it, or an error
	// that wraps it.
	ErrTenantNotFound = errors.New("pgxtenant: tenant not found")

	// ErrTenantSuspended means the tenant's status does not allow it to be served. Nothing was sent to
	// the server.
	ErrTenantSuspended = errors.New("pgxtenant: tenant suspended")

	// ErrWrongTenant means a connection or pool of one tenant was about to serve another: an isolated
	// pool or a connection was used under another tenant's context, or its database carries another tenant's mark.
	// Nothing was run.
	ErrWrongTenant = errors.New("pgxtenant: wrong tenant")

	// ErrPoolsBusy means Config.MaxPools isolated pools are open and each is in use. Nothing was sent to
	// the server, so a retry is safe.
	ErrPoolsBusy = errors.New("pgxtenant: every isolated pool is in use")

	// ErrNoAdmin means a call that needs Config.Admin, on a TenantDB made without it.
	ErrNoAdmin = errors.New("pgxtenant: Config.Admin is not set, and this needs the role that owns the tables")

	// ErrNoRegistry means a call that needs Config.Registry, on a TenantDB made without it.
	ErrNoRegistry = errors.New("pgxtenant: Config.Registry is not set")

	// ErrTenantUnavailable means the tenant is still being provisioned, or is being deleted. Nothing was
	// sent to the server.
	ErrTenantUnavailable = errors.New("pgxtenant: tenant unavailable")

	// ErrTenantExists means Registry.Create was given the ID of a tenant that the registry has already.
	ErrTenantExists = errors.New("pgxtenant: tenant exists already")

	// ErrAliasTaken means an alias that belongs to another tenant. Nothing was changed.
	ErrAliasTaken = errors.New("pgxtenant: alias taken by another tenant")

	// ErrInvalidAlias means a text that can be no tenant's alias; see Record.Aliases for its form.
	ErrInvalidAlias = errors.New("pgxtenant: invalid alias")

	// ErrTenantStatus means a change of status that the tenant's present status does not allow.
	ErrTenantStatus = errors.New("pgxtenant: the tenant's status does not allow it")

	// ErrRunStopped means that TenantDB.ForEach ended before all was done: by ForEachOptions.StopAfter or StopRate, by a
	// failure of a canary, a template or the shared schemas, or because Stop was closed. A call under the same Name goes on.
	ErrRunStopped = errors.New("pgxtenant: the run was stopped")

	// ErrNothingSelected means that what ForEachOptions select is nothing at all. Nothing was done.
	ErrNothingSelected = errors.New("pgxtenant: no tenant is selected")

	// ErrClosed means the TenantDB has been closed, or the Registry.
	ErrClosed = errors.New("pgxtenant: closed")

	// ErrUnidentified means a request that does not say which tenant it is for.
	ErrUnidentified = errors.New("pgxtenant: the request does not say which tenant it is for")

	// ErrAmbiguousTenant means a request that names two different tenants.
	ErrAmbiguousTenant = errors.New("pgxtenant: the request names more than one tenant")

	// ErrUnauthenticated means a caller who is nobody yet, and must say who it is before it may act as any
	// tenant. A function given to Authorize may return it, or an error that wraps it.
	ErrUnauthenticated = errors.New("pgxtenant: the caller is not authenticated")

	// ErrForbidden means a caller who may not act as the tenant. Any error of a function given to Authorize
	// that does not say otherwise is wrapped by one.
	ErrForbidden = errors.New("pgxtenant: the caller may not act as this tenant")

	// ErrUnreachable means that it cannot be told at the moment which tenants there are, or what a caller
	// may do. A function given to Authorize may return it, or an error that wraps it.
	ErrUnreachable = errors.New("pgxtenant: the directory cannot be asked")

	// ErrUnbound means that a statement reached a connection that no checkout had bound, or one in a form
	// that cannot be bound. It was not sent, and the connection was closed.
	ErrUnbound = errors.New("pgxtenant: statement on a connection that is not bound to a tenant")
)

// TenantError is the failure of one step for one tenant. Reach it with errors.As, and its cause with
// errors.Is.
type TenantError struct {
	Tenant string // tenant ID as the caller gave it
	Op     string // step that failed, such as "look up", "check", "open pool", "acquire", "create" or "update"
	Err    error  // cause, never nil
}

func (e *TenantError) Error() string { return fmt.Sprintf("tenant %q: %s: %v", e.Tenant, e.Op, e.Err) }

func (e *TenantError) Unwrap() error { return e.Err }
