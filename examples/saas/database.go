package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// All of this is run as the role that owns the tables.

// Row tenants share this table. EnableRLS gives it the policy, the default of tenant_id, and the grants.
//
// The key begins with the tenant: one tenant's keys then say nothing of another's, whose values a unique key over
// id alone would give away.
const createSharedTable = `
	create table if not exists project (
		tenant_id   text        not null,
		id          uuid        not null,
		name        text        not null,
		description text        not null,
		created_at  timestamptz not null default now(),
		updated_at  timestamptz not null default now(),
		primary key (tenant_id, id)
	);
`

// What a tenant has that shares its tables with nobody. No column has to say whose the rows are.
const createOwnTable = `
	create table if not exists %[1]s.project (
		id          uuid        primary key,
		name        text        not null,
		description text        not null,
		created_at  timestamptz not null default now(),
		updated_at  timestamptz not null default now()
	);
	grant select, insert, update, delete on %[1]s.project to %[2]s;
`

// A schema tenant gets a copy of this schema.
const template = "template"

// openDatabase makes the TenantDB. This is where a service opens its *pgxpool.Pool.
func openDatabase(ctx context.Context, s settings, logger *slog.Logger) (*pgxtenant.TenantDB, error) {
	config, err := pgxtenant.ParseConfig(s.database)
	if err != nil {
		return nil, err
	}
	if config.Admin, err = pgxpool.ParseConfig(s.admin); err != nil {
		return nil, err
	}
	app := pgx.Identifier{config.Shared.ConnConfig.User}.Sanitize()

	config.Registry = &pgxtenant.RegistryConfig{}
	config.Template = template
	config.Servers = map[string]pgxtenant.DatabaseServer{"main": { // where database tenants' databases are made
		Admin: config.Admin, ConnString: s.database,
		DatabaseOptions: pgxtenant.DatabaseOptions{Setup: func(ctx context.Context, conn *pgx.Conn, _ string) error {
			_, err := conn.Exec(ctx, fmt.Sprintf(createOwnTable, "public", app))
			return err
		}},
	}}
	config.AdjustPool = func(_ pgxtenant.Tenant, c *pgxpool.Config) error {
		c.MaxConns = 8 // a database tenant's own, whatever the shared pool has
		return nil
	}
	config.Limits = connectionLimits
	config.Logger = logger
	config.OnHeavyTenant = func(t pgxtenant.TenantLoad) {
		// The library has logged it. This is where a service pages somebody, opens a ticket, or moves the tenant.
		logger.Warn("noisy neighbour", "tenant", t.TenantID, "share", fmt.Sprintf("%.0f %%", 100*t.SharedShare),
			"seconds", t.SharedTime.Seconds(), "statements", t.Statements())
	}
	return pgxtenant.NewWithConfig(ctx, config)
}

// migrate makes what tenants share, and looks whether it keeps them apart. It may run at every start. A service with
// more than one process runs it as a step of its deployment instead, and leaves the owner's password there.
func migrate(ctx context.Context, db *pgxtenant.TenantDB) error {
	app := pgx.Identifier{db.Config().Shared.ConnConfig.User}.Sanitize()
	makeTemplate := fmt.Sprintf("create schema if not exists %[1]s; grant usage on schema %[1]s to %[2]s;", template, app)
	for _, sql := range []string{createSharedTable, makeTemplate, fmt.Sprintf(createOwnTable, template, app)} {
		if _, err := db.Admin().Exec(ctx, sql); err != nil {
			return fmt.Errorf("%w in: %s", err, sql)
		}
	}
	if err := db.EnableRLS(ctx, pgxtenant.Tables("project")...); err != nil {
		return err
	}
	return db.Registry().Install(ctx)
}

// tenants are of all kinds. A service provisions one when a customer signs up.
var tenants = []pgxtenant.Tenant{
	{ID: "acme", Plan: "pro"},
	{ID: "globex", Plan: "pro"},
	{ID: "wonka", Plan: "free"},
	{ID: "initech", Plan: "pro", Isolation: pgxtenant.IsolationSchema},
	{ID: "umbrella", Plan: "enterprise", Isolation: pgxtenant.IsolationDatabase},
	{ID: "vandelay", Plan: "free", Status: pgxtenant.StatusSuspended}, // has not paid
}

// provision makes the tenants, and then audits the whole, which the page and the metrics show. What would let one
// tenant see another's rows stops the service here.
func provision(ctx context.Context, db *pgxtenant.TenantDB) error {
	for _, t := range tenants {
		if err := db.Provision(ctx, t); err != nil {
			return err
		}
	}
	report, err := db.Audit(ctx)
	if err != nil {
		return err
	}
	return report.Err()
}
