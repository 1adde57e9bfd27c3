package cli

import "github.com/spf13/cobra"

// moveCommand keeps the name of what is to move a tenant with its data, so that nothing else takes it.
func (a *app) moveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "move ID",
		Short: "Reserved: there is no move of a tenant with its data yet",
		Long: `Reserved for moving a tenant, with its data, to another kind of isolation or
another server. It does nothing yet but say so, and exits with 2.`,
		Example: `  pgxtenant move acme`,
		Args:    cobra.ArbitraryArgs,
		RunE: func(*cobra.Command, []string) error {
			return usagef("move is reserved: it does not move tenants yet")
		},
	}
}
