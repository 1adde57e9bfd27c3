package cli

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

func (a *app) initCommand() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make what the package needs in a database",
		Long: `Makes what is missing of: the service's role (the user of --database, with its
password), the registry's tables, the keys of sealed tenants if seal_key is
set, and the schema named by --template, which the service's role gets USAGE on.
What may be done with a table in it is granted where the table is made. It may
be called again at any time, and is to be called after an upgrade.

The role of --admin needs CREATE on the database, and CREATEROLE if the
service's role is not there.`,
		Example: `  pgxtenant init
  pgxtenant init --template template
  pgxtenant init --dry-run | psql "$PGXTENANT_ADMIN"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			db, err := a.open(cmd.Context(), needs{database: true})
			if err != nil {
				return err
			}
			defer db.Close()
			if dryRun {
				return a.planInit(cmd.Context(), db)
			}
			return a.init(cmd.Context(), db)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the SQL, and change nothing")
	return cmd
}

func (a *app) init(ctx context.Context, db *pgxtenant.TenantDB) error {
	service := db.Config().Shared.ConnConfig
	missing, err := a.missing(ctx, db.Admin(), service.User)
	if err != nil {
		return err
	}
	if missing.role {
		if err := createRole(ctx, db.Admin(), service.User, service.Password); err != nil {
			return err
		}
		a.out.line("Made role %s.", printable(service.User))
	}
	if err := db.Registry().Install(ctx); err != nil {
		return err
	}
	a.out.line("The registry is in schema pgxtenant.")
	if a.settings.SealKey != "" {
		if err := db.InstallSeal(ctx); err != nil {
			return err
		}
		a.out.line("The seal's key is in schema pgxtenant.")
	}
	if missing.template {
		if _, err := db.Admin().Exec(ctx, a.templateSQL()); err != nil {
			return fmt.Errorf("make the template: %w", err)
		}
		a.out.line("Made schema %s; create the tables there that each tenant is to have, by pgxtenant migrate up or by hand,\nand grant %s what it may do with them.",
			printable(a.settings.Template), printable(service.User))
	}
	if missing.usage {
		if _, err := db.Admin().Exec(ctx, a.usageSQL(service.User)); err != nil {
			return fmt.Errorf("let role %s use the template: %w", service.User, err)
		}
		a.out.line("Role %s may use schema %s.", printable(service.User), printable(a.settings.Template))
	}
	return nil
}

func (a *app) planInit(ctx context.Context, db *pgxtenant.TenantDB) error {
	service := db.Config().Shared.ConnConfig
	missing, err := a.missing(ctx, db.Admin(), service.User)
	if err != nil {
		return err
	}
	if missing.role && a.settings.SealKey != "" {
		return fmt.Errorf("the rest cannot be planned without the role: create role %s login", pgx.Identifier{service.User}.Sanitize())
	}
	plan, err := db.PlanInstall(ctx)
	if err != nil {
		return err
	}
	if missing.role {
		plan = createRoleSQL(service.User) + "; -- and its password, by \\password in psql\n" + plan
	}
	if missing.template {
		plan += a.templateSQL() + ";\n"
	}
	if missing.usage {
		plan += a.usageSQL(service.User) + ";\n"
	}
	return a.printPlan(plan, nil)
}

// missing tells what has to be made of that which the package does not make.
func (a *app) missing(ctx context.Context, admin *pgxpool.Pool, role string) (missing struct{ role, template, usage bool }, err error) {
	err = admin.QueryRow(ctx, `select not r, $2 <> '' and not t, $2 <> ''
			and case when r and t then not pg_catalog.has_schema_privilege($1, (select oid from pg_catalog.pg_namespace where nspname = $2), 'usage') else true end
		from (select exists (select from pg_catalog.pg_roles where rolname = $1) as r, exists (select from pg_catalog.pg_namespace where nspname = $2) as t) x`,
		role, a.settings.Template).Scan(&missing.role, &missing.template, &missing.usage)
	return missing, err
}

func (a *app) templateSQL() string {
	return "create schema " + pgx.Identifier{a.settings.Template}.Sanitize()
}

// usageSQL is what the copies of the template carry, too.
func (a *app) usageSQL(role string) string {
	return "grant usage on schema " + pgx.Identifier{a.settings.Template}.Sanitize() + " to " + pgx.Identifier{role}.Sanitize()
}

func createRoleSQL(role string) string {
	return "create role " + pgx.Identifier{role}.Sanitize() + " login"
}

// createRole gives the server what it keeps of a password, and not the password, which it might log.
func createRole(ctx context.Context, admin *pgxpool.Pool, role, password string) error {
	sql := createRoleSQL(role)
	if password != "" {
		if strings.IndexFunc(password, func(r rune) bool { return r < 0x20 || r > 0x7e }) >= 0 {
			return usagef("the role is not there, and its password goes beyond ASCII, which has several spellings; as a superuser, %s, and set the password by \\password in psql", sql)
		}
		verifier, err := verifierOf(password)
		if err != nil {
			return err
		}
		sql += " password '" + verifier + "'"
	}
	_, err := admin.Exec(ctx, sql)
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "42501":
		return fmt.Errorf("the role %s is not there, and that of --admin may not make it; as a superuser, %s: %w", role, createRoleSQL(role), err)
	case errors.As(err, &pgErr) && pgErr.Code == "42710":
		return nil // another process was first
	}
	return err
}

// verifierOf is a password as the server keeps it, by RFC 5803.
func verifierOf(password string) (string, error) {
	const iterations = 4096
	salt := make([]byte, 16)
	_, _ = rand.Read(salt) // never fails
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", err
	}
	sign := func(text string) []byte {
		h := hmac.New(sha256.New, salted)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	stored := sha256.Sum256(sign("Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, b64(salt), b64(stored[:]), b64(sign("Server Key"))), nil
}
