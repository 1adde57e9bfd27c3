package cli

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

func (a *app) rlsCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "rls",
		Short: "Put tables under row-level security",
		Long:  "Puts tables whose rows belong to tenants under row-level security, and takes it\nfrom them.",
		Example: `  pgxtenant rls plan invoice billing.payment
  pgxtenant rls enable invoice billing.payment
  pgxtenant rls disable invoice`,
	}, a.rlsEnable(), a.rlsDisable(), a.rlsPlan())
}

// tableFlags are what is said of the tables of one call.
type tableFlags struct{ column, typ, backfill string }

func (t *tableFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&t.column, "column", pgxtenant.DefaultTenantColumn, "`name` of the tenant column")
	cmd.Flags().StringVar(&t.typ, "type", "text", "type of a column that is added: `text`, uuid, integer or bigint")
	cmd.Flags().StringVar(&t.backfill, "backfill", "", "`ID` of the tenant that rows without one are given")
	choices(cmd, "type", "text", "uuid", "integer", "bigint")
}

func (t *tableFlags) tables(names []string) []pgxtenant.RLSTable {
	tables := pgxtenant.Tables(names...)
	for i := range tables {
		tables[i].Column, tables[i].Type, tables[i].Backfill = t.column, t.typ, t.backfill
	}
	return tables
}

func (a *app) rlsEnable() *cobra.Command {
	var t tableFlags
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "enable TABLE...",
		Short: "Put tables under row-level security",
		Long: `Gives each table what it lacks of: the tenant column with its default, an index,
the policy, row-level security, forced, and the service's grants; partitions and
inheriting tables too. Refuses what would let rows out all the same, and says
what to do about it. A table that has all is left alone. Each table is changed
in a transaction of its own.`,
		Example: `  pgxtenant rls enable invoice billing.payment
  pgxtenant rls enable invoice --column customer --type uuid
  pgxtenant rls enable legacy --backfill acme
  pgxtenant rls enable invoice --dry-run`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			db, err := a.open(cmd.Context(), needs{database: true})
			if err != nil {
				return err
			}
			defer db.Close()
			if dryRun {
				return a.printPlan(db.PlanEnableRLS(cmd.Context(), t.tables(args)...))
			}
			return a.eachTable(cmd.Context(), t.tables(args), db.PlanEnableRLS, db.EnableRLS, "under row-level security")
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the SQL, and change nothing")
	return cmd
}

func (a *app) rlsDisable() *cobra.Command {
	var t tableFlags
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "disable TABLE...",
		Short: "Take row-level security from tables",
		Long: `Takes all rights to each table from the service's role, for its rows are open
then, and the policy and row-level security from the table. The tenant column
stays. It asks first.`,
		Example: `  pgxtenant rls disable invoice
  pgxtenant rls disable invoice --dry-run`,
		Args: cobra.MinimumNArgs(1),
	}
	yes := yesFlag(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the SQL, and change nothing")
	cmd.Flags().StringVar(&t.column, "column", pgxtenant.DefaultTenantColumn, "`name` of the tenant column")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		db, err := a.open(cmd.Context(), needs{database: true})
		if err != nil {
			return err
		}
		defer db.Close()
		if dryRun {
			return a.printPlan(db.PlanDisableRLS(cmd.Context(), t.tables(args)...))
		}
		if !*yes {
			if err := a.confirm(cmd.Context(), "yes", "Take row-level security from %s? The service loses all rights to what it is taken from.", printable(strings.Join(args, ", "))); err != nil {
				return err
			}
		}
		return a.eachTable(cmd.Context(), t.tables(args), db.PlanDisableRLS, db.DisableRLS, "without row-level security")
	}
	return cmd
}

// eachTable changes tables one by one, and says which are done: those stay so if the next one fails.
func (a *app) eachTable(ctx context.Context, tables []pgxtenant.RLSTable, plan func(context.Context, ...pgxtenant.RLSTable) (string, error),
	change func(context.Context, ...pgxtenant.RLSTable) error, state string) error {
	for _, t := range tables {
		before, err := plan(ctx, t)
		if err != nil {
			return err
		}
		if before == "" {
			a.out.line("Table %s is %s already.", printable(t.Name), state)
			continue
		}
		if err := change(ctx, t); err != nil {
			return err
		}
		a.out.line("Table %s is %s.", printable(t.Name), state)
	}
	return nil
}

func (a *app) rlsPlan() *cobra.Command {
	var t tableFlags
	var disable, check bool
	cmd := &cobra.Command{
		Use:   "plan TABLE...",
		Short: "Print the SQL of enable or disable",
		Long: `Prints the SQL that enable would run now, or disable, for a migration to keep.
With --check it exits with 3 if there is anything to do.`,
		Example: `  pgxtenant rls plan invoice billing.payment > migrations/0042_rls.sql
  pgxtenant rls plan invoice --check
  pgxtenant rls plan invoice --disable`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			db, err := a.open(cmd.Context(), needs{database: true})
			if err != nil {
				return err
			}
			defer db.Close()
			make := db.PlanEnableRLS
			if disable {
				make = db.PlanDisableRLS
			}
			plan, err := make(cmd.Context(), t.tables(args)...)
			if err := a.printPlan(plan, err); err != nil {
				return err
			}
			if check && plan != "" {
				return &exitError{exitFound, errors.New("there is something to do")}
			}
			return nil
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&disable, "disable", false, "print that of disable")
	cmd.Flags().BoolVar(&check, "check", false, "exit with 3 if there is anything to do")
	return cmd
}
