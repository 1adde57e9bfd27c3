package pgxtenant

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// registryChannel carries "t" and a tenant's ID, "a" and an alias, or "*" for everything. What comes over it
// is a hint to read again and nothing more, since any role may notify.
const registryChannel = "pgxtenant_registry"

// registrySteps are the versions of the registry's tables. Never change one: add another.
var registrySteps = []string{
	`create sequence pgxtenant.tenant_generation;
	create table pgxtenant.tenant (
		id text collate "C" primary key check (length(id) between 1 and 128),
		plan text not null,
		isolation text not null,
		schema text not null,
		holds text not null, -- the schema that it lives in, named or not
		conn text not null,
		server text not null,
		status text not null,
		settings jsonb not null check (jsonb_typeof(settings) = 'object'),
		generation bigint not null default nextval('pgxtenant.tenant_generation'),
		created timestamptz not null default clock_timestamp(),
		changed timestamptz not null default clock_timestamp()
	);
	create unique index tenant_holds on pgxtenant.tenant (server, holds) where holds <> '';
	create table pgxtenant.tenant_alias (
		alias text collate "C" primary key check (alias = lower(alias) and length(alias) between 1 and 253),
		tenant_id text collate "C" not null references pgxtenant.tenant on update cascade on delete cascade
	);
	create index tenant_alias_tenant on pgxtenant.tenant_alias (tenant_id);` +
		registryTriggers("tenant", "t", "id") + registryTriggers("tenant_alias", "a", "alias"),
	runTables,
}

// registryTriggers tell of changes, by statement: one that touches many rows says so once.
func registryTriggers(table, mark, column string) string {
	const sql = `
	create function pgxtenant.tell_TABLE() returns trigger language plpgsql set search_path = pg_catalog, pg_temp as $$
	begin
		if tg_op = 'TRUNCATE' then
			perform pg_notify('CHANNEL', '*');
		elsif (select count(*) from (select 1 from touched limit 101) x) > 100 then
			perform pg_notify('CHANNEL', '*');
		else
			perform pg_notify('CHANNEL', 'MARK' || COLUMN) from touched;
		end if;
		return null;
	end $$;
	create trigger tell_insert after insert on pgxtenant.TABLE referencing new table as touched for each statement execute function pgxtenant.tell_TABLE();
	create trigger tell_update_old after update on pgxtenant.TABLE referencing old table as touched for each statement execute function pgxtenant.tell_TABLE();
	create trigger tell_update_new after update on pgxtenant.TABLE referencing new table as touched for each statement execute function pgxtenant.tell_TABLE();
	create trigger tell_delete after delete on pgxtenant.TABLE referencing old table as touched for each statement execute function pgxtenant.tell_TABLE();
	create trigger tell_truncate after truncate on pgxtenant.TABLE for each statement execute function pgxtenant.tell_TABLE();`
	return strings.NewReplacer("TABLE", table, "MARK", mark, "COLUMN", column, "CHANNEL", registryChannel).Replace(sql)
}

// Install makes the registry's tables in schema pgxtenant, or brings them up to date, and gives the role
// of RegistryConfig.Pool the right to read them. It may be called at each start, by any number of processes. It
// runs as the role of Config.Admin, which needs CREATE on the database; a Registry of its own uses its pool.
func (r *Registry) Install(ctx context.Context) error { return r.install(ctx, r.write) }

func (r *Registry) install(ctx context.Context, on adminRunner) error {
	if err := install(ctx, on, "registry", registrySteps); err != nil {
		return err
	}
	reader, owner := r.pool.Config().ConnConfig.User, on.Config().ConnConfig.User
	if reader == owner {
		return nil
	}
	err := installing(ctx, on, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, fmt.Sprintf("grant usage on schema pgxtenant to %[1]s; grant select on pgxtenant.tenant, pgxtenant.tenant_alias to %[1]s", ident(reader)))
		return err
	})
	if err != nil {
		return fmt.Errorf("pgxtenant: registry: grant role %q the right to read: %w", reader, adminError(err))
	}
	return nil
}
