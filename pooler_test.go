package pgxtenant

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// Behind PgBouncer in transaction mode, many connections share few of the server's, and each statement
// still runs as its own tenant: in the modes that such a pooler allows.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.RLSTable("docs")
	db.SuperExec("insert into docs select 't'||t, n, 't'||t||':'||n from generate_series(0, 19) t, generate_series(1, 20) n")
	for _, s := range []string{"tenant_a", "tenant_b"} {
		db.Exec("create schema "+s, "create table "+s+".items (body text)", "insert into "+s+".items values ('"+s+"')",
			"grant usage on schema "+s+" to public", "grant select on "+s+".items to public")
	}
	bouncer := pgtest.PgBouncer(t, db)
	for _, m := range []pgx.QueryExecMode{pgx.QueryExecModeExec, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeSimpleProtocol} {
		t.Run(strings.ReplaceAll(m.String(), " ", "_"), func(t *testing.T) {
			t.Parallel()
			pool := boundPool(t, bouncer.AppURL(), mode(m), func(c *pgxpool.Config) { c.MaxConns = 16 })
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for range 60 {
						id := fmt.Sprintf("t%d", rand.IntN(20))
						var err error
						switch rand.IntN(4) {
						case 0:
							err = pooledRead(pool, id)
						case 1:
							_, err = pool.Exec(as(id), "update docs set body = body where id = $1", rand.IntN(20)+1)
						case 2:
							err = pgx.BeginTxFunc(as(id), pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error {
								for range 2 {
									var foreign, own int
									if err := tx.QueryRow(as(id), "select count(*) filter (where tenant_id <> $1), count(*) from docs", id).Scan(&foreign, &own); err != nil {
										return err
									}
									if foreign != 0 || own != 20 {
										return fmt.Errorf("%s reads %d foreign rows and %d in all", id, foreign, own)
									}
								}
								return nil
							})
						default:
							schema := string(rune('a' + rand.IntN(2)))
							var body string
							err = pool.QueryRow(inSchema(schema), "select body from items").Scan(&body)
							if err == nil && body != "tenant_"+schema {
								err = fmt.Errorf("%s reads %q", schema, body)
							}
						}
						if err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
	// On the servers behind it nothing is left, of whatever tenant.
	t.Cleanup(func() {
		pool := boundPool(t, bouncer.AppURL(), mode(pgx.QueryExecModeExec))
		for range 10 {
			require.Equal(t, []string{""}, strs(t, pool, WithoutTenant(context.Background()), readTenant))
		}
	})
}

func pooledRead(pool *pgxpool.Pool, id string) error {
	rows, err := pool.Query(as(id), "select body from docs")
	if err != nil {
		return err
	}
	bodies, err := pgx.CollectRows(rows, pgx.RowTo[string])
	for _, b := range bodies {
		if !strings.HasPrefix(b, id+":") {
			return fmt.Errorf("%s reads %q", id, b)
		}
	}
	if err == nil && len(bodies) != 20 {
		return fmt.Errorf("%s reads %d rows", id, len(bodies))
	}
	return err
}
