package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

// pastRunView is a run of migrations.
type pastRunView struct {
	Name     string                     `json:"name"`
	By       string                     `json:"by"`
	Started  time.Time                  `json:"started"`
	Ended    *time.Time                 `json:"ended"` // null while no call has come to its end
	Complete bool                       `json:"complete"`
	Counts   map[pgxtenant.RunState]int `json:"counts"`
}

func (a *app) migrateRuns() *cobra.Command {
	var limit int
	var all, asJSON bool
	cmd := &cobra.Command{
		Use:   "runs [NAME]",
		Short: "Show past runs, and which tenants failed",
		Long: `Shows the latest runs; or, of the latest one of a name, each tenant that it has
failed for, or whose outcome is unknown, with the error. Needs no migrations.

Exits with 3 if there is no run, or none of that name.`,
		Example: `  pgxtenant migrate runs
  pgxtenant migrate runs release-42
  pgxtenant migrate runs release-42 --all --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 1 {
				return usagef("--limit is %d; want 1 or more", limit)
			}
			db, err := a.open(cmd.Context(), needs{})
			if err != nil {
				return err
			}
			defer db.Close()
			if len(args) == 0 {
				return a.runs(cmd.Context(), db, limit, asJSON)
			}
			return a.runResults(cmd.Context(), db, args[0], all, asJSON)
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 20, "how many `runs` at most")
	cmd.Flags().BoolVar(&all, "all", false, "with NAME: all tenants, and not only those that failed")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line")
	return cmd
}

func (a *app) runs(ctx context.Context, db *pgxtenant.TenantDB, limit int, asJSON bool) error {
	runs, err := db.Runs(ctx, limit)
	if err != nil {
		return err
	}
	if len(runs) == 0 {
		return &exitError{exitFound, errors.New("there has been no run")}
	}
	g := &grid{o: a.out, header: []string{"RUN", "BY", "STARTED", "STATE", "DONE", "CURRENT", "FAILED", "UNKNOWN"}}
	g.paint = func(column int, cell string) (color, bool) { return red, column > 5 && cell != "0" }
	for i := range runs {
		r := &runs[i]
		if asJSON {
			view := pastRunView{Name: r.Name, By: r.By, Started: r.Started, Complete: r.Complete, Counts: r.Counts}
			if !r.Ended.IsZero() {
				view.Ended = &r.Ended
			}
			if err := a.out.json(view); err != nil {
				return err
			}
			continue
		}
		state := "not completed"
		if r.Complete {
			state = "complete"
		}
		n := func(s pgxtenant.RunState) string { return fmt.Sprint(r.Counts[s]) }
		g.add(r.Name, r.By, r.Started.UTC().Format(time.DateTime), state,
			n(pgxtenant.RunDone), n(pgxtenant.RunCurrent), n(pgxtenant.RunFailed), n(pgxtenant.RunUnknown))
	}
	if len(g.rows) > 0 {
		fmt.Fprint(a.out, g.String())
	}
	return nil
}

// runResults shows what became of tenants in the latest run of a name.
func (a *app) runResults(ctx context.Context, db *pgxtenant.TenantDB, name string, all, asJSON bool) error {
	runs, err := db.Runs(ctx, 1, name)
	if err != nil {
		return err
	}
	if len(runs) == 0 {
		return &exitError{exitFound, fmt.Errorf("there has been no run %q; migrate runs lists them", printable(name))}
	}
	states := []pgxtenant.RunState{pgxtenant.RunFailed, pgxtenant.RunUnknown}
	if all {
		states = nil
	}
	for res, err := range db.RunResults(ctx, runs[0].ID, states...) {
		if err != nil {
			return err
		}
		if asJSON {
			if err := a.out.json(a.viewOfResult(&res)); err != nil {
				return err
			}
			continue
		}
		line := fmt.Sprintf("%s: %s", nameOf(res.Tenant, res.Place), res.State)
		if res.After != "" && res.After != res.Before {
			line += fmt.Sprintf(", from %s to %s", printable(res.Before), printable(res.After))
		}
		if res.Err != nil {
			line += ": " + a.text(res.Err)
		}
		a.out.line("%s", line)
	}
	return nil
}
