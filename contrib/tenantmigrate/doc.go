// Package tenantmigrate runs migrations of [github.com/golang-migrate/migrate/v4] over every tenant.
//
//	report, err := tenantmigrate.Migrate(ctx, db, os.DirFS("migrations"), pgxtenant.ForEachOptions{})
//
// Each tenant's schema or database has golang-migrate's table schema_migrations, so its command works on a single one, with that
// search_path, and the other way round. golang-migrate's own drivers open connections of their own and wait for a lock of the session, which
// a pooler may leave with another session; the one here has the tenant's connection, and takes no lock: the run has one for each tenant.
//
// As golang-migrate has it, a version is dirty from the moment at which its file begins until that has succeeded. A tenant that is found
// dirty fails until somebody has seen what is there and called [Force]; for the same reason nothing is tried a second time
// after a lock timeout. A file is sent as one text, which the server runs as one transaction unless the file says begin and commit.
//
// What is copied from Config.Template needs "schema_migrations" in Config.TemplateReference.
package tenantmigrate
