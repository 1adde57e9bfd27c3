package pgxtenant

import (
	"context"
	"iter"
	"time"

	"github.com/jackc/pgx/v5"
)

// Defaults of ForEachOptions' fields.
const (
	DefaultRunConcurrency      = 4
	DefaultRunLockTimeout      = 2 * time.Second
	DefaultRunStatementTimeout = 15 * time.Minute
	DefaultRunAttempts         = 5
	DefaultRunLease            = 10 * time.Second
	DefaultRunPatience         = 30 * time.Second
)

const (
	// MaxRunConcurrency is the most that ForEachOptions.Concurrency may be: above it nothing but a mistake is meant.
	MaxRunConcurrency = 10_000

	// StopRateSamples is how many results there must be before ForEachOptions.StopRate is looked at.
	StopRateSamples = 20

	// firstPause is the pause before a second attempt, and longestPause where those between further ones stop growing.
	firstPause   = 250 * time.Millisecond
	longestPause = 10 * time.Second

	// maxFailures is how many failures a report keeps; the run table has all of them.
	maxFailures = 100
)

// ForEachFunc is what [TenantDB.ForEach] calls for each tenant, for several at once. The connection is of the role of
// Config.Admin, outside of any transaction, with timeouts set, and placed where the tenant's data are:
//
//   - for a tenant with IsolationSchema, in its schema: the search_path is what a checkout has, the schema first,
//     then Config.SharedSchemas, and pg_temp last;
//   - for one with IsolationDatabase, in its database, with the search_path that the database gives;
//   - for all tenants with IsolationRow together, once, in the shared schemas: the search_path is
//     Config.SharedSchemas and pg_temp.
//
// What is no tenant's own has an empty t.ID, and t.Isolation tells which it is: with IsolationRow the shared
// schemas, with IsolationSchema the template schema, t.Schema, and with IsolationDatabase the template
// database of one of Config.Servers, conn.Config().Database.
//
// The context carries the tenant, as WithTenantID does, or, for what is no tenant's own, none, as WithoutTenant does.
//
// The function must promise that it may be called again for the same tenant after it has failed, or was cut off at any
// place: each of its transactions is all or nothing and, once committed, is not done a second time, as migrations are
// that record themselves in a table in the same transaction. It must not keep the connection, nor change the session's
// advisory locks. What else it leaves on the session, an open transaction included, does not reach the next tenant. Behind a
// pooler that gives each transaction another session it does: SET, SET ROLE, LISTEN and temporary tables stay with the pooler's session,
// for whoever has it next. Use SET LOCAL there, or let ForEachOptions.AdjustConn lead past the pooler.
//
// A panic in it is the tenant's failure, with the stack in its error.
type ForEachFunc = func(ctx context.Context, conn *pgx.Conn, t Tenant) error

// ForEachOptions adjust one call of [TenantDB.ForEach]. The zero value is every tenant, four at a time, in a run
// that nothing resumes.
type ForEachOptions struct {
	// Name names the run, in up to 200 bytes. If there is a run of the same name that was not completed, because it
	// was stopped, died or had failures, this call goes on with it: tenants that it has done are left alone. Another
	// process may be at work in it; the two share what is left. A completed run is never resumed: its name begins a
	// new one.
	//
	// Empty means a new run, under a name made of the time.
	Name string

	// Fresh begins a new run even if one of the same Name was not completed. It is refused while a process is at
	// work in that one.
	Fresh bool

	// FailedOnly does only what has failed, or ended unknown, in the run that is resumed, and nothing that it had
	// not come to. It needs the Name of a run that was not completed.
	FailedOnly bool

	// By says who began the run, for those who read the run table. Empty means user@host of the process.
	By string

	// Isolations selects tenants by where their data are. Nil means all kinds, and an empty list none. Row tenants are one target
	// together, the shared schemas, which is selected if one of them is, and also, for a service without
	// tenants, if none of Plans, IDs, Percent and Select narrows the selection.
	Isolations []Isolation

	// Plans selects tenants by their Plan. Nil means every plan, and an empty list none.
	Plans []string

	// IDs selects tenants by their IDs. One that the registry does not know is ErrTenantNotFound, before anything is
	// done, in a new run; in one that is resumed it may have been deleted and is passed over. Nil means all, and an empty list none.
	IDs []string

	// Percent selects the tenants whose StablePercent is below it: the same ones each time, and those of 10
	// among those of 20. Zero means all. ForEach rejects a negative value and one above 100.
	Percent float64

	// Select, if not nil, selects those tenants for which it returns true, of those that all else selects. Being a function,
	// it is no part of what a resumed run compares.
	Select func(Tenant) bool

	// SkipShared leaves the shared schemas alone, and SkipTemplates the templates. Otherwise the shared schemas come first
	// of all, since tenants' schemas may refer to them. Then come Config.Template and the template databases of
	// Config.Servers, if Isolations has their kind and nothing else narrows the selection: no customer's data are in
	// them, and a tenant that is provisioned during the run, or later, is made from what is up to date. If one of
	// them fails the run is stopped. Tenants that come during a run are found at its end in any case.
	SkipShared, SkipTemplates bool

	// Versions, if not nil, returns the versions that tenants are at, by ID; one that is missing is at "". It is asked on
	// a connection of Config.Admin's role to their database, once for each page of up to 1,000 schema tenants, so one query
	// should do for all. The connection may be placed in any schema: name schemas in full, as Tenant.Schema has them. It is
	// asked again for each tenant that is worked on, before and after. For what is no tenant's own, tenants is that one
	// value of an empty ID, which is the key then. It may be called for several tenants, or pages, at once. If it
	// fails for a page, it is asked for each tenant of it alone, and its error is that of those for which it fails then.
	Versions func(ctx context.Context, conn *pgx.Conn, tenants []Tenant) (map[string]string, error)

	// Target is the version to reach: a tenant that Versions says is there is reported as current, and nothing is
	// called, locked or connected to for it. A tenant that is at another version after the function has returned
	// nil has failed. It is part of what a resumed run compares.
	//
	// Empty means that the function is called for each tenant.
	Target string

	// Canaries are the IDs of tenants that come first. If one fails, the run stops when all of them are through. Nothing is
	// done, and it is an error, if one is not among those that all else selects, is unknown to the registry, is being
	// provisioned or deleted: the others would be done without the canary that was asked for. That is so in a run that
	// is resumed too, which may have other canaries than before. The one of row tenants is the shared schemas, which come
	// before all others in any case.
	Canaries []string

	// Waves are the percentages of the tenants, by StablePercent, that are done at the end of each wave, such as
	// 1, 10, 50. They must rise. A wave begins when the one before has ended. All that is left is the last one.
	//
	// Nil means one wave.
	Waves []float64

	// StopAfter stops the run after so many failures, unknown outcomes included. Zero means never: a failure
	// is reported and the others go on. ForEach rejects a negative value.
	StopAfter int

	// StopRate stops the run when failures, unknown outcomes included, are more than this part of the results of this
	// call, once there are StopRateSamples (20) of them; what is current does not count. Zero means never. ForEach rejects
	// a negative value and one above 1.
	StopRate float64

	// Stop, if not nil, stops the run when it is closed: what is running goes on to its end, and nothing else
	// is begun. Cancelling the context of ForEach cancels what is running too.
	Stop <-chan struct{}

	// Concurrency is how many tenants are worked on at once. Each takes one connection, which counts towards
	// Config.MaxConns. Zero means DefaultRunConcurrency (4). ForEach rejects a negative value and one above
	// MaxRunConcurrency (10,000).
	Concurrency int

	// PerServer is the same for each server, by host and port. Zero means no limit but Concurrency. ForEach rejects a
	// negative value.
	PerServer int

	// AdjustConn, if not nil, may change how a target is connected to: to go past a pooler, or as another role. Of
	// schema tenants and the shared schemas it is asked once, with the zero Tenant. The configuration is
	// Config.Admin's, or that of the tenant's server in Config.Servers, in the tenant's database; for a database
	// tenant that has only a ConnString it is that, whose role may own nothing. The Tenant is as the function gets
	// it. It may be called for several tenants at once.
	AdjustConn func(t Tenant, c *pgx.ConnConfig) error

	// LockTimeout is the lock_timeout of the session: how long a statement may wait for a lock, with live traffic
	// waiting behind it. Zero means DefaultRunLockTimeout (2 seconds). A negative value means no limit.
	LockTimeout time.Duration

	// StatementTimeout is the statement_timeout of the session. Zero means DefaultRunStatementTimeout (15 minutes). A
	// negative value means no limit.
	StatementTimeout time.Duration

	// Timeout is how long the function may take for one tenant, each attempt anew; then its context ends, and what it
	// did has an unknown outcome. Zero means no limit. ForEach rejects a negative value.
	Timeout time.Duration

	// Attempts is how often the function is called for a tenant whose error is lock_timeout's (55P03), a deadlock (40P01)
	// or a serialization failure (40001), all of which roll their transaction back. No other error is retried. Zero means
	// DefaultRunAttempts (5), and 1 no retry. ForEach rejects a negative value. The pause before the second attempt is 250
	// milliseconds; each further one is twice as long, up to 10 seconds, and all vary by half.
	Attempts int

	// Lease is how long after a process has died, or lost the registry, another may take over the tenants that it was
	// at work on; a statement of the dead process that still runs on the server keeps its tenant in any case. Zero
	// means DefaultRunLease (10 seconds). ForEach rejects less than a second.
	Lease time.Duration

	// Patience is how long a server that cannot be reached is waited for, the registry's included, before a
	// tenant has failed, or the run. Zero means DefaultRunPatience (30 seconds). A negative value means not at all.
	Patience time.Duration

	// OnProgress, if not nil, is told after each change. It is never called twice at once, and the run waits for
	// it. It may close Stop.
	OnProgress func(RunProgress)
}

// RunState is what became of a tenant in a run.
type RunState string

const (
	RunRunning     RunState = "running"     // a process is at work on it
	RunInterrupted RunState = "interrupted" // a process was, and has died
	RunDone        RunState = "done"        // the function has returned nil
	RunCurrent     RunState = "current"     // it was at the target version already
	RunFailed      RunState = "failed"      // an error, with the transaction that it came from rolled back
	RunUnknown     RunState = "unknown"     // the connection was lost, or closed by a cancellation, after something was sent
	RunSkipped     RunState = "skipped"     // deleted, not there yet, or not looked at; Err says which
	RunPending     RunState = "pending"     // nothing was done; only TenantDB.Pending reports it
)

// RunResult is what became of one tenant in a run.
type RunResult struct {
	Tenant    string    // ID; empty for what is no tenant's own, as in ForEachFunc
	Isolation Isolation // of the tenant
	Place     string    // the schema, or the database and its server; "shared" for the shared schemas
	State     RunState
	Before    string // version; empty without ForEachOptions.Versions, or if it is not known
	After     string
	Attempts  int // calls of the function
	Started   time.Time
	Took      time.Duration
	Err       error // nil when done or current. Read from the run table it has the text alone
}

// RunProgress is how far a run has come. Counts are of this call alone, and of targets: tenants, and what is no
// tenant's own.
type RunProgress struct {
	Run   int64  // ID
	Name  string // of the run
	Stage string // "shared", "template", "canaries", "wave 1", …, or "late" for those that came during the run

	Done, Current, Failed, Unknown, Skipped int // that have ended
	Running                                 int // at work on
	Total                                   int // to end, as far as it is known; with Select, Percent or new tenants it is an estimate

	Elapsed time.Duration
	Rate    float64       // ended per second, current ones not counted, over the last half minute
	Left    time.Duration // until all have ended at this Rate; zero while it cannot be told

	Last   *RunResult // what ended just now; nil where something began, or many were found current
	Report *RunReport // of the run, when it has ended
}

// Ended is how many have ended, in whatever way.
func (p *RunProgress) Ended() int { return p.Done + p.Current + p.Failed + p.Unknown + p.Skipped }

// RunReport is how a run ended. Its size does not grow with the number of tenants.
type RunReport struct {
	RunProgress // the counts at the end; Report is nil

	Resumed  bool        // the run was begun by an earlier call
	Complete bool        // nothing is left to do in the run
	LeftOver int         // targets that are not done, failed ones included; counted in the registry
	Failures []RunResult // the first 100 that failed or ended unknown, in the order in which they did

	db *TenantDB
}

// Results returns all results of the run from the run table, those of earlier calls included, in the order of the
// IDs. It ends after an error.
func (r *RunReport) Results(ctx context.Context, states ...RunState) iter.Seq2[RunResult, error] {
	return r.db.RunResults(ctx, r.Run, states...)
}

// RunError is the error of a run that did not do all it was to do. Its causes are reached by errors.Is and
// errors.As: ErrRunStopped, ErrClosed or the context's error, and those in Report.Failures.
type RunError struct {
	Report *RunReport
	Cause  error // why it ended before its end; nil if it did not
}

func (e *RunError) Error() string { return e.text() }

// Unwrap returns the cause, and the errors of the failures that the report has.
func (e *RunError) Unwrap() (errs []error) {
	if e.Cause != nil {
		errs = append(errs, e.Cause)
	}
	for _, f := range e.Report.Failures {
		errs = append(errs, f.Err)
	}
	return errs
}

// Run is a run as the run table has it.
type Run struct {
	ID             int64
	Name, By       string
	Options        string    // selection and target, as JSON
	Started, Ended time.Time // Ended is zero while no call has come to its end
	Complete       bool      // nothing is left to do
	Counts         map[RunState]int
}
