package pgxtenant

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// tenantsHole is a hole in what tenants of their own schema or database have.
type tenantsHole struct {
	super []string
	want  []string // "code: object"
	mend  []string // where the finding has no SQL
	redo  bool     // provisioning the tenants again is the mend
}

// What the registry, the template and the lists of schemas and databases say against each other is found.
// SCHEMA and TENANTDB stand for those of tenants with one of their own.
func TestAuditFindsEachHoleOfTenants(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for name, c := range map[string]tenantsHole{
		"drift": {
			super: []string{"alter table SCHEMA.note add extra int"},
			want:  []string{"schema-drift: schema SCHEMA"}, mend: []string{"alter table SCHEMA.note drop extra"},
		},
		"stand-in used": {
			super: []string{"alter table SCHEMA.note rename to other"},
			want:  []string{"schema-drift: schema SCHEMA", "stand-in-used: table public.note"}, mend: []string{"alter table SCHEMA.other rename to note"},
		},
		"sequence of the template": {
			super: []string{"create table template.item (id serial)", "alter table template.item owner to OWNER",
				"create table SCHEMA.item (like template.item including all)", "insert into SCHEMA.item default values", "alter table SCHEMA.item owner to OWNER"},
			want: []string{"sequence-shared: column id of table SCHEMA.item", "schema-drift: schema SCHEMA"}, mend: []string{"drop table SCHEMA.item, template.item"},
		},
		"view of the template": {
			super: []string{"create view SCHEMA.v as select * from template.note", "alter table SCHEMA.note drop body, add body text default template.f()",
				"alter view SCHEMA.v owner to OWNER"},
			want: []string{"schema-crossing: column body of table SCHEMA.note", "schema-crossing: view SCHEMA.v", "schema-drift: schema SCHEMA"},
			mend: []string{"drop view SCHEMA.v", "alter table SCHEMA.note alter body drop default"},
		},
		"schema dropped": {
			super: []string{"drop schema SCHEMA cascade"},
			want:  []string{"tenant-schema-missing: schema SCHEMA"}, redo: true,
		},
		"schema unknown": {
			super: []string{"delete from pgxtenant.tenant where isolation = 'schema'"},
			want:  []string{"tenant-schema-orphan: schema SCHEMA"}, redo: true,
		},
		"schema in the registry only": {
			super: []string{"insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings) values ('ghost', '', 'schema', '', 'tenant_ghost', '', '', 'active', '{}')"},
			want:  []string{"tenant-schema-missing: schema tenant_ghost"}, mend: []string{"delete from pgxtenant.tenant where id = 'ghost'"},
		},
		"database dropped": {
			super: []string{"drop database TENANTDB with (force)"},
			want:  []string{"tenant-database-missing: database TENANTDB on server here"}, redo: true,
		},
		"database unknown": {
			super: []string{"delete from pgxtenant.tenant where isolation = 'database'"},
			want:  []string{"tenant-database-orphan: database TENANTDB on server here"}, redo: true,
		},
		"database open": {
			super: []string{"grant connect on database TENANTDB to public"},
			want:  []string{"tenant-database-open: database TENANTDB on server here"},
		},
		"registry read": {
			super: []string{"grant usage on schema pgxtenant to APP", "grant select (id) on pgxtenant.tenant to public"},
			want:  []string{"registry-readable: table pgxtenant.tenant"},
		},
		"registry written": {
			super: []string{"grant update, select on pgxtenant.tenant_alias to APP", "grant insert on pgxtenant.schema to public"},
			want: []string{"own-schema-writable: table pgxtenant.schema", "own-schema-writable: table pgxtenant.tenant_alias",
				"registry-readable: table pgxtenant.tenant_alias"},
		},
		"registry owned": {
			super: []string{"alter table pgxtenant.tenant owner to APP", "grant all on pgxtenant.tenant to OWNER"},
			want:  []string{"own-schema-writable: table pgxtenant.tenant"},
		},
		"key read": {
			super: []string{"create table pgxtenant.seal_key (key bytea)", "grant select on pgxtenant.seal_key to APP"},
			want:  []string{"seal-key-readable: table pgxtenant.seal_key"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProvisioner(t)
			d := &auditedDB{p.d, t, p.open(nil)}
			d.exec("drop table aa_line", "create function template.f() returns text language sql as 'select null::text'")
			require.NoError(t, d.db.Registry().Install(ctx))
			tenants := p.kinds()
			provision := func() {
				for _, tenant := range tenants {
					require.NoError(t, d.db.Provision(ctx, tenant))
				}
			}
			provision()
			fill := func(sql string) string {
				return d.fill(strings.NewReplacer("SCHEMA", ident(SchemaName(tenants[1].ID)), "TENANTDB", ident(DatabaseName(tenants[2].ID))).Replace(sql))
			}
			require.Empty(t, grave(d.audit()))

			for _, sql := range c.super {
				d.SuperExec(fill(sql))
			}
			found := d.audit()
			var want, mend []string
			for _, w := range c.want {
				want = append(want, fill(w))
			}
			for _, f := range found {
				if f.Severity == SeverityInfo {
					continue
				}
				require.True(t, f.Mend != "" || f.Detail != "")
				if f.Mend != "" {
					mend = append(mend, f.Mend)
				}
			}
			require.ElementsMatch(t, want, grave(found))
			for _, sql := range append(mend, c.mend...) {
				d.SuperExec(fill(sql))
			}
			if c.redo {
				provision()
			}
			require.Empty(t, grave(d.audit()))
		})
	}
}

// A shared table by the name of one of the template's is named, until one of the two is called otherwise.
func TestAuditNamesWhatStandsIn(t *testing.T) {
	t.Parallel()
	p := newProvisioner(t)
	d := &auditedDB{p.d, t, p.open(nil)}
	named := func() (objects []string) {
		for _, f := range d.audit() {
			if f.Code == "stand-in" {
				objects = append(objects, f.Object)
			}
		}
		return objects
	}
	require.Equal(t, []string{"table public.note"}, named())
	d.exec("alter table template.note rename to other")
	require.Empty(t, named())
}
