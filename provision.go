package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A ProvisionOption adjusts one call of Provision.
type ProvisionOption func(*Record)

// OnServer says on which of Config.Servers the database of a database tenant is made. It may be left out
// where there is only one.
func OnServer(name string) ProvisionOption { return func(r *Record) { r.Server = name } }

// WithAliases gives the tenant further names, by which Registry.ByAlias finds it.
func WithAliases(aliases ...string) ProvisionOption {
	return func(r *Record) { r.Aliases = append(r.Aliases, aliases...) }
}

// Provision makes a tenant: its row in the registry, with StatusProvisioning, then its schema, as a copy
// of Config.Template with the grants that it has, or its database, on one of Config.Servers, with CONNECT
// for the application's role; and last it gives the tenant the Status of t, so that nobody is served a tenant that is not
// whole. It needs Config.Registry and Config.Admin.
//
// A call that fails or dies at any step is completed by the same call, from any process; two at once make
// one tenant. Provisioning a tenant that is there already, in the same place, is no error and changes nothing
// about it, but makes a schema or database anew that has gone missing; one that is elsewhere, or is being deleted, is ErrTenantExists.
//
// A database tenant whose ConnString is set has a database already: none is made, and OnServer is refused.
func (db *TenantDB) Provision(ctx context.Context, t Tenant, options ...ProvisionOption) error {
	return db.provisionOn(ctx, db.admin, t, options)
}

func (db *TenantDB) provisionOn(ctx context.Context, on adminRunner, t Tenant, options []ProvisionOption) error {
	record := Record{Tenant: t}
	for _, o := range options {
		o(&record)
	}
	if err := db.provision(ctx, on, record); err != nil {
		if te := (*TenantError)(nil); errors.As(err, &te) {
			return err
		}
		return &TenantError{clip(t.ID), "provision", err}
	}
	return nil
}

func (db *TenantDB) provision(ctx context.Context, on adminRunner, want Record) error {
	if err := db.placeable(&want); err != nil {
		return err
	}
	final := want.Status
	want.Status = StatusProvisioning
	_, err := db.registry.create(ctx, on, want)
	if errors.Is(err, ErrTenantExists) {
		there, found := db.registry.get(ctx, on, want.ID)
		if found != nil {
			return found
		}
		if err = samePlace(&there, &want); err == nil && there.Status != StatusProvisioning {
			final = there.Status // made before; what follows finds all there
		}
	}
	if err != nil {
		return err
	}
	switch want.Isolation {
	case IsolationSchema:
		schemas, err := db.schemasOn(on)
		if err != nil {
			return err
		}
		if err := schemas.provision(ctx, want.ID, want.Tenant.schema()); err != nil {
			return err
		}
	case IsolationDatabase:
		if want.Server != "" {
			if err := db.servers[want.Server].on(on, want.Server).Provision(ctx, want.ID); err != nil {
				return err
			}
		}
	}
	return db.registry.setStatusOn(ctx, on, want.ID, []Status{StatusProvisioning, final}, final)
}

// placeable completes a record with where the tenant's data will be, or says why they cannot be anywhere.
func (db *TenantDB) placeable(r *Record) error {
	switch {
	case db.closed.Load():
		return ErrClosed
	case db.registry == nil:
		return ErrNoRegistry
	case db.admin == nil:
		return ErrNoAdmin
	case r.Status != StatusActive && r.Status != StatusSuspended && r.Status != StatusReadOnly:
		return fmt.Errorf("%w: a tenant is not provisioned to be %v", ErrInvalidTenant, r.Status)
	case r.Isolation != IsolationDatabase && r.Server != "":
		return fmt.Errorf("%w: OnServer is for tenants with database isolation, and it has %v isolation", ErrInvalidTenant, r.Isolation)
	case r.ConnString != "" && r.Server != "":
		return fmt.Errorf("%w: OnServer makes a database, and its ConnString leads to one already", ErrInvalidTenant)
	}
	if r.Isolation == IsolationSchema {
		if err := notTemplate(r.Tenant.schema(), db.config.Template); err != nil {
			return err
		}
	}
	if r.Isolation == IsolationDatabase && r.ConnString == "" {
		if r.Server == "" && len(db.servers) == 1 {
			for r.Server = range db.servers {
			}
		}
		if _, err := db.Databases(r.Server); err != nil {
			return err
		}
	}
	_, err := db.registry.encode(r)
	return err
}

// samePlace reports whether a tenant that exists is where it is now asked for.
func samePlace(there, want *Record) error {
	switch {
	case there.Status == StatusDeleting:
		return fmt.Errorf("%w: it is being deleted; Deprovision it to the end first", ErrTenantExists)
	case there.Isolation != want.Isolation || there.Isolation == IsolationSchema && there.Tenant.schema() != want.Tenant.schema():
		return fmt.Errorf("%w: with %v isolation, in another place", ErrTenantExists, there.Isolation)
	case there.Server != want.Server:
		return fmt.Errorf("%w: on server %q", ErrTenantExists, there.Server)
	}
	return nil
}

// A DeprovisionOption adjusts one call of Deprovision.
type DeprovisionOption func(*deprovisioning)

type deprovisioning struct{ retire bool }

// Retire sets the tenant's schema or database aside instead of dropping it: SchemaManager.Purge and
// DatabaseManager.Purge drop it for good, and Restore brings it back until then. It is not possible
// for a row tenant, whose rows are among all others'; suspend that instead.
func Retire() DeprovisionOption { return func(d *deprovisioning) { d.retire = true } }

// Deprovision removes a tenant: it is given StatusDeleting, then its data are removed (the rows of a row
// tenant from all tables that a policy on the tenant setting guards, in one transaction; the schema; the
// database, if Provision made it), and last its row in the registry.
//
// Between the two it waits until RegistryConfig.TTL, and StaleOnError, have passed since the change of status, for a
// process that has missed the news serves the tenant from its cache for as long. What such a process or
// an open transaction writes even later is not seen. If a run of ForEach is at work on the tenant it waits for that too, up
// to half a minute, and then fails, to be called again: the function of a run cannot remove the tenant that it is called for.
//
// What is kept of the tenant outside of PostgreSQL is the caller's to remove, such as its entries in a cache: a tenant that is
// made later under the same ID would find it.
//
// A call that fails or dies at any step is completed by the same call, from any process. A tenant that is
// not in the registry is ErrTenantNotFound: nothing is left of it.
func (db *TenantDB) Deprovision(ctx context.Context, tenantID string, options ...DeprovisionOption) error {
	return db.deprovisionOn(ctx, db.admin, tenantID, options)
}

func (db *TenantDB) deprovisionOn(ctx context.Context, on adminRunner, tenantID string, options []DeprovisionOption) error {
	var d deprovisioning
	for _, o := range options {
		o(&d)
	}
	if err := db.deprovision(ctx, on, tenantID, d); err != nil {
		if te := (*TenantError)(nil); errors.As(err, &te) {
			return err
		}
		return &TenantError{clip(tenantID), "deprovision", err}
	}
	return nil
}

func (db *TenantDB) deprovision(ctx context.Context, on adminRunner, id string, d deprovisioning) error {
	switch {
	case db.closed.Load():
		return ErrClosed
	case db.registry == nil:
		return ErrNoRegistry
	case db.admin == nil:
		return ErrNoAdmin
	}
	record, err := db.registry.get(ctx, on, id)
	if err != nil {
		return err
	}
	if d.retire && record.Isolation == IsolationRow {
		return fmt.Errorf("%w: Retire is not for a tenant whose rows are among others'; Suspend it instead", ErrInvalidTenant)
	}
	if record.Status != StatusDeleting {
		record, err = db.registry.update(ctx, on, id, func(r *Record) error {
			r.Status = StatusDeleting
			return nil
		})
		if err != nil {
			return err
		}
	}
	if p := planOf(on); p != nil {
		p.note("here " + (db.registry.config.TTL + db.registry.config.StaleOnError).String() + " pass, until no process serves the tenant from memory, and it is waited for a run of ForEach that is at work on it")
	} else {
		db.Evict(id)
		if err := db.staleAnswersGone(ctx, record.Changed); err != nil {
			return err
		}
		if err := db.runsGone(ctx, id); err != nil {
			return err
		}
	}
	if err := db.removeData(ctx, on, &record, d); err != nil {
		return err
	}
	// The server may run it after this process has died and another has made the tenant anew.
	err = db.registry.remove(ctx, on, id, &record.Generation)
	if errors.Is(err, ErrTenantNotFound) {
		return nil // another process did the same, and was first
	}
	return err
}

// staleAnswersGone waits until no process can have a tenant in memory as it was before a change.
func (db *TenantDB) staleAnswersGone(ctx context.Context, changed time.Time) error {
	var now time.Time // the server's, as the time of the change is
	if err := db.registry.write.QueryRow(ctx, "select clock_timestamp()").Scan(&now); err != nil {
		return err
	}
	return sleep(ctx, db.registry.config.TTL+db.registry.config.StaleOnError-now.Sub(changed))
}

// runPatience is how long Deprovision waits for a run: longer than DefaultRunLease, for that of a process that has died,
// and not without end, for it may be called by the very function that it would wait for.
const runPatience = 30 * time.Second

// runsGone waits until no run of ForEach is at work on a tenant that is being deleted, which no other begins with. With
// its schema gone, the next transaction of the run's function would find what it names, or make it, in the shared schemas.
func (db *TenantDB) runsGone(ctx context.Context, id string) error {
	for begun := time.Now(); ; {
		var run string
		err := db.registry.write.QueryRow(ctx, `select coalesce((select name from pgxtenant.run where id = c.run), '') from pgxtenant.run_claim c
			where kind = 'tenant' and target = $1 and expires > clock_timestamp()`, id).Scan(&run)
		var pgErr *pgconn.PgError
		switch {
		case errors.Is(err, pgx.ErrNoRows), errors.As(err, &pgErr) && pgErr.Code == "42P01": // of a registry that knows no runs yet
			return nil
		case err != nil:
			return err
		case time.Since(begun) > runPatience:
			return fmt.Errorf("pgxtenant: run %q has been at work on it for %v; call Deprovision again when that has ended", run, runPatience)
		}
		if err := sleep(ctx, busyPause); err != nil {
			return err
		}
	}
}

func (db *TenantDB) removeData(ctx context.Context, on adminRunner, record *Record, d deprovisioning) error {
	switch record.Isolation {
	case IsolationSchema:
		schemas, err := db.schemasOn(on)
		if err != nil {
			return err
		}
		if d.retire {
			return schemas.retire(ctx, record.ID, record.schema())
		}
		return schemas.drop(ctx, record.ID, record.schema())
	case IsolationDatabase:
		if record.Server == "" {
			return nil // it is not ours
		}
		databases, err := db.Databases(record.Server)
		if err != nil {
			return err
		}
		databases = databases.on(on, record.Server)
		if d.retire {
			return databases.Retire(ctx, record.ID)
		}
		return databases.Drop(ctx, record.ID)
	}
	return db.deleteRows(ctx, on, record.ID)
}
