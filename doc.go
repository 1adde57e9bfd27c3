// Package pgxtenant runs every SQL statement that is sent through pgx as exactly one tenant of a service.
// A [TenantDB] is used where a *pgxpool.Pool is, and has all of its methods:
//
//	db, err := pgxtenant.New(ctx, os.Getenv("DATABASE_URL")) // was pgxpool.New
//	...
//	ctx = pgxtenant.WithTenantID(ctx, "acme") // once per request
//	rows, err := db.Query(ctx, "select id, item from invoice") // acme's invoices
//
// The statements do not mention the tenant. The package example shows tenants of all three kinds at work,
// and examples/quickstart the roles, policies, schemas and databases that go with them.
//
// # How a statement is bound
//
// Below pgx and above TLS there is a net.Conn that follows PostgreSQL's protocol. Whenever the connection
// leaves the idle state, it puts a statement of its own ahead of the caller's message, in the same
// segment of the protocol, and swallows the reply:
//
//	select set_config('app.current_tenant_id', $1, true)
//
// The setting is local to the transaction, so it lives exactly as long as the caller's statement, batch or
// transaction. Therefore
//
//   - no round trip is added;
//   - nothing has to be reset when a connection is returned, and nothing can be left behind;
//   - nothing goes around it: queries, batches, copies, prepared statements, a hijacked connection,
//     database/sql and any library that is handed the pool all send through it;
//   - a transaction pooler such as PgBouncer cannot separate the setting from the statement.
//
// # Where a tenant's rows are
//
// The [Isolation] of a [Tenant] tells how its rows are kept apart from others'. The three can be mixed
// freely, and the service's statements are the same for all.
//
//   - [IsolationRow]: in tables shared by all, under row-level security. For any number of tenants.
//   - [IsolationSchema]: in a schema of its own, [SchemaName] of the ID unless the Tenant names another.
//     The search_path is bound with the tenant. If the schema is missing the statement fails. A table
//     missing from it is looked up in the shared schemas, which are Config.SharedSchemas. For tenants
//     whose tables differ, or are saved and restored alone.
//   - [IsolationDatabase]: in a database of its own, on any server, by way of a pool of its own (an isolated
//     pool, in what follows), which is opened on first use and closed when idle. The database says whose it
//     is (ALTER DATABASE ... SET app.current_tenant_id), which each new connection checks. For tenants who
//     need a server, a place or a password to themselves.
//
// The policy of a shared table compares its tenant column with the setting, and must refuse NULL and the
// empty string, one of which the setting holds where no tenant is bound:
//
//	create policy tenant on invoice using
//		(tenant_id = (select nullif(current_setting('app.current_tenant_id', true), '')));
//	alter table invoice enable row level security, force row level security;
//
// What a tenant needs in the database is made and removed by [TenantDB.EnableRLS], [SchemaManager],
// [DatabaseManager] and [Registry], and for one tenant together by [TenantDB.Provision] and
// [TenantDB.Deprovision]. They run on Config.Admin, never as the service's own role. [TenantDB.Audit] tells what in a
// database gets around all this, and Config.RequireAudit refuses to start on it.
//
// # Contexts
//
// The tenant travels in the context. [WithTenant] takes it whole. [WithTenantID] takes its ID, which each
// checkout looks up in Config.Directory, so that a suspension or a move takes effect between two
// statements. A context without a tenant gets no connection but [ErrNoTenant]. [WithoutTenant] runs as
// none on purpose, for tables that belong to nobody and for health checks; policies then let no row
// through. [Detach] keeps the tenant for work that outlives the request.
//
// A connection belongs to the tenant of the context that it was checked out under, to its end. A statement
// on it whose context carries another tenant is refused with [ErrWrongTenant], unless it is in a transaction that
// has begun before.
//
// [Middleware] puts the tenant of an HTTP request into its context, and [Gate] that of anything else, after they
// have asked a [Directory] whether there is one, and the caller whether it may act as it.
//
// To bring every tenant to a version, or do anything else everywhere, there is [TenantDB.ForEach]. The module cmd/pgxtenant is
// all that operators do, as a command line.
//
// Work across tenants belongs to [TenantDB.Admin], a pool that is not bound. So do VACUUM, CREATE DATABASE
// and CREATE INDEX CONCURRENTLY, which cannot run in one segment with another statement.
//
// # What it protects from, and what not
//
// It protects from a forgotten or wrong WHERE clause, a forgotten tenant, a connection that still is the
// last one's, and the code path or library that nobody thought of.
//
// Policies do not hold a superuser, a role with BYPASSRLS, or the owner of a table that lacks FORCE ROW
// LEVEL SECURITY: the service must log in as a role that is none of these. And where tenants share a role, as row
// and schema tenants do, SQL that a tenant writes or injects can set another tenant for itself, or name
// another's schema. Config.Seal makes policies refuse an ID that the package has not signed; for all else only a
// database and a login of the tenant's own help.
//
// A session also keeps temporary tables, cursors WITH HOLD, advisory locks, LISTEN and the like. What a
// tenant's statement was seen to leave is removed together with the next tenant's first statement, or
// the connection is closed; a connection that was left clean pays nothing. What a function of your own
// leaves out of sight is removed if Config.Strict is set, at every change of tenant.
//
// # Sharing
//
// While there are not enough connections for all, tenants take turns, by connection time, where pgxpool serves
// who came first. Config.Limits gives their weights and bounds, by plan for instance; Config.ArrivalOrder turns it off.
//
// # Load
//
// [TenantDB.Load] tells what each tenant has the database do, [TenantDB.Stat] what pools do, and [TenantDB.DebugHandler]
// shows both on a page. A tenant that takes a large share of the shared database is told to Config.OnHeavyTenant.
// The module contrib/tenantprom tells Prometheus of it.
//
// # Errors
//
// A failure to find, admit or connect a tenant is a [*TenantError], which tells the tenant and the step. Ask
// errors.Is for its cause: [ErrTenantNotFound], [ErrTenantSuspended], [ErrTenantUnavailable], [ErrInvalidTenantID],
// [ErrInvalidTenant], [ErrWrongTenant], [ErrPoolsBusy], [ErrTenantOverloaded]. [ErrNoTenant] and [ErrClosed] come without one.
// After any of these the statement has not been sent. What the server refuses is a *pgconn.PgError as
// ever: 42501 for a row that a policy does not let in; and if the binding itself was refused, the message
// begins with "pgxtenant: binding tenant". No error repeats a password.
//
// # Other libraries, and poolers
//
// Whatever wants a *pgxpool.Pool is given [TenantDB.Shared], or for one database tenant [TenantDB.Lease]: both
// are real pools, and bound. A service that has row and schema tenants only may keep the pool that it
// makes itself, and call [Bind] on its config.
//
// Behind a transaction pooler that does not keep prepared statements, say default_query_exec_mode=exec (or
// cache_describe, or simple_protocol) in the connection string, as pgx alone requires too. The binding
// then keeps none either.
package pgxtenant
