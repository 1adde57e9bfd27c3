package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// DefaultDropGrace is how long a database that is dropped or retired waits for its connections to end.
const DefaultDropGrace = 10 * time.Second

// DatabaseOptions describe the tenants' databases on one server.
type DatabaseOptions struct {
	// Template is the database that new ones are copied from, rows, grants and all. Nobody may be connected
	// to it while it is copied: mark it by ALTER DATABASE … ALLOW_CONNECTIONS false.
	//
	// Empty means template0, an empty database.
	Template string

	// Setup, if not nil, fills a new database, connected to it as the administrating role. The database
	// has a passing name then, and gets its own when Setup has returned nil. After an error it is dropped,
	// so Setup need not be repeatable; it may use transactions of its own.
	Setup func(ctx context.Context, conn *pgx.Conn, tenantID string) error

	// AppRole is the role that tenants' statements run as. It may connect to the new database, which
	// PUBLIC may not; what it may do inside is for Template and Setup to say.
	//
	// Empty means nobody is granted anything.
	AppRole string

	// Owner is the role that owns new databases, of which the administrating role must be a member.
	//
	// Empty means the administrating role.
	Owner string

	// ConnLimit is how many connections a new database takes at most, superusers' not counted.
	//
	// Zero means no limit. NewDatabaseManager rejects a negative value.
	ConnLimit int

	// Setting is the run-time parameter that carries the tenant's ID, by which a database says whose it is.
	//
	// Empty means DefaultSetting.
	Setting string

	// Grace is how long Drop and Retire wait for connections to end, after no new one is let in and before
	// those that are left are terminated.
	//
	// Zero means DefaultDropGrace (10 seconds). A negative value means not to wait.
	Grace time.Duration
}

// DatabaseManager makes and removes tenants' databases on one server. Each is marked with its tenant's
// ID (ALTER DATABASE … SET), which every connection to it then carries, through RESET and poolers; no
// call touches a database that is not so marked. It is safe for concurrent use, in any number of processes
// that connect to the same database of the server: a tenant's calls wait for each other.
//
// The pool's role needs CREATEDB, membership in DatabaseOptions.Owner if that is set, and, unless it is a
// superuser, SET on the tenant setting (PostgreSQL 15 and later):
//
//	grant set on parameter app.current_tenant_id to admin
//
// It must reach the server directly: a transaction pooler would lose the locks.
type DatabaseManager struct {
	admin *pgxpool.Pool
	o     DatabaseOptions
	plan  *plan // if not nil, changes go there instead of to the server
}

// NewDatabaseManager returns a manager for the server that admin leads to. The pool stays the caller's.
func NewDatabaseManager(admin *pgxpool.Pool, o DatabaseOptions) (*DatabaseManager, error) {
	if admin == nil {
		return nil, ErrNoAdmin
	}
	o.Setting = orDefault(o.Setting, DefaultSetting)
	o.Grace = orDefault(o.Grace, DefaultDropGrace)
	var errs []error
	if o.ConnLimit < 0 {
		errs = append(errs, fmt.Errorf("pgxtenant: DatabaseOptions.ConnLimit is %d; want 0 or more", o.ConnLimit))
	}
	if err := validName(o.Template); o.Template != "" && err != nil {
		errs = append(errs, fmt.Errorf("pgxtenant: DatabaseOptions.Template %q: %w", clip(o.Template), err))
	}
	if err := validTenantSetting(o.Setting); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &DatabaseManager{admin: admin, o: o}, nil
}

// DatabaseName returns the name of the database of the tenant with the given ID. It is [SchemaName]'s, and
// as injective.
func DatabaseName(tenantID string) string { return SchemaName(tenantID) }

// TenantDatabase is a tenant's database, as DatabaseManager.List finds it.
type TenantDatabase struct {
	Name     string
	TenantID string
	Retired  time.Time // when it was taken out of use; zero while it is in use
}

// Provision makes the tenant's database, named DatabaseName(tenantID), if it is not there. A call that
// fails or is interrupted leaves no database of that name, and the next one begins anew.
// A database of that name that does not carry the tenant's mark is an error that wraps ErrWrongTenant.
func (m *DatabaseManager) Provision(ctx context.Context, tenantID string) error {
	return m.provision(ctx, tenantID, DatabaseName(tenantID))
}

func (m *DatabaseManager) provision(ctx context.Context, tenantID, name string) error {
	return m.locked(ctx, "provision database", tenantID, name, func(conn runner) error {
		found, err := m.find(ctx, conn, name)
		if err != nil {
			return err
		}
		if found.exists {
			return m.own(found, tenantID, name)
		}
		return m.create(ctx, conn, tenantID, name)
	})
}

// create makes the database under a passing name and gives it its own when all is done, so that a database
// of a tenant's name is always a whole one.
func (m *DatabaseManager) create(ctx context.Context, conn runner, tenantID, name string) error {
	passing := passingName(name)
	left, err := m.find(ctx, conn, passing)
	if err != nil {
		return err
	}
	if left.exists { // by a call that was interrupted: nobody else has the lock
		if err := m.remove(ctx, conn, passing, 0); err != nil {
			return err
		}
	}
	create := "create database " + ident(passing) + " template " + ident(orDefault(m.o.Template, "template0"))
	if m.o.Owner != "" {
		create += " owner " + ident(m.o.Owner)
	}
	if _, err := conn.Exec(ctx, create); err != nil {
		return m.explain(err)
	}
	err = m.fill(ctx, conn, tenantID, passing)
	if err == nil {
		_, err = conn.Exec(ctx, "alter database "+ident(passing)+" rename to "+ident(name))
	}
	if err == nil {
		return nil
	}
	err = m.explain(err)
	// With ctx cancelled the database is left for the next call: its name tells that it is not whole.
	if ctx.Err() == nil {
		if undo := m.remove(ctx, conn, passing, 0); undo != nil {
			err = fmt.Errorf("%w (and dropping %q: %w)", err, passing, undo)
		}
	}
	return err
}

func (m *DatabaseManager) fill(ctx context.Context, conn runner, tenantID, passing string) error {
	db := ident(passing)
	statements := []string{
		"alter database " + db + " set " + settingIdent(m.o.Setting) + " = " + literal(tenantID),
		"revoke connect, temporary on database " + db + " from public",
	}
	if m.o.AppRole != "" {
		statements = append(statements, "grant connect on database "+db+" to "+ident(m.o.AppRole))
	}
	if m.o.ConnLimit > 0 {
		statements = append(statements, "alter database "+db+" connection limit "+strconv.Itoa(m.o.ConnLimit))
	}
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	if m.o.Setup == nil {
		return nil
	}
	if m.plan != nil {
		m.plan.note("DatabaseOptions.Setup fills database " + db + " here")
		return nil
	}
	pool := m.admin.Config()
	config := pool.ConnConfig
	if pool.BeforeConnect != nil { // where credentials may come from
		if err := pool.BeforeConnect(ctx, config); err != nil {
			return fmt.Errorf("connect to the new database: %w", err)
		}
	}
	config.Database = passing
	inside, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return fmt.Errorf("connect to the new database: %w", err)
	}
	err = m.o.Setup(ctx, inside, tenantID)
	if closed := inside.Close(ctx); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("DatabaseOptions.Setup: %w", err)
	}
	return m.emptied(ctx, conn, passing) // the server ends a session after its client has
}

// Exists reports whether the tenant's database is there, and the tenant's: one of its name that carries
// another mark, or none, is an error that wraps ErrWrongTenant. A retired one does not count.
func (m *DatabaseManager) Exists(ctx context.Context, tenantID string) (bool, error) {
	name := DatabaseName(tenantID)
	if err := ValidateID(tenantID); err != nil {
		return false, &TenantError{clip(tenantID), "find database", err}
	}
	conn, err := m.admin.Acquire(ctx)
	if err != nil {
		return false, &TenantError{tenantID, "find database", err}
	}
	defer conn.Release()
	found, err := m.find(ctx, conn.Conn(), name)
	if err == nil && found.exists {
		err = m.own(found, tenantID, name)
	}
	if err != nil {
		return false, &TenantError{tenantID, "find database", err}
	}
	return found.exists, nil
}

// List returns every database of the server that carries a tenant's mark, in the order of their names,
// retired ones included.
func (m *DatabaseManager) List(ctx context.Context) ([]TenantDatabase, error) {
	rows, err := m.admin.Query(ctx, "select d.datname, "+m.markColumn()+" as mark from pg_catalog.pg_database d order by 1")
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: list databases: %w", err)
	}
	var list []TenantDatabase
	var name string
	var mark *string
	_, err = pgx.ForEachRow(rows, []any{&name, &mark}, func() error {
		if mark != nil && !strings.HasPrefix(name, passingPrefix) {
			list = append(list, TenantDatabase{Name: name, TenantID: *mark, Retired: retiredAt(name)})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: list databases: %w", err)
	}
	return list, nil
}

// Drop removes the tenant's database with all that is in it; one that is not there is no error. First no
// new connection is let in, then those that are open have DatabaseOptions.Grace to end, then they are
// terminated, for which the role needs to be a member of theirs or of pg_signal_backend. A call that is
// interrupted leaves the database closed, for the next one to drop; Provision refuses it meanwhile.
//
// In a TenantDB, Evict the tenant first: an open pool keeps connections.
func (m *DatabaseManager) Drop(ctx context.Context, tenantID string) error {
	return m.drop(ctx, tenantID, DatabaseName(tenantID))
}

func (m *DatabaseManager) drop(ctx context.Context, tenantID, name string) error {
	return m.locked(ctx, "drop database", tenantID, name, func(conn runner) error {
		for _, name := range []string{passingName(name), name} {
			found, err := m.find(ctx, conn, name)
			if err != nil {
				return err
			}
			if !found.exists {
				continue
			}
			// One under a passing name may not have got its mark yet.
			if !strings.HasPrefix(name, passingPrefix) {
				if found.mark == nil || *found.mark != tenantID {
					return m.own(found, tenantID, name)
				}
			}
			if err := m.remove(ctx, conn, name, m.o.Grace); err != nil {
				return err
			}
		}
		return nil
	})
}

// Retire takes the tenant's database out of use and keeps it, closed and under another name, until Purge
// drops it or Restore brings it back. Connections end as by Drop. A database that is not there is no error.
func (m *DatabaseManager) Retire(ctx context.Context, tenantID string) error {
	return m.retire(ctx, tenantID, DatabaseName(tenantID))
}

func (m *DatabaseManager) retire(ctx context.Context, tenantID, name string) error {
	return m.locked(ctx, "retire database", tenantID, name, func(conn runner) error {
		found, err := m.find(ctx, conn, name)
		if err != nil || !found.exists {
			return err
		}
		if found.mark == nil || *found.mark != tenantID {
			return m.own(found, tenantID, name)
		}
		if err := m.closeOff(ctx, conn, name, m.o.Grace); err != nil {
			return err
		}
		_, err = conn.Exec(ctx, "alter database "+ident(name)+" rename to "+ident(retiredName(name, time.Now())))
		return m.explain(err)
	})
}

// Restore undoes the tenant's latest Retire. It is an error if there is none to undo, or if the tenant has
// a database again.
func (m *DatabaseManager) Restore(ctx context.Context, tenantID string) error {
	name := DatabaseName(tenantID)
	return m.locked(ctx, "restore database", tenantID, name, func(conn runner) error {
		found, err := m.find(ctx, conn, name)
		if err != nil {
			return err
		}
		// A call that was interrupted after the rename left it closed.
		if found.exists && (found.mark == nil || *found.mark != tenantID || found.open) {
			return fmt.Errorf("pgxtenant: there is a database %q already; retire or drop it first", name)
		}
		if !found.exists {
			retired, err := m.retired(ctx, conn, tenantID)
			if err != nil {
				return err
			}
			if len(retired) == 0 {
				return fmt.Errorf("pgxtenant: no retired database carries %s = %q", m.o.Setting, tenantID)
			}
			last := retired[len(retired)-1].Name
			if _, err := conn.Exec(ctx, "alter database "+ident(last)+" rename to "+ident(name)); err != nil {
				return m.explain(err)
			}
		}
		_, err = conn.Exec(ctx, "alter database "+ident(name)+" allow_connections true")
		return m.explain(err)
	})
}

// Purge drops the databases that were retired longer than retention ago, and returns which. On an error the
// ones before it are dropped.
func (m *DatabaseManager) Purge(ctx context.Context, retention time.Duration) ([]TenantDatabase, error) {
	conn, err := m.admin.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: purge databases: %w", err)
	}
	retired, err := m.retired(ctx, conn.Conn(), "")
	conn.Release()
	if err != nil {
		return nil, fmt.Errorf("pgxtenant: purge databases: %w", err)
	}
	var dropped []TenantDatabase
	for _, d := range retired {
		if time.Since(d.Retired) < retention {
			continue
		}
		// The lock is that of Restore, or another Purge, which may have been first.
		err := m.locked(ctx, "purge database", d.TenantID, DatabaseName(d.TenantID), func(conn runner) error {
			found, err := m.find(ctx, conn, d.Name)
			if err != nil || !found.exists {
				return err
			}
			if err := m.remove(ctx, conn, d.Name, 0); err != nil {
				return err
			}
			dropped = append(dropped, d)
			return nil
		})
		if err != nil {
			return dropped, err
		}
	}
	return dropped, nil
}

// retired lists retired databases, of one tenant or of all, oldest first.
func (m *DatabaseManager) retired(ctx context.Context, conn runner, tenantID string) ([]TenantDatabase, error) {
	rows, err := conn.Query(ctx, "select d.datname, "+m.markColumn()+" as mark from pg_catalog.pg_database d where starts_with(d.datname, $1)", retiredPrefix)
	if err != nil {
		return nil, err
	}
	var list []TenantDatabase
	var name string
	var mark *string
	_, err = pgx.ForEachRow(rows, []any{&name, &mark}, func() error {
		if at := retiredAt(name); mark != nil && !at.IsZero() && (tenantID == "" || *mark == tenantID) {
			list = append(list, TenantDatabase{Name: name, TenantID: *mark, Retired: at})
		}
		return nil
	})
	slices.SortFunc(list, func(a, b TenantDatabase) int { return a.Retired.Compare(b.Retired) })
	return list, err
}

// foundDatabase is what the catalogue says of a database.
type foundDatabase struct {
	exists bool
	open   bool
	mark   *string
}

// markColumn is SQL for the tenant that database d is marked with, or NULL.
func (m *DatabaseManager) markColumn() string {
	return `(select pg_catalog.substr(c, pg_catalog.strpos(c, '=') + 1)
		from pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) c
		where s.setdatabase = d.oid and s.setrole = 0 and pg_catalog.lower(pg_catalog.split_part(c, '=', 1)) = ` +
		literal(strings.ToLower(m.o.Setting)) + ")"
}

func (m *DatabaseManager) find(ctx context.Context, conn runner, name string) (found foundDatabase, err error) {
	err = conn.QueryRow(ctx, "select d.datallowconn, "+m.markColumn()+" from pg_catalog.pg_database d where d.datname = $1", name).
		Scan(&found.open, &found.mark)
	if errors.Is(err, pgx.ErrNoRows) {
		return foundDatabase{}, nil
	}
	found.exists = err == nil
	return found, err
}

// own says why a database that exists is not the tenant's to use, or nil.
func (m *DatabaseManager) own(found foundDatabase, tenantID, name string) error {
	switch {
	case found.mark == nil:
		return fmt.Errorf("%w: there is a database %q that carries no tenant's mark; rename it, or, if it is the tenant's, alter database %s set %s = %s",
			ErrWrongTenant, name, ident(name), m.o.Setting, literal(tenantID))
	case *found.mark != tenantID:
		return fmt.Errorf("%w: database %q is tenant %q's", ErrWrongTenant, name, clip(*found.mark))
	case !found.open:
		return fmt.Errorf("pgxtenant: database %q takes no connections; an interrupted Drop or Retire left it so, or alter database %s allow_connections true",
			name, ident(name))
	}
	return nil
}

// remove drops a database that is ours, once its connections have ended.
func (m *DatabaseManager) remove(ctx context.Context, conn runner, name string, grace time.Duration) error {
	if err := m.closeOff(ctx, conn, name, grace); err != nil {
		return err
	}
	_, err := conn.Exec(ctx, "drop database if exists "+ident(name))
	return m.explain(err)
}

// sessionsOf selects the sessions in a database. Autovacuum is none: only a superuser may end it, and the server
// itself does so where a database is dropped or renamed. It is told by its having no user, for what kind a session
// is of is shown to its own role only.
const sessionsOf = "from pg_catalog.pg_stat_activity where datname = $1 and usesysid is not null"

// closeOff lets no new connection in, waits for those that are open, and terminates what is left.
func (m *DatabaseManager) closeOff(ctx context.Context, conn runner, name string, grace time.Duration) error {
	// What no termination ends is ended from inside, so it is found while the database can be entered.
	var held *string
	err := conn.QueryRow(ctx, `select coalesce(
			(select 'the prepared transaction ' || pg_catalog.quote_literal(gid) || '; COMMIT PREPARED or ROLLBACK PREPARED it' from pg_catalog.pg_prepared_xacts where database = $1 limit 1),
			(select 'the subscription ' || pg_catalog.quote_ident(s.subname) || '; drop it'
				from pg_catalog.pg_subscription s join pg_catalog.pg_database d on d.oid = s.subdbid where d.datname = $1 limit 1))`, name).Scan(&held)
	if err != nil {
		return err
	}
	if held != nil {
		return fmt.Errorf("pgxtenant: database %q is held by %s there first", name, *held)
	}
	if _, err := conn.Exec(ctx, "alter database "+ident(name)+" allow_connections false"); err != nil {
		return m.explain(err)
	}
	if m.plan != nil {
		m.plan.note("here its connections have " + max(grace, 0).String() + " to end")
	} else if grace > 0 {
		wait, cancel := context.WithTimeout(ctx, grace)
		err := m.emptied(wait, conn, name)
		timedOut := wait.Err() != nil
		cancel()
		if err == nil || ctx.Err() != nil || !timedOut {
			return err
		}
	}
	if _, err := conn.Exec(ctx, "select pg_catalog.pg_terminate_backend(pid) "+sessionsOf, name); err != nil {
		return m.explain(err)
	}
	if m.plan != nil {
		return nil
	}
	return m.emptied(ctx, conn, name)
}

// emptied waits until nobody is connected to a database. The server tells nobody when a session ends, so it
// is asked again and again. The waiting is done here, and not by a statement, whose cancellation would close
// the connection that holds the lock.
func (m *DatabaseManager) emptied(ctx context.Context, conn runner, name string) error {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-pause.C:
		}
		var users int
		err := conn.QueryRow(context.WithoutCancel(ctx), "select count(*) "+sessionsOf, name).Scan(&users)
		if err != nil || users == 0 {
			return err
		}
		pause.Reset(20 * time.Millisecond)
	}
}

// locked runs f while no other process does anything for a database of that name.
func (m *DatabaseManager) locked(ctx context.Context, op, tenantID, name string, f func(conn runner) error) (err error) {
	defer func() {
		if err != nil {
			err = &TenantError{clip(tenantID), op, err}
		}
	}()
	if err := ValidateID(tenantID); err != nil {
		return err
	}
	if err := validName(name); err != nil {
		return fmt.Errorf("pgxtenant: database name %q: %w", clip(name), err)
	}
	pooled, err := m.admin.Acquire(ctx)
	if err != nil {
		return err
	}
	defer pooled.Release()
	conn := pooled.Conn()
	if m.plan != nil {
		return f(&plannedConn{conn, m.plan})
	}
	const key = "pg_catalog.hashtextextended($1, 0)"
	if _, err := conn.Exec(ctx, "select pg_catalog.pg_advisory_lock("+key+")", "pgxtenant database "+name); err != nil {
		return err
	}
	defer func() {
		// With the connection lost the server gives up the lock itself.
		if conn.IsClosed() {
			return
		}
		unlock, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if _, failed := conn.Exec(unlock, "select pg_catalog.pg_advisory_unlock("+key+")", "pgxtenant database "+name); failed != nil {
			_ = conn.Close(unlock)
		}
	}()
	return f(conn)
}

// explain adds to a refusal of the server what it takes.
func (m *DatabaseManager) explain(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	role := ident(m.admin.Config().ConnConfig.User)
	// Not adminError: the role is that of the server's Admin, which need not be Config.Admin's.
	lacks := fmt.Errorf("role %s lacks a right: %w", role, err)
	switch {
	case pgErr.Code == "42501" && strings.Contains(pgErr.Message, "set parameter"):
		return fmt.Errorf("%w: as a superuser, grant set on parameter %s to %s", lacks, m.o.Setting, role)
	case pgErr.Code == "42501" && strings.Contains(pgErr.Message, "create database"):
		return fmt.Errorf("%w: as a superuser, alter role %s createdb", lacks, role)
	case pgErr.Code == "42501" && strings.Contains(pgErr.Message, "terminat") && strings.Contains(strings.ToLower(pgErr.Message+pgErr.Detail), "superuser"):
		return fmt.Errorf("a superuser is connected, and stays; disconnect it, or do this as a superuser: %w", err)
	case pgErr.Code == "42501" && strings.Contains(pgErr.Message, "terminat"):
		return fmt.Errorf("%w: as a superuser, grant pg_signal_backend to %s", lacks, role)
	case pgErr.Code == "55006" && m.o.Template != "" && strings.Contains(pgErr.Message, strconv.Quote(m.o.Template)):
		return fmt.Errorf("somebody is connected to the template; keep them out by alter database %s allow_connections false: %w", ident(m.o.Template), err)
	case pgErr.Code == "42501":
		return lacks
	case pgErr.Code == "55006" && pgErr.Detail != "":
		return fmt.Errorf("%w: %s", err, pgErr.Detail)
	case pgErr.Code == "3D000" && m.o.Template != "" && strings.Contains(pgErr.Message, strconv.Quote(m.o.Template)):
		return fmt.Errorf("DatabaseOptions.Template %q is not there; create that database on the server, with what each tenant is to have: %w", m.o.Template, err)
	}
	return err
}
