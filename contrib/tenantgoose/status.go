package tenantgoose

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/pressly/goose/v3"

	"github.com/pgxtenant/pgxtenant"
)

// Status is where one place is: a tenant, the shared schemas, or a template.
type Status struct {
	Tenant    string              // ID; empty for what is no tenant's own, as for pgxtenant.ForEachFunc
	Isolation pgxtenant.Isolation // of the tenant
	Place     string              // as in pgxtenant.RunResult
	Version   int64               // the highest that was applied; zero if none was
	Pending   []Migration         // what Up would apply, in that order
	Missing   []Migration         // those of them below Version, for which Up fails without WithOutOfOrder
	Unknown   []int64             // applied, and in no file: by a process with other ones
	Skipped   bool                // it is not looked at, as pgxtenant.RunSkipped by TenantDB.Pending; Err says why
	Err       error               // why nothing is known; the rest is empty then
}

// Status tells for all that the options select, the shared schemas and templates first, what was applied and what was not. It changes nothing,
// and pays no attention to earlier runs. Template databases, to which nobody may connect, are not looked into: their Err says so. It ends after
// an error; that of a single place is in its Status.
func (m *Migrator) Status(ctx context.Context, o pgxtenant.ForEachOptions) iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		if err := m.prepare(&o); err != nil {
			yield(Status{}, err)
			return
		}
		// What Versions has read waits here for its result: for a page of tenants at most.
		var mu sync.Mutex
		read := make(map[string]Status)
		newest := max(m.shared.newest(), m.tenant.newest())
		o.Versions = m.versionsOf(goal{version: newest}, func(id string, l *ledger, f *folder) {
			s := l.status(f)
			mu.Lock()
			defer mu.Unlock()
			read[id] = s
		})
		for res, err := range m.db.Pending(ctx, o) {
			if err != nil {
				yield(Status{}, err)
				return
			}
			mu.Lock()
			s := read[res.Tenant]
			delete(read, res.Tenant)
			mu.Unlock()
			if res.Err != nil {
				s = Status{Err: res.Err, Skipped: res.State == pgxtenant.RunSkipped}
			}
			s.Tenant, s.Isolation, s.Place = res.Tenant, res.Isolation, res.Place
			if !yield(s, nil) {
				return
			}
		}
	}
}

// status is what a ledger tells. Lists may be shared with other places'.
func (l *ledger) status(f *folder) Status {
	s := Status{Version: l.newest(), Pending: l.lacks(f, f.newest()), Missing: l.lacks(f, min(l.newest(), f.newest()))}
	for _, v := range l.applied {
		if f.find(v) == nil {
			s.Unknown = append(s.Unknown, v)
		}
	}
	if err := l.doubtful(); err != nil {
		s = Status{Err: err}
	}
	return s
}

// Plan is what Up would do.
type Plan struct {
	Target  int64      // the highest version of both folders
	Current int        // places that have all of their folder's migrations
	Pending int        // places that do not
	Skipped int        // places that are not looked at, see Status
	Steps   []PlanStep // what they lack, by version
	Failed  []Status   // the first 100 for which Up would fail: nothing is known of them, or they have Missing
}

// PlanStep is a migration that some places lack.
type PlanStep struct {
	Migration Migration
	Places    int
}

// Plan tells what Up would do under the same options. It changes nothing. Places in Failed with an Err are in no count. A
// file that was edited after it had been applied is ErrEdited, as by Up.
func (m *Migrator) Plan(ctx context.Context, o pgxtenant.ForEachOptions) (*Plan, error) {
	if err := m.sums.look(ctx, m.folders()); err != nil {
		return nil, err
	}
	p := &Plan{Target: max(m.shared.newest(), m.tenant.newest())}
	steps := make(map[Migration]int)
	for s, err := range m.Status(ctx, o) {
		if err != nil {
			return nil, err
		}
		switch {
		case s.Skipped:
			p.Skipped++
		case s.Err != nil:
		case len(s.Pending) > 0:
			p.Pending++
		default:
			p.Current++
		}
		if (s.Err != nil && !s.Skipped || len(s.Missing) > 0 && !m.outOfOrder) && len(p.Failed) < maxFailed {
			p.Failed = append(p.Failed, s)
		}
		for _, mi := range s.Pending {
			steps[mi]++
		}
	}
	for mi, n := range steps {
		p.Steps = append(p.Steps, PlanStep{mi, n})
	}
	slices.SortFunc(p.Steps, func(a, b PlanStep) int {
		return cmp.Or(cmp.Compare(a.Migration.Version, b.Migration.Version), cmp.Compare(a.Migration.Name, b.Migration.Name))
	})
	return p, nil
}

// maxFailed is the most places that a Plan keeps.
const maxFailed = 100

// Version returns the highest version that was applied for a tenant, zero if none was: for a row tenant, in the shared
// schemas. One that the registry does not know is ErrTenantNotFound.
func (m *Migrator) Version(ctx context.Context, tenantID string) (int64, error) {
	for s, err := range m.Status(ctx, pgxtenant.ForEachOptions{IDs: []string{tenantID}}) {
		if err == nil {
			err = s.Err
		}
		return s.Version, err
	}
	return 0, fmt.Errorf("tenantgoose: tenant %q: %w: its folder has none", tenantID, goose.ErrNoMigrations)
}
