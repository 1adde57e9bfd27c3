package pgxtenant

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ownSchema holds what the package keeps in a database for itself: the registry, the keys of sealed
// tenants and the functions that read them. It belongs to the role that made it.
const ownSchema = "pgxtenant"

// adminPool returns the pool that DDL runs on.
func (db *TenantDB) adminPool() (*pgxpool.Pool, error) {
	switch {
	case db.closed.Load():
		return nil, ErrClosed
	case db.admin == nil:
		return nil, ErrNoAdmin
	}
	return db.admin, nil
}

// appRole is the role that tenants' statements run as, which gets the grants.
func (db *TenantDB) appRole() string { return db.config.Shared.ConnConfig.User }

// ident quotes a name, which may be qualified, for SQL.
func ident(parts ...string) string { return pgx.Identifier(parts).Sanitize() }

// beginner is a connection or a pool.
type beginner interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// runner runs statements: a connection, a transaction, a pool, or what keeps them for a plan.
type runner interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// adminRunner is what changes are made on: the Admin pool, or what keeps them for a plan.
type adminRunner interface {
	beginner
	runner
	Config() *pgxpool.Config
}

// install brings a component that the package keeps in ownSchema up to date, in one transaction: it runs
// the steps that a database has not seen yet. Steps are only ever added, so an older version of the package
// finds more steps done than it knows and leaves all as it is. Any number of processes may install at once.
func install(ctx context.Context, on beginner, component string, steps []string) error {
	err := installing(ctx, on, func(tx pgx.Tx) error {
		var there bool
		if err := tx.QueryRow(ctx, "select pg_catalog.to_regclass('pgxtenant.component') is not null").Scan(&there); err != nil {
			return err
		}
		if !there {
			if _, err := tx.Exec(ctx, `create schema if not exists pgxtenant;
				create table pgxtenant.component (name text primary key, version integer not null)`); err != nil {
				return err
			}
		}
		done := 0
		err := tx.QueryRow(ctx, "select version from pgxtenant.component where name = $1", component).Scan(&done)
		if err != nil && !errors.Is(err, pgx.ErrNoRows) || done >= len(steps) {
			return err
		}
		for i, step := range steps[done:] {
			if _, err := tx.Exec(ctx, step); err != nil {
				return fmt.Errorf("step %d: %w", done+i+1, err)
			}
		}
		_, err = tx.Exec(ctx, `insert into pgxtenant.component values ($1, $2)
			on conflict (name) do update set version = excluded.version`, component, len(steps))
		return err
	})
	if err != nil {
		return fmt.Errorf("pgxtenant: install %s in schema %s: %w", component, ownSchema, adminError(err))
	}
	return nil
}

// installing runs f in a transaction that no other like it runs beside: "create … if not exists" is no
// protection from another that does the same at the same moment, and two grants on one object may fail with
// "tuple concurrently updated".
func installing(ctx context.Context, on beginner, f func(tx pgx.Tx) error) error {
	return pgx.BeginFunc(ctx, on, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgxtenant install', 0))"); err != nil {
			return err
		}
		return f(tx)
	})
}

// adminError says what the server's refusal of a right means for the role that DDL runs as.
func adminError(err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42501" {
		return fmt.Errorf("the role of Config.Admin lacks a right: %w", err)
	}
	return err
}
