package pgxtenant

// auditHoles are one for each way past isolation that is in one database, and not in what the package keeps
// of its own.
var auditHoles = map[string]auditHole{
	// The login.
	"superuser":              {super: []string{"alter role APP superuser"}, want: []string{"app-superuser: role APP"}},
	"bypassrls":              {super: []string{"alter role APP bypassrls"}, want: []string{"app-bypassrls: role APP"}},
	"createrole":             {super: []string{"alter role APP createrole"}, want: []string{"app-createrole: role APP"}},
	"replication":            {super: []string{"alter role APP replication"}, want: []string{"app-replication: role APP"}},
	"member of superuser":    {super: []string{"grant postgres to APP", "alter role APP noinherit"}, want: []string{"app-member-exempt: role APP as a member of postgres"}},
	"reads server files":     {super: []string{"grant pg_read_server_files to APP"}, want: []string{"app-server-access: role APP as a member of pg_read_server_files"}},
	"reads a server file":    {super: []string{"grant execute on function pg_read_file(text) to APP"}, want: []string{"app-server-access: function pg_read_file(text)"}},
	"owns a table":           {super: []string{"alter table note owner to APP"}, want: []string{"app-owner: table public.note"}},
	"member of the owner":    {super: []string{"grant OWNER to APP"}, want: []string{"app-member-owner: role APP as a member of OWNER", "app-owns-database: database DATABASE"}, also: nil},
	"noinherit member":       {super: []string{"alter role APP noinherit", "grant OWNER to APP"}, want: []string{"app-member-owner: role APP as a member of OWNER", "app-owns-database: database DATABASE"}},
	"owns a schema":          {super: []string{"create schema theirs authorization APP"}, want: []string{"app-owns-schema: schema theirs"}},
	"owns the database":      {super: []string{"alter database DATABASE owner to APP"}, want: []string{"app-owns-database: database DATABASE"}},
	"tenant preset for role": {super: []string{"alter role APP set app.current_tenant_id = 'a'"}, want: []string{"setting-preset: role APP"}},
	"tenant preset for both": {super: []string{"alter role APP in database DATABASE set app.current_tenant_id = 'a'"}, want: []string{"setting-preset: role APP in database DATABASE"}},
	"tenant preset for all":  {super: []string{"alter database DATABASE set app.current_tenant_id = 'a'"}, want: []string{"setting-preset: database DATABASE"}},

	// Row-level security.
	"off, with a tenant column": {
		hole: []string{"create table doc (TENANT)", "create index on doc (tenant_id)", "grant select on doc to APP"},
		want: []string{"rls-off: table public.doc"},
	},
	"off, one column granted": {
		hole: []string{"create table doc (TENANT, body text)", "create index on doc (tenant_id)", "grant select (body) on doc to public"},
		want: []string{"rls-off: table public.doc"},
	},
	"off, another tenant column": {
		setup: []string{"create table doc (org uuid not null, id int, primary key (org, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (org = (select SETTING::uuid))", "grant select on doc to APP"},
		hole: []string{"create table line (org uuid not null, id int, primary key (org, id))", "grant select on line to APP"},
		want: []string{"rls-off: table public.line"},
	},
	"off, in a schema with a tenant's name": {
		setup: []string{"create schema tenant_data", "grant usage on schema tenant_data to APP", "create table tenant_data.doc (TENANT)", "create index on tenant_data.doc (tenant_id)",
			"grant select on tenant_data.doc to APP", "alter table tenant_data.doc enable row level security, force row level security", "create policy p on tenant_data.doc using (tenant_id = (select SETTING))"},
		hole: []string{"create table tenant_data.line (TENANT)", "create index on tenant_data.line (tenant_id)", "grant select on tenant_data.line to APP"},
		want: []string{"rls-off: table tenant_data.line"},
	},
	"maybe a tenant's schema": {
		hole: []string{"create schema tenant_x", "grant usage on schema tenant_x to APP", "create table tenant_x.line (TENANT)", "grant select on tenant_x.line to APP"},
		also: []string{"not-audited"}, want: []string{"not-audited: schemas that have a tenant's name"}, mend: []string{"drop schema tenant_x cascade"},
	},
	"off, with a policy": {
		setup: []string{guarded + strictPolicy}, hole: []string{"alter table doc disable row level security"},
		want: []string{"rls-off: table public.doc"},
	},
	"not forced":        {hole: []string{"alter table note no force row level security"}, want: []string{"rls-not-forced: table public.note"}},
	"no policy":         {hole: []string{guarded}, want: []string{"no-policy: table public.doc"}},
	"policy for others": {hole: []string{guarded, "create policy p on doc to OWNER using (tenant_id = (select SETTING))"}, want: []string{"no-policy: table public.doc"}},
	"partition named itself": {
		setup: []string{"create table doc (TENANT, id int, primary key (tenant_id, id)) partition by hash (id, tenant_id)",
			"alter table doc enable row level security, force row level security", "create policy p on doc using (tenant_id = (select SETTING))",
			"create table doc_0 partition of doc for values with (modulus 1, remainder 0)", "grant select on doc to APP"},
		hole: []string{"grant select on doc_0 to APP"},
		want: []string{"child-unguarded: table public.doc_0"},
	},
	"child named itself": {
		setup: []string{guarded + strictPolicy, "create table doc_child () inherits (doc)"},
		hole:  []string{"grant insert on doc_child to public"},
		want:  []string{"child-unguarded: table public.doc_child"},
	},
	"on, but not by tenant": {
		hole: []string{"create table doc (id int)", "alter table doc enable row level security, force row level security", "create policy p on doc using (true)", "grant select on doc to APP"},
		also: []string{"rls-not-on-tenant"}, want: []string{"rls-not-on-tenant: table public.doc"}, mend: []string{"drop table doc"},
	},

	// Policies.
	"fails open without a tenant": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING) or (select SETTING) is null)"},
		want: []string{"policy-admits-unset: policy p on table public.doc"},
	},
	"fails open where unset": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = coalesce((select current_setting('app.current_tenant_id', true)), tenant_id))"},
		want: []string{"policy-admits-unset: policy p on table public.doc"},
	},
	"fails open where empty": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING) or (select current_setting('app.current_tenant_id', true)) = '')"},
		want: []string{"policy-admits-unset: policy p on table public.doc"},
	},
	"admits all": {
		hole: []string{guarded, "create policy p on doc using (true)"},
		want: []string{"policy-admits-others: policy p on table public.doc"},
	},
	"admits all besides": {
		hole: []string{guarded, strictPolicy, "create policy q on doc for select using (true)"},
		want: []string{"policy-admits-others: policy q on table public.doc"},
	},
	"admits shared rows": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING) or shared)"},
		want: []string{"policy-admits-others: policy p on table public.doc"},
	},
	"admits shared rows by a function": {
		hole: []string{guarded, "create function tenant() returns text stable language sql as $$ select SETTING $$", "create policy p on doc using (tenant_id = (select tenant()) or shared)"},
		want: []string{"policy-admits-others: policy p on table public.doc"},
	},
	"admits rows of a kind": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING) or kind = 'public')"},
		want: []string{"policy-admits-others: policy p on table public.doc"},
	},
	"admits rows of nobody": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING) or kind is null)"},
		want: []string{"policy-admits-others: policy p on table public.doc"},
	},
	"deletes all": {
		hole: []string{guarded, strictPolicy, "create policy q on doc for delete using (true)"},
		want: []string{"policy-admits-others: policy q on table public.doc"},
	},
	"writes for others": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select SETTING)) with check (true)"},
		want: []string{"policy-check-open: policy p on table public.doc"},
	},
	"inserts for others": {
		hole: []string{guarded, strictPolicy, "create policy q on doc for insert with check (true)"},
		want: []string{"policy-check-open: policy q on table public.doc"},
	},
	"updates for others": {
		hole: []string{guarded, strictPolicy, "create policy q on doc for update using (tenant_id = (select SETTING)) with check (true)"},
		want: []string{"policy-check-open: policy q on table public.doc"},
	},
	"another policy besides": {
		hole: []string{guarded, strictPolicy, "create policy q on doc for select using (length(body) > 100)"},
		want: []string{"policy-besides: policy q on table public.doc"},
	},
	"rows without a tenant": {
		hole: []string{"create table doc (tenant_id text not null, id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select current_setting('app.current_tenant_id', true)))", "grant select on doc to APP"},
		want: []string{"policy-admits-empty: policy p on table public.doc"},
	},
	"no tenant is one": {
		hole: []string{"create table doc (tenant_id text check (tenant_id <> ''), id int)", "create index on doc (tenant_id)", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id is not distinct from (select SETTING))", "grant select on doc to APP"},
		want: []string{"policy-admits-empty: policy p on table public.doc", "tenant-column-nullable: column tenant_id of table public.doc"},
	},
	"fails without a tenant": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = (select current_setting('app.current_tenant_id')))"},
		want: []string{"policy-raises: policy p on table public.doc"},
	},
	"no uuid in the setting": {
		hole: []string{"create table doc (tenant_id uuid not null, id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select current_setting('app.current_tenant_id', true)::uuid))", "grant select on doc to APP"},
		want: []string{"policy-raises: policy p on table public.doc"},
	},
	"read for each row": {
		hole: []string{guarded, "create policy p on doc using (tenant_id = SETTING)"},
		want: []string{"policy-per-row: policy p on table public.doc"},
	},
	"called for each row": {
		hole: []string{guarded, "create function tenant() returns text stable language sql as $$ select SETTING $$", "create policy p on doc using (tenant_id = tenant())"},
		want: []string{"policy-per-row: policy p on table public.doc"},
	},
	"immutable function of a function": {
		hole: []string{guarded, "create function inner_tenant() returns text stable language sql as $$ select SETTING $$",
			"create function tenant() returns text immutable language plpgsql as $$ begin return public.inner_tenant(); end $$", "create policy p on doc using (tenant_id = (select tenant()))"},
		want: []string{"policy-immutable-function: function public.tenant()"},
	},
	"immutable function": {
		hole: []string{guarded, "create function tenant() returns text immutable language plpgsql as $$ begin return SETTING; end $$", "create policy p on doc using (tenant_id = (select tenant()))"},
		want: []string{"policy-immutable-function: function public.tenant()"},
	},

	// The tenant column, and keys.
	"nullable": {hole: []string{"alter table note alter tenant_id drop not null"}, want: []string{"tenant-column-nullable: column tenant_id of table public.note"}},
	"citext": {
		super: []string{"create extension citext"},
		hole: []string{"create table doc (tenant_id citext not null check (tenant_id <> ''), id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select SETTING::citext))", "grant select on doc to APP"},
		want: []string{"tenant-column-loose: column tenant_id of table public.doc"},
	},
	"padded": {
		hole: []string{"create table doc (tenant_id char(10) not null check (tenant_id <> ''), id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select SETTING::bpchar))", "grant select on doc to APP"},
		want: []string{"tenant-column-loose: column tenant_id of table public.doc"},
	},
	"loose collation": {
		hole: []string{"create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
			"create table doc (tenant_id text collate loose not null check (tenant_id <> ''), id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select SETTING))", "grant select on doc to APP"},
		want: []string{"tenant-column-loose: column tenant_id of table public.doc"},
	},
	"citext, admits all": {
		super: []string{"create extension citext"},
		hole: []string{"create table doc (tenant_id citext not null check (tenant_id <> ''), id int, shared boolean, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select SETTING::citext) or shared)", "grant select on doc to APP"},
		want: []string{"tenant-column-loose: column tenant_id of table public.doc", "policy-admits-others: policy p on table public.doc"},
	},
	"odd type": {
		hole: []string{"create table doc (tenant_id numeric not null, id int, primary key (tenant_id, id))", "alter table doc enable row level security, force row level security",
			"create policy p on doc using (tenant_id = (select SETTING::numeric))", "grant select on doc to APP"},
		want: []string{"tenant-column-type: column tenant_id of table public.doc"},
		mend: []string{"drop table doc"},
	},
	"no index": {hole: []string{"drop index note_tenant_id_idx"}, want: []string{"tenant-column-unindexed: column tenant_id of table public.note"}},
	"unique":   {hole: []string{"alter table note add constraint slug unique (body)"}, want: []string{"unique-without-tenant: constraint slug on table public.note"}},
	"unique expression": {
		hole: []string{"create unique index slug on note (lower(body)) where body <> ''"},
		want: []string{"unique-without-tenant: index public.slug of table public.note"},
	},
	"tenant only included": {
		hole: []string{"create unique index slug on note (body) include (tenant_id)"},
		want: []string{"unique-without-tenant: index public.slug of table public.note"},
	},
	"unique that is referred to": {
		hole: []string{"alter table note add constraint slug unique (body)", "create table line (TENANT, body text references note (body), primary key (tenant_id, body))"},
		want: []string{"unique-without-tenant: constraint slug on table public.note", "fk-without-tenant: constraint line_body_fkey on table public.line"},
		mend: []string{"alter table note drop constraint slug cascade"},
	},
	"exclusion": {
		hole: []string{"alter table note add constraint apart exclude using gist (int8range(id, id + 1) with &&)"},
		want: []string{"unique-without-tenant: constraint apart on table public.note"},
		mend: []string{"alter table note drop constraint apart"},
	},
	"generated key": {
		hole: []string{guarded, strictPolicy, "alter table doc add number bigserial unique"},
		also: []string{"key-without-tenant"}, want: []string{"key-without-tenant: constraint note_pkey on table public.note", "key-without-tenant: constraint doc_number_key on table public.doc"},
		mend: []string{"alter table doc drop column number", "alter table note drop constraint note_pkey"},
	},
	"foreign key": {
		setup: []string{guarded + strictPolicy},
		hole:  []string{"alter table doc add note bigint references note deferrable initially deferred"},
		want:  []string{"fk-without-tenant: constraint doc_note_fkey on table public.doc"},
	},
	"foreign key that cascades": {
		setup: []string{guarded + strictPolicy},
		hole:  []string{"alter table doc add note bigint references note on delete cascade"},
		want:  []string{"fk-across-tenants: constraint doc_note_fkey on table public.doc"},
	},
	"foreign key that sets null": {
		setup: []string{guarded + strictPolicy},
		hole:  []string{"alter table doc add note bigint references note on delete set null on update cascade"},
		want:  []string{"fk-across-tenants: constraint doc_note_fkey on table public.doc"},
	},

	// Views, functions, rules.
	"view of a superuser": {
		super: []string{"create view v as select * from note", "grant select on v to APP"},
		want:  []string{"view-past-policy: view public.v"},
	},
	"view of a superuser under another": {
		super: []string{"create view v as select * from note", "grant select on v to OWNER"},
		hole:  []string{"create view w as select * from v", "create view x with (security_invoker = true) as select * from w", "grant select on x, w to APP"},
		want:  []string{"view-past-policy: view public.v"},
	},
	"view of an owner who is not held": {
		setup: []string{"alter table note force row level security", "create view v as select * from note", "grant select on v to public"},
		hole:  []string{"alter table note no force row level security"},
		want:  []string{"view-past-policy: view public.v", "rls-not-forced: table public.note"},
	},
	"view by its owner's rights": {
		hole: []string{"create view v as select * from note", "grant select on v to APP"},
		also: []string{"view-not-invoker"}, want: []string{"view-not-invoker: view public.v"},
	},
	"materialized view": {
		hole: []string{"create materialized view m as select * from note", "grant select on m to APP, public"},
		want: []string{"matview-past-policy: materialized view public.m"},
	},
	"materialized view behind a view": {
		hole: []string{"create materialized view m as select * from note", "create view v as select * from m", "grant select on v to APP"},
		want: []string{"matview-past-policy: view public.v"},
		mend: []string{"revoke select on v from APP"},
	},
	"function of a superuser": {
		super: []string{"create function f() returns bigint language sql security definer set search_path = pg_catalog, pg_temp as 'select count(*) from public.note'"},
		want:  []string{"definer-exempt-owner: function public.f()"},
	},
	"function without a path": {
		hole: []string{"create function f() returns bigint language sql security definer as 'select count(*) from note'"},
		want: []string{"definer-search-path: function public.f()"},
	},
	"function that searches pg_temp first": {
		hole: []string{"create function f(a text, b int[]) returns bigint language sql security definer set search_path = public as 'select count(*) from note'"},
		want: []string{"definer-search-path: function public.f(text,integer[])"},
	},
	"trigger of a superuser": {
		super: []string{"create function f() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as 'begin return new; end'",
			"create trigger t before insert on note for each row execute function f()"},
		want: []string{"definer-trigger: function public.f()"},
	},
	"leakproof": {
		super: []string{"create function f(text) returns boolean immutable leakproof language sql as 'select true'"},
		want:  []string{"leakproof-function: function public.f(text)"},
	},
	"rule": {
		hole: []string{"create table log (body text)", "create rule copy as on insert to note do also insert into log values (new.body)"},
		want: []string{"rewrite-rule: rule copy on table public.note"},
	},

	// Grants.
	"truncate":   {hole: []string{"grant truncate on note to public"}, want: []string{"truncate-granted: table public.note"}},
	"references": {hole: []string{"grant references on note to APP"}, want: []string{"references-granted: table public.note"}},
	"trigger":    {hole: []string{"grant trigger on note to APP, public"}, want: []string{"trigger-granted: table public.note"}},
	"temp": {
		setup: []string{"revoke temporary on database DATABASE from public"}, hole: []string{"grant temporary on database DATABASE to APP"},
		also: []string{"temp-granted"}, want: []string{"temp-granted: database DATABASE"},
	},
	"create on public":   {hole: []string{"create schema s", "grant create on schema s to public"}, want: []string{"create-on-schema: schema s"}},
	"create on database": {hole: []string{"grant create on database DATABASE to APP"}, want: []string{"create-on-database: database DATABASE"}},
	"by default": {
		hole: []string{"alter default privileges grant all on tables to APP", "alter default privileges in schema public grant trigger on tables to public"},
		also: []string{"default-access"},
		want: []string{"default-privileges: default privileges of role OWNER", "default-access: default privileges of role OWNER", "default-privileges: default privileges of role OWNER in schema public"},
	},
	"large object": {
		hole: []string{"select lo_create(4711)", "grant select on large object 4711 to public"},
		want: []string{"large-objects: large objects"},
	},
	"publication": {
		hole: []string{"create publication p for table note"},
		also: []string{"publication"}, want: []string{"publication: publication p"}, mend: []string{"drop publication p"},
	},
	"foreign table": {
		super: []string{"create extension postgres_fdw", "create server far foreign data wrapper postgres_fdw", "create foreign table theirs (id int) server far", "grant select on theirs to APP"},
		also:  []string{"foreign-table"}, want: []string{"foreign-table: foreign table public.theirs"}, mend: []string{"revoke all on theirs from APP"},
	},
	"foreign table of tenants": {
		super: []string{"create extension postgres_fdw", "create server far foreign data wrapper postgres_fdw", "create foreign table theirs (tenant_id text) server far", "grant select on theirs to APP"},
		want:  []string{"foreign-tenant-table: foreign table public.theirs"},
	},
}
