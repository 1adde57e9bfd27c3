// Package tenanttern runs migrations of [github.com/jackc/tern/v2] over every tenant.
//
//	report, err := tenanttern.Migrate(ctx, db, os.DirFS("migrations"), pgxtenant.ForEachOptions{})
//
// tern reads the files: their order, templates, code packages and ways back. Each tenant's schema or database has a table schema_version of
// tern's own form, so tern's commands work on a single one with version_table set to it, and the other way round. The statements are run here, not
// by tern's Migrator, for two reasons: it takes one lock for the whole database, which makes all tenants wait for one, and it resets the session after each
// migration, which sends the next one to another schema than the tenant's. The run has a lock for each tenant.
//
// What is copied from Config.Template needs "schema_version" in Config.TemplateReference.
package tenanttern
