package pgxtenant

// auditCodes are the codes of findings, which stay what they are, with what each lets happen.
var auditCodes = map[string]struct {
	severity Severity
	allows   string
}{
	// The role that the application logs in as.
	"app-superuser":     {SeverityError, "No policy holds a superuser: every statement sees and changes all tenants' rows."},
	"app-bypassrls":     {SeverityError, "No policy holds a role with BYPASSRLS: every statement sees and changes all tenants' rows."},
	"app-member-exempt": {SeverityError, "SET ROLE turns the application into a role that no policy holds, and injected SQL can say so."},
	"app-owner":         {SeverityError, "The owner of a table can switch its row-level security off, and is exempt from it unless it is forced."},
	"app-member-owner":  {SeverityError, "A member of a table's owner has the owner's rights: it can switch row-level security off, and is exempt from it unless it is forced."},
	"app-createrole":    {SeverityError, "A role with CREATEROLE can make itself a member of others, the tables' owner among them (before PostgreSQL 16 of any but superusers)."},
	"app-replication":   {SeverityError, "A role with REPLICATION can stream every change in the server, of all tenants and past all policies."},
	"app-server-access": {SeverityError, "The application may read or write files of the server or run its programs, and so the files that all tenants' rows are in."},
	"app-owns-schema":   {SeverityWarning, "The owner of a schema can drop the tables in it, make others in their place, and let others in."},
	"app-owns-database": {SeverityWarning, "The owner of a database can make schemas, change what every session begins with, and drop it."},
	"setting-preset":    {SeverityWarning, "A connection that nothing was bound on acts as that tenant, and RESET and DISCARD ALL go back to it."},

	// Tables and their policies.
	"rls-off":                   {SeverityError, "The application sees and changes every tenant's rows of the table."},
	"child-unguarded":           {SeverityError, "A statement that names the partition or child itself sees and changes every tenant's rows: the parent's policies do not hold there."},
	"rls-not-forced":            {SeverityWarning, "The table's owner is exempt, and with it every view and SECURITY DEFINER function of the owner's."},
	"rls-not-on-tenant":         {SeverityInfo, "Row-level security is on, by other rules than the tenant: nothing here keeps tenants apart."},
	"no-policy":                 {SeverityWarning, "No row is seen and none can be written: row-level security is on and lets nothing through to the application."},
	"policy-admits-unset":       {SeverityError, "A connection without a tenant sees or writes tenants' rows."},
	"policy-admits-others":      {SeverityError, "One tenant sees, changes or deletes another's rows."},
	"policy-check-open":         {SeverityError, "One tenant writes rows that belong to another, or gives its own away."},
	"policy-besides":            {SeverityError, "Permissive policies add up, and this one does not ask for the tenant: what it lets through, it lets through to every tenant."},
	"policy-admits-empty":       {SeverityWarning, "Rows without a tenant, or with an empty one, are seen and written by every connection that has none."},
	"policy-unsealed":           {SeverityWarning, "SQL that is injected can set another tenant's ID for itself, and reach its rows."},
	"policy-raises":             {SeverityWarning, "Statements fail where they should find nothing."},
	"policy-per-row":            {SeverityWarning, "The setting is read anew for each row, which takes up to twice the time of a large query."},
	"policy-immutable-function": {SeverityError, "A function that is called IMMUTABLE is evaluated when a plan is made: a cached plan shows one tenant's rows to the next."},
	"tenant-column-nullable":    {SeverityWarning, "Rows can be nobody's. Policies with IS NOT DISTINCT FROM show them to all, others to none."},
	"tenant-column-loose":       {SeverityError, "The column calls different IDs equal, by case or by spaces: such tenants see each other's rows."},
	"tenant-column-type":        {SeverityWarning, "The tenant column has a type whose values and texts may differ from the tenants' IDs."},
	"tenant-column-unindexed":   {SeverityWarning, "Every statement reads the rows of all tenants to find one's own."},
	"unique-without-tenant":     {SeverityWarning, "A tenant learns from the error, or from ON CONFLICT, that another has the value, and cannot use it itself."},
	"key-without-tenant":        {SeverityInfo, "A generated key is unique over all tenants: one who inserts keys by hand learns which are taken."},
	"fk-across-tenants":         {SeverityError, "A row can refer to another tenant's, and what the one does to its row deletes or changes the other's."},
	"fk-without-tenant":         {SeverityWarning, "A row can refer to another tenant's: inserting one tells whether the other exists, and then hinders its removal."},

	// What shows or changes rows past policies.
	"view-past-policy":     {SeverityError, "The view reads with the rights of its owner, whom no policy of the table holds: it shows every tenant's rows."},
	"view-not-invoker":     {SeverityInfo, "The view reads with the rights of its owner, who is held by the policies as things are. One that is no longer shows all rows."},
	"matview-past-policy":  {SeverityError, "A materialized view has no policies: it shows the rows of every tenant that it was filled from."},
	"foreign-tenant-table": {SeverityError, "A foreign table can have no policies, and the other server does not know the tenant: it shows every tenant's rows."},
	"foreign-table":        {SeverityInfo, "A foreign table can have no policies: every tenant sees the same rows."},
	"definer-exempt-owner": {SeverityError, "The function runs with the rights of its owner, whom no policy holds: what it reads and writes is every tenant's."},
	"definer-trigger":      {SeverityWarning, "The trigger runs with the rights of its function's owner, whom no policy holds: what it reads and writes is every tenant's."},
	"definer-search-path":  {SeverityWarning, "The function finds what its caller put in the way: a temporary table or a function by the same name, run with its owner's rights."},
	"leakproof-function":   {SeverityWarning, "A function that is called LEAKPROOF runs before the policies, on every tenant's values."},
	"rewrite-rule":         {SeverityWarning, "A rule runs further statements with the rights of the table's owner, and sees rows before their policies do."},
	"truncate-granted":     {SeverityError, "TRUNCATE asks no policy: one tenant removes every tenant's rows."},
	"references-granted":   {SeverityWarning, "A foreign key made by the application asks no policy: it tells which rows there are."},
	"trigger-granted":      {SeverityWarning, "A trigger made by the application runs in every tenant's statements, and sees their rows."},
	"temp-granted":         {SeverityInfo, "Temporary tables are found before others of the same name, and outlive a transaction; the package cleans them up between tenants."},
	"create-on-schema":     {SeverityWarning, "One tenant's statement can leave tables without policies there, or functions and tables that stand in for others'."},
	"create-on-database":   {SeverityWarning, "One tenant's statement can make schemas, and leave rows and functions in them for others to find."},
	"default-privileges":   {SeverityWarning, "Tables that are made from now on give the application rights that go past policies."},
	"default-access":       {SeverityInfo, "A table that is made from now on is open to the application at once, before it has a policy."},
	"large-objects":        {SeverityWarning, "No policy guards large objects: every tenant reads and writes them by their number."},
	"publication":          {SeverityInfo, "Whoever subscribes gets every tenant's rows: policies do not hold replication."},

	// The package's own tables.
	"seal-key-readable":   {SeverityError, "Whoever reads the key can sign any tenant's ID for itself."},
	"own-schema-writable": {SeverityError, "The application can change who the tenants are and where their data lie."},
	"registry-readable":   {SeverityWarning, "Every statement of the application can list all tenants, their names, and where they are."},

	// Tenants with a schema or database of their own.
	"schema-crossing":         {SeverityError, "What is in one tenant's schema reads or refers to another's, or to the template's: their rows, and not the tenant's own."},
	"sequence-shared":         {SeverityWarning, "Tenants draw numbers from one sequence: each learns how much the others insert, and dropping one schema breaks the other's inserts."},
	"schema-drift":            {SeverityWarning, "The tenant's schema is not what the service expects: statements fail, or find something else."},
	"stand-in":                {SeverityInfo, "Should a tenant's schema lack the table, its statements go to the shared one of the same name instead."},
	"stand-in-used":           {SeverityWarning, "The tenant's schema lacks the table, and its statements go to the shared one of the same name."},
	"tenant-schema-missing":   {SeverityWarning, "Every statement of the tenant fails: its schema is not there."},
	"tenant-schema-orphan":    {SeverityWarning, "Data of a tenant that the registry does not know are kept, and are the next one's who gets that ID."},
	"tenant-database-missing": {SeverityWarning, "Every statement of the tenant fails: its database is not there."},
	"tenant-database-orphan":  {SeverityWarning, "Data of a tenant that the registry does not know are kept, and are the next one's who gets that ID."},
	"tenant-database-open":    {SeverityWarning, "Every login of the server can connect to the tenant's database."},

	"not-audited": {SeverityInfo, "What is wrong there is not in this report."},
}
