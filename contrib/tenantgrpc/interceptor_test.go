package tenantgrpc_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgrpc"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// directory is one in memory.
type directory struct {
	mu      sync.Mutex
	tenants map[string]pgxtenant.Tenant
}

func newDirectory() *directory {
	d := &directory{tenants: map[string]pgxtenant.Tenant{}}
	d.put(pgxtenant.Tenant{ID: "acme", Plan: "gold"}, pgxtenant.Tenant{ID: "globex"}, pgxtenant.Tenant{ID: "frozen", Status: pgxtenant.StatusSuspended},
		pgxtenant.Tenant{ID: "new", Status: pgxtenant.StatusProvisioning})
	return d
}

func (d *directory) put(tenants ...pgxtenant.Tenant) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range tenants {
		d.tenants[t.ID] = t
	}
}

func (d *directory) Lookup(ctx context.Context, id string) (pgxtenant.Tenant, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t, ok := d.tenants[id]
	switch {
	case id == "outage":
		return t, errors.New("secret: no route to host")
	case !ok:
		return t, pgxtenant.ErrTenantNotFound
	}
	return t, nil
}

// service answers with the tenant and its number of notes.
type service struct {
	testpb.UnimplementedTestServiceServer
	db     *pgxtenant.TenantDB
	before func() // each query of a stream but the first
}

func (s *service) notes(ctx context.Context) (string, error) {
	tenant, _ := pgxtenant.FromContext(ctx)
	var bound string
	var notes int
	err := s.db.QueryRow(ctx, "select current_setting('app.current_tenant_id'), count(*) from note").Scan(&bound, &notes)
	if err != nil {
		return "", tenantgrpc.Status(err).Err()
	}
	return fmt.Sprintf("%s on plan %q, bound as %s, notes: %d", tenant.ID, tenant.Plan, bound, notes), nil
}

func (s *service) UnaryCall(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	said, err := s.notes(ctx)
	return &testpb.SimpleResponse{Username: said}, err
}

func (s *service) FullDuplexCall(stream grpc.BidiStreamingServer[testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse]) error {
	for i := 0; ; i++ {
		if _, err := stream.Recv(); err != nil {
			return nil
		}
		if i > 0 && s.before != nil {
			s.before()
		}
		said, err := s.notes(stream.Context())
		if err != nil {
			return err
		}
		if err := stream.Send(&testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: []byte(said)}}); err != nil {
			return err
		}
	}
}

// client calls a server on the loopback that has these interceptors.
type client struct {
	testpb.TestServiceClient
	health healthpb.HealthClient
	conn   *grpc.ClientConn
}

func serve(t *testing.T, s *service, i *tenantgrpc.Interceptor) client {
	t.Helper()
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(authenticate, i.Unary()), grpc.ChainStreamInterceptor(authenticateStream, i.Stream()))
	testpb.RegisterTestServiceServer(server, s)
	healthpb.RegisterHealthServer(server, health.NewServer())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, conn.Close())
		server.Stop()
		require.NoError(t, <-served)
	})
	return client{testpb.NewTestServiceClient(conn), healthpb.NewHealthClient(conn), conn}
}

type principalKey struct{}

// authenticate believes the metadata "user", as a real one would a token.
func authenticate(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	return next(authenticated(ctx), req)
}

func authenticateStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return next(srv, userStream{ss, authenticated(ss.Context())})
}

type userStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s userStream) Context() context.Context { return s.ctx }

func authenticated(ctx context.Context) context.Context {
	if user := metadata.ValueFromIncomingContext(ctx, "user"); len(user) > 0 {
		return context.WithValue(ctx, principalKey{}, user[0])
	}
	return ctx
}

func principal(ctx context.Context) (string, bool) {
	user, ok := ctx.Value(principalKey{}).(string)
	return user, ok
}

func call(kv ...string) context.Context {
	return metadata.AppendToOutgoingContext(context.Background(), kv...)
}

// both makes a unary call and a stream, which must agree.
func both(t *testing.T, c client, ctx context.Context) (string, error) {
	t.Helper()
	unary, unaryErr := c.UnaryCall(ctx, &testpb.SimpleRequest{})
	stream, err := c.FullDuplexCall(ctx)
	require.NoError(t, err)
	_ = stream.Send(&testpb.StreamingOutputCallRequest{})
	answer, streamErr := stream.Recv()
	_ = stream.CloseSend()
	require.Equal(t, status.Convert(unaryErr).Proto().String(), status.Convert(streamErr).Proto().String())
	require.Equal(t, unary.GetUsername(), string(answer.GetPayload().GetBody()))
	return unary.GetUsername(), unaryErr
}

func open(t *testing.T, dir pgxtenant.Directory) *pgxtenant.TenantDB {
	t.Helper()
	d := pgtest.New(t)
	d.RLSTable("note")
	config, err := pgxtenant.ParseConfig(d.AppURL())
	require.NoError(t, err)
	config.Directory = dir
	db, err := pgxtenant.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	_, err = db.Exec(pgxtenant.WithTenantID(t.Context(), "acme"), "insert into note (id, body) values (1, 'a'), (2, 'b')")
	require.NoError(t, err)
	return db
}

func TestACallRunsAsItsTenantOrNotAtAll(t *testing.T) {
	t.Parallel()
	dir := newDirectory()
	s := &service{db: open(t, dir)}
	hook := func(ctx context.Context, method string, tenant pgxtenant.Tenant) error {
		user, ok := principal(ctx)
		carried, _ := pgxtenant.FromContext(ctx)
		switch {
		case !ok:
			return pgxtenant.ErrUnauthenticated
		case carried.ID != tenant.ID || method != "/grpc.testing.TestService/UnaryCall" && method != "/grpc.testing.TestService/FullDuplexCall":
			return errors.New("the hook was told wrong")
		case user == "slow":
			return context.DeadlineExceeded
		case user != tenant.ID:
			return errors.New("secret: not a member")
		}
		return nil
	}
	const key = tenantgrpc.DefaultMetadata
	for _, c := range []struct {
		name string
		i    *tenantgrpc.Interceptor
		want map[codes.Code][]context.Context
	}{
		{"Authorize", tenantgrpc.New(dir, tenantgrpc.Authorize(hook)), map[codes.Code][]context.Context{
			codes.OK:               {call(key, "acme", "user", "acme"), call(key, "acme", key, "acme", "user", "acme")},
			codes.InvalidArgument:  {call("user", "acme"), call(key, "", "user", "acme"), call(key, "*", "user", "acme"), call(key, "acme", key, "globex", "user", "acme")},
			codes.NotFound:         {call(key, "nobody", "user", "nobody"), call(key, "Acme", "user", "acme")},
			codes.PermissionDenied: {call(key, "globex", "user", "acme"), call(key, "frozen", "user", "frozen"), call(key, "frozen", "user", "acme")},
			codes.Unauthenticated:  {call(key, "acme")},
			codes.Unavailable:      {call(key, "new", "user", "new"), call(key, "outage", "user", "outage"), call(key, "acme", "user", "slow")},
		}},
		{"ByClaim", tenantgrpc.New(dir, tenantgrpc.ByClaim(principal)), map[codes.Code][]context.Context{
			codes.OK:               {call("user", "acme"), call(key, "acme", "user", "acme")},
			codes.PermissionDenied: {call(key, "globex", "user", "acme"), call("user", "*"), call("user", "frozen")},
			codes.Unauthenticated:  {call(), call(key, "acme"), call(key, "nobody")},
			codes.NotFound:         {call("user", "nobody")},
			codes.InvalidArgument:  {call(key, "*", "user", "acme")},
		}},
		{"WithoutAuthorization", tenantgrpc.New(dir, tenantgrpc.WithoutAuthorization(), tenantgrpc.ByMetadata("Tenant")), map[codes.Code][]context.Context{
			codes.OK:              {call("tenant", "acme")},
			codes.InvalidArgument: {call(), call(key, "acme")},
		}},
		{"Hide", tenantgrpc.New(dir, tenantgrpc.Authorize(hook), tenantgrpc.Hide()), map[codes.Code][]context.Context{
			codes.OK: {call(key, "acme", "user", "acme")},
			codes.NotFound: {call(), call(key, "*"), call(key, "nobody", "user", "acme"), call(key, "globex", "user", "acme"), call(key, "frozen", "user", "frozen"),
				call(key, "acme"), call(key, "outage", "user", "acme"), call(key, "new", "user", "new")},
		}},
	} {
		client := serve(t, s, c.i)
		hidden := map[string]bool{}
		for code, calls := range c.want {
			for _, ctx := range calls {
				said, err := both(t, client, ctx)
				md, _ := metadata.FromOutgoingContext(ctx)
				require.Equal(t, code, status.Code(err), "%s: %v: %v", c.name, md, err)
				require.NotContains(t, fmt.Sprint(err), "secret")
				if code == codes.OK {
					require.Equal(t, `acme on plan "gold", bound as acme, notes: 2`, said)
				} else {
					hidden[err.Error()] = true
				}
			}
		}
		require.True(t, c.name != "Hide" || len(hidden) == 1, "%v", hidden)
	}
}

func TestATenantSuspendedWithinAStreamIsRefusedAtItsNextQuery(t *testing.T) {
	t.Parallel()
	dir := newDirectory()
	s := &service{db: open(t, dir), before: func() { dir.put(pgxtenant.Tenant{ID: "acme", Status: pgxtenant.StatusSuspended}) }}
	c := serve(t, s, tenantgrpc.New(dir, tenantgrpc.ByClaim(principal)))
	stream, err := c.FullDuplexCall(call("user", "acme"))
	require.NoError(t, err)
	require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
	_, err = stream.Recv()
	require.NoError(t, err)
	require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
	_, err = stream.Recv()
	require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
}

func TestExemptMethodsNeedNoTenant(t *testing.T) {
	t.Parallel()
	dir := newDirectory()
	for _, exempt := range []string{"/grpc.health.v1.Health/", "/grpc.health.v1.Health/Check"} {
		c := serve(t, &service{}, tenantgrpc.New(dir, tenantgrpc.ByClaim(principal), tenantgrpc.Exempt(exempt)))
		_, err := c.health.Check(call(), &healthpb.HealthCheckRequest{})
		require.NoError(t, err)
		_, err = c.health.List(call(), &healthpb.HealthListRequest{})
		require.Equal(t, exempt[len(exempt)-1] != '/', status.Code(err) == codes.Unauthenticated, "%v", err)
		_, err = c.UnaryCall(call(), &testpb.SimpleRequest{})
		require.Equal(t, codes.Unauthenticated, status.Code(err))
	}
}

func TestRefusalsAreToldWithTheirCause(t *testing.T) {
	t.Parallel()
	told := make(chan error, 1)
	c := serve(t, &service{}, tenantgrpc.New(newDirectory(), tenantgrpc.WithoutAuthorization(),
		tenantgrpc.OnRefusal(func(_ context.Context, method string, err error) { told <- fmt.Errorf("%s: %w", method, err) })))
	_, err := c.UnaryCall(call(tenantgrpc.DefaultMetadata, "outage"), &testpb.SimpleRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err))
	cause := <-told
	require.ErrorIs(t, cause, pgxtenant.ErrUnreachable)
	require.ErrorContains(t, cause, "/grpc.testing.TestService/UnaryCall")
	require.ErrorContains(t, cause, "no route to host")
}

func TestNewRefusesOptionsThatLeaveADoorOpen(t *testing.T) {
	t.Parallel()
	yes := func(context.Context, string, pgxtenant.Tenant) error { return nil }
	for want, options := range map[string][]tenantgrpc.Option{
		"who may act as which tenant": {},
		"contradict each other":       {tenantgrpc.Authorize(yes), tenantgrpc.WithoutAuthorization()},
		"Authorize is given nil":      {tenantgrpc.Authorize(nil)},
		"Authorize is given twice":    {tenantgrpc.Authorize(yes), tenantgrpc.Authorize(yes)},
		"ByClaim is given nil":        {tenantgrpc.ByClaim(nil)},
		"OnRefusal is given nil":      {tenantgrpc.ByClaim(principal), tenantgrpc.OnRefusal(nil)},
		"ByMetadata is given no key":  {tenantgrpc.ByClaim(principal), tenantgrpc.ByMetadata("")},
		`Exempt is given "Check"`:     {tenantgrpc.ByClaim(principal), tenantgrpc.Exempt("Check")},
	} {
		require.Contains(t, panicOf(func() { tenantgrpc.New(newDirectory(), options...) }), want)
	}
	require.Contains(t, panicOf(func() { tenantgrpc.New(nil, tenantgrpc.WithoutAuthorization()) }), "the directory is nil")
}

func panicOf(f func()) (said string) {
	defer func() { said = fmt.Sprint(recover()) }()
	f()
	return ""
}

func TestStatusOfErrors(t *testing.T) {
	t.Parallel()
	for code, err := range map[codes.Code]error{
		codes.Internal:         errors.New("secret: syntax error"),
		codes.Unavailable:      &pgxtenant.TenantError{Tenant: "a", Op: "acquire", Err: errors.New("secret")},
		codes.PermissionDenied: fmt.Errorf("secret: %w", pgxtenant.ErrTenantSuspended),
	} {
		s := tenantgrpc.Status(err)
		require.Equal(t, code, s.Code())
		require.NotContains(t, s.Message(), "secret")
	}
}
