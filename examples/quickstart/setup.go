package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Run as a superuser, once for the server. The service must log in as a role that policies hold: one that
// owns no table, and is neither superuser nor BYPASSRLS.
const createRoles = `
	create role shop_owner  login password 'owner' createdb; -- makes the tables, and tenants' schemas and databases
	create role shop_app    login password 'app';            -- the service
	create role shop_reader login password 'reader' bypassrls; -- only here: to look at all rows, and to compare with
	grant pg_signal_backend to shop_owner;                   -- to drop a database that is in use
	do $$ begin                                              -- to write a tenant's ID on its database
		if current_setting('server_version_num')::int >= 150000 then
			execute 'grant set on parameter app.current_tenant_id to shop_owner';
		end if;
	end $$;
`

// Run as a superuser, each statement on its own.
var createDatabase = []string{
	"create database shop owner shop_owner",
	"revoke all on database shop from public",
	"grant connect on database shop to shop_app, shop_reader",
}

// Run in the shop's database as a superuser, where public is not yet as it is from PostgreSQL 15 on.
const closePublic = `
	revoke create on schema public from public;
	grant  create on schema public to shop_owner;
`

// The rest is run as shop_owner. Row tenants share this table. EnableRLS gives it all that keeps them apart.
const createSharedTable = `
	create table invoice (
		tenant_id text   not null,
		id        bigint not null,
		item      text   not null,
		primary key (tenant_id, id)
	);
	grant select, insert, update, delete on invoice to shop_reader;
`

// A schema tenant gets a copy of this schema. No column has to say whose the rows are.
const createTemplate = `
	create schema template;
	create table template.invoice (id bigint primary key, item text not null);
	grant usage on schema template to shop_app;
	grant select, insert, update, delete on template.invoice to shop_app;
`

// A database tenant has the table in its database.
const createTenantTable = `
	create table invoice (id bigint primary key, item text not null);
	grant select, insert, update, delete on invoice to shop_app;
`

// shop is the server with all of that on it. Everything goes with it.
type shop struct {
	server *pgtest.Server
}

func openShop(ctx context.Context) (*shop, error) {
	// Roles and databases have names of their own here: not on a server where others have theirs.
	if err := os.Unsetenv(pgtest.EnvDatabase); err != nil {
		return nil, err
	}
	server, err := pgtest.Start(ctx)
	if err != nil {
		return nil, err
	}
	s := &shop{server}
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *shop) prepare(ctx context.Context) error {
	if err := s.run(ctx, s.server.URL(), append([]string{createRoles}, createDatabase...)...); err != nil {
		return err
	}
	if err := s.run(ctx, withPath(s.server.URL(), "shop"), closePublic); err != nil {
		return err
	}
	return s.run(ctx, s.owner(), createSharedTable, createTemplate)
}

// open makes the TenantDB. This is where a service opens its *pgxpool.Pool.
func (s *shop) open(ctx context.Context) (*pgxtenant.TenantDB, error) {
	config, err := pgxtenant.ParseConfig(s.app("shop"))
	if err != nil {
		return nil, err
	}
	if config.Admin, err = pgxpool.ParseConfig(s.owner()); err != nil {
		return nil, err
	}
	config.Template = "template"
	config.Servers = map[string]pgxtenant.DatabaseServer{"first": {
		Admin: config.Admin, ConnString: s.app("postgres"),
		DatabaseOptions: pgxtenant.DatabaseOptions{Setup: func(ctx context.Context, conn *pgx.Conn, _ string) error {
			_, err := conn.Exec(ctx, createTenantTable)
			return err
		}},
	}}
	key := make([]byte, 32) // encrypts the connection strings in the registry; a service keeps it
	_, _ = rand.Read(key)   // never fails
	config.Registry = &pgxtenant.RegistryConfig{Key: key}
	return pgxtenant.NewWithConfig(ctx, config)
}

// tenants are provisioned: a row in the registry, and a schema or a database where they have one.
var tenants = []pgxtenant.Tenant{
	{ID: "acme"},
	{ID: "globex"},
	{ID: "initech", Isolation: pgxtenant.IsolationSchema},
	{ID: "umbrella", Isolation: pgxtenant.IsolationDatabase},
	{ID: "vandelay", Status: pgxtenant.StatusSuspended},
}

// provision makes the tenants, and two with a row in the registry alone, which must not be served: one whose
// schema was never made, and one that is led to another's database.
func (s *shop) provision(ctx context.Context, db *pgxtenant.TenantDB) error {
	if err := db.Registry().Install(ctx); err != nil {
		return err
	}
	if err := db.EnableRLS(ctx, pgxtenant.Tables("invoice")...); err != nil {
		return err
	}
	for _, t := range tenants {
		if err := db.Provision(ctx, t); err != nil {
			return err
		}
	}
	for _, t := range []pgxtenant.Tenant{
		{ID: "hooli", Isolation: pgxtenant.IsolationSchema},
		{ID: "wayne", Isolation: pgxtenant.IsolationDatabase, ConnString: s.app(pgxtenant.DatabaseName("umbrella"))},
	} {
		if _, err := db.Registry().Create(ctx, pgxtenant.Record{Tenant: t}); err != nil {
			return err
		}
	}
	return nil
}

// run executes each text of statements.
func (s *shop) run(ctx context.Context, connString string, texts ...string) error {
	conn, err := pgx.Connect(ctx, connString)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, sql := range texts {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%w in: %s", err, sql)
		}
	}
	return nil
}

func (s *shop) close() error { return s.server.Close() }

// app is how the service connects to a database: postgres://shop_app:app@host:port/database.
func (s *shop) app(database string) string {
	return withUser(withPath(s.server.URL(), database), "shop_app", "app")
}

// owner connects as the role that the tables belong to.
func (s *shop) owner() string {
	return withUser(withPath(s.server.URL(), "shop"), "shop_owner", "owner")
}

// reader connects as the role that sees every tenant's rows.
func (s *shop) reader() string {
	return withUser(withPath(s.server.URL(), "shop"), "shop_reader", "reader")
}

func withPath(connString, database string) string {
	return with(connString, func(u *url.URL) { u.Path = "/" + database })
}

func withUser(connString, user, password string) string {
	return with(connString, func(u *url.URL) { u.User = url.UserPassword(user, password) })
}

func withHost(connString, host string) string {
	return with(connString, func(u *url.URL) { u.Host = host })
}

func with(connString string, change func(*url.URL)) string {
	u, err := url.Parse(connString)
	if err != nil {
		panic(err) // it is pgtest's own
	}
	change(u)
	return u.String()
}
