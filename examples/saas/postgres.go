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

// Run as a superuser, once for the server. The service logs in as a role that policies hold: one that owns no
// table, and is neither superuser nor BYPASSRLS.
const createRoles = `
	create role saas_owner login password 'owner' createdb; -- makes the tables, and tenants' schemas and databases
	create role saas_app   login password 'app';            -- the service
	do $$ begin                                             -- to write a tenant's ID on its database
		if current_setting('server_version_num')::int >= 150000 then
			execute 'grant set on parameter app.current_tenant_id to saas_owner';
		end if;
	end $$;
`

// Run as a superuser, each statement on its own.
var createDatabase = []string{
	"create database saas owner saas_owner",
	"revoke all on database saas from public",
	"grant connect on database saas to saas_app",
}

// Run in the service's database as a superuser, where public is not yet as it is from PostgreSQL 15 on.
const closePublic = `
	revoke create on schema public from public;
	grant  create on schema public to saas_owner;
`

// postgres is a server for this example alone. It ends with the process, and nothing of it is left.
type postgres struct {
	server *pgtest.Server
}

func startPostgres(ctx context.Context) (*postgres, error) {
	// Roles and databases have names of their own here: not on a server where others have theirs.
	if err := os.Unsetenv(pgtest.EnvDatabase); err != nil {
		return nil, err
	}
	server, err := pgtest.Start(ctx)
	if err != nil {
		return nil, err
	}
	p := &postgres{server}
	if err := p.prepare(ctx); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

func (p *postgres) prepare(ctx context.Context) error {
	if err := execute(ctx, p.server.URL(), append([]string{createRoles}, createDatabase...)...); err != nil {
		return err
	}
	return execute(ctx, withPath(p.server.URL(), "saas"), closePublic)
}

// execute runs each text of statements on a connection of its own.
func execute(ctx context.Context, connString string, texts ...string) error {
	conn, err := pgx.Connect(ctx, connString)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, sql := range texts {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%w in: %s", err, sql)
		}
	}
	return nil
}

// app connects as the service, which may hold 16 connections for all row and schema tenants together.
func (p *postgres) app() string {
	return with(p.as("saas_app", "app"), func(u *url.URL, q url.Values) { q.Set("pool_max_conns", "16") })
}

// owner connects as the role that the tables belong to.
func (p *postgres) owner() string { return p.as("saas_owner", "owner") }

func (p *postgres) close() error { return p.server.Close() }

func (p *postgres) as(user, password string) string {
	return with(withPath(p.server.URL(), "saas"), func(u *url.URL, _ url.Values) { u.User = url.UserPassword(user, password) })
}

func withPath(connString, database string) string {
	return with(connString, func(u *url.URL, _ url.Values) { u.Path = "/" + database })
}

func with(connString string, change func(*url.URL, url.Values)) string {
	u, err := url.Parse(connString)
	if err != nil {
		panic(err) // it is pgtest's own
	}
	q := u.Query()
	change(u, q)
	u.RawQuery = q.Encode()
	return u.String()
}
