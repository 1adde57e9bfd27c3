package bench

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/pgxtenant/pgxtenant"
)

// Copy copies 100,000 rows into an empty table.
var Copy = Job{
	Name: "Copy", Unit: "CopyFrom of 100,000 rows, in rows", Scale: copiedRows,
	Rows: []Row{
		{What: "row tenant, under policies, against COPY without", Base: "pool", Way: "tenant", Limit: 0.5, Rate: true, Allocs: noLimit},
	},
	open: openCopy,
}

type copier interface {
	CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error)
}

func openCopy(ctx context.Context, l *Lab) (ways []Way, err error) {
	if err := l.fill(ctx); err != nil {
		return nil, err
	}
	tenant := tenantID(0)
	body := strings.Repeat("0123456789abcdef", 6)
	plain, err := pool(ctx, l.near().bypass, nil)
	if err != nil {
		return nil, err
	}
	add := func(name, table string, db copier, c context.Context, closer func()) {
		ways = append(ways, Way{Name: name, Close: closer,
			Reset: func() error {
				_, err := plain.Exec(ctx, "truncate "+table)
				return err
			},
			Do: func(n int) error {
				_, err := db.CopyFrom(c, pgx.Identifier{table}, []string{"tenant_id", "id", "body"},
					pgx.CopyFromSlice(copiedRows, func(i int) ([]any, error) {
						return []any{tenant, n*copiedRows + i, body}, nil
					}))
				return err
			}})
	}
	add("pool", "copy_plain", plain, ctx, plain.Close)
	db, err := tenantDB(ctx, l.near().app, nil)
	if err != nil {
		return ways, err
	}
	add("tenant", "copy_bound", db, pgxtenant.WithTenant(ctx, rowTenant(0)), db.Close)
	return ways, nil
}
