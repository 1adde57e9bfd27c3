// Package tenantgoose runs the migrations of [github.com/pressly/goose/v3] over every tenant, by [pgxtenant.TenantDB.ForEach]: several at once, in waves, with a record of
// each in the registry, so that a run that was stopped or has failed goes on where it ended.
//
//	config.Template = "template"
//	config.TemplateReference = []string{"goose_db_version"}
//	…
//	migrator, err := tenantgoose.New(db, os.DirFS("migrations"))
//	report, err := migrator.Up(ctx, pgxtenant.ForEachOptions{Name: "release 42"})
//
// # Folders
//
// The file system has two folders, of which one may be missing. The migrations in shared are applied to the shared schemas of the database, once: the tables of row
// tenants, and what all tenants refer to. Those in tenant are applied to the template schema, to the template databases of
// Config.Servers, and then to the schema or database of each tenant. A tenant that is provisioned later is a copy of its template at that
// version, and needs none of them.
//
// The numbers of both folders are one sequence. Version 7 means the migrations up to 7 of each folder, so that a report says 7 of a place that has all
// of its own up to there, even if none has that number; Status tells the number of the newest one that was applied.
//
// # Ledgers
//
// Each place has a table goose_db_version, as goose makes it, so goose itself works on a single one, with that search_path, and schemas that it was run on are taken over as they
// are. The ledgers of all tenants of a database are read by one statement for some hundred of them; tenants that are at the target take no connection,
// lock or call of their own. goose's own lock, one for all who use it in a database, is not taken: the run has one for each tenant.
//
// A migration and its row in the ledger are one transaction. One marked "-- +goose NO TRANSACTION", as CREATE INDEX CONCURRENTLY has to be, is
// not: if it fails, what it has done stays, no row says so, it is not tried a second time, and the error tells what to do. It waits for older transactions, so
// ForEachOptions.LockTimeout may be too short for it; "set lock_timeout = 0" as its first statement lasts until it ends.
//
// What is applied must not change. New sums up each file, and when it is first seen as applied anywhere, the sum is kept in table
// pgxtenant.goose_sum; another content is [ErrEdited] from then on, before anything is done.
package tenantgoose
