package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

func (a *app) tenantCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "tenant",
		Short: "Make, list, suspend and delete tenants",
		Long:  "What the registry knows of tenants, and what they need in the database.",
		Example: `  pgxtenant tenant create acme --plan pro
  pgxtenant tenant list --plan pro
  pgxtenant tenant suspend acme`,
	}, a.tenantCreate(), a.tenantList(), a.tenantShow(), a.tenantSuspend(), a.tenantResume(), a.tenantDelete())
}

// tenantView is a tenant as it is printed. Its connection string is not.
type tenantView struct {
	ID         string            `json:"id"`
	Status     string            `json:"status,omitempty"`
	Isolation  string            `json:"isolation,omitempty"`
	Plan       string            `json:"plan,omitempty"`
	Schema     string            `json:"schema,omitempty"` // that its rows are in
	Server     string            `json:"server,omitempty"`
	Database   string            `json:"database,omitempty"` // if Provision made it
	Elsewhere  bool              `json:"has_connection_string,omitempty"`
	Aliases    []string          `json:"aliases,omitempty"`
	Settings   map[string]string `json:"settings,omitempty"`
	Created    *time.Time        `json:"created,omitempty"`
	Changed    *time.Time        `json:"changed,omitempty"`
	Unreadable string            `json:"unreadable,omitempty"` // why no more is known
}

func viewOf(r *pgxtenant.Record, unreadable error) tenantView {
	v := tenantView{ID: r.ID}
	if unreadable != nil {
		v.Unreadable = unreadable.Error()
		return v
	}
	created, changed := r.Created.UTC(), r.Changed.UTC()
	v.Status, v.Isolation, v.Plan, v.Server = r.Status.String(), r.Isolation.String(), r.Plan, r.Server
	v.Aliases, v.Settings, v.Created, v.Changed = r.Aliases, r.Settings, &created, &changed
	switch r.Isolation {
	case pgxtenant.IsolationSchema:
		v.Schema = r.Schema
		if v.Schema == "" {
			v.Schema = pgxtenant.SchemaName(r.ID)
		}
	case pgxtenant.IsolationDatabase:
		v.Elsewhere = r.ConnString != ""
		if !v.Elsewhere {
			v.Database = pgxtenant.DatabaseName(r.ID)
		}
	}
	return v
}

// place is where a tenant's rows are.
func (v *tenantView) place() string {
	switch {
	case v.Unreadable != "":
		return "unreadable"
	case v.Schema != "":
		return "schema " + v.Schema
	case v.Elsewhere:
		return "database of its own"
	case v.Database != "":
		return "database " + v.Database + " on " + v.Server
	}
	return "shared tables"
}

func (a *app) tenantList() *cobra.Command {
	var want filter
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List tenants",
		Long: `Lists the tenants of the registry, in the order of their IDs.

With conditions that no tenant meets it says so, and exits with 3.`,
		Example: `  pgxtenant tenant list
  pgxtenant tenant list --isolation schema --status suspended
  pgxtenant tenant list --json | jq -r .id`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := want.check(); err != nil {
				return err
			}
			db, err := a.open(cmd.Context(), needs{})
			if err != nil {
				return err
			}
			defer db.Close()
			return a.list(cmd.Context(), db.Registry(), &want, asJSON)
		},
	}
	want.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line")
	return cmd
}

// list prints tenants. Those of which only the ID can be read come too, and are an error at the end.
func (a *app) list(ctx context.Context, registry *pgxtenant.Registry, want *filter, asJSON bool) error {
	g := &grid{o: a.out, header: []string{"ID", "STATUS", "ISOLATION", "PLAN", "PLACE", "ALIASES"}, paint: paintStatus}
	var n, unreadable int
	for r, err := range registry.All(ctx) {
		if err != nil && r.ID == "" {
			return err
		}
		if !want.match(&r, err) {
			continue
		}
		n++
		v := viewOf(&r, err)
		if err != nil {
			unreadable++
			a.err.line("%s: %s", v.ID, a.settings.masked(printable(v.Unreadable)))
		}
		if asJSON {
			if err := a.out.json(v); err != nil {
				return err
			}
			continue
		}
		g.add(v.ID, v.Status, v.Isolation, v.Plan, v.place(), strings.Join(v.Aliases, " "))
	}
	if n > 0 && !asJSON {
		fmt.Fprint(a.out, g.String())
	}
	switch {
	case unreadable > 0:
		return fmt.Errorf("of %s no more than the ID can be read; is registry_key the service's?", count(unreadable, "tenant"))
	case n == 0 && want.any():
		return &exitError{exitFound, fmt.Errorf("no tenant matches %s", want)}
	case n == 0:
		a.err.line("There are no tenants yet; pgxtenant tenant create makes one.")
	}
	return nil
}

// count is a number of things.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func paintStatus(_ int, cell string) (color, bool) {
	switch cell {
	case "active":
		return green, true
	case "suspended", "read-only", "provisioning", "deleting":
		return yellow, true
	case "unreadable":
		return red, true
	}
	return 0, false
}

func (a *app) tenantShow() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show a tenant",
		Long: `Shows what the registry knows of a tenant, save for its connection string.

Exits with 3 if there is no such tenant.`,
		Example: `  pgxtenant tenant show acme
  pgxtenant tenant show acme --json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			db, err := a.open(cmd.Context(), needs{})
			if err != nil {
				return err
			}
			defer db.Close()
			r, err := db.Registry().Get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			v := viewOf(&r, nil)
			if asJSON {
				return a.out.json(v)
			}
			a.show(&v)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object")
	return cmd
}

func (a *app) show(v *tenantView) {
	field := func(name, value string) {
		if value != "" {
			a.out.line("%-11s %s", name, printable(value))
		}
	}
	field("ID", v.ID)
	field("Status", v.Status)
	field("Isolation", v.Isolation)
	field("Plan", v.Plan)
	field("Place", v.place())
	field("Aliases", strings.Join(v.Aliases, " "))
	for _, name := range slices.Sorted(maps.Keys(v.Settings)) {
		field("Setting", name+" = "+v.Settings[name])
	}
	field("Created", v.Created.Format(time.RFC3339))
	field("Changed", v.Changed.Format(time.RFC3339))
}

func (a *app) tenantSuspend() *cobra.Command {
	var readOnly bool
	cmd := &cobra.Command{
		Use:   "suspend ID",
		Short: "Refuse service to a tenant, or let it only read",
		Long: `Refuses service to a tenant, in every process, from its next statement on. Work
under way is not disturbed. With --read-only it may still read.

Exits with 3 if there is no such tenant.`,
		Example: `  pgxtenant tenant suspend acme
  pgxtenant tenant suspend acme --read-only`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if readOnly {
				return a.setStatus(cmd.Context(), args[0], "read-only", (*pgxtenant.Registry).MakeReadOnly)
			}
			return a.setStatus(cmd.Context(), args[0], "suspended", (*pgxtenant.Registry).Suspend)
		},
	}
	cmd.Flags().BoolVar(&readOnly, "read-only", false, "let it read, and not write")
	return cmd
}

func (a *app) tenantResume() *cobra.Command {
	return &cobra.Command{
		Use:   "resume ID",
		Short: "Serve a suspended or read-only tenant again",
		Long: `Serves a suspended or read-only tenant again, in every process.

Exits with 3 if there is no such tenant.`,
		Example: `  pgxtenant tenant resume acme`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.setStatus(cmd.Context(), args[0], "active", (*pgxtenant.Registry).Resume)
		},
	}
}

func (a *app) setStatus(ctx context.Context, id, status string, set func(*pgxtenant.Registry, context.Context, string) error) error {
	db, err := a.open(ctx, needs{})
	if err != nil {
		return err
	}
	defer db.Close()
	if err := set(db.Registry(), ctx, id); err != nil {
		return err
	}
	a.out.line("Tenant %s is %s.", id, status)
	return nil
}
