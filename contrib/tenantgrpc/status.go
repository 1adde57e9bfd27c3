package tenantgrpc

import (
	"context"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/pgxtenant/pgxtenant"
)

// codeOf are the codes of the statuses that pgxtenant.ProblemFor gives.
var codeOf = map[int]codes.Code{
	http.StatusBadRequest:         codes.InvalidArgument,
	http.StatusUnauthorized:       codes.Unauthenticated,
	http.StatusForbidden:          codes.PermissionDenied,
	http.StatusNotFound:           codes.NotFound,
	http.StatusServiceUnavailable: codes.Unavailable,
}

// Status returns what err is to the caller of a gRPC method, for the errors that a handler meets after the
// interceptor has let it pass, such as pgxtenant.ErrTenantSuspended at a query. The message is a constant. An error
// that has nothing to do with finding, admitting or connecting a tenant is Internal.
func Status(err error) *status.Status {
	p := pgxtenant.ProblemFor(err)
	code, ok := codeOf[p.Status]
	if !ok {
		return status.New(codes.Internal, p.Title)
	}
	return status.New(code, p.Detail)
}

// status is what a refused call is answered with.
func (i *Interceptor) status(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err() // nobody waits, or no longer than this
	}
	s := Status(err)
	if i.hide && s.Code() != codes.Internal {
		return status.Error(codes.NotFound, "not found")
	}
	return s.Err()
}
