package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantgoose"
)

func (a *app) migrateCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "migrate",
		Short: "Migrate the tables of all tenants",
		Long: `Applies goose's SQL migrations to all tenants, or to those that are selected.
The folder --dir has two:

    shared/  once per database: tables that tenants share
    tenant/  for the template, and each tenant with a schema or database

A run is kept in the database. Ctrl-C stops it after the tenants that are being
worked on, and says how to go on with it; a second Ctrl-C cancels those too.`,
		Example: `  pgxtenant migrate plan
  pgxtenant migrate up --canary acme --stop-after 5
  pgxtenant migrate status --pending
  pgxtenant migrate runs release-42
  pgxtenant migrate down --to 41 --id acme`,
	}, a.migrateUp(), a.migrateDown(), a.migrateStatus(), a.migratePlan(), a.migrateRuns())
}

// migration is what a migrate command is told.
type migration struct {
	dir         string
	outOfOrder  bool
	acceptEdits []int64
	isolations  []string
	resume      string
	to          int64
	asJSON      bool
	o           pgxtenant.ForEachOptions
}

// selection adds the flags that say which tenants are meant.
func (m *migration) selection(f *pflag.FlagSet, cmd *cobra.Command) {
	f.StringVar(&m.dir, "dir", "migrations", "`folder` of the migrations, with shared/ and tenant/")
	f.StringSliceVar(&m.isolations, "isolation", nil, "only tenants with one of these: `row`, schema or database; row are the shared tables")
	f.StringSliceVar(&m.o.Plans, "plan", nil, "only tenants on one of these `plans`")
	f.StringSliceVar(&m.o.IDs, "id", nil, "only these `tenants`")
	f.Float64Var(&m.o.Percent, "percent", 0, "only so many `percent` of the tenants, the same ones each time (default: all)")
	f.BoolVar(&m.o.SkipShared, "skip-shared", false, "leave the shared tables alone")
	f.BoolVar(&m.o.SkipTemplates, "skip-templates", false, "leave the templates alone")
	f.BoolVar(&m.outOfOrder, "out-of-order", false, "apply what a tenant lacks below its version, too")
	f.Int64SliceVar(&m.acceptEdits, "accept-edits", nil, "`versions` whose files were changed after they were applied")
	f.Lookup("accept-edits").DefValue = "" // which prints as none, where that of an empty list would be []
	f.BoolVar(&m.asJSON, "json", false, "print one JSON object per line")
	choices(cmd, "isolation", "row", "schema", "database")
	must(cmd.MarkFlagDirname("dir"))
}

// pace adds the flags that say how a run goes.
func (m *migration) pace(f *pflag.FlagSet) {
	f.IntVar(&m.o.Concurrency, "concurrency", pgxtenant.DefaultRunConcurrency, "how many tenants at once")
	f.IntVar(&m.o.PerServer, "per-server", 0, "how many at once on one server (default: as many as --concurrency)")
	f.StringSliceVar(&m.o.Canaries, "canary", nil, "`tenants` of those selected that come first; the rest is left alone if one fails")
	f.Float64SliceVar(&m.o.Waves, "waves", nil, "`percentages` of the tenants to be done after each wave, such as 1,10")
	f.Lookup("waves").DefValue = ""
	f.IntVar(&m.o.StopAfter, "stop-after", 0, "stop after so many failures (default: go on to the end)")
	f.Float64Var(&m.o.StopRate, "stop-rate", 0, "stop if more than this `part` of the tenants fail, 0.1 for a tenth")
	f.DurationVar(&m.o.LockTimeout, "lock-timeout", pgxtenant.DefaultRunLockTimeout, "how long a statement waits for a lock before it is tried again; 0 is for ever")
	f.DurationVar(&m.o.StatementTimeout, "statement-timeout", pgxtenant.DefaultRunStatementTimeout, "how long a statement may take; 0 is for ever")
	f.StringVar(&m.o.Name, "name", "", "`name` of the run (default: made of the time)")
	f.StringVar(&m.resume, "resume", "", "go on with the run of this `name`; its selection must be given again")
	f.BoolVar(&m.o.Fresh, "fresh", false, "begin anew, and give up a run of the same --name that was not completed")
	f.BoolVar(&m.o.FailedOnly, "failed-only", false, "with --resume: only what has failed")
}

// zeros says what a zero means that was given. The options' own zero is the default, which is none that is asked for.
func (m *migration) zeros(f *pflag.FlagSet) error {
	for name, timeout := range map[string]*time.Duration{"lock-timeout": &m.o.LockTimeout, "statement-timeout": &m.o.StatementTimeout} {
		switch {
		case !f.Changed(name):
		case *timeout < 0:
			return usagef("--%s is %v; want 0, which is for ever, or more", name, *timeout)
		case *timeout == 0:
			*timeout = -1
		}
	}
	for name, value := range map[string]float64{"percent": m.o.Percent, "concurrency": float64(m.o.Concurrency), "per-server": float64(m.o.PerServer),
		"stop-after": float64(m.o.StopAfter), "stop-rate": m.o.StopRate} {
		if f.Changed(name) && value == 0 {
			return usagef("--%s is 0; leave it out, or say more", name)
		}
	}
	for name, value := range map[string]string{"name": m.o.Name, "resume": m.resume} {
		if f.Changed(name) && value == "" {
			return usagef("--%s is given, and names no run", name)
		}
	}
	return nil
}

// open opens the database and reads the migrations.
func (m *migration) open(cmd *cobra.Command, a *app) (*pgxtenant.TenantDB, *tenantgoose.Migrator, error) {
	if err := m.zeros(cmd.Flags()); err != nil {
		return nil, nil, err
	}
	for _, name := range m.isolations {
		isolation, err := isolationOf(name)
		if err != nil {
			return nil, nil, err
		}
		m.o.Isolations = append(m.o.Isolations, isolation)
	}
	if !folder(m.dir) {
		return nil, nil, usagef("there is no folder of migrations %q; --dir names it", m.dir)
	}
	if !folder(filepath.Join(m.dir, "shared")) && !folder(filepath.Join(m.dir, "tenant")) {
		return nil, nil, usagef("the folder of migrations %q has neither a folder shared nor a folder tenant; --dir names another", m.dir)
	}
	db, err := a.open(cmd.Context(), needs{})
	if err != nil {
		return nil, nil, err
	}
	var options []tenantgoose.Option
	if m.outOfOrder {
		options = append(options, tenantgoose.WithOutOfOrder())
	}
	if len(m.acceptEdits) > 0 {
		options = append(options, tenantgoose.AcceptEdits(m.acceptEdits...))
	}
	migrator, err := tenantgoose.New(db, os.DirFS(m.dir), options...)
	if err != nil {
		db.Close()
		return nil, nil, &exitError{exitUsage, err}
	}
	return db, migrator, nil
}

func folder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func (a *app) migrateUp() *cobra.Command {
	var m migration
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Apply migrations",
		Long: `Applies to each selected tenant the migrations that it lacks: first to the
shared tables, then to the templates, then to canaries, then to all others, in
waves. A failure of a tenant is reported, and the others go on, up to
--stop-after.

Exits with 1 if one has failed, and with 3 if the selection matches nothing.`,
		Example: `  pgxtenant migrate up
  pgxtenant migrate up --canary acme,initech --waves 1,10,50 --stop-rate 0.05
  pgxtenant migrate up --resume release-42 --failed-only
  pgxtenant migrate up --isolation schema --percent 10 --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			db, migrator, err := m.open(cmd, a)
			if err != nil {
				return err
			}
			defer db.Close()
			do := migrator.Up
			if cmd.Flags().Changed("to") {
				if err := known(migrator.Migrations(), m.to); err != nil {
					return err
				}
				do = func(ctx context.Context, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
					return migrator.UpTo(ctx, m.to, o)
				}
			}
			return a.migrate(cmd, db, &m, do)
		},
	}
	m.selection(cmd.Flags(), cmd)
	m.pace(cmd.Flags())
	cmd.Flags().Int64Var(&m.to, "to", 0, "`version` to go up to (default: the newest)")
	return cmd
}

func (a *app) migrateDown() *cobra.Command {
	var m migration
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Take migrations back",
		Long: `Takes back the newest migration of the files wherever it is applied, or all
above --to. It asks first, for what a migration drops is gone.

The shared tables are left alone, unless --isolation is row: then it is they.`,
		Example: `  pgxtenant migrate down --id acme
  pgxtenant migrate down --to 41 --dry-run
  pgxtenant migrate down --isolation row --yes`,
		Args: cobra.NoArgs,
	}
	yes := yesFlag(cmd)
	m.selection(cmd.Flags(), cmd)
	m.pace(cmd.Flags())
	cmd.Flags().Int64Var(&m.to, "to", 0, "`version` to go back to, 0 for none (default: the one before the newest)")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the SQL, and change nothing")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		db, migrator, err := m.open(cmd, a)
		if err != nil {
			return err
		}
		defer db.Close()
		if err := known(migrator.Migrations(), m.to); err != nil {
			return err
		}
		back := m.takenBack(migrator.Migrations(), cmd.Flags().Changed("to"))
		if dryRun {
			return a.printDown(m.dir, back)
		}
		if !*yes && len(back) > 0 {
			names := make([]string, len(back))
			for i, b := range back {
				names[i] = b.Name
			}
			if err := a.confirm(cmd.Context(), "yes", "Take back %s, wherever it is applied and was selected? What it drops is gone.", printable(strings.Join(names, ", "))); err != nil {
				return err
			}
		}
		do := migrator.Down
		if cmd.Flags().Changed("to") {
			do = func(ctx context.Context, o pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error) {
				return migrator.DownTo(ctx, m.to, o)
			}
		}
		return a.migrate(cmd, db, &m, do)
	}
	return cmd
}

// takenBack are the migrations that down takes back, the newest first. They are of one folder, in which the newest may not be
// the newest of all.
func (m *migration) takenBack(all []tenantgoose.Migration, to bool) (back []tenantgoose.Migration) {
	shared := len(m.o.Isolations) == 1 && m.o.Isolations[0] == pgxtenant.IsolationRow
	for _, one := range slices.Backward(all) {
		switch {
		case one.Shared != shared:
		case to && one.Version <= m.to || !to && len(back) > 0:
			return back
		default:
			back = append(back, one)
		}
	}
	return back
}

// migrate runs a migration, and tells how it goes.
func (a *app) migrate(cmd *cobra.Command, db *pgxtenant.TenantDB, m *migration, do func(context.Context, pgxtenant.ForEachOptions) (*pgxtenant.RunReport, error)) error {
	if m.o.FailedOnly && m.resume == "" {
		return usagef("--failed-only goes on with a run; --resume names it")
	}
	if m.resume != "" {
		if m.o.Name != "" && m.o.Name != m.resume {
			return usagef("--name and --resume name two runs")
		}
		if m.o.Fresh {
			return usagef("--resume goes on with a run, and --fresh gives it up")
		}
		if err := resumable(cmd.Context(), db, m.resume); err != nil {
			return err
		}
		m.o.Name = m.resume
	}
	if m.o.Name == "" {
		// A name of our own is known before the run has a report, so that it can always be said how to go on.
		m.o.Name = cmd.Name() + "-" + time.Now().UTC().Format("20060102T150405.000")
	}
	show := a.progress(m.asJSON)
	ctx, stop, release := a.gently(cmd.Context(), show.say)
	defer release()
	m.o.Stop = stop
	m.o.OnProgress = show.progress
	report, err := do(ctx, m.o)
	show.end(report)
	if report == nil {
		return ofOptions(err)
	}
	if m.asJSON {
		_ = a.out.json(a.viewOfReport(report, err)) // how to go on is worth more than that it was not written
	} else {
		a.report(report)
	}
	if errors.Is(err, pgxtenant.ErrNothingSelected) {
		return nothing(err)
	}
	if err == nil {
		return nil
	}
	code := exitFailed
	select {
	case <-stop:
		code = exitInterrupted
	default:
	}
	return &exitError{code, fmt.Errorf("%s\nGo on with it by:\n%s", brief(err), resumption(cmd, m.o.Name, a.err.width))}
}

var optionName = regexp.MustCompile(`ForEachOptions\.([A-Z][A-Za-z]+)`)

// ofOptions names flags where an error names fields.
func ofOptions(err error) error {
	if err == nil || !optionName.MatchString(err.Error()) {
		return err
	}
	return &exitError{exitUsage, errors.New(optionName.ReplaceAllStringFunc(err.Error(), func(field string) string {
		field = strings.TrimPrefix(field, "ForEachOptions.")
		if name, ok := map[string]string{"IDs": "id", "Canaries": "canary", "Plans": "plan", "Isolations": "isolation"}[field]; ok {
			return "--" + name
		}
		var flag strings.Builder
		for i, r := range field {
			if unicode.IsUpper(r) && i > 0 {
				flag.WriteByte('-')
			}
			flag.WriteRune(unicode.ToLower(r))
		}
		return "--" + flag.String()
	}))}
}

// known refuses a version that no file has.
func known(all []tenantgoose.Migration, version int64) error {
	if version == 0 || slices.ContainsFunc(all, func(m tenantgoose.Migration) bool { return m.Version == version }) {
		return nil
	}
	return usagef("no migration has the version %d", version)
}

// brief is what there is to say of a run whose failures have been told one by one.
func brief(err error) string {
	var run *pgxtenant.RunError
	if !errors.As(err, &run) {
		return err.Error()
	}
	p := &run.Report.RunProgress
	text := fmt.Sprintf("run %s: %d of %d failed", p.Name, p.Failed+p.Unknown, p.Total)
	if run.Cause != nil {
		text += "; " + run.Cause.Error()
	}
	if run.Report.LeftOver > 0 {
		text += fmt.Sprintf("; left to do: %d", run.Report.LeftOver)
	}
	return text
}

// resumable says what is wrong with resuming a run of that name.
func resumable(ctx context.Context, db *pgxtenant.TenantDB, name string) error {
	named, err := db.Runs(ctx, 1, name)
	switch {
	case err != nil:
		return err
	case len(named) > 0 && named[0].Complete:
		return &exitError{exitFound, fmt.Errorf("run %s is complete; there is nothing left of it to do", strconv.Quote(name))}
	case len(named) > 0:
		return nil
	}
	latest, err := db.Runs(ctx, 20)
	if err != nil {
		return err
	}
	var open []string
	for _, r := range latest {
		if !r.Complete && len(open) < 5 {
			open = append(open, r.Name)
		}
	}
	hint := "none of late is incomplete"
	if len(open) > 0 {
		hint = "incomplete are " + strings.Join(open, ", ")
	}
	return &exitError{exitFound, fmt.Errorf("there is no run %s; %s", strconv.Quote(name), hint)}
}

// resumption is the command that goes on with a run. Flags that all commands share are left out: they may hold a
// connection string.
//
// It is broken where a shell takes it for one line all the same; a width of 0 means not at all.
func resumption(cmd *cobra.Command, name string, width int) string {
	words := []string{cmd.CommandPath(), "--resume", quoted(name)}
	shared := cmd.Root().PersistentFlags()
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Name == "name" || f.Name == "resume" || f.Name == "failed-only" || f.Name == "fresh" || shared.Lookup(f.Name) != nil {
			return
		}
		value := f.Value.String()
		if list, ok := f.Value.(pflag.SliceValue); ok {
			value = strings.Join(list.GetSlice(), ",")
		}
		if f.Value.Type() == "bool" && value == "true" {
			words = append(words, "--"+f.Name)
			return
		}
		words = append(words, "--"+f.Name+"="+quoted(value))
	})
	text, line := "", "  "
	for i, word := range words {
		if i > 0 && width > 0 && len(line)+len(word)+len(" \\") > width {
			text, line = text+line+"\\\n", "    "
		}
		line += word + " "
	}
	return strings.TrimRight(text+line, " ")
}

// quoted is a word for a shell.
func quoted(word string) string {
	if strings.Trim(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.,/:=+%@") == "" && word != "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
