package pgxtenant

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// A pool that ends while Reset has come to it is still there.
func TestResetWhileEvicted(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	db := openDB(t, d.AppURL(), func(c *Config) { c.MaxPools = 8 })
	ctx := context.Background()
	tenant := func(i int) context.Context {
		return WithTenant(ctx, Tenant{ID: fmt.Sprint("t", i), Isolation: IsolationDatabase, ConnString: d.AppURL("pool_max_conns=1")})
	}
	var wg sync.WaitGroup
	over := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
				db.Reset()
			}
		}
	})
	for range 4 {
		for i := range 8 {
			require.NoError(t, db.Ping(tenant(i)))
		}
		for i := range 8 {
			db.Evict(fmt.Sprint("t", i))
		}
	}
	close(over)
	wg.Wait()
}
