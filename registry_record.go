package pgxtenant

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Record is a tenant as the registry keeps it.
type Record struct {
	// Tenant is what Lookup returns, except that with RegistryConfig.Resolve its ConnString is the reference.
	// A database tenant may lack a ConnString if TenantDB.Provision made its database, on Server, or as long as
	// it is StatusProvisioning or StatusDeleting.
	Tenant

	// Aliases are further names that lead to the tenant: slugs, subdomains, custom domains. No two tenants
	// share one. Each is 1 to 253 bytes of a-z 0-9 . _ and -, with a letter or digit at both ends of each
	// part between dots; upper case is folded to lower, and names outside ASCII go in as Punycode (xn--…).
	// They are sorted.
	Aliases []string

	// Server names the server that the tenant is placed on, in the caller's own terms. Empty is the default.
	Server string

	// The registry sets these and ignores what they are set to. Generation differs between a tenant and one
	// that is created later with the same ID.
	Generation       int64
	Created, Changed time.Time
}

// maxPage is how many records All reads at once.
const maxPage = 1000

// recordSQL reads records; what follows it begins with a condition.
const recordSQL = `select t.id, t.plan, t.isolation, t.schema, t.conn, t.server, t.status, t.settings, t.generation, t.created, t.changed,
	array(select a.alias from pgxtenant.tenant_alias a where a.tenant_id = t.id order by 1)
	from pgxtenant.tenant t where `

// Create adds a tenant, and its aliases, all or nothing. It returns the record as stored. A tenant with the
// same ID fails it with ErrTenantExists, an alias of another with ErrAliasTaken, and one of a bad form with
// ErrInvalidAlias.
func (r *Registry) Create(ctx context.Context, rec Record) (Record, error) {
	return r.create(ctx, r.write, rec)
}

func (r *Registry) create(ctx context.Context, on adminRunner, rec Record) (Record, error) {
	row, err := r.encode(&rec)
	if err != nil {
		return Record{}, &TenantError{clip(rec.ID), "create", err}
	}
	err = pgx.BeginFunc(ctx, on, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings)
			values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict (id) do nothing returning generation, created, changed`,
			row...).Scan(&rec.Generation, &rec.Created, &rec.Changed)
		if errors.Is(err, pgx.ErrNoRows) {
			return ErrTenantExists
		}
		if err != nil {
			return err
		}
		return addAliases(ctx, tx, rec.ID, rec.Aliases)
	})
	if err != nil {
		return Record{}, r.failure(rec.ID, "create", err)
	}
	r.forget(rec.ID, rec.Aliases...)
	return rec, nil
}

// Get returns the tenant's record, from the database and not from memory. If there is none the error wraps
// ErrTenantNotFound.
func (r *Registry) Get(ctx context.Context, id string) (Record, error) {
	return r.get(ctx, r.write, id)
}

func (r *Registry) get(ctx context.Context, on runner, id string) (rec Record, err error) {
	if err = ValidateID(id); err == nil {
		rec, err = r.readRecord(ctx, on, id, "")
	}
	if err != nil {
		return Record{}, &TenantError{clip(id), "get", err}
	}
	return rec, nil
}

// Update changes a tenant: it locks the row, calls change with the record, and writes what change made of
// it, all in one transaction. An error of change, which is returned as it is, leaves everything as it was, and
// so does a change of the ID, which is refused. change must not call the registry. The result is the record as
// stored; errors are as Create's and Get's.
func (r *Registry) Update(ctx context.Context, id string, change func(*Record) error) (Record, error) {
	return r.update(ctx, r.write, id, change)
}

func (r *Registry) update(ctx context.Context, on adminRunner, id string, change func(*Record) error) (rec Record, err error) {
	if err := ValidateID(id); err != nil {
		return Record{}, &TenantError{clip(id), "update", err}
	}
	var own error
	var aliases []string // before and after
	err = pgx.BeginFunc(ctx, on, func(tx pgx.Tx) error {
		if rec, err = r.readRecord(ctx, tx, id, " for update of t"); err != nil {
			return err
		}
		before := rec
		before.Aliases = slices.Clone(rec.Aliases)
		if own = change(&rec); own != nil {
			return own
		}
		if rec.ID != id {
			return fmt.Errorf("%w: its ID may not change (to %q)", ErrInvalidTenant, clip(rec.ID))
		}
		row, err := r.encode(&rec)
		if err != nil {
			return err
		}
		rec.Generation, rec.Created = before.Generation, before.Created
		if err := tx.QueryRow(ctx, `update pgxtenant.tenant set plan = $2, isolation = $3, schema = $4, holds = $5, conn = $6,
			server = $7, status = $8, settings = $9, changed = clock_timestamp() where id = $1 returning changed`, row...).Scan(&rec.Changed); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "delete from pgxtenant.tenant_alias where tenant_id = $1 and alias <> all ($2)", id, rec.Aliases); err != nil {
			return err
		}
		aliases = slices.Concat(before.Aliases, rec.Aliases)
		fresh := slices.DeleteFunc(slices.Clone(rec.Aliases), func(a string) bool { return slices.Contains(before.Aliases, a) })
		return addAliases(ctx, tx, id, fresh)
	})
	switch {
	case own != nil:
		return Record{}, own
	case err != nil:
		return Record{}, r.failure(id, "update", err)
	}
	r.forget(id, aliases...)
	return rec, nil
}

// Suspend refuses service to a tenant that is served, everywhere, from its next checkout on: see
// StatusSuspended. Work under way is not disturbed. One that is suspended already stays so; in any other
// status it fails with ErrTenantStatus.
func (r *Registry) Suspend(ctx context.Context, id string) error {
	return r.setStatus(ctx, id, []Status{StatusActive, StatusReadOnly, StatusSuspended}, StatusSuspended)
}

// MakeReadOnly lets a tenant that is served, or suspended, read and not write: see StatusReadOnly.
// Transactions under way are not disturbed.
func (r *Registry) MakeReadOnly(ctx context.Context, id string) error {
	return r.setStatus(ctx, id, []Status{StatusActive, StatusReadOnly, StatusSuspended}, StatusReadOnly)
}

// Resume makes a suspended or read-only tenant an active one.
func (r *Registry) Resume(ctx context.Context, id string) error {
	return r.setStatus(ctx, id, []Status{StatusActive, StatusReadOnly, StatusSuspended}, StatusActive)
}

// setStatus changes the status if it is one of from, and fails with ErrTenantStatus otherwise.
func (r *Registry) setStatus(ctx context.Context, id string, from []Status, to Status) error {
	return r.setStatusOn(ctx, r.write, id, from, to)
}

func (r *Registry) setStatusOn(ctx context.Context, on adminRunner, id string, from []Status, to Status) error {
	_, err := r.update(ctx, on, id, func(rec *Record) error {
		if !slices.Contains(from, rec.Status) {
			return &TenantError{id, "set status", fmt.Errorf("%w: it is %v and cannot become %v", ErrTenantStatus, rec.Status, to)}
		}
		rec.Status = to
		return nil
	})
	return err
}

// Delete removes the tenant's record and aliases, whatever its status, and nothing else: its data stay where
// they are. If there is none the error wraps ErrTenantNotFound.
func (r *Registry) Delete(ctx context.Context, id string) error {
	if err := ValidateID(id); err != nil {
		return &TenantError{clip(id), "delete", err}
	}
	return r.remove(ctx, r.write, id, nil)
}

// remove is Delete of the tenant of one generation, or of whichever there is.
func (r *Registry) remove(ctx context.Context, on runner, id string, generation *int64) error {
	tag, err := on.Exec(ctx, "delete from pgxtenant.tenant where id = $1 and ($2::bigint is null or generation = $2)", id, generation)
	if err == nil && tag.RowsAffected() == 0 {
		err = ErrTenantNotFound
	}
	if err != nil {
		return r.failure(id, "delete", err)
	}
	r.forget(id)
	return nil
}

// All returns all tenants, in the order of their IDs. It reads them a page at a time and holds no transaction
// or connection between pages, so it sees changes made meanwhile: each tenant that is there all the time comes
// once. A row that cannot be read, changed by hand or sealed with another key, comes as its ID and an error, and the
// others follow. After any other error it ends.
func (r *Registry) All(ctx context.Context) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for after := ""; ; {
			page, err := r.page(ctx, after)
			if err != nil {
				yield(Record{}, err)
				return
			}
			for _, row := range page {
				if !yield(row.rec, row.unreadable) {
					return
				}
				after = row.rec.ID
			}
			if len(page) < maxPage {
				return
			}
		}
	}
}

type pageRow struct {
	rec        Record
	unreadable error
}

func (r *Registry) page(ctx context.Context, after string) ([]pageRow, error) {
	rows, err := r.pool.Query(ctx, recordSQL+"t.id > $1 order by t.id limit $2", after, maxPage)
	if err != nil {
		return nil, r.explain("read all", err)
	}
	page, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p pageRow, err error) {
		p.rec, err = r.decode(row)
		if err != nil && p.rec.ID != "" {
			p.rec, p.unreadable, err = Record{Tenant: Tenant{ID: p.rec.ID}}, err, nil
		}
		return p, err
	})
	return page, r.explain("read all", err)
}

// Reseal encrypts with RegistryConfig.Key every connection string that is not, and returns how many. To
// rotate: move Key to OldKeys and set a new Key in every process, call Reseal, then drop the old one. If it
// fails, call it again. Those that cannot be read are left as they are, and are errors once all others are done.
func (r *Registry) Reseal(ctx context.Context) (n int, err error) {
	if r.vault.sealer == nil {
		return 0, errNoKey
	}
	rows, err := r.write.Query(ctx, "select id from pgxtenant.tenant where conn <> '' and not starts_with(conn, $1)", "aes:"+r.vault.sealer.name+":")
	if err != nil {
		return 0, r.explain("reseal", err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return 0, r.explain("reseal", err)
	}
	var unreadable []error
	for _, id := range ids {
		_, err := r.Update(ctx, id, func(*Record) error { return nil })
		switch {
		case err == nil:
			n++
		case errors.Is(err, errUnreadable), errors.Is(err, ErrInvalidTenant):
			unreadable = append(unreadable, err)
		case !isNotFound(err):
			return n, errors.Join(append(unreadable, err)...)
		}
	}
	return n, errors.Join(unreadable...)
}

func isNotFound(err error) bool { return errors.Is(err, ErrTenantNotFound) }

// encode checks rec, brings its aliases into form and returns what is stored.
func (r *Registry) encode(rec *Record) ([]any, error) {
	t := rec.Tenant
	if (rec.Server != "" || rec.Status == StatusProvisioning || rec.Status == StatusDeleting) && t.Isolation == IsolationDatabase && t.ConnString == "" {
		t.ConnString = "to be known later"
	}
	if err := r.validate(&t); err != nil {
		return nil, err
	}
	if rec.Status > StatusDeleting {
		return nil, fmt.Errorf("%w: unknown status %v", ErrInvalidTenant, rec.Status)
	}
	if strings.IndexByte(rec.Plan+rec.Server, 0) >= 0 {
		return nil, fmt.Errorf("%w: its Plan or Server has a NUL byte", ErrInvalidTenant)
	}
	aliases := make([]string, 0, len(rec.Aliases))
	for _, a := range rec.Aliases {
		name, err := normalAlias(a)
		if err != nil {
			return nil, err
		}
		aliases = append(aliases, name)
	}
	slices.Sort(aliases)
	rec.Aliases = slices.Compact(aliases)
	stored, err := r.vault.store(rec.ID, rec.ConnString)
	if err != nil {
		return nil, err
	}
	holds := ""
	if rec.Isolation == IsolationSchema {
		holds = rec.schema()
	}
	settings := rec.Settings
	if settings == nil {
		settings = map[string]string{}
	}
	text, err := json.Marshal(settings)
	if err != nil {
		return nil, err
	}
	return []any{rec.ID, rec.Plan, rec.Isolation.String(), rec.Schema, holds, concealed(stored), rec.Server, rec.Status.String(), string(text)}, nil
}

// readRecord returns the tenant with the given ID.
func (r *Registry) readRecord(ctx context.Context, on runner, id, lock string) (Record, error) {
	rows, err := on.Query(ctx, recordSQL+"t.id = $1"+lock, id)
	if err != nil {
		return Record{}, r.explain("read tenant", err)
	}
	rec, err := pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (Record, error) { return r.decode(row) })
	if errors.Is(err, pgx.ErrNoRows) {
		return Record{}, ErrTenantNotFound
	}
	return rec, r.explain("read tenant", err)
}

// decode is the reverse of encode. What it does not know, of a later version, is an error, with the ID
// and no more of the record.
func (r *Registry) decode(row pgx.CollectableRow) (rec Record, err error) {
	var isolation, status, stored string
	var settings []byte
	if err := row.Scan(&rec.ID, &rec.Plan, &isolation, &rec.Schema, &stored, &rec.Server, &status, &settings,
		&rec.Generation, &rec.Created, &rec.Changed, &rec.Aliases); err != nil {
		return Record{}, err
	}
	for rec.Isolation.String() != isolation {
		if rec.Isolation++; rec.Isolation > IsolationDatabase {
			return Record{Tenant: Tenant{ID: rec.ID}}, fmt.Errorf("%w: tenant %q has an unknown isolation %q", ErrInvalidTenant, rec.ID, clip(isolation))
		}
	}
	for rec.Status.String() != status {
		if rec.Status++; rec.Status > StatusDeleting {
			return Record{Tenant: Tenant{ID: rec.ID}}, fmt.Errorf("%w: tenant %q has an unknown status %q", ErrInvalidTenant, rec.ID, clip(status))
		}
	}
	if string(settings) != "{}" {
		if err := json.Unmarshal(settings, &rec.Settings); err != nil {
			return Record{Tenant: Tenant{ID: rec.ID}}, fmt.Errorf("%w: tenant %q's settings are not all text", ErrInvalidTenant, rec.ID)
		}
	}
	if rec.ConnString, err = r.vault.load(rec.ID, stored); err != nil {
		return Record{Tenant: Tenant{ID: rec.ID}}, fmt.Errorf("%w%w", err, errUnreadable)
	}
	return rec, nil
}

// errUnreadable marks what is wrong with one row, and not with the registry. It adds nothing to the text.
var errUnreadable = errors.New("")

func addAliases(ctx context.Context, tx pgx.Tx, id string, aliases []string) error {
	// One by one in sorted order: two tenants that want the same ones do not deadlock, and the one that
	// is taken is known.
	for _, alias := range aliases {
		tag, err := tx.Exec(ctx, "insert into pgxtenant.tenant_alias values ($1, $2) on conflict do nothing", alias, id)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return fmt.Errorf("%w: %q", ErrAliasTaken, alias)
		}
	}
	return nil
}

// forget makes a change seen here at once, whether or not the listener is there to hear of it.
func (r *Registry) forget(id string, aliases ...string) {
	for _, a := range aliases {
		r.listener.handle("a" + a)
	}
	r.listener.handle("t" + id)
}

// failure dresses an error of a change.
func (r *Registry) failure(id, op string, err error) error {
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.ConstraintName == "tenant_holds":
		err = fmt.Errorf("%w: its schema is another tenant's", ErrInvalidTenant)
	case pgErr != nil && r.ctx.Err() == nil && !strings.HasPrefix(err.Error(), "pgxtenant:"):
		err = r.explain(op, err)
	case r.ctx.Err() != nil:
		err = ErrClosed
	}
	return &TenantError{clip(id), op, err}
}

// normalAlias returns the one form of an alias.
func normalAlias(alias string) (string, error) {
	name := strings.ToLower(alias)
	if len(name) < 1 || len(name) > 253 {
		return "", fmt.Errorf("%w: it has %d bytes; want 1 to 253", ErrInvalidAlias, len(name))
	}
	edge := true // of a part between dots
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
			edge = false
		case c == '.' && !edge && name[i-1] != '-' && name[i-1] != '_':
			edge = true
		case (c == '-' || c == '_') && !edge && i < len(name)-1:
		default:
			return "", fmt.Errorf("%w: %q at byte %d; want a-z 0-9 . _ and -, with a letter or digit at both ends of each part", ErrInvalidAlias, clip(alias), i+1)
		}
	}
	if edge {
		return "", fmt.Errorf("%w: %q ends with a dot", ErrInvalidAlias, clip(alias))
	}
	// Some letters outside ASCII have lower-case forms within it.
	if strings.IndexFunc(alias, func(c rune) bool { return c > 127 }) >= 0 {
		return "", fmt.Errorf("%w: %q is not ASCII; write Punycode", ErrInvalidAlias, clip(alias))
	}
	return name, nil
}
