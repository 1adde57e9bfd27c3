package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Kinds of targets, as the run table has them.
const (
	targetTenant   = "tenant"
	targetShared   = "shared"
	targetSchema   = "schema"   // the template of schema tenants
	targetDatabase = "database" // a template of database tenants
)

// runTarget is what a run calls its function for: a tenant, or what is no tenant's own.
type runTarget struct {
	kind   string
	name   string // tenant's ID, the template schema's name, or the template's server
	tenant Tenant // as the function gets it
	server string // of Config.Servers; empty if there is none
	place  string // for people
	host   string // what PerServer counts by
	status Status

	version string    // as of the question for all
	again   time.Time // not to be tried before, since another session was at work on it
	err     error     // why it cannot be worked on
}

// fence names the lock that a session at work on the target holds in its database.
func (t *runTarget) fence() string { return fenceOf(&t.tenant) }

func fenceOf(t *Tenant) string {
	switch {
	case t.ID != "":
		return "pgxtenant run tenant " + t.ID
	case t.Isolation == IsolationRow:
		return "pgxtenant run shared"
	}
	return "pgxtenant run template " + t.Schema
}

// database is the name of the target's database on its server.
func (t *runTarget) database() string {
	if t.kind == targetDatabase {
		return t.place
	}
	return DatabaseName(t.name)
}

// tenantTarget is the target of a tenant that is not a row tenant.
func (r *tenantRun) tenantTarget(rec Record) *runTarget {
	t := &runTarget{kind: targetTenant, name: rec.ID, tenant: rec.Tenant, server: rec.Server, host: r.homeHost, status: rec.Status}
	if rec.Isolation == IsolationSchema {
		t.tenant.Schema = rec.schema()
		t.place = t.tenant.Schema
		t.server = ""
		return t
	}
	t.place = "its own ConnString"
	switch s, ok := r.db.config.Servers[rec.Server]; {
	case rec.Server != "" && rec.ConnString == "":
		t.place = DatabaseName(rec.ID) + " on " + rec.Server
		if ok {
			t.host = hostOf(s.Admin)
		}
	case r.db.registry.config.Resolve != nil:
		t.server, t.host = "", "resolved" // to ask now would be to ask for a whole page
	default:
		t.server = ""
		if c, err := parsePoolConfig(rec.ConnString); err == nil {
			t.host = hostOf(c)
		}
	}
	return t
}

func hostOf(c *pgxpool.Config) string {
	return net.JoinHostPort(c.ConnConfig.Host, strconv.Itoa(int(c.ConnConfig.Port)))
}

// selectSQL is the condition of tenants that this call may still have to work on; the parameters are in scanArgs. A
// failure of this call is not tried again by it, nor one that another process has had since this call began. What the
// run has of a tenant is a value, and no join: nothing is known of a table that was filled just now, and a join of
// all with all is what the server may take then. What became of a tenant that was deleted says nothing of one that was
// made later under its ID.
const selectSQL = chosenSQL + ` and coalesce((select case
		when r.state in ('done', 'current') then false
		when r.state in ('failed', 'unknown', 'skipped') and r.ended >= $7 then false
		when $8 then r.state in ('failed', 'unknown', 'interrupted', 'running')
		else true end ` + ofTenantSQL + `), not $8)`

const (
	chosenSQL = `t.id > $1 and t.isolation <> 'row'
	and ($3::text[] is null or t.isolation = any ($3)) and ($4::text[] is null or t.plan = any ($4)) and ($5::text[] is null or t.id = any ($5))`

	ofTenantSQL = "from pgxtenant.run_result r where r.run = $6 and r.kind = 'tenant' and r.target = t.id and r.started >= t.created"
)

func (r *tenantRun) scanArgs(after string, limit int) []any {
	var isolations []string
	if r.o.Isolations != nil {
		isolations = []string{} // an empty list is none, where NULL is all
	}
	for _, i := range r.o.Isolations {
		isolations = append(isolations, i.String())
	}
	return []any{after, limit, isolations, r.o.Plans, r.o.IDs, r.id, r.began, r.o.FailedOnly}
}

// page reads the next tenants of the registry that this call may have to work on, in the order of their IDs; with again,
// those too that have failed since it began. Memory does not grow with the number of tenants, and no transaction spans
// two pages.
func (r *tenantRun) page(ctx context.Context, after string, again bool) (page []pageRow, err error) {
	args := r.scanArgs(after, maxPage)
	if again {
		args[6] = nil
	}
	err = r.book(ctx, func(ctx context.Context) error {
		rows, err := r.books.Query(ctx, recordSQL+selectSQL+" order by t.id limit $2", args...)
		if err != nil {
			return err
		}
		page, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p pageRow, err error) {
			p.rec, err = r.db.registry.decode(row)
			if err != nil && p.rec.ID != "" {
				p.rec, p.unreadable, err = Record{Tenant: Tenant{ID: p.rec.ID, Isolation: IsolationDatabase}}, err, nil
			}
			return p, err
		})
		return err
	})
	return page, err
}

// expected is how many tenants this call may have to work on. Functions are not asked.
func (r *tenantRun) expected(ctx context.Context) (n int, err error) {
	err = r.book(ctx, func(ctx context.Context) error {
		return r.books.QueryRow(ctx, "select count(*) from pgxtenant.tenant t where "+selectSQL+" and $2 > 0", r.scanArgs("", 1)...).Scan(&n)
	})
	if r.o.Percent != 0 {
		n = int(float64(n)*r.o.Percent/100 + 0.5)
	}
	return n, err
}

// A feed returns the next targets of a stage, and none when there are no more.
type feed func(ctx context.Context) ([]*runTarget, error)

// tenantsFeed reads the registry from its beginning, for those tenants that are selected and in. With again it has those
// too that have failed since this call began: a canary that another process has had fail must not be passed over.
func (r *tenantRun) tenantsFeed(in func(Tenant) bool, again bool) feed {
	after, end := "", false
	return func(ctx context.Context) ([]*runTarget, error) {
		for !end {
			page, err := r.page(ctx, after, again)
			if err != nil {
				return nil, err
			}
			end = len(page) < maxPage
			var targets []*runTarget
			for _, row := range page {
				after = row.rec.ID
				if !r.o.selects(row.rec.Tenant) || in != nil && !in(row.rec.Tenant) {
					continue
				}
				t := r.tenantTarget(row.rec)
				t.err = row.unreadable
				targets = append(targets, t)
			}
			if targets, err = r.outdated(ctx, targets); err != nil || len(targets) > 0 {
				return targets, err
			}
		}
		return nil, nil
	}
}

// outdated drops the targets that are at the target version, after one question for all that are in one database, and
// those that nothing is to be done for.
func (r *tenantRun) outdated(ctx context.Context, targets []*runTarget) ([]*runTarget, error) {
	var ask, rest, current, deleting []*runTarget
	for _, t := range targets {
		switch {
		case t.status == StatusDeleting:
			deleting = append(deleting, t)
		case t.err == nil && t.tenant.Isolation == IsolationSchema && t.status != StatusProvisioning:
			ask = append(ask, t)
		default:
			rest = append(rest, t)
		}
	}
	if err := r.skip(ctx, deleting); err != nil {
		return nil, err
	}
	if r.o.Versions == nil || len(ask) == 0 {
		return append(ask, rest...), nil
	}
	versions, err := r.versions(ctx, ask)
	if err != nil && ctx.Err() != nil {
		return nil, err
	}
	// One tenant may have made the question fail for all. Each is asked for again when it is worked on.
	for _, t := range ask {
		if t.version = versions[t.tenant.ID]; err == nil && r.o.Target != "" && t.version == r.o.Target {
			current = append(current, t)
		} else {
			rest = append(rest, t)
		}
	}
	noted, err := r.note(ctx, RunCurrent, current, nil)
	if err != nil {
		return nil, err
	}
	r.progress.many(RunCurrent, len(noted))
	for _, t := range current {
		if !noted[t.name] { // another process is about to say so
			rest = append(rest, t)
		}
	}
	return rest, nil
}

// skip notes tenants that are being removed.
func (r *tenantRun) skip(ctx context.Context, targets []*runTarget) error {
	noted, err := r.note(ctx, RunSkipped, targets, errDeleted)
	r.progress.many(RunSkipped, len(noted))
	return err
}

var errDeleted = fmt.Errorf("%w: it was deleted, or is being deleted", ErrTenantUnavailable)

// versions asks for the versions of targets in the database of schema tenants.
func (r *tenantRun) versions(ctx context.Context, targets []*runTarget) (versions map[string]string, err error) {
	tenants := make([]Tenant, 0, len(targets))
	for _, t := range targets {
		tenants = append(tenants, t.tenant)
	}
	err = r.patiently(ctx, func() error {
		conn, err := r.home.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		versions, err = r.askVersions(ctx, conn.Conn(), tenants)
		r.home.release(conn, r.home.reset(ctx, conn.Conn()) == nil)
		return err
	})
	return versions, err
}

// askVersions calls the function of the options. A panic in it is an error.
func (r *tenantRun) askVersions(ctx context.Context, conn *pgx.Conn, tenants []Tenant) (versions map[string]string, err error) {
	err = callSafely(func() (err error) {
		versions, err = r.o.Versions(ctx, conn, tenants)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: ForEachOptions.Versions: %w", err)
	}
	return versions, nil
}

// shared is the target of the row tenants, or nil if none is to be worked on.
func (r *tenantRun) shared(ctx context.Context) (*runTarget, error) {
	if !r.o.has(IsolationRow) || r.o.SkipShared {
		return nil, nil
	}
	wanted := !r.o.narrowed()
	for after := ""; !wanted; {
		var page []Tenant
		err := r.book(ctx, func(ctx context.Context) error {
			rows, err := r.books.Query(ctx, recordSQL+`t.id > $1 and t.isolation = 'row' and t.status <> 'deleting' and ($3::text[] is null or t.plan = any ($3))
				and ($4::text[] is null or t.id = any ($4)) order by t.id limit $2`, after, maxPage, r.o.Plans, r.o.IDs)
			if err != nil {
				return err
			}
			page, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Tenant, error) {
				rec, _ := r.db.registry.decode(row) // one that cannot be read is selected by nothing
				return rec.Tenant, nil
			})
			return err
		})
		if err != nil {
			return nil, err
		}
		wanted = slices.ContainsFunc(page, r.o.selects)
		if len(page) < maxPage {
			break
		}
		after = page[len(page)-1].ID
	}
	if !wanted {
		return nil, nil
	}
	return &runTarget{kind: targetShared, place: "shared", host: r.homeHost}, nil
}

// templates are the targets that new tenants are copies of.
func (r *tenantRun) templates() (targets []*runTarget) {
	c := r.db.config
	if r.o.SkipTemplates || r.o.narrowed() {
		return nil
	}
	if c.Template != "" && r.o.has(IsolationSchema) {
		targets = append(targets, &runTarget{kind: targetSchema, name: c.Template, place: c.Template, host: r.homeHost,
			tenant: Tenant{Isolation: IsolationSchema, Schema: c.Template}})
	}
	for _, name := range slices.Sorted(maps.Keys(c.Servers)) {
		template := c.Servers[name].Template
		if template == "" || template == "template0" || template == "template1" || !r.o.has(IsolationDatabase) {
			continue
		}
		s := c.Servers[name]
		targets = append(targets, &runTarget{kind: targetDatabase, name: name, server: name, place: template, host: hostOf(s.Admin),
			tenant: Tenant{Isolation: IsolationDatabase}})
	}
	return targets
}

// unfinished tells what is left of targets that are no tenants', and which of them the run has done already.
func (r *tenantRun) unfinished(ctx context.Context, targets []*runTarget) (left, done []*runTarget, err error) {
	if len(targets) == 0 {
		return nil, nil, nil
	}
	states := make(map[[2]string]string)
	err = r.book(ctx, func(ctx context.Context) error {
		rows, err := r.books.Query(ctx, "select kind, target, state from pgxtenant.run_result where run = $1 and kind <> 'tenant'", r.id)
		if err != nil {
			return err
		}
		var kind, name, state string
		_, err = pgx.ForEachRow(rows, []any{&kind, &name, &state}, func() error {
			states[[2]string{kind, name}] = state
			return nil
		})
		return err
	})
	for _, t := range targets {
		switch state := RunState(states[[2]string{t.kind, t.name}]); {
		case state == RunDone, state == RunCurrent:
			done = append(done, t)
		case state != "" || !r.o.FailedOnly:
			left = append(left, t)
		}
	}
	return left, done, err
}

// settled decides what to do with a tenant that is being provisioned. Its row in the registry is older than its
// schema or database, so no tenant is overlooked that is copied from a template which the run has not done yet: it is
// there when the run looks for what is left. Here, where the template is done, the lock of the copying is waited for:
// then either the copy is there, perhaps of the template as it was, and is worked on, or it will be made of the
// template as it is now.
func (r *tenantRun) settled(ctx context.Context, t *runTarget) (there bool, err error) {
	switch {
	case t.tenant.Isolation == IsolationSchema && r.db.config.Template != "":
		schemas, err := r.db.Schemas()
		if err != nil {
			return false, err
		}
		err = schemas.locked(ctx, "run", t.name, t.tenant.Schema, func(tx pgx.Tx, schema string) error {
			found, err := schemas.find(ctx, tx, schema)
			there = found.exists
			return err
		})
		return there, err
	case t.server != "":
		databases, err := r.db.Databases(t.server)
		if err != nil {
			return false, err
		}
		err = databases.locked(ctx, "run", t.name, t.database(), func(conn runner) error {
			found, err := databases.find(ctx, conn, t.database())
			there = found.exists
			return err
		})
		return there, err
	}
	return true, nil // by other means: what is missing is told by the attempt
}

var errNotThere = errors.New("pgxtenant: it is still being provisioned, and its template was not part of the run; Provision completes it, Deprovision removes it")
