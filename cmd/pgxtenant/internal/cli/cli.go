// Package cli is the command line.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pgxtenant/pgxtenant"
)

// Exit codes, as docs/command-line.md tells them.
const (
	exitFailed      = 1   // something went wrong; stderr says what
	exitUsage       = 2   // wrong flags, arguments, environment or config file; nothing was done
	exitFound       = 3   // the audit has found something, or no tenant is meant by what was said
	exitRefused     = 4   // not confirmed; nothing was done
	exitInterrupted = 130 // ended by Ctrl-C, SIGTERM or SIGHUP
)

// exitError is an error with an exit code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }

func (e *exitError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// app is one run of the program: its streams, and what commands share.
type app struct {
	in       *os.File
	out      *output
	err      *output
	settings settings
	ready    bool // the command line could be understood

	signalsOff func() // has signals end the program again, and ends the context of commands
	ownSignals bool   // a command has done so: that the context has ended does not tell of a signal
}

// Main runs the program and returns its exit code.
func Main(args []string, in, out, err *os.File) int {
	ctx, stop := signal.NotifyContext(context.Background(), endings()...)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the program at once
	a := &app{in: in, out: newOutput(out), err: newOutput(err), signalsOff: stop}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	return a.exitCode(ctx, cmp.Or(root.ExecuteContext(ctx), a.out.lost()))
}

// endings are the signals that end the program, or a run. What it was started to take no notice of, as by nohup, is none.
func endings() []os.Signal {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		signals = append(signals, syscall.SIGHUP)
	}
	return signals
}

// Root is the command as the pages about it describe it.
func Root() *cobra.Command {
	return (&app{in: os.Stdin, out: newOutput(os.Stdout), err: newOutput(os.Stderr)}).root()
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "pgxtenant",
		Short: "Tenants of a PostgreSQL database, for operators",
		Long: `pgxtenant makes and removes tenants, puts tables under row-level security,
audits a database, and shows what a running service does with it.

It logs in as the role that owns the tables (--admin), and reads off the
service's own connection string (--database) whom to grant what. Both may stand
in the environment or in a config file, where other users of this machine
cannot see them; no output repeats a connection string.

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration, nothing done;
3 findings of an audit, or no tenant that was meant; 4 not confirmed, nothing
done; 130 interrupted.`,
		Example: `  export PGXTENANT_ADMIN=postgres://owner@db.example.com/shop
  export PGXTENANT_DATABASE=postgres://shop@db.example.com/shop
  pgxtenant init
  pgxtenant rls enable invoice billing.payment
  pgxtenant tenant create acme --plan pro --alias acme.example.com
  pgxtenant audit`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.settings.load(cmd.Root().PersistentFlags()); err != nil {
				return &exitError{exitUsage, err}
			}
			if err := notEmpty(cmd.Flags()); err != nil {
				return err
			}
			if a.settings.warning != "" {
				a.err.line("%s %s", a.err.paint(yellow, "pgxtenant:"), printable(a.settings.warning))
			}
			a.ready = true
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	a.settings.flags(root.PersistentFlags())
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	must(root.MarkPersistentFlagFilename("config", "yaml", "yml"))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitUsage, err} })
	root.SetUsageTemplate(usageTemplate(root.UsageTemplate()))
	root.AddCommand(a.initCommand(), a.tenantCommand(), a.rlsCommand(), a.auditCommand(), a.migrateCommand(), a.topCommand(), a.moveCommand())
	root.InitDefaultCompletionCmd()
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		group(completion) // which would take any shell for a wish for help
	}
	return root
}

// notEmpty refuses lists that are given with nothing in them, such as by a variable of a shell that is not set: a selection by
// nothing would be one of everything.
func notEmpty(flags *pflag.FlagSet) (err error) {
	flags.Visit(func(f *pflag.Flag) {
		if list, ok := f.Value.(pflag.SliceValue); ok && len(list.GetSlice()) == 0 && err == nil {
			err = usagef("--%s is given, and names nothing; leave it out if that is meant", f.Name)
		}
	})
	return err
}

// version is that of the module, as the binary was built from it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// usageTemplate breaks the lines of flags at 80 columns.
func usageTemplate(template string) string {
	cobra.AddTemplateFunc("flagUsages", func(cmd *cobra.Command, inherited bool) string {
		if inherited {
			return cmd.InheritedFlags().FlagUsagesWrapped(80)
		}
		return cmd.LocalFlags().FlagUsagesWrapped(80)
	})
	return strings.NewReplacer(".LocalFlags.FlagUsages", "flagUsages . false", ".InheritedFlags.FlagUsages", "flagUsages . true").Replace(template)
}

// choices are what completion offers for a flag.
func choices(cmd *cobra.Command, flag string, values ...string) {
	must(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
}

// must is for what fails where there is no such flag.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// group is a command that has only commands of its own.
func group(c *cobra.Command, commands ...*cobra.Command) *cobra.Command {
	c.Args = cobra.NoArgs
	c.RunE = func(cmd *cobra.Command, args []string) error {
		cmd.SetOut(cmd.ErrOrStderr())
		_ = cmd.Usage()
		return usagef("say which: pgxtenant %s COMMAND", c.Name())
	}
	c.AddCommand(commands...)
	return c
}

// prefix is what errors of the package begin with, which needs saying once.
var prefix = regexp.MustCompile(`(?m)(^|[:;] )(?:pgxtenant|tenantgoose): `)

// inOurWords says what the package's errors name as an operator knows it.
var inOurWords = strings.NewReplacer(
	"call Registry.Install", "run pgxtenant init", "Registry.Install", "pgxtenant init", "call InstallSeal", "run pgxtenant init",
	"take another Name, or set Fresh", "or take another --name, or --fresh", "WithOutOfOrder", "--out-of-order", "DatabaseOptions.Template", "the server's template",
	"Provision makes it, or Deprovision removes the tenant", "tenant create makes it, or tenant delete removes the tenant", "Provision completes it", "tenant create completes it", "Deprovision removes it", "tenant delete removes it",
	"Config.Admin", "--admin", "Config.Shared", "--database", "Config.TemplateReference", "--template-reference", "Config.Template", "--template", "Config.Servers", "servers",
	"set Backfill", "set --backfill", "FailedOnly", "--failed-only",
	"RegistryConfig.TTL", "--registry-ttl", "RegistryConfig.StaleOnError", "--registry-stale", "Config.AuditAllow", "audit.allow",
	"Config.Registry.Key", "registry_key", "Config.Registry.TTL", "--registry-ttl", "Config.Registry.StaleOnError", "--registry-stale",
	"Config.Seal.Key", "seal_key")

var acceptEdits = regexp.MustCompile(`AcceptEdits\(([0-9, ]+)\)`)

// ourWords is the text of an error for an operator, without secrets.
func (a *app) ourWords(err error) string {
	text := prefix.ReplaceAllString(a.settings.masked(err.Error()), "$1")
	return acceptEdits.ReplaceAllStringFunc(inOurWords.Replace(text), func(call string) string {
		return "--accept-edits " + strings.ReplaceAll(acceptEdits.FindStringSubmatch(call)[1], ", ", ",")
	})
}

// exitCode says what went wrong, without secrets, and how the program ends for it.
func (a *app) exitCode(ctx context.Context, err error) int {
	if err == nil {
		return 0
	}
	code := exitFailed
	var own *exitError
	switch {
	case errors.As(err, &own):
		code = own.code
	case !a.ready && a.out.lost() == nil:
		code = exitUsage // cobra's own complaints about arguments
	case errors.Is(err, pgxtenant.ErrTenantNotFound):
		code = exitFound
	case errors.Is(err, pgxtenant.ErrInvalidTenantID), errors.Is(err, pgxtenant.ErrInvalidTenant), errors.Is(err, pgxtenant.ErrInvalidAlias):
		code = exitUsage
	case ctx.Err() != nil && !a.ownSignals:
		code = exitInterrupted
	}
	text := a.ourWords(err)
	if code == exitInterrupted {
		text = "interrupted: " + text
	}
	a.err.line("%s %s", a.err.paint(red, "pgxtenant:"), printableLines(text))
	if code == exitUsage {
		a.err.line("Run it with --help to see how it is used.")
	}
	return code
}
