package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/contrib/tenantcache"
)

// Project is what the API is about.
type Project struct {
	ID          uuid.UUID `json:"id"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

// errNoProject means that the tenant has no project of this ID. Whether another tenant has one cannot be told from
// here: its rows are not seen.
var errNoProject = errors.New("no such project")

// projects keeps each tenant's projects, and a copy of what is read often in a cache. Nothing in here names a tenant:
// neither a statement nor a key. The context does, for both. It is safe for concurrent use.
type projects struct {
	db    *pgxtenant.TenantDB
	one   *tenantcache.Cache[Project]
	pages *tenantcache.Cache[[]Project]
	log   *slog.Logger
}

// cacheTTL bounds how old a value may be that could not be forgotten since Redis was out of reach.
const cacheTTL = 30 * time.Second

// pageSize is the most projects that a list has.
const pageSize = 50

func newProjects(db *pgxtenant.TenantDB, store tenantcache.Store, log *slog.Logger) (*projects, error) {
	one, err := tenantcache.New(store, tenantcache.Config[Project]{Namespace: "project/1", TTL: cacheTTL})
	if err != nil {
		return nil, err
	}
	pages, err := tenantcache.New(store, tenantcache.Config[[]Project]{Namespace: "projects/1", TTL: cacheTTL})
	if err != nil {
		return nil, err
	}
	return &projects{db, one, pages, log}, nil
}

const columns = "id, name, description, created_at, updated_at"

// get returns one project, or errNoProject.
func (p *projects) get(ctx context.Context, id uuid.UUID) (Project, error) {
	return p.one.GetOrLoad(ctx, id.String(), 0, func(ctx context.Context) (Project, error) {
		return p.queryOne(ctx, "select "+columns+" from project where id = $1", id)
	})
}

// list returns the projects that come after one of this ID, by age, and at most pageSize.
func (p *projects) list(ctx context.Context, after uuid.UUID) ([]Project, error) {
	return p.pages.GetOrLoad(ctx, after.String(), 0, func(ctx context.Context) ([]Project, error) {
		rows, err := p.db.Query(ctx, "select "+columns+" from project where id > $1 order by id limit $2", after, pageSize)
		if err != nil {
			return nil, err
		}
		return pgx.AppendRows([]Project{}, rows, pgx.RowToStructByPos[Project])
	})
}

// create adds a project. Its ID holds the time, so that IDs are in the order in which projects came, and chance, not
// a number that counts other tenants' projects as well.
func (p *projects) create(ctx context.Context, name, description string) (Project, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return Project{}, err
	}
	made, err := p.queryOne(ctx, "insert into project (id, name, description) values ($1, $2, $3) returning "+columns, id, name, description)
	if err == nil {
		p.forget(ctx)
		p.log.InfoContext(ctx, "project created", "id", id)
	}
	return made, err
}

// update changes a project, or returns errNoProject.
func (p *projects) update(ctx context.Context, id uuid.UUID, name, description string) (Project, error) {
	changed, err := p.queryOne(ctx, "update project set name = $2, description = $3, updated_at = now() where id = $1 returning "+columns,
		id, name, description)
	if err == nil {
		p.forget(ctx, id.String())
	}
	return changed, err
}

// delete removes a project, or returns errNoProject.
func (p *projects) delete(ctx context.Context, id uuid.UUID) error {
	tag, err := p.db.Exec(ctx, "delete from project where id = $1", id)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 {
		return errNoProject
	}
	p.forget(ctx, id.String())
	return nil
}

// Report is expensive to make.
type Report struct {
	Projects int `json:"projects"`
	Longest  int `json:"longest_name"`
}

// report stands for the query that every service has and nobody dares to touch. It has the server sleep, so that it takes
// a connection and time, as a real one would, but does not heat the machine that this is tried on.
func (p *projects) report(ctx context.Context) (r Report, err error) {
	err = p.db.QueryRow(ctx, `select count(*), coalesce(max(length(name)), 0) from project, (select pg_sleep(1)) s`).
		Scan(&r.Projects, &r.Longest)
	return r, err
}

func (p *projects) queryOne(ctx context.Context, sql string, args ...any) (Project, error) {
	rows, err := p.db.Query(ctx, sql, args...)
	if err != nil {
		return Project{}, err
	}
	found, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[Project])
	if errors.Is(err, pgx.ErrNoRows) {
		err = errNoProject
	}
	return found, err
}

// forget removes what a write has made wrong from the cache: these projects, and all pages of the list. It comes after
// the write: a load that read the old row before is not kept then, as tenantcache sees to.
//
// The write has been committed, so its client is told so even if Redis is out of reach. This process reads from the
// database until Redis is back; others, which may still reach it, may see the old value for cacheTTL.
func (p *projects) forget(ctx context.Context, keys ...string) {
	// A client that has gone away meanwhile must not leave an old value behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	var one error
	if len(keys) > 0 {
		one = p.one.Delete(ctx, keys...)
	}
	if err := errors.Join(one, p.pages.Invalidate(ctx)); err != nil {
		p.log.WarnContext(ctx, "not removed from the cache", "for", cacheTTL, "error", err)
	}
}
