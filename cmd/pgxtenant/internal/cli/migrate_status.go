package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
)

// statusView is a place, and what it lacks.
type statusView struct {
	Tenant    string   `json:"tenant"`
	Isolation string   `json:"isolation"`
	Place     string   `json:"place"`
	Version   int64    `json:"version"`
	Pending   []string `json:"pending"`
	Missing   []string `json:"missing,omitempty"` // those of them that are older than the version
	Unknown   []int64  `json:"unknown,omitempty"`
	Skipped   bool     `json:"skipped,omitempty"` // it is not looked at, and error says why
	Error     string   `json:"error,omitempty"`
}

func (a *app) migrateStatus() *cobra.Command {
	var m migration
	var pending, check bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which migrations tenants have",
		Long: `Shows the version of each selected tenant, of the shared tables and of the
templates, and how many migrations each lacks. Nothing is changed. Tenants that
are being provisioned or deleted, and template databases that nobody may
connect to, are not looked at.

Exits with 3 if the selection matches nothing, and, with --check, if anything is
pending.`,
		Example: `  pgxtenant migrate status
  pgxtenant migrate status --pending --isolation schema
  pgxtenant migrate status --check --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.status(cmd, &m, pending, check) },
	}
	m.selection(cmd.Flags(), cmd)
	cmd.Flags().BoolVar(&pending, "pending", false, "leave out what lacks nothing")
	cmd.Flags().BoolVar(&check, "check", false, "exit with 3 if anything is pending")
	return cmd
}

func (a *app) status(cmd *cobra.Command, m *migration, pending, check bool) error {
	db, migrator, err := m.open(cmd, a)
	if err != nil {
		return err
	}
	defer db.Close()
	g := &grid{o: a.out, header: []string{"TENANT", "ISOLATION", "PLACE", "VERSION", "PENDING"}}
	g.paint = func(column int, cell string) (color, bool) {
		return yellow, column == 4 && cell != "0" && cell != "unreadable" && cell != "not looked at"
	}
	var n, behind, broken int
	for s, err := range migrator.Status(cmd.Context(), m.o) {
		if err != nil {
			return nothing(err)
		}
		n++
		version, lacks := fmt.Sprint(s.Version), fmt.Sprint(len(s.Pending))
		if len(s.Missing) > 0 {
			lacks += fmt.Sprintf(", %d of them older", len(s.Missing))
		}
		if len(s.Unknown) > 0 {
			lacks += fmt.Sprintf("; %d applied of no file", len(s.Unknown))
		}
		switch {
		case s.Err != nil:
			if version, lacks = "?", "not looked at"; !s.Skipped {
				lacks = "unreadable"
				broken++
			}
			a.err.line("%s %s: %s", nameOf(s.Tenant, s.Place), lacks, a.text(s.Err))
		case len(s.Pending) > 0:
			behind++
		case pending:
			continue
		}
		if m.asJSON {
			if err := a.out.json(a.viewOfStatus(&s)); err != nil {
				return err
			}
			continue
		}
		g.add(s.Tenant, s.Isolation.String(), s.Place, version, lacks)
	}
	if len(g.rows) > 0 {
		fmt.Fprint(a.out, g.String())
	}
	switch {
	case broken > 0:
		return fmt.Errorf("the version of %s cannot be read", count(broken, "place"))
	case n == 0:
		return nothing(nil)
	case check && behind > 0:
		return &exitError{exitFound, fmt.Errorf("%s of %d lack migrations", count(behind, "place"), n)}
	}
	return nil
}

func (a *app) viewOfStatus(s *tenantgoose.Status) statusView {
	v := statusView{Tenant: s.Tenant, Isolation: s.Isolation.String(), Place: s.Place, Version: s.Version, Unknown: s.Unknown,
		Pending: namesOf(s.Pending), Missing: namesOf(s.Missing), Skipped: s.Skipped}
	if s.Err != nil {
		v.Error = a.text(s.Err)
	}
	return v
}

func namesOf(migrations []tenantgoose.Migration) []string {
	names := make([]string, len(migrations))
	for i, m := range migrations {
		names[i] = m.Name
	}
	return names
}

func (a *app) migratePlan() *cobra.Command {
	var m migration
	var check bool
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what up would do",
		Long: `Shows which migrations up would apply, to how many tenants, and for which it
would fail. Nothing is changed.

Exits with 3 if the selection matches nothing, and, with --check, if there is
anything to do.`,
		Example: `  pgxtenant migrate plan
  pgxtenant migrate plan --plan pro --check`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.plan(cmd, &m, check) },
	}
	m.selection(cmd.Flags(), cmd)
	cmd.Flags().BoolVar(&check, "check", false, "exit with 3 if there is anything to do")
	return cmd
}

func (a *app) plan(cmd *cobra.Command, m *migration, check bool) error {
	db, migrator, err := m.open(cmd, a)
	if err != nil {
		return err
	}
	defer db.Close()
	plan, err := migrator.Plan(cmd.Context(), m.o)
	if err != nil {
		return nothing(err)
	}
	if plan.Current+plan.Pending+plan.Skipped+len(plan.Failed) == 0 {
		return nothing(nil)
	}
	if m.asJSON {
		type step struct {
			Migration string `json:"migration"`
			Version   int64  `json:"version"`
			Places    int    `json:"places"`
		}
		view := struct {
			Target  int64        `json:"target"`
			Current int          `json:"current"`
			Pending int          `json:"pending"`
			Skipped int          `json:"skipped"`
			Steps   []step       `json:"steps"`
			Failed  []statusView `json:"failed"`
		}{plan.Target, plan.Current, plan.Pending, plan.Skipped, []step{}, []statusView{}}
		for _, s := range plan.Steps {
			view.Steps = append(view.Steps, step{s.Migration.Name, s.Migration.Version, s.Places})
		}
		for i := range plan.Failed {
			view.Failed = append(view.Failed, a.viewOfStatus(&plan.Failed[i]))
		}
		if err := a.out.json(view); err != nil {
			return err
		}
	} else {
		a.planTable(plan)
	}
	switch {
	case len(plan.Failed) > 0:
		return errors.New("up would fail for those named above")
	case check && plan.Pending > 0:
		return &exitError{exitFound, errors.New("there is something to do")}
	}
	return nil
}

func (a *app) planTable(plan *tenantgoose.Plan) {
	text := fmt.Sprintf("Newest version: %d. Places that have all: %d, that lack something: %d", plan.Target, plan.Current, plan.Pending)
	if plan.Skipped > 0 {
		text += fmt.Sprintf(", not looked at: %d", plan.Skipped)
	}
	a.out.line("%s.", text)
	if len(plan.Steps) > 0 {
		g := &grid{o: a.out, header: []string{"MIGRATION", "PLACES"}}
		for _, s := range plan.Steps {
			g.add(s.Migration.Name, fmt.Sprint(s.Places))
		}
		fmt.Fprint(a.out, "\n"+g.String())
	}
	for i := range plan.Failed {
		f := &plan.Failed[i]
		why := "lacks older migrations: " + strings.Join(namesOf(f.Missing), ", ") + "; --out-of-order applies them"
		if f.Err != nil {
			why = a.text(f.Err)
		}
		a.err.line("%s: %s", nameOf(f.Tenant, f.Place), why)
	}
}

// nothing makes of a selection without a tenant an exit code of its own.
func nothing(err error) error {
	if err == nil || errors.Is(err, pgxtenant.ErrNothingSelected) {
		return &exitError{exitFound, errors.New("the selection matches nothing")}
	}
	return err
}

// printDown prints the SQL that takes migrations back, as their files have it.
func (a *app) printDown(dir string, back []tenantgoose.Migration) error {
	var sb strings.Builder
	for _, b := range back {
		fmt.Fprintf(&sb, "-- %s\n", b.Name)
		text, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(b.Name)))
		if errors.Is(err, os.ErrNotExist) {
			sb.WriteString("-- is no SQL file\n")
			continue
		}
		if err != nil {
			return err
		}
		sb.WriteString(downOf(string(text)))
	}
	return a.printPlan(sb.String(), nil)
}

// downOf is what follows goose's mark for the way down, to the mark for the way up or the end.
func downOf(file string) string {
	var sb strings.Builder
	down := false
	for line := range strings.Lines(file) {
		switch mark := strings.Join(strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "--")), " "); {
		case !strings.HasPrefix(strings.TrimSpace(line), "--"):
		case strings.EqualFold(mark, "+goose Down"):
			down = true
			continue
		case strings.EqualFold(mark, "+goose Up"):
			down = false
		}
		if down {
			sb.WriteString(line)
		}
	}
	return sb.String()
}
