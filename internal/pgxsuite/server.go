package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

const database = "pgx_test"

// setup is what pgx's tests expect to find in their database; see testsetup/postgresql_setup.sql there.
var setup = []string{
	"create extension hstore",
	"create extension ltree",
	"create domain uint64 as numeric(20,0)",
	"create schema tenant_suite", // for the mode "schema"
}

// trickyUser appears in pgx's test of aclitem.
const trickyUser = `" tricky, ' } "" \ test user "`

// prepareDatabase makes the database of one run anew, and returns the environment that leads pgx's tests
// to it, by TLS if so asked.
func prepareDatabase(ctx context.Context, s *pgtest.Server, tls bool) ([]string, error) {
	if err := execute(ctx, s.URL(),
		"drop database if exists "+database+" with (force)",
		"drop role if exists "+trickyUser,
		"create role "+trickyUser+" superuser",
		"create database "+database+" template template0",
		"alter database "+database+" set pg_stat_statements.track = 'top'",
		"create extension if not exists pg_stat_statements",
		"select pg_stat_statements_reset()",
	); err != nil {
		return nil, err
	}
	config, err := pgx.ParseConfig(s.URL())
	if err != nil {
		return nil, err
	}
	config.Database = database
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	for _, sql := range setup {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return nil, fmt.Errorf("%s: %w", sql, err)
		}
	}

	// pgx's tests append to these, in this form.
	params := func(more ...string) string {
		all := append([]string{
			"host", config.Host, "port", fmt.Sprint(config.Port), "dbname", database, "user", config.User, "password", config.Password,
		}, more...)
		var sb strings.Builder
		for i := 0; i+1 < len(all); i += 2 {
			fmt.Fprintf(&sb, "%s='%s' ", all[i], strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(all[i+1]))
		}
		return strings.TrimSpace(sb.String())
	}
	plain := params("sslmode", "disable")
	env := []string{
		"PGX_TEST_DATABASE=" + plain,
		"PGX_TEST_TCP_CONN_STRING=" + plain,
		"PGX_TEST_SCRAM_PASSWORD_CONN_STRING=" + plain,
	}
	if cert := s.CertFile(); cert != "" {
		verify := func(binding string) string {
			return params("sslmode", "verify-full", "sslrootcert", cert, "channel_binding", binding)
		}
		env = append(env,
			"PGX_TEST_TLS_CONN_STRING="+verify("disable"),
			"PGX_TEST_SCRAM_PLUS_CONN_STRING="+verify("require"))
		if tls {
			env = append(env, "PGX_TEST_DATABASE="+verify("prefer")) // the last one counts
		}
	}
	return env, nil
}

// countBindings tells how many transactions the server has seen bound since the database was prepared.
func countBindings(ctx context.Context, s *pgtest.Server) (string, error) {
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	var n int64
	err = conn.QueryRow(ctx, "select coalesce(sum(calls), 0) from pg_stat_statements where query like 'select pg_catalog.set_config(%'").Scan(&n)
	return fmt.Sprintf("%d bindings", n), err
}

func execute(ctx context.Context, url string, statements ...string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
	}
	return nil
}
