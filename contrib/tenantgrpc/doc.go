// Package tenantgrpc finds the tenant of a gRPC call, decides whether the caller may act as it, and puts it into
// the call's context, where every pgxtenant.TenantDB finds it:
//
//	tenants := tenantgrpc.New(db.Registry(), tenantgrpc.ByClaim(tenantOfToken))
//	server := grpc.NewServer(
//		grpc.ChainUnaryInterceptor(authenticate, tenants.Unary()),
//		grpc.ChainStreamInterceptor(authenticateStream, tenants.Stream()))
//
// It is to gRPC what pgxtenant.Middleware is to HTTP, and keeps the same rules: there is no default tenant, what
// the client writes is a wish and no identity, and no answer has anything of an error's text.
package tenantgrpc
