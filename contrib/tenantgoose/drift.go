package tenantgoose

import (
	"context"
	"errors"
	"iter"

	"github.com/pgxtenant/pgxtenant"
)

// Drift is how the schema of one tenant differs from the template.
type Drift struct {
	Tenant string
	Schema string
	Lines  []string // SQL of objects, those that it lacks after a - and those that it has besides after a +
	Err    error    // why it could not be compared; Lines are empty then
}

// Drift compares the objects in the schemas of tenants with those in Config.Template, as the audit does, and returns those that differ. Tenants at
// another version than the template differ by what the versions do, so it is best asked after Up. It changes nothing, and holds
// no lock on more than one tenant. The options select tenants; those without a schema, or not quite there, are passed over. It ends after an error.
func (m *Migrator) Drift(ctx context.Context, o pgxtenant.ForEachOptions) iter.Seq2[Drift, error] {
	return func(yield func(Drift, error) bool) {
		schemas, err := m.db.Schemas()
		if err == nil && (o.Versions != nil || o.Target != "") {
			err = errors.New("tenantgoose: ForEachOptions.Versions and Target have no use here; leave them unset")
		}
		if err != nil {
			yield(Drift{}, err)
			return
		}
		o.SkipShared, o.SkipTemplates = true, true
		for res, err := range m.db.Pending(ctx, o) {
			if err != nil {
				yield(Drift{}, err)
				return
			}
			if res.Isolation != pgxtenant.IsolationSchema || res.State == pgxtenant.RunSkipped {
				continue
			}
			lines, err := schemas.Diff(ctx, res.Tenant)
			if err != nil && ctx.Err() != nil {
				yield(Drift{}, err)
				return
			}
			if d := (Drift{res.Tenant, res.Place, lines, err}); len(lines) > 0 || err != nil {
				if !yield(d, nil) {
					return
				}
			}
		}
	}
}
