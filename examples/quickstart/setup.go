package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/jackc/pgx/v5"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Run as a superuser, once for the server. The service must log in as a role that policies hold: one that
// owns no table, and is neither superuser nor BYPASSRLS.
const createRoles = `
	create role shop_owner login password 'owner';           -- makes the tables
	create role shop_app   login password 'app';             -- the service
	create role shop_admin login password 'admin' bypassrls; -- reads across tenants
`

// Run as a superuser, each statement on its own. A database tenant's database says whose it is: pgxtenant
// compares that with the tenant on each new connection.
var createDatabases = []string{
	"create database shop owner shop_owner",
	"create database umbrella owner shop_owner",
	"alter database umbrella set app.current_tenant_id = 'umbrella'",
	"revoke all on database shop, umbrella from public",
	"grant connect on database shop, umbrella to shop_app, shop_admin",
}

// Run in each database, as a superuser. The tables' owner makes what follows.
const prepareDatabase = `
	revoke create on schema public from public; -- as it is from PostgreSQL 15 on
	grant  create on schema public to shop_owner;
	set role shop_owner;
`

// Row tenants share a table. The policy compares each row with the setting that pgxtenant binds, on
// reading and, as there is no WITH CHECK that says otherwise, on writing. No tenant is the empty string,
// which nullif turns into NULL, which equals nothing. The sub-select is evaluated once per statement
// and not once per row.
const createSharedTable = `
	create table invoice (
		tenant_id text   not null check (tenant_id <> '')
		                 default current_setting('app.current_tenant_id'),
		id        bigint not null,
		item      text   not null,
		primary key (tenant_id, id)
	);
	alter table invoice enable row level security;
	alter table invoice force  row level security; -- for the table's owner too
	create policy tenant on invoice using
		(tenant_id = (select nullif(current_setting('app.current_tenant_id', true), '')));
	grant select, insert, update, delete on invoice to shop_app, shop_admin;
`

// A schema tenant has the table in a schema of its own. No column has to say whose the rows are.
const createTenantSchema = `
	create schema initech;
	create table initech.invoice (id bigint primary key, item text not null);
	grant usage on schema initech to shop_app;
	grant select, insert, update, delete on initech.invoice to shop_app;
`

// A database tenant has it in its database.
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
	if err := s.provision(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *shop) provision(ctx context.Context) error {
	if err := s.run(ctx, "postgres", append([]string{createRoles}, createDatabases...)...); err != nil {
		return err
	}
	if err := s.run(ctx, "shop", prepareDatabase, createSharedTable, createTenantSchema); err != nil {
		return err
	}
	return s.run(ctx, "umbrella", prepareDatabase, createTenantTable)
}

// run executes each text of statements in a database, as the superuser.
func (s *shop) run(ctx context.Context, database string, texts ...string) error {
	conn, err := pgx.Connect(ctx, withPath(s.server.URL(), database))
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

// admin connects as the role that sees every tenant's rows.
func (s *shop) admin() string {
	return withUser(withPath(s.server.URL(), "shop"), "shop_admin", "admin")
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
