package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// migrations writes a folder: names and SQL in turn, up and down parted by "--down".
func migrations(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(dir, files[i])
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		up, down, _ := strings.Cut(files[i+1], "--down")
		require.NoError(t, os.WriteFile(path, []byte("-- +goose Up\n"+up+";\n-- +goose Down\n"+strings.TrimSpace(down)+";\n"), 0o600))
	}
	return dir
}

// migrating is a shop with schema tenants, each with a table of one column.
func migrating(t *testing.T, tenants ...string) *shop {
	t.Helper()
	s := installed(t)
	for _, id := range tenants {
		s.ok("tenant", "create", id, "--isolation", "schema")
	}
	s.env = append(s.env, "PGXTENANT_TEMPLATE_REFERENCE=goose_db_version")
	return s
}

func (s *shop) columns(schema string) (names string) {
	s.t.Helper()
	conn := s.Connect(s.OwnerURL())
	require.NoError(s.t, conn.QueryRow(s.t.Context(), `select coalesce(string_agg(attname, ' ' order by attnum), '') from pg_attribute
		where attrelid = to_regclass(quote_ident($1) || '.note') and attnum > 0 and not attisdropped`, schema).Scan(&names))
	return names
}

const addTag = "alter table note add tag text --down alter table note drop tag"

func TestMigrateUpStatusPlanDown(t *testing.T) {
	t.Parallel()
	s := migrating(t, "acme", "initech")
	dir := migrations(t, "shared/00001_country.sql", "create table country (code text) --down drop table country", "tenant/00002_tag.sql", addTag)
	s.env = append(s.env, "PGXTENANT_X=y")
	on := func(args ...string) []string { return append(append([]string{"migrate"}, args...), "--dir", dir) }

	out := s.ok(on("plan")...)
	require.Regexp(t, `tenant/00002_tag.sql +3\n`, out)
	s.run(on("plan", "--check")...).fails(exitFound, "there is something to do")
	s.run(on("status", "--check")...).fails(exitFound, "4 places of 4 lack migrations")

	r := s.run(on("up", "--canary", "acme", "--name", "release-1")...)
	require.Zero(t, r.code, r.err)
	require.Contains(t, r.out, "Run release-1: 4 done, 0 current, 0 failed, 0 unknown, 0 skipped, of 4, in ")
	require.Contains(t, r.err, "shared: ", "lines for a log")
	require.Equal(t, "id body tag", s.columns("tenant_acme"))
	require.Contains(t, s.ok(on("up")...), "0 done, 4 current")
	require.Regexp(t, `acme +schema +\S+ +2 +0\n`, s.ok(on("status")...))
	require.Empty(t, s.ok(on("status", "--pending", "--check")...))
	s.ok(on("plan", "--check")...)

	require.Equal(t, "-- tenant/00002_tag.sql\nalter table note drop tag;\n", s.ok(on("down", "--dry-run")...))
	s.run(on("down")...).fails(exitRefused, "Take back tenant/00002_tag.sql", "Nothing was done")
	require.Equal(t, "id body tag", s.columns("tenant_initech"))
	s.ok(on("down", "--yes", "--id", "initech")...)
	require.Equal(t, "id body", s.columns("tenant_initech"))
	require.Equal(t, "id body tag", s.columns("tenant_acme"))

	// What is being made has no version, and is no failure.
	s.run("tenant", "create", "begun", "--isolation", "schema", "--template-reference", "nope").fails(exitFailed,
		`has no table "nope" yet, which --template-reference names; run the migrations`, "the same command goes on with it")
	r = s.run(on("status")...)
	require.Zero(t, r.code)
	require.Regexp(t, `begun +schema +\S+ +\? +not looked at\n`, r.out)
	require.Contains(t, r.err, `begun not looked at: tenant "begun": run: tenant unavailable: it is being provisioned`)
	require.Contains(t, s.ok(on("plan")...), "Places that have all: 3, that lack something: 1, not looked at: 1.")
	s.ok("tenant", "create", "begun", "--isolation", "schema")
	s.ok("tenant", "delete", "begun", "--yes", "--registry-ttl", "1ms")

	var last struct {
		Event, Run string
		Done       int
		Complete   bool
	}
	lines := strings.Split(strings.TrimSpace(s.ok(on("up", "--json")...)), "\n")
	require.NoError(t, json.Unmarshal([]byte(lines[len(lines)-1]), &last))
	require.Equal(t, "report", last.Event)
	require.Equal(t, 1, last.Done)
	require.True(t, last.Complete)
	for _, line := range lines {
		require.True(t, json.Valid([]byte(line)), line)
	}

	edited := filepath.Join(dir, "tenant", "00002_tag.sql")
	text, err := os.ReadFile(edited)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(edited, append(text, "-- more\n"...), 0o600))
	for _, command := range []string{"up", "plan"} {
		s.run(on(command)...).fails(exitFailed, "tenant/00002_tag.sql; undo the edit", "take it by --accept-edits 2\n")
	}
	s.ok(on("up", "--accept-edits", "2")...)
	require.NoError(t, os.Rename(edited, filepath.Join(dir, "tenant", "00003_tag.sql")))
	require.Regexp(t, `acme +schema +\S+ +2 +1; 1 applied of no file\n`, s.ok(on("status")...))
}

// A failure is told, the others go on, and the run is gone on with by what is said.
func TestMigrateGoesOnWithARun(t *testing.T) {
	t.Parallel()
	s := migrating(t, "acme", "initech", "umbrella")
	dir := migrations(t, "tenant/00001_tag.sql", addTag)
	s.Exec("create view tenant_initech.tag as select 1", "alter table tenant_initech.note add tag int")
	r := s.run("migrate", "up", "--dir", dir, "--concurrency", "1", "--admin", s.OwnerURL())
	r.fails(exitFailed, "initech failed:", `column "tag" of relation "note" already exists`, "1 of 4 failed", "left to do: 1", "Go on with it by:\n  pgxtenant migrate up --resume up-")
	require.Equal(t, "id body tag", s.columns("tenant_umbrella"))
	require.Regexp(t, `up-\S+ +\S+ +\S+ \S+ +not completed +3 +0 +1 +0\n`, s.ok("migrate", "runs"))
	s.Exec("alter table tenant_initech.note drop tag")
	_, command, _ := strings.Cut(r.err, "Go on with it by:\n  pgxtenant ")
	require.NotContains(t, command, "postgres://")
	out := s.ok(strings.Fields(command)...)
	require.Contains(t, out, "It was resumed.")
	require.Equal(t, "id body tag", s.columns("tenant_initech"))
	name := strings.Fields(command)[3]
	require.Empty(t, s.ok("migrate", "runs", name), "nothing has failed in the end")
	require.Contains(t, s.ok("migrate", "runs", name, "--all"), "initech: done, from 0 to 1\n")
	s.run("migrate", "runs", "nope").fails(exitFound, `there has been no run "nope"; migrate runs lists them`)
	s.run("migrate", "up", "--dir", dir, "--resume", name, "--fresh").fails(exitUsage, "--resume goes on with a run, and --fresh gives it up")
	s.run("migrate", "up", "--dir", dir, "--resume", name).fails(exitFound, "is complete")
	s.run("migrate", "up", "--dir", dir, "--resume", "nope").fails(exitFound, `there is no run "nope"; none of late is incomplete`)
	s.run("migrate", "up", "--dir", dir, "--resume", "a", "--name", "b").fails(exitUsage, "name two runs")
	s.Exec("create view tenant_initech.tag_of_note as select tag from tenant_initech.note")
	s.run("migrate", "down", "--dir", dir, "--yes", "--name", "back").fails(exitFailed, "cannot drop column tag", "pgxtenant migrate down --resume back --dir="+dir+" --yes\n")
	s.run("migrate", "down", "--dir", dir, "--resume", "back", "--yes", "--id", "acme").fails(exitFailed, "was begun with other options", "finish it with those, or take another --name, or --fresh")
	require.Regexp(t, `^initech: failed: .*cannot drop column tag.*\n$`, s.ok("migrate", "runs", "back"))
	var failed struct{ Tenant, State, Error string }
	require.NoError(t, json.Unmarshal([]byte(s.ok("migrate", "runs", "back", "--json")), &failed))
	require.Equal(t, "initech failed", failed.Tenant+" "+failed.State)
	require.Contains(t, failed.Error, "cannot drop column tag")
	s.ok("migrate", "down", "--dir", dir, "--name", "back", "--fresh", "--yes", "--id", "acme")
}

// What is taken back is asked for, also where the newest migration is in the other folder, or there is no other.
func TestMigrateDownAsks(t *testing.T) {
	t.Parallel()
	s := migrating(t, "acme")
	const country = "create table country (code text) --down drop table country"
	dir := migrations(t, "tenant/00001_tag.sql", addTag, "shared/00002_country.sql", country)
	s.ok("migrate", "up", "--dir", dir)
	require.Contains(t, s.ok("migrate", "down", "--dir", dir, "--dry-run"), "alter table note drop tag;")
	s.run("migrate", "down", "--dir", dir).fails(exitRefused, "Take back tenant/00001_tag.sql, wherever")
	s.run("migrate", "down", "--dir", dir, "--isolation", "row").fails(exitRefused, "Take back shared/00002_country.sql, wherever")
	require.Equal(t, "id body tag", s.columns("tenant_acme"))

	alone := migrations(t, "shared/00002_country.sql", country)
	s.run("migrate", "down", "--dir", alone).fails(exitFailed, "the folder tenant has none")
	s.ok("migrate", "down", "--dir", dir, "--isolation", "row", "--yes") // it was there
}

// A reader that goes away, as head does, does not end a run.
func TestMigrateWithoutAReader(t *testing.T) {
	t.Parallel()
	s := migrating(t, "acme", "initech")
	dir := migrations(t, "tenant/00001_tag.sql", "select pg_sleep(0.2); "+addTag)
	cmd := program(t, t.Context(), s.env, "migrate", "up", "--dir", dir, "--concurrency", "1", "--json")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = out.Read(make([]byte, 1))
	require.NoError(t, err)
	require.NoError(t, out.Close())
	require.NoError(t, cmd.Wait())
	require.Equal(t, "id body tag", s.columns("tenant_initech"))
}

func TestMigrateBadInput(t *testing.T) {
	t.Parallel()
	s := migrating(t, "acme")
	dir := migrations(t, "tenant/00001_tag.sql", addTag)
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"migrate", exitUsage, "say which"},
		{"migrate runs", exitFound, "there has been no run"},
		{"migrate runs --limit 0", exitUsage, "--limit is 0"},
		{"migrate up --dir /nowhere", exitUsage, `there is no folder of migrations "/nowhere"`},
		{"migrate up --dir " + t.TempDir(), exitUsage, "has neither a folder shared nor a folder tenant"},
		{"migrate up --isolation x --dir " + dir, exitUsage, `there is no isolation "x"`},
		{"migrate up --id nobody --dir " + dir, exitFound, "not found"},
		{"migrate up --plan gold --dir " + dir, exitFound, "the selection matches nothing"},
		{"migrate status --plan gold --dir " + dir, exitFound, "the selection matches nothing"},
		{"migrate plan --plan gold --dir " + dir, exitFound, "the selection matches nothing"},
		{"migrate up --percent 101 --dir " + dir, exitUsage, "--percent is 101"},
		{"migrate up --percent 0 --dir " + dir, exitUsage, "--percent is 0; leave it out, or say more"},
		{"migrate up --concurrency 0 --dir " + dir, exitUsage, "--concurrency is 0; leave it out"},
		{"migrate up --lock-timeout -1s --dir " + dir, exitUsage, "--lock-timeout is -1s; want 0, which is for ever, or more"},
		{"migrate up --id= --dir " + dir, exitUsage, "--id is given, and names nothing"},
		{"migrate up --isolation= --dir " + dir, exitUsage, "--isolation is given, and names nothing"},
		{"migrate up --canary= --dir " + dir, exitUsage, "--canary is given, and names nothing"},
		{"migrate up --resume= --dir " + dir, exitUsage, "--resume is given, and names no run"},
		{"migrate up --failed-only --dir " + dir, exitUsage, "--failed-only goes on with a run; --resume names it"},
		{"migrate up --id a,+ --dir " + dir, exitUsage, `--id has "+": invalid tenant ID`},
		{"migrate up --plan gold --canary acme --dir " + dir, exitUsage, "--canary has it, and it is not among the tenants that are selected"},
		{"migrate up --canary nobody --dir " + dir, exitFound, `tenant "nobody": canary: tenant not found`},
		{"migrate up --dir " + migrations(t, "tenant/00001_tag.SQL", addTag), exitUsage, "tenant/00001_tag.SQL: its name must end in .sql"},
		{"migrate up --dir " + migrations(t, "tenant/00001_tag.sql", addTag, "tenant/00002_x.sql", "-- +goose StatementBegin\nselect 1"), exitUsage, "00002_x.sql"},
		{"migrate up --to 7 --dir " + dir, exitUsage, "no migration has the version 7"},
		{"migrate down --yes --to 7 --dir " + dir, exitUsage, "no migration has the version 7"},
		{"migrate up --concurrency -1 --dir " + dir, exitUsage, "--concurrency is -1"},
		{"migrate up --template-reference x --dir " + dir, exitUsage, `--template-reference lacks "goose_db_version"`},
	} {
		s.run(strings.Fields(c.args)...).fails(c.code, c.says)
	}
	run(t, []string{"PGXTENANT_ADMIN=" + s.AppURL()}, "migrate", "up", "--dir", dir).fails(exitFailed, "permission denied")
	require.Regexp(t, `^RUN .*\nup-\S+ .* complete +0 +0 +0 +0\n$`, s.ok("migrate", "runs"), "that on a plan that nobody is on, and no other")
}

// A timeout of zero is none, as to the server.
func TestMigrateWithoutTimeouts(t *testing.T) {
	t.Parallel()
	s := migrating(t, "acme")
	dir := migrations(t, "tenant/00001_told.sql", "insert into note (body) values (current_setting('lock_timeout') || ' ' || current_setting('statement_timeout'))")
	s.ok("migrate", "up", "--dir", dir, "--lock-timeout", "0", "--statement-timeout", "0")
	var told string
	require.NoError(t, s.Connect(s.OwnerURL()).QueryRow(t.Context(), "select body from tenant_acme.note").Scan(&told))
	require.Equal(t, "0 0", told)
}

// holding has migrations that call public.wait wait for the test, as long as public.hold has a row, rather than for time to
// pass. What it returns returns when one does.
func (s *shop) holding() (atWork func()) {
	s.Exec("create table public.hold ()", "insert into public.hold default values", `create function public.wait() returns void language plpgsql as $$ begin
		while exists (select from public.hold) loop perform pg_sleep(0.01); end loop; end $$`)
	return func() {
		s.t.Helper()
		super := s.Connect(s.SuperURL())
		require.Eventually(s.t, func() bool {
			var n int
			err := super.QueryRow(s.t.Context(), "select count(*) from pg_stat_activity where datname = current_database() and query like '%public.wait%' and state = 'active' and pid <> pg_backend_pid()").Scan(&n)
			return err == nil && n == 1
		}, patience, 10*time.Millisecond)
	}
}

// A terminal that goes away stops a run as Ctrl-C does, however often it says so; what was started to outlive it does.
func TestMigrateWhenTheTerminalGoes(t *testing.T) {
	t.Parallel()
	s := migrating(t, "a", "b", "c")
	atWork := s.holding()
	dir := migrations(t, "tenant/00001_tag.sql", "select public.wait(); "+addTag)
	hangup := func(cmd *exec.Cmd) (string, int) {
		var out bytes.Buffer
		cmd.Stderr = &out
		require.NoError(t, cmd.Start())
		atWork()
		for range 2 {
			require.NoError(t, cmd.Process.Signal(syscall.SIGHUP))
			time.Sleep(20 * time.Millisecond) // or the second one is lost
		}
		s.Exec("delete from public.hold")
		_ = cmd.Wait()
		return out.String(), cmd.ProcessState.ExitCode()
	}
	args := []string{"migrate", "up", "--dir", dir, "--name", "x", "--concurrency", "1", "--skip-templates"}
	out, code := hangup(program(t, t.Context(), s.env, args...))
	require.Equal(t, exitInterrupted, code, out)
	require.Contains(t, out, "pgxtenant migrate up --resume x")
	require.Equal(t, []string{"id body tag", "id body", "id body"}, []string{s.columns("tenant_a"), s.columns("tenant_b"), s.columns("tenant_c")})

	s.Exec("insert into public.hold default values")
	cmd := program(t, t.Context(), s.env, args...)
	cmd.Args = append([]string{"sh", "-c", `trap "" HUP; exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	out, code = hangup(cmd)
	require.Zero(t, code, out)
	require.Equal(t, "id body tag", s.columns("tenant_c"))
}

// On a terminal there is a bar. Ctrl-C stops after the tenants that are being worked on, and says how to go on.
func TestMigrateOnATerminal(t *testing.T) {
	t.Parallel()
	s := migrating(t, "a", "b", "c")
	atWork := s.holding()
	dir := migrations(t, "tenant/00001_tag.sql", "select public.wait(); "+addTag)
	term := onScreen(t, s.env, "migrate", "up", "--dir", dir, "--concurrency", "1", "--skip-templates")
	fits(t, term.until("of 3"))
	atWork()
	term.tmux("send-keys", "C-c")
	term.until("Stopping")
	s.Exec("delete from public.hold")
	require.Equal(t, "130", term.ended(), "%s", term)
	text := term.text()
	fits(t, text)
	require.Contains(t, text, "Stopping when the tenants that are being worked on are done.")
	require.Contains(t, strings.Join(strings.Fields(text), " "), "Stopping when the tenants that are being worked on are done. Ctrl-C again cancels them.")
	require.Regexp(t, `Go on with it by:\n  pgxtenant migrate up --resume up-\S+ --concurrency=1 \\\n *--dir=`, text)
	term.restored()
	require.Equal(t, "id body", s.columns("tenant_c"))

	// Twice cancels.
	s.Exec("insert into public.hold default values")
	dir = migrations(t, "tenant/00001_tag.sql", "select public.wait(); select 1; "+addTag)
	term = onScreen(t, s.env, "migrate", "up", "--dir", dir, "--concurrency", "1", "--skip-templates", "--id", "c", "--accept-edits", "1")
	term.until("0 of 1")
	atWork()
	term.tmux("send-keys", "C-c")
	term.until("Ctrl-C again")
	term.tmux("send-keys", "C-c")
	require.Equal(t, "130", term.ended(), "%s", term)
	require.Equal(t, "id body", s.columns("tenant_c"))
}
