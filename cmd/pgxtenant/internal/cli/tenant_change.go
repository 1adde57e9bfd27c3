package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pgxtenant/pgxtenant"
)

// creation is what tenant create is told.
type creation struct {
	tenant            pgxtenant.Tenant
	isolation, status string
	server            string
	aliases, set      []string
	connStdin, dryRun bool
}

func (a *app) tenantCreate() *cobra.Command {
	var c creation
	cmd := &cobra.Command{
		Use:   "create ID",
		Short: "Make a tenant and what it needs in the database",
		Long: `Makes a tenant: its record in the registry, and then its schema, as a copy of
the template, or its database, on one of the servers of the config file. It is
served when all is there. A call that was interrupted is completed by the same
call. For a tenant that is there already nothing is changed, but a schema or
database that has gone missing is made anew, without its data.

With --connection-stdin the tenant has a database already, to which the
connection string leads that is read from standard input.`,
		Example: `  pgxtenant tenant create acme --plan pro --alias acme.example.com
  pgxtenant tenant create initech --isolation schema
  pgxtenant tenant create umbrella --isolation database --server eu
  pgxtenant tenant create hooli --isolation database --connection-stdin < url
  pgxtenant tenant create initech --isolation schema --dry-run`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c.tenant.ID = args[0]
			if err := a.parse(cmd.Context(), &c); err != nil {
				return err
			}
			db, err := a.open(cmd.Context(), needs{template: c.tenant.Isolation == pgxtenant.IsolationSchema})
			if err != nil {
				return err
			}
			defer db.Close()
			return a.create(cmd.Context(), db, &c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.isolation, "isolation", "row", "where its rows are: `row`, schema or database")
	f.StringVar(&c.tenant.Plan, "plan", "", "`name` of what it has bought")
	f.StringVar(&c.tenant.Schema, "schema", "", "`name` of its schema (default: made of its ID)")
	f.StringVar(&c.server, "server", "", "`name` of the server in the config file to make its database on")
	f.StringSliceVar(&c.aliases, "alias", nil, "further `names` that lead to it, such as domains")
	f.StringArrayVar(&c.set, "set", nil, "a setting `name=value` to bind with it; may be repeated")
	f.StringVar(&c.status, "status", "active", "`active`, suspended or read-only")
	f.BoolVar(&c.connStdin, "connection-stdin", false, "read the connection string of its database from stdin")
	f.BoolVar(&c.dryRun, "dry-run", false, "print the SQL, and change nothing")
	choices(cmd, "isolation", "row", "schema", "database")
	choices(cmd, "status", "active", "suspended", "read-only")
	return cmd
}

func (a *app) parse(ctx context.Context, c *creation) (err error) {
	t := &c.tenant
	if t.Isolation, err = isolationOf(c.isolation); err != nil {
		return err
	}
	if t.Status, err = statusOf(c.status); err != nil {
		return err
	}
	if t.Settings, err = textOf(c.set); err != nil {
		return err
	}
	if err := pgxtenant.ValidateID(t.ID); err != nil {
		return err
	}
	if !c.connStdin {
		return nil
	}
	if term.IsTerminal(int(a.in.Fd())) {
		fmt.Fprint(a.err, "Connection string: ")
	}
	if t.ConnString, err = readLine(ctx, a.in); t.ConnString == "" {
		return usagef("there is no connection string on stdin: %w", err)
	}
	a.settings.further = append(a.settings.further, t.ConnString)
	if _, err := pgxtenant.ParseConfig(t.ConnString); err != nil && !a.settings.RegistryReferences {
		return &exitError{exitUsage, err}
	}
	return nil
}

func (a *app) create(ctx context.Context, db *pgxtenant.TenantDB, c *creation) error {
	var options []pgxtenant.ProvisionOption
	if c.server != "" {
		options = append(options, pgxtenant.OnServer(c.server))
	}
	if len(c.aliases) > 0 {
		options = append(options, pgxtenant.WithAliases(c.aliases...))
	}
	if c.dryRun {
		return a.printPlan(db.PlanProvision(ctx, c.tenant, options...))
	}
	before, err := db.Registry().Get(ctx, c.tenant.ID)
	if err != nil && !errors.Is(err, pgxtenant.ErrTenantNotFound) {
		return err
	}
	there := err == nil && before.Status != pgxtenant.StatusProvisioning
	if err := db.Provision(ctx, c.tenant, options...); err != nil {
		if made, getErr := db.Registry().Get(context.WithoutCancel(ctx), c.tenant.ID); getErr == nil && made.Status == pgxtenant.StatusProvisioning {
			err = fmt.Errorf("%w\nIt stays as provisioning and is not served: the same command goes on with it, tenant delete removes it", err)
		}
		return err
	}
	if there {
		a.out.line("Tenant %s is there already, and %s, with all that it needs; its record was not changed.", c.tenant.ID, before.Status)
		return nil
	}
	made, err := db.Registry().Get(ctx, c.tenant.ID)
	if err != nil {
		return err
	}
	v := viewOf(&made, nil)
	a.out.line("Tenant %s is %s, in %s.", v.ID, v.Status, printable(v.place()))
	if made.Isolation == pgxtenant.IsolationSchema {
		a.warnUnusable(ctx, db, &made)
	}
	return nil
}

// warnUnusable says so if the service's role may not use a tenant's schema, in which the service cannot serve it.
func (a *app) warnUnusable(ctx context.Context, db *pgxtenant.TenantDB, r *pgxtenant.Record) {
	if a.settings.Database == "" {
		return // which role it is nobody has said
	}
	schema := r.Schema
	if schema == "" {
		schema = pgxtenant.SchemaName(r.ID)
	}
	role := db.Config().Shared.ConnConfig.User
	var usable bool
	err := db.Admin().QueryRow(ctx, `select pg_catalog.has_schema_privilege(r.oid, n.oid, 'usage') from pg_catalog.pg_roles r, pg_catalog.pg_namespace n
		where r.rolname = $1 and n.nspname = $2`, role, schema).Scan(&usable)
	if err == nil && !usable {
		a.err.line("Role %[1]s may not use it, since it may not use the template: grant usage on schema %[2]s to %[3]s; pgxtenant init does so for the template.",
			printable(role), printable(pgx.Identifier{schema}.Sanitize()), printable(pgx.Identifier{role}.Sanitize()))
	}
}

// printPlan prints SQL. Elsewhere than on a terminal it goes out as it is, for psql.
func (a *app) printPlan(plan string, err error) error {
	if err != nil {
		return err
	}
	if plan == "" {
		plan = "-- Nothing to do.\n"
	}
	if a.out.terminal() {
		plan = printableLines(plan)
	}
	_, err = a.out.Write([]byte(plan))
	return err
}

func (a *app) tenantDelete() *cobra.Command {
	var retire, dryRun bool
	cmd := &cobra.Command{
		Use:   "delete ID",
		Short: "Delete a tenant with all its data",
		Long: `Refuses service to a tenant, waits until no process serves it from memory
(--registry-ttl and --registry-stale, which must be the service's), and deletes
its rows, its schema, or its database, and its record.

It asks first. A call that was interrupted is completed by the same call.
With --retire a schema or database is set aside instead, under another name.
Exits with 3 if there is no such tenant.`,
		Example: `  pgxtenant tenant delete acme
  pgxtenant tenant delete acme --dry-run
  pgxtenant tenant delete initech --retire --yes`,
		Args: cobra.ExactArgs(1),
	}
	yes := yesFlag(cmd)
	cmd.Flags().BoolVar(&retire, "retire", false, "keep its schema or database, under another name")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the SQL, and change nothing")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		db, err := a.open(cmd.Context(), needs{})
		if err != nil {
			return err
		}
		defer db.Close()
		var options []pgxtenant.DeprovisionOption
		if retire {
			options = append(options, pgxtenant.Retire())
		}
		if dryRun {
			return a.printPlan(db.PlanDeprovision(cmd.Context(), args[0], options...))
		}
		return a.delete(cmd.Context(), db, args[0], retire, *yes, options)
	}
	return cmd
}

func (a *app) delete(ctx context.Context, db *pgxtenant.TenantDB, id string, retire, yes bool, options []pgxtenant.DeprovisionOption) error {
	record, err := db.Registry().Get(ctx, id)
	if err != nil {
		return err
	}
	v := viewOf(&record, nil)
	what := "with all its data"
	switch {
	case retire:
		what = "and set its data aside"
	case v.Elsewhere:
		what = "from the registry; its database stays"
	}
	if !yes {
		if err := a.confirm(ctx, id, "Delete tenant %s (%s, in %s) %s?", id, v.Status, printable(v.place()), what); err != nil {
			return err
		}
	}
	if wait := a.wait(); wait >= time.Second {
		a.err.line("Waiting %v, until no process serves the tenant from memory.", wait)
	}
	if err := db.Deprovision(ctx, id, options...); err != nil {
		return fmt.Errorf("%w\nThe same command goes on where it stopped", err)
	}
	a.out.line("Tenant %s is deleted.", id)
	return nil
}

// wait is how long the service may serve a tenant from memory.
func (a *app) wait() time.Duration {
	ttl := a.settings.RegistryTTL
	if ttl == 0 {
		ttl = pgxtenant.DefaultRegistryTTL
	}
	return ttl + a.settings.RegistryStale
}
