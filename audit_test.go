package pgxtenant

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// auditedDB is a database with a table of tenants' rows, note, as EnableRLS makes it. Names in capitals stand
// for the roles and the database in what its exec methods run.
type auditedDB struct {
	*pgtest.DB
	t  *testing.T
	db *TenantDB
}

func newAuditedDB(t *testing.T, adjust ...func(*Config)) *auditedDB {
	t.Helper()
	d := &auditedDB{pgtest.New(t), t, nil}
	d.Exec("create table note (id bigint generated always as identity primary key, body text)")
	d.db = adminDB(t, d.DB, adjust...)
	require.NoError(t, d.db.EnableRLS(context.Background(), Tables("note")...))
	return d
}

func (d *auditedDB) fill(sql string) string {
	return strings.NewReplacer("APP", d.App, "OWNER", d.Owner, "DATABASE", d.Name,
		// What a table of tenants needs; no test is about what is not in it.
		"TENANT", "tenant_id text not null check (tenant_id <> '')",
		"SETTING", "nullif(current_setting('app.current_tenant_id', true), '')").Replace(sql)
}

func (d *auditedDB) filled(sql []string) []string {
	out := make([]string, len(sql))
	for i, s := range sql {
		out[i] = d.fill(s)
	}
	return out
}

func (d *auditedDB) exec(sql ...string) {
	d.t.Helper()
	d.Exec(d.filled(sql)...)
}

func (d *auditedDB) superExec(sql ...string) {
	d.t.Helper()
	d.SuperExec(d.filled(sql)...)
}

func (d *auditedDB) audit() []Finding {
	d.t.Helper()
	r, err := d.db.Audit(context.Background())
	require.NoError(d.t, err)
	return r.Findings
}

// grave are the findings that are more than a note, as "code: object".
func grave(findings []Finding) (out []string) {
	for _, f := range findings {
		if f.Severity != SeverityInfo {
			out = append(out, f.Code+": "+f.Object)
		}
	}
	return out
}

// guarded makes a table of tenants' rows that the application may use, with an index and a policy.
const guarded = `create table doc (TENANT, id int, body text, shared boolean, kind text, primary key (tenant_id, id));
	alter table doc enable row level security, force row level security;
	grant select, insert, update, delete on doc to APP;`

// strictPolicy is what guarded lacks.
const strictPolicy = `create policy p on doc using (tenant_id = (select SETTING));`

// auditHole is a hole, with what Audit must say of it.
type auditHole struct {
	setup []string // as the owner, first; the database is without findings then
	super []string // as a superuser, after setup
	hole  []string // as the owner, after super
	want  []string // "code: object", all there is; the first is the one that the case is about
	also  []string // codes of notes that come with it
	mend  []string // where the finding has no SQL, what a human might decide
}

// Each hole is found, under its code, and nothing else is; when the SQL that is printed has been run, nothing is found.
func TestAuditFindsEachHole(t *testing.T) {
	t.Parallel()
	for name, c := range auditHoles {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			d := newAuditedDB(t)
			d.exec(c.setup...)
			var before []Finding
			if c.setup != nil {
				before = d.audit()
				require.Empty(t, grave(before))
			}
			d.superExec(c.super...)
			d.exec(c.hole...)

			found := d.audit()
			want := d.filled(c.want)
			var mend []string
			got := grave(found)
			for _, f := range found {
				if f.Severity == SeverityInfo && slices.Contains(c.also, f.Code) {
					got = append(got, f.Code+": "+f.Object)
				}
				if f.Mend != "" && slices.Contains(want, f.Code+": "+f.Object) {
					mend = append(mend, f.Mend)
				}
				require.NotEmpty(t, f.Allows)
				require.True(t, f.Mend != "" || f.Detail != "" || f.Code == "key-without-tenant", "%+v says how it is mended", f)
			}
			require.ElementsMatch(t, want, got, "%s", (&Report{Findings: found}).String())

			d.SuperExec(append(mend, d.filled(c.mend)...)...)
			after := d.audit()
			require.Empty(t, grave(after))
			for _, f := range found {
				if slices.Contains(want, f.Code+": "+f.Object) {
					require.False(t, slices.ContainsFunc(after, func(g Finding) bool { return g.Code == f.Code && g.Object == f.Object }), f.Code)
				}
			}
		})
	}
}

// Every code is found in some test, and is in the documentation with its severity.
func TestAuditCodes(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/audit.md")
	require.NoError(t, err)
	var tests strings.Builder
	for _, file := range []string{"audit_test.go", "audit_holes_test.go", "audit_tenants_test.go"} {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		tests.Write(text)
	}
	for code, c := range auditCodes {
		require.Contains(t, string(page), "| `"+code+"` | "+string(c.severity)+" |")
		require.Regexp(t, `"`+code+`[":]`, tests.String())
	}
	require.Equal(t, len(auditCodes), strings.Count(string(page), "\n| `"), "no code that there is none of")
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	require.Contains(t, string(readme), fmt.Sprintf("%d ways past the isolation", len(auditCodes)))
}

// A database that is as it should be has nothing to find, whatever else is in it.
func TestAuditHasNothingToSayOfAHealthyDatabase(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	p := newProvisioner(t)
	d := p.d
	super := ident(d.Name)
	d.SuperExec("create extension pg_trgm", "create extension citext", "create extension hstore", "create extension postgres_fdw", "revoke temporary on database "+super+" from public")
	d.Exec("drop table aa_line, note", // of a policy by hand, which would do as well
		"create table measure (id bigint generated always as identity, at date, primary key (id, at)) partition by range (at)",
		"create table measure_old partition of measure for values from (minvalue) to ('2020-01-01')",
		"create table measure_new partition of measure default partition by hash (id)",
		"create table measure_new0 partition of measure_new for values with (modulus 1, remainder 0)",
		"create table note (id bigserial primary key, body text)",
		"create table line (tenant_id uuid not null, id uuid default gen_random_uuid(), note bigint, primary key (tenant_id, id))",
		"create table child (extra text) inherits (note)",
		"create table country (id int primary key, name text unique)", "grant select on country to "+ident(d.App),
		"create view notes as select * from note", "grant select on notes to "+ident(d.App),
		"create function helper() returns text language sql security definer set search_path = pg_catalog, public, pg_temp as 'select name from country limit 1'",
		"create table template.child (note int, tenant_id text)", "create view template.v as select * from template.note",
		"create materialized view template.m as select * from template.note",
		"grant select on template.v, template.m to "+ident(d.App))
	db := p.open(nil)
	require.NoError(t, db.Registry().Install(ctx))
	require.NoError(t, db.EnableRLS(ctx, append(Tables("measure", "note", "line"), RLSTable{Name: "country_of", Column: "org"})[:3]...))
	for _, tenant := range p.kinds() {
		require.NoError(t, db.Provision(ctx, tenant))
	}
	schemas, err := db.Schemas()
	require.NoError(t, err)
	_, err = schemas.Stock(ctx, 1)
	require.NoError(t, err)

	r, err := db.Audit(ctx)
	require.NoError(t, err)
	require.Empty(t, grave(r.Findings), r.String())
	require.NoError(t, r.Err())
	require.Equal(t, 7, r.TenantTables)
	for _, f := range r.Findings {
		require.Contains(t, []string{"key-without-tenant", "stand-in", "view-not-invoker"}, f.Code, "%+v", f)
	}
	again, err := db.Audit(ctx)
	require.NoError(t, err)
	require.Equal(t, r, again, "the same, in the same order")
}

// The application's own login sees as much, but for what is none of its business.
func TestAuditWithoutAdmin(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := newAuditedDB(t)
	d.exec(guarded, "create policy p on doc using (true)", "create table other (TENANT)", "grant select on other to APP", "create index on other (tenant_id)")
	require.NoError(t, install(ctx, d.db.Admin(), "schemas", schemaSteps))
	want := d.audit()

	db := openDB(t, d.AppURL())
	r, err := db.Audit(ctx)
	require.NoError(t, err)
	require.Equal(t, []string{"policy-admits-others: policy p on table public.doc", "rls-off: table public.other"}, grave(r.Findings))
	require.Equal(t, grave(want), grave(r.Findings))
	var unseen []string
	for _, f := range r.Findings {
		if f.Code == "not-audited" {
			unseen = append(unseen, f.Object)
		}
	}
	require.Equal(t, []string{"tenants' schemas"}, unseen)
	require.ErrorContains(t, r.Err(), "rls-off: table public.other")

	// Nor need the admin's role have any right.
	stranger := pgtest.New(t)
	db = openDB(t, d.AppURL(), func(c *Config) {
		var err error
		c.Admin, err = pgxpool.ParseConfig(d.AppURL())
		require.NoError(t, err)
		c.Admin.ConnConfig.User = stranger.App
		c.Admin.ConnConfig.Password = mustParse(t, stranger.AppURL()).ConnConfig.Password
		c.Template = "tpl"
		c.Registry = &RegistryConfig{}
	})
	r, err = db.Audit(ctx)
	require.NoError(t, err)
	require.Equal(t, grave(want), grave(r.Findings))
	unseen = nil
	for _, f := range r.Findings {
		if f.Code == "not-audited" {
			unseen = append(unseen, f.Object)
		}
	}
	require.Equal(t, []string{"tenants' schemas", "the registry"}, unseen)
}

func mustParse(t *testing.T, url string) *pgxpool.Config {
	t.Helper()
	c, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	return c
}

// An admin alone finds what the catalogue has, and says that the policies were not tried.
func TestAuditWithoutTheApplicationsLogin(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := newAuditedDB(t)
	d.exec(guarded, "create policy p on doc using (true)")
	db := openDB(t, d.AppURL("application_name=x"), func(c *Config) {
		c.Shared.ConnConfig.Password = "s3cr3t"
		c.Admin = mustParse(t, d.OwnerURL())
	})
	r, err := db.Audit(ctx)
	require.NoError(t, err)
	require.Equal(t, []string{"policy-besides: policy p on table public.doc"}, grave(r.Findings))
	require.True(t, slices.ContainsFunc(r.Findings, func(f Finding) bool {
		return f.Code == "not-audited" && strings.Contains(f.Detail, "could not connect")
	}))
	require.NotContains(t, r.String(), "s3cr3t")

	_, err = openDB(t, d.AppURL(), func(c *Config) { c.Shared.ConnConfig.Password = "s3cr3t" }).Audit(ctx)
	require.ErrorContains(t, err, "pgxtenant: audit: connect as the application: ")
	closed := openDB(t, d.AppURL())
	closed.Close()
	_, err = closed.Audit(ctx)
	require.ErrorIs(t, err, ErrClosed)
}

// Config.RequireAudit refuses to start on an error that is not allowed, and on nothing less.
func TestRequireAudit(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d := newAuditedDB(t)
	d.exec(guarded, strictPolicy, "alter table doc no force row level security") // a warning
	for _, admin := range []bool{true, false} {
		open := func(allow ...AllowedFinding) (*TenantDB, error) {
			config, err := ParseConfig(d.AppURL("tenant_require_audit=true"))
			require.NoError(t, err)
			require.True(t, config.RequireAudit)
			if admin {
				config.Admin = mustParse(t, d.OwnerURL())
			}
			config.AuditAllow = allow
			return NewWithConfig(ctx, config)
		}
		db, err := open()
		require.NoError(t, err)
		db.Close()

		d.exec("create table open (TENANT)", "grant select on open to APP", "grant truncate on note to APP")
		_, err = open()
		var failed *AuditError
		require.ErrorAs(t, err, &failed)
		require.Equal(t, 2, failed.Report.Count(SeverityError))
		require.ErrorContains(t, err, "rls-off: table public.open: ")
		require.ErrorContains(t, err, "truncate-granted: table public.note: ")
		require.ErrorContains(t, err, "Config.AuditAllow")

		_, err = open(AllowedFinding{Code: "truncate-granted"}, AllowedFinding{"rls-off", "table public.other"})
		require.ErrorAs(t, err, &failed)
		require.Equal(t, 1, failed.Report.Count(SeverityError))
		require.NotContains(t, err.Error(), "truncate-granted")

		db, err = open(AllowedFinding{Code: "truncate-granted"}, AllowedFinding{"rls-off", "table public.open"})
		require.NoError(t, err)
		r, err := db.Audit(ctx)
		require.NoError(t, err)
		require.Contains(t, r.String(), "error (allowed): rls-off: table public.open\n")
		require.Zero(t, r.Count(SeverityError))
		db.Close()

		_, err = open(AllowedFinding{Code: "rls_off"})
		require.ErrorContains(t, err, `Config.AuditAllow has the code "rls_off"; there is none such`)
		d.exec("drop table open", "revoke truncate on note from APP")
	}

	// Nor does it start without having looked.
	for _, admin := range []*pgxpool.Config{nil, mustParse(t, d.OwnerURL())} {
		config, err := ParseConfig(d.AppURL())
		require.NoError(t, err)
		config.Shared.ConnConfig.Password, config.RequireAudit, config.Admin = "s3cr3t", true, admin
		_, err = NewWithConfig(ctx, config)
		require.ErrorContains(t, err, "which Config.RequireAudit asks for: connect as the application: ")
	}
}

func TestAuditReport(t *testing.T) {
	t.Parallel()
	r := &Report{Database: "shop", Role: "app", TenantTables: 3, Findings: []Finding{
		{Code: "rls-off", Severity: SeverityError, Object: "table public.note", Allows: "Rows are open.", Mend: "alter table a;\nalter table b;"},
		{Code: "no-policy", Severity: SeverityWarning, Object: "table public.x", Allows: strings.Repeat("word ", 30), Detail: "Decide."},
		{Code: "rls-off", Severity: SeverityError, Object: "table public.y", Allows: "Rows are open.", Allowed: true},
	}}
	const want = `Audit of database shop for role app, with 3 tables of tenants. Errors: 1, warnings: 1, notes: 0.

error: rls-off: table public.note
    Rows are open.
        alter table a;
        alter table b;

warning: no-policy: table public.x
    word word word word word word word word word word word word word word word word word word word
    word word word word word word word word word word word
    Decide.

error (allowed): rls-off: table public.y
    Rows are open.
`
	require.Equal(t, want, r.String())
	var sb strings.Builder
	n, err := r.WriteTo(&sb)
	require.NoError(t, err)
	require.EqualValues(t, len(want), n)
	require.Equal(t, want, sb.String())

	text, err := json.Marshal(r.Findings[0])
	require.NoError(t, err)
	require.JSONEq(t, `{"code":"rls-off","severity":"error","object":"table public.note","allows":"Rows are open.","mend":"alter table a;\nalter table b;"}`, string(text))
	require.Contains(t, (&Report{TenantTables: 1}).String(), ", with 1 table of tenants.")
	var many Report
	for range 30 {
		many.Findings = append(many.Findings, r.Findings[0])
	}
	require.ErrorContains(t, many.Err(), "and 10 more")
}

// What looks like a hole and is none is not taken for one.
func TestAuditKnowsWhatIsNoHole(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ super, setup []string }{
		"restrictive twin": {setup: []string{guarded, "create policy p on doc using (true)", "create policy q on doc as restrictive using (tenant_id = (select SETTING))"}},
		"a policy for each command": {setup: []string{guarded, "create policy r on doc for select using (tenant_id = (select SETTING))", "create policy d on doc for delete using (tenant_id = (select SETTING))",
			"create policy u on doc for update using (tenant_id = (select SETTING))", "create policy i on doc for insert with check (tenant_id = (select SETTING))"}},
		"another role's policy": {setup: []string{guarded, strictPolicy, "create policy q on doc to OWNER using (true)"}},
		"more to ask for":       {setup: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING) and (shared or kind = 'mine'))"}},
		"stable function":       {setup: []string{guarded, "create function tenant() returns text stable language sql as $$ select SETTING $$", "create policy p on doc using (tenant_id = (select tenant()))"}},
		"function of a function": {setup: []string{guarded, "create function inner_tenant() returns text stable language sql as $$ select SETTING $$",
			"create function tenant() returns text stable language sql as $$ select public.inner_tenant() $$", "create policy p on doc using (tenant_id = (select tenant()))"}},
		"immutable function of a column": {setup: []string{guarded, "create function same(t text) returns text immutable language sql as 'select t'", "create policy p on doc using (same(tenant_id) = (select SETTING))"}},
		"looked up": {setup: []string{guarded, "create table slug (slug text primary key, id text)", "grant select on slug to APP",
			"create policy p on doc using (tenant_id = (select s.id from slug s where s.slug = (select SETTING)))"}},
		"by way of the parent": {setup: []string{guarded + strictPolicy, "create table line (doc int, item text)", "alter table line enable row level security, force row level security",
			"create policy p on line using (exists (select from doc where doc.id = line.doc))", "grant select on line to APP"}},
		"tenants themselves": {setup: []string{"create table customer (id text primary key check (id <> ''))", "alter table customer enable row level security, force row level security",
			"create policy p on customer using (id = (select SETTING))", "grant select on customer to APP", "create table plan (id text primary key)", "grant select on plan to APP"}},
		"no right to it": {setup: []string{"create table doc (tenant_id text)", "create schema s", "create table s.doc (tenant_id text)", "grant all on s.doc to APP"}},
		"disabled":       {setup: []string{"alter table note disable row level security, no force row level security", "revoke all on note from APP"}},
		"partition without rights": {setup: []string{"create table doc (TENANT, id int, primary key (tenant_id, id)) partition by hash (id, tenant_id)", "alter table doc enable row level security, force row level security", strictPolicy,
			"create table doc_0 partition of doc for values with (modulus 1, remainder 0)", "grant select on doc to APP"}},
		"tenant's own schema": {setup: []string{"create schema tenant_x", "create table tenant_x.doc (id int primary key, name text unique)", "grant usage on schema tenant_x to APP", "grant all on tenant_x.doc to APP"}},
		"invoker's view":      {super: []string{"create view v with (security_invoker = true) as select * from note", "grant select on v to APP"}},
		"view of the owner's": {setup: []string{"create view v as select * from note", "create view w as select * from v", "grant select on v, w to APP"}},
		"definer that is held": {setup: []string{"create function f() returns bigint language sql security definer set search_path = pg_catalog, public, pg_temp as 'select count(*) from note'"},
			super: []string{"create function g() returns bigint language sql security definer set search_path = '' as 'select count(*) from public.note'", "revoke execute on function g() from public"}},
		"extensions": {super: []string{"create extension pg_trgm", "create extension hstore", "create extension citext", "create extension ltree", "create extension dblink", "create extension lo", "create extension pg_buffercache",
			"create function f() returns bigint language sql security definer as 'select count(*) from note'", "alter extension hstore add function f()",
			"create view v as select * from note", "grant select on v to APP", "alter extension hstore add view v",
			"create table doc (tenant_id text)", "grant all on doc to APP", "alter extension hstore add table doc"}},
		"quoted names": {setup: []string{`create schema "Odd one"`, `create schema "tenant_ROLES'SETTING"`, `create table "tenant_ROLES'SETTING"."ROLES" ("SETTING" text)`, `create table "Odd one"."It's. (select" (TENANT, "a'b" boolean, primary key (tenant_id))`,
			`alter table "Odd one"."It's. (select" enable row level security, force row level security`,
			`create policy "p'q" on "Odd one"."It's. (select" using ("It's. (select".tenant_id = (select SETTING) and exists (select where not "It's. (select"."a'b"))`,
			`grant usage on schema "Odd one" to APP`, `grant all on "Odd one"."It's. (select" to APP`, `revoke truncate, references, trigger on "Odd one"."It's. (select" from APP`}},
		"domain": {setup: []string{"create domain tenant as uuid", "create table doc (tenant_id tenant not null, id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select SETTING::uuid))", "grant select on doc to APP"}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			d := newAuditedDB(t)
			d.superExec(c.super...)
			d.exec(c.setup...)
			r, err := d.db.Audit(context.Background())
			require.NoError(t, err)
			require.Empty(t, grave(r.Findings), r.String())
			require.NotContains(t, r.String(), "not-audited")
		})
	}
}

// The audit works however the pool speaks to the server.
func TestAuditInEveryMode(t *testing.T) {
	t.Parallel()
	d := newAuditedDB(t)
	d.exec(guarded, "create policy p on doc using (tenant_id = SETTING or shared)", "create view v as select * from note", "grant select on v to APP", "grant truncate on note to APP")
	want := d.audit()
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		for _, admin := range []bool{true, false} {
			db := openDB(t, d.AppURL(), func(c *Config) {
				if admin {
					c.Admin = mustParse(t, d.OwnerURL("pool_max_conns=1"))
					c.Admin.ConnConfig.DefaultQueryExecMode = m
				}
				c.Shared.ConnConfig.DefaultQueryExecMode = m
			})
			r, err := db.Audit(context.Background())
			require.NoError(t, err)
			require.Equal(t, want, r.Findings)
		}
	})
}

// A connection string that names a tenant makes one of every connection that nothing was bound on.
func TestAuditFindsATenantInTheConnectionString(t *testing.T) {
	t.Parallel()
	d := newAuditedDB(t)
	for parameter, object := range map[string]string{
		"app.current_tenant_id=a":            "parameter app.current_tenant_id of Config.Shared",
		"App.Current_Tenant_ID=a":            "parameter App.Current_Tenant_ID of Config.Shared",
		"options=-c app.current_tenant_id=a": "parameter options of Config.Shared",
		"options=-c work_mem=1MB":            "",
	} {
		r, err := openDB(t, d.AppURL(parameter)).Audit(context.Background())
		require.NoError(t, err)
		if object == "" {
			require.Empty(t, grave(r.Findings), parameter)
			continue
		}
		require.Equal(t, []string{"setting-preset: " + object}, grave(r.Findings), parameter)
	}
}

// With Config.Seal policies are evaluated as a tenant that is signed, and those that ask for no signature are found.
func TestAuditOfSealedTenants(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	seal := &SealConfig{Key: []byte(strings.Repeat("k", MinSealKeyLen))}
	d := newAuditedDB(t)
	d.db = adminDB(t, d.DB, func(c *Config) { c.Seal = seal })
	require.Equal(t, []string{"policy-unsealed: policy pgxtenant on table public.note"}, grave(d.audit()))
	require.NoError(t, d.db.InstallSeal(ctx))
	for _, f := range d.audit() {
		if f.Code == "policy-unsealed" {
			d.exec(f.Mend)
		}
	}
	require.Empty(t, grave(d.audit()))
	plan, err := d.db.PlanEnableRLS(ctx, Tables("note")...)
	require.NoError(t, err)
	require.Empty(t, plan, "what is printed is what EnableRLS makes")

	// A hole is found beside the seal, and by those who have no key as well.
	d.exec(guarded, "create policy p on doc using (tenant_id = (select pgxtenant.sealed_tenant('app.current_tenant_id')) or shared)")
	require.Equal(t, []string{"policy-admits-others: policy p on table public.doc"}, grave(d.audit()))
	for _, db := range []*TenantDB{adminDB(t, d.DB), openDB(t, d.AppURL())} {
		r, err := db.Audit(ctx)
		require.NoError(t, err)
		require.Equal(t, []string{"policy-admits-unset: policy p on table public.doc"}, grave(r.Findings))
	}
}
