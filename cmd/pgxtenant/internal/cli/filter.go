package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

// filter says which tenants are meant: those that meet every condition that is given.
type filter struct {
	isolations, plans, statuses, servers []string
}

func (f *filter) flags(cmd *cobra.Command) {
	list := func(to *[]string, name, usage string) { cmd.Flags().StringSliceVar(to, name, nil, usage) }
	list(&f.isolations, "isolation", "only those with one of these: `row`, schema or database")
	list(&f.plans, "plan", "only those on one of these `plans`")
	list(&f.statuses, "status", "only those in one of these: `active`, suspended, read-only, provisioning or deleting")
	list(&f.servers, "server", "only those on one of these `servers`")
	choices(cmd, "isolation", "row", "schema", "database")
	choices(cmd, "status", "active", "suspended", "read-only", "provisioning", "deleting")
}

func (f *filter) any() bool {
	return len(f.isolations)+len(f.plans)+len(f.statuses)+len(f.servers) > 0
}

// check refuses what no tenant can be.
func (f *filter) check() error {
	for _, name := range f.isolations {
		if _, err := isolationOf(name); err != nil {
			return err
		}
	}
	for _, name := range f.statuses {
		if _, err := statusOf(name); err != nil {
			return err
		}
	}
	return nil
}

// match leaves out, with any condition, a record of which only the ID could be read.
func (f *filter) match(r *pgxtenant.Record, unreadable error) bool {
	if unreadable != nil {
		return !f.any()
	}
	one := func(list []string, value string) bool { return len(list) == 0 || slices.Contains(list, value) }
	return one(f.isolations, r.Isolation.String()) && one(f.plans, r.Plan) && one(f.statuses, r.Status.String()) && one(f.servers, r.Server)
}

func (f *filter) String() string {
	var parts []string
	for _, p := range []struct {
		name   string
		values []string
	}{{"isolation", f.isolations}, {"plan", f.plans}, {"status", f.statuses}, {"server", f.servers}} {
		if len(p.values) > 0 {
			parts = append(parts, "--"+p.name+" "+printable(strings.Join(p.values, ",")))
		}
	}
	return strings.Join(parts, " ")
}

func isolationOf(name string) (pgxtenant.Isolation, error) {
	for i := pgxtenant.IsolationRow; i <= pgxtenant.IsolationDatabase; i++ {
		if i.String() == name {
			return i, nil
		}
	}
	return 0, usagef("there is no isolation %q; want row, schema or database", name)
}

func statusOf(name string) (pgxtenant.Status, error) {
	for s := pgxtenant.StatusActive; s <= pgxtenant.StatusDeleting; s++ {
		if s.String() == name {
			return s, nil
		}
	}
	return 0, usagef("there is no status %q; want active, suspended, read-only, provisioning or deleting", name)
}

// textOf is what the value of a --set flag says: name=value.
func textOf(pairs []string) (map[string]string, error) {
	set := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, usagef("--set %s: want name=value", fmt.Sprintf("%q", pair))
		}
		set[name] = value
	}
	return set, nil
}
