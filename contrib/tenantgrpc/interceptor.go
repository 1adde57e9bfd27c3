package tenantgrpc

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/pgxtenant/pgxtenant"
)

// DefaultMetadata is the key of the metadata that names the tenant.
const DefaultMetadata = "x-tenant-id"

// Interceptor makes interceptors for a server. It is not changed once made, and safe for concurrent use.
type Interceptor struct {
	gate      *pgxtenant.Gate
	key       string
	claim     func(context.Context) (string, bool)
	authorize func(ctx context.Context, method string, t pgxtenant.Tenant) error
	anyone    bool
	hide      bool
	exempt    map[string]bool
	refused   func(ctx context.Context, method string, err error)
	problems  []error
}

// An Option adjusts an Interceptor.
type Option func(*Interceptor)

// New makes an Interceptor for the tenants that directory knows. It panics, as grpc's own registrations do, if
// the directory is nil, or its options are bad or contradict each other: one of Authorize and ByClaim must say who
// may act as whom, or WithoutAuthorization that nobody need be asked.
func New(directory pgxtenant.Directory, options ...Option) *Interceptor {
	i := &Interceptor{key: DefaultMetadata, exempt: map[string]bool{}}
	for _, o := range options {
		o(i)
	}
	errs := i.problems
	switch {
	case i.anyone && i.authorize != nil:
		errs = append(errs, errors.New("Authorize and WithoutAuthorization contradict each other"))
	case !i.anyone && i.authorize == nil && i.claim == nil:
		errs = append(errs, errors.New("nothing says who may act as which tenant; give Authorize or ByClaim, or WithoutAuthorization if nobody need be asked"))
	}
	if err := errors.Join(errs...); err != nil {
		panic(fmt.Sprintf("tenantgrpc: New: %v", err))
	}
	i.gate = pgxtenant.NewGate(directory)
	return i
}

// ByMetadata takes the tenant's ID from this key of the metadata in place of DefaultMetadata. A key that is there
// twice must say the same.
func ByMetadata(key string) Option {
	return func(i *Interceptor) {
		i.key = strings.ToLower(key)
		if i.key == "" {
			i.problems = append(i.problems, errors.New("ByMetadata is given no key"))
		}
	}
}

// ByClaim takes the tenant from what authentication has verified and put into the context. The claim is an
// identity: naming another tenant in the metadata is refused with PermissionDenied, and a caller without a claim
// with Unauthenticated, unless Authorize or WithoutAuthorization say otherwise. Authorize, if there is one, is asked
// in either case.
func ByClaim(f func(ctx context.Context) (tenantID string, ok bool)) Option {
	return func(i *Interceptor) { given(i, "ByClaim", f == nil, i.claim != nil); i.claim = f }
}

// Authorize has f decide whether the caller may act as the tenant that the call names: nil means yes. An error is
// answered with PermissionDenied, one that wraps pgxtenant.ErrUnauthenticated with Unauthenticated, and one that wraps
// pgxtenant.ErrUnreachable or context.DeadlineExceeded with Unavailable. method is the full one, such as
// /shop.Orders/List; ctx carries the tenant already. The tenant's status is checked only afterwards.
func Authorize(f func(ctx context.Context, method string, t pgxtenant.Tenant) error) Option {
	return func(i *Interceptor) { given(i, "Authorize", f == nil, i.authorize != nil); i.authorize = f }
}

// WithoutAuthorization lets every caller act as every tenant that it names.
func WithoutAuthorization() Option { return func(i *Interceptor) { i.anyone = true } }

// Hide answers every refusal with the same NotFound, so that nobody can tell which tenants there are.
func Hide() Option { return func(i *Interceptor) { i.hide = true } }

// Exempt lets calls of these full methods pass without a tenant, such as /grpc.health.v1.Health/Check. One that
// ends with a slash stands for all methods of a service.
func Exempt(methods ...string) Option {
	return func(i *Interceptor) {
		for _, m := range methods {
			if !strings.HasPrefix(m, "/") || strings.Count(m, "/") != 2 {
				i.problems = append(i.problems, fmt.Errorf("Exempt is given %q; want /package.Service/Method or /package.Service/", m))
			}
			i.exempt[m] = true
		}
	}
}

// OnRefusal calls f with each refused call and its cause, for logs.
func OnRefusal(f func(ctx context.Context, method string, err error)) Option {
	return func(i *Interceptor) { given(i, "OnRefusal", f == nil, i.refused != nil); i.refused = f }
}

func given(i *Interceptor, option string, isNil, again bool) {
	switch {
	case isNil:
		i.problems = append(i.problems, fmt.Errorf("%s is given nil", option))
	case again:
		i.problems = append(i.problems, fmt.Errorf("%s is given twice", option))
	}
}

// Unary returns the interceptor of unary calls. What authenticates must come before it.
func (i *Interceptor) Unary() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		ctx, err := i.admit(ctx, info.FullMethod)
		if err != nil {
			return nil, err
		}
		return handler(ctx, req)
	}
}

// Stream returns the interceptor of streams. The whole stream is the tenant's; its status is looked at when the
// stream begins, and again at each checkout of a TenantDB.
func (i *Interceptor) Stream() grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, err := i.admit(ss.Context(), info.FullMethod)
		if err != nil {
			return err
		}
		return handler(srv, &stream{ss, ctx})
	}
}

// stream is a stream with a tenant in its context.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// admit returns the context for a call, or the status that it is refused with.
func (i *Interceptor) admit(ctx context.Context, method string) (context.Context, error) {
	if i.exempt[method] || i.exempt[method[:strings.LastIndexByte(method, '/')+1]] {
		return ctx, nil
	}
	id, err := i.identify(ctx)
	if err == nil {
		var admitted context.Context
		admitted, err = i.gate.Admit(ctx, id, func(ctx context.Context, t pgxtenant.Tenant) error {
			if i.authorize == nil {
				return nil
			}
			return i.authorize(ctx, method, t)
		})
		if err == nil {
			return admitted, nil
		}
	}
	if i.refused != nil {
		i.refused(ctx, method, err)
	}
	return nil, i.status(ctx, err)
}

// identify returns the ID of the tenant that the call is for, which need not be valid.
func (i *Interceptor) identify(ctx context.Context) (string, error) {
	id := ""
	if values := metadata.ValueFromIncomingContext(ctx, i.key); len(values) > 0 {
		id = values[0]
		for _, v := range values[1:] {
			if v != id {
				return "", pgxtenant.ErrAmbiguousTenant
			}
		}
		if err := pgxtenant.ValidateID(id); err != nil {
			return "", err
		}
	}
	if i.claim == nil {
		return id, nil
	}
	claim, ok := i.claim(ctx)
	switch {
	case !ok && i.authorize == nil && !i.anyone:
		return "", pgxtenant.ErrUnauthenticated
	case !ok:
		return id, nil
	case pgxtenant.ValidateID(claim) != nil, id != "" && id != claim:
		return "", pgxtenant.ErrForbidden
	}
	return claim, nil
}
