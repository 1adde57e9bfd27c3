package pgxtenant

import "time"

// DefaultHeavyShare is the share of the shared database's time from which on a tenant is heavy.
const DefaultHeavyShare = 0.4

// HeavyMinTime is how much time must have been spent in the shared database within five minutes for any
// tenant to be called heavy: below, there is nothing to share. It is a tenth of what one connection has.
const HeavyMinTime = 30 * time.Second

// LoadTenants is the most tenants that a LoadWindow has by name.
const LoadTenants = 256

// Load is a snapshot of what tenants had their databases do, of all pools but Admin's. It is the caller's own.
//
// It comes from a sketch whose memory, some 1.5 MB at most, does not grow with the number of tenants: each slice of
// ten seconds keeps the LoadTenants (256) tenants that used the most time, found by the algorithm of Misra and Gries
// (1982), with time as weight. So what is told of a tenant was surely used by it, Missed tells what
// it may have used beyond that, and totals are exact. Missed is at most 1/256 of the window's time for the first two
// windows, and 1/128 for Hour; it is zero for all as long as no slice has seen more than 256 tenants.
type Load struct {
	At time.Time

	// Minute, FiveMinutes and Hour end at At. They reach back by no more than their names say, by up to ten seconds less,
	// and Hour by up to five minutes less; see LoadWindow.Span.
	Minute, FiveMinutes, Hour LoadWindow

	// Total is all that was used since the TenantDB was opened.
	Total Usage

	// Held is how many connections each tenant has checked out now, hijacked ones included. The empty ID stands for
	// WithoutTenant.
	Held map[string]int
}

// LoadWindow is what was used within a stretch of time.
type LoadWindow struct {
	// Span is how long it really is. It is less than the window's name says while the TenantDB is younger.
	Span time.Duration

	// Total is what all tenants used.
	Total Usage

	// Tenants are those that used the most time, heaviest first: all, or LoadTenants (256) of them. A tenant
	// without an ID stands for work under WithoutTenant.
	Tenants []TenantLoad

	// Other is what is in Total and in none of Tenants.
	Other Usage

	// Active is how many tenants did anything. Exact tells whether it is a count; otherwise it is an estimate, of a
	// standard error of 2.3 %.
	Active int
	Exact  bool
}

// Usage is what statements came to.
type Usage struct {
	// Statements by kind. Queries were answered with rows of a SELECT. Execs are all others that were sent alone: writes,
	// DDL, BEGIN and COMMIT, and those that failed. Batched went in a pgx.Batch. Copies are calls of CopyFrom.
	Queries, Execs, Batched, Copies int64

	// Rows were returned or changed, by the server's count.
	Rows int64

	// Errors are statements that failed, for whatever reason. A batch that fails counts once.
	Errors int64

	// Time is the time in the database: from when a statement is sent until its last row has been read, whoever is
	// slow about it, with what it took to prepare it. A statement that runs counts as it goes.
	Time time.Duration

	// SharedTime is the part of Time spent on connections of the shared pool.
	SharedTime time.Duration

	// Waits are checkouts that found no connection idle, and WaitTime is how long they waited for one, or
	// for their turn, or under Config.MaxConns, whether or not they got it. The opening of an isolated
	// pool counts as one.
	Waits    int64
	WaitTime time.Duration
}

// Statements returns how many there were of all kinds.
func (u Usage) Statements() int64 { return u.Queries + u.Execs + u.Batched + u.Copies }

// TenantLoad is what one tenant used.
type TenantLoad struct {
	TenantID string
	Usage

	// Missed is how much more Time it may have used at most. If it is zero, all of Usage is exact.
	Missed time.Duration

	// TimeShare and StatementShare are its parts of the window's total Time and statements, and SharedShare that of
	// SharedTime: from 0 to 1. Config.HeavyShare is about SharedShare.
	TimeShare, StatementShare, SharedShare float64
}

// Load returns what tenants have used. It takes about a millisecond of work if there are very many of them. With
// Config.DisableLoad it returns an empty Load.
func (db *TenantDB) Load() *Load { return db.load.snapshot() }

func (u *Usage) add(o *Usage) {
	u.Queries += o.Queries
	u.Execs += o.Execs
	u.Batched += o.Batched
	u.Copies += o.Copies
	u.Rows += o.Rows
	u.Errors += o.Errors
	u.Time += o.Time
	u.SharedTime += o.SharedTime
	u.Waits += o.Waits
	u.WaitTime += o.WaitTime
}

func (u *Usage) sub(o *Usage) {
	u.Queries -= o.Queries
	u.Execs -= o.Execs
	u.Batched -= o.Batched
	u.Copies -= o.Copies
	u.Rows -= o.Rows
	u.Errors -= o.Errors
	u.Time -= o.Time
	u.SharedTime -= o.SharedTime
	u.Waits -= o.Waits
	u.WaitTime -= o.WaitTime
}
