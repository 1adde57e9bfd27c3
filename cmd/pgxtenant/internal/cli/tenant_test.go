package cli

import (
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestATenantFromCreationToDeletion(t *testing.T) {
	t.Parallel()
	s := installed(t)
	require.Contains(t, s.ok("tenant", "create", "acme", "--plan", "pro", "--alias", "acme.example.com,acme.org", "--set", "app.x=y"),
		"Tenant acme is active, in shared tables.")
	require.Contains(t, s.ok("tenant", "create", "initech", "--isolation", "schema", "--status", "suspended"), "Tenant initech is suspended, in schema tenant_initech.")
	require.Contains(t, s.ok("tenant", "create", "acme"), "is there already")

	list := s.ok("tenant", "list")
	require.Equal(t, []string{"ID", "STATUS", "ISOLATION", "PLAN", "PLACE", "ALIASES"}, strings.Fields(strings.Split(list, "\n")[0]))
	require.Regexp(t, `acme +active +row +pro +shared tables +acme.example.com acme.org\n`, list)
	require.Regexp(t, `initech +suspended +schema +schema tenant_initech\n`, list)
	require.NotContains(t, s.ok("tenant", "list", "--isolation", "row"), "initech")
	var v tenantView
	require.NoError(t, json.Unmarshal([]byte(s.ok("tenant", "list", "--json", "--status", "suspended")), &v))
	require.Equal(t, "initech", v.ID)
	require.Equal(t, "tenant_initech", v.Schema)
	require.NoError(t, json.Unmarshal([]byte(s.ok("tenant", "show", "acme", "--json")), &v))
	require.Equal(t, map[string]string{"app.x": "y"}, v.Settings)

	require.Contains(t, s.ok("tenant", "suspend", "acme"), "Tenant acme is suspended.")
	require.Regexp(t, `Status +suspended`, s.ok("tenant", "show", "acme"))
	s.ok("tenant", "suspend", "acme", "--read-only")
	require.Regexp(t, `Status +read-only`, s.ok("tenant", "show", "acme"))
	require.Contains(t, s.ok("tenant", "resume", "acme"), "Tenant acme is active.")

	for _, id := range []string{"acme", "initech"} {
		require.Contains(t, s.ok("tenant", "delete", id, "--yes"), "Tenant "+id+" is deleted.")
		s.run("tenant", "show", id).fails(exitFound, "not found")
	}
	r := s.run("tenant", "list")
	require.Zero(t, r.code)
	require.Contains(t, r.err, "There are no tenants yet")
}

// What a dry run prints is what psql can run in place of the command.
func TestADryRunPrintsTheSQL(t *testing.T) {
	t.Parallel()
	s := newShop(t)
	s.psql(s.ok("init", "--dry-run"))
	s.psql(s.ok("tenant", "create", "acme", "--plan", "it's", "--dry-run"))
	require.Contains(t, s.ok("tenant", "show", "acme"), "it's")
	plan := s.ok("tenant", "delete", "acme", "--dry-run")
	require.Contains(t, s.ok("tenant", "show", "acme"), "active")
	s.psql(plan)
	s.run("tenant", "show", "acme").fails(exitFound)
}

func (s *shop) psql(sql string) {
	s.t.Helper()
	cmd := exec.Command("psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname="+s.OwnerURL())
	cmd.Stdin = strings.NewReader(sql)
	out, err := cmd.CombinedOutput()
	require.NoError(s.t, err, "%s\n%s", out, sql)
}

func TestDeletionAsksFirst(t *testing.T) {
	t.Parallel()
	s := installed(t)
	s.ok("tenant", "create", "acme")
	s.run("tenant", "delete", "acme").fails(exitRefused, "stdin is no terminal; say --yes", "Nothing was done")
	runWith(t, "acme\n", s.env, "tenant", "delete", "acme").fails(exitRefused)
	require.Contains(t, s.ok("tenant", "show", "acme"), "active")
}

// A tenant's connection string comes over stdin, and is never shown.
func TestAConnectionStringIsTakenAndNotShown(t *testing.T) {
	t.Parallel()
	s := installed(t)
	s.env = append(s.env, "PGXTENANT_REGISTRY_KEY="+strings.Repeat("ab", 32))
	const url = "postgres://hooli:sEcret99@db.example.com/hooli"
	passwords.Store("sEcret99", true)
	passwords.Store("db.example.com/hooli", true)
	args := []string{"tenant", "create", "hooli", "--isolation", "database", "--connection-stdin"}
	r := runWith(t, url+"\n", s.env, append(args, "--dry-run")...)
	require.Zero(t, r.code, r.err)
	require.Contains(t, r.out, "secrets are left out")
	r = runWith(t, url+"\n", s.env, args...)
	require.Zero(t, r.code, r.err)
	require.Contains(t, r.out, "Tenant hooli is active, in database of its own.")
	require.Contains(t, s.ok("tenant", "show", "hooli"), "database of its own")
	require.Contains(t, s.ok("tenant", "list", "--json"), `"has_connection_string":true`)
	runWith(t, "", s.env, "tenant", "create", "b", "--isolation", "database", "--connection-stdin").fails(exitUsage, "no connection string on stdin")
	runWith(t, "postgres://u:sEcret99@h:port/d", s.env, "tenant", "create", "b", "--isolation", "database", "--connection-stdin").fails(exitUsage, "invalid")

	refs := append(s.env, "PGXTENANT_REGISTRY_KEY=", "PGXTENANT_REGISTRY_REFERENCES=true")
	r = runWith(t, "vault:shop/globex\n", refs, "tenant", "create", "globex", "--isolation", "database", "--connection-stdin")
	require.Zero(t, r.code, r.err)
	r = run(t, refs, "tenant", "delete", "globex", "--yes")
	require.Zero(t, r.code, r.err)

	// Without the key no more than the ID can be read.
	s.env = append(s.env, "PGXTENANT_REGISTRY_KEY=")
	r = s.run("tenant", "list")
	r.fails(exitFailed, "of 1 tenant no more than the ID can be read; is registry_key the service's?")
	require.Regexp(t, `hooli +unreadable`, r.out)
}

// A database is made on a server of the config file, and dropped there.
func TestADatabaseTenantIsMadeOnAServer(t *testing.T) {
	t.Parallel()
	s := installed(t)
	super, err := url.Parse(s.SuperURL())
	require.NoError(t, err)
	if password, ok := super.User.Password(); ok && password != "" {
		passwords.Store(password, true)
	}
	config := file(t, "c.yaml", "servers:\n  eu:\n    admin: "+s.SuperURL()+"\n    database: "+s.AppURL()+"\n    conn_limit: 7\n")
	s.env = append(s.env, "PGXTENANT_CONFIG="+config)
	id := "umbrella" + strings.TrimPrefix(s.Name, "pgxtenant_")
	plan := s.ok("tenant", "create", id, "--isolation", "database", "--dry-run")
	require.Contains(t, plan, `-- what follows is for database "`+s.Name+`" of server "eu"`)
	require.Contains(t, plan, "connection limit 7")
	require.Contains(t, s.ok("tenant", "create", id, "--isolation", "database"), "in database tenant_"+id+" on eu.")
	inside, err := url.Parse(s.AppURL())
	require.NoError(t, err)
	inside.Path = "/tenant_" + id
	s.Connect(inside.String())
	require.Contains(t, s.ok("tenant", "list", "--server", "eu"), id)
	s.run("tenant", "list", "--server", "us").fails(exitFound, "no tenant matches --server us")
	require.Contains(t, s.ok("tenant", "delete", id, "--dry-run"), `drop database if exists "tenant_`+id+`"`)
	require.NoError(t, os.WriteFile(config, []byte("servers: {eu: {admin: \""+s.SuperURL()+"\", database: \""+s.AppURL()+"\", grace: -1s}}"), 0o600))
	s.ok("tenant", "delete", id, "--yes") // with a connection open
	s.run("tenant", "show", id).fails(exitFound)
}

func TestTenantBadInput(t *testing.T) {
	t.Parallel()
	s := installed(t)
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"tenant", exitUsage, "say which"},
		{"tenant frobnicate", exitUsage, "unknown command"},
		{"frobnicate", exitUsage, "unknown command"},
		{"tenant show", exitUsage, "accepts 1 arg(s)"},
		{"tenant list x", exitUsage, "unknown command"},
		{"tenant list --frob", exitUsage, "unknown flag: --frob"},
		{"tenant list --plan gold,silver --status active", exitFound, "no tenant matches --plan gold,silver --status active"},
		{"tenant list --isolation none", exitUsage, `there is no isolation "none"; want row, schema or database`},
		{"tenant list --status none", exitUsage, `there is no status "none"`},
		{"tenant show nobody", exitFound, `tenant "nobody": get: tenant not found`},
		{"tenant suspend nobody", exitFound, "not found"},
		{"tenant delete nobody --yes", exitFound, "not found"},
		{"tenant delete nobody --dry-run", exitFound, "not found"},
		{"tenant create -- -x", exitUsage, `it begins with '-'`},
		{"tenant create a --set x", exitUsage, `--set "x": want name=value`},
		{"tenant create a --set search_path=x", exitUsage, "search_path"},
		{"tenant create a --status deleting", exitUsage, "not provisioned to be deleting"},
		{"tenant create a --alias a..b", exitUsage, "invalid alias"},
		{"tenant create a --isolation database --server eu", exitFailed, "there is no server to make databases on"},
		{"tenant create a --isolation schema --template nope", exitFailed, "nope"},
		{"tenant create b --isolation schema --schema template", exitFailed, `schema "template" is the template`},
		{"tenant show b", exitFound, "not found"},
		{"tenant list --plan=", exitUsage, "--plan is given, and names nothing"},
		{"tenant list --registry-ttl soon", exitUsage, "invalid argument"},
		{"tenant list --registry-ttl -5s", exitUsage, "--registry-ttl is -5s"},
		{"tenant list --config /nowhere.yaml", exitUsage, "no such file"},
	} {
		s.run(strings.Fields(c.args)...).fails(c.code, c.says)
	}
}

func TestNoRightsAndNoServer(t *testing.T) {
	t.Parallel()
	s := installed(t)
	app := []string{"PGXTENANT_ADMIN=" + s.AppURL()}
	run(t, app, "tenant", "list").fails(exitFailed, "the role lacks a right; pgxtenant init grants it")
	run(t, app, "tenant", "create", "a").fails(exitFailed, "lacks a right")
	run(t, app, "tenant", "create", "a", "--dry-run").fails(exitFailed, "lacks a right")
	run(t, app, "init").fails(exitUsage, "--database")
	run(t, nil, "tenant", "list").fails(exitUsage, "--admin, PGXTENANT_ADMIN, or admin in the config file")
	passwords.Store("sEcret98", true)
	for _, conn := range []string{"postgres://u:sEcret98@127.0.0.1:1/d", "host=127.0.0.1 port=1 user=u password=sEcret98"} {
		run(t, []string{"PGXTENANT_ADMIN=" + conn}, "tenant", "list").fails(exitFailed, "connection refused")
	}
	for _, conn := range []string{"postgres://u:sEcret98@h:port/d", "host=h password='sEcret98", "postgres://u:sEcret98/x@h/d", "postgres://u:sEcret98@h/d?sslmode=sEcret98"} {
		run(t, []string{"PGXTENANT_ADMIN=" + conn}, "tenant", "list").fails(exitUsage, "invalid connection string")
	}
	// Not installed yet.
	bare := newShop(t)
	bare.run("tenant", "list").fails(exitFailed, "run pgxtenant init")
}

// A disk that is full is a failure, wherever it is met; that nobody reads on is none.
func TestOutputThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	s := installed(t)
	s.ok("tenant", "create", "acme")
	for _, args := range []string{"tenant list", "tenant list --json", "tenant suspend acme", "tenant show acme", "audit --fail-on never", "init --dry-run", "--help", "--version"} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		require.NoError(t, err)
		defer full.Close()
		cmd := program(t, t.Context(), s.env, strings.Fields(args)...)
		var errs strings.Builder
		cmd.Stdout, cmd.Stderr = full, &errs
		_ = cmd.Run()
		require.Equal(t, exitFailed, cmd.ProcessState.ExitCode(), args)
		require.Contains(t, errs.String(), "no space left on device", args)
	}
}
