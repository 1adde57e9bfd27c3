package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A row that somebody changed by hand concerns its own tenant only.
func TestTheRegistrySurvivesRowsChangedByHand(t *testing.T) {
	t.Parallel()
	key := []byte(strings.Repeat("k", 32))
	d, r := newRegistryDB(t, func(c *RegistryConfig) { c.Key = key })
	ctx := context.Background()
	bad := map[string]string{
		"status":    "status = 'asleep'",
		"isolation": "isolation = 'galaxy'",
		"settings":  `settings = '{"app.x": {"a": 1}}'`,
		"name":      `settings = '{"search_path": "x"}'`,
		"schema":    "isolation = 'schema', schema = 'pg_catalog'",
		"sealed":    "isolation = 'database', conn = 'aes:00000000:AAAA'",
		"damaged":   "conn = regexp_replace(conn, '.....$', 'AAAAA')",
		"no string": "isolation = 'database', conn = ''",
	}
	create(t, r, Record{Tenant: Tenant{ID: "aaa"}})
	create(t, r, Record{Tenant: Tenant{ID: "zzz", Isolation: IsolationDatabase, ConnString: "host=z password=hush"}})
	for id := range bad {
		create(t, r, Record{Tenant: Tenant{ID: strings.ReplaceAll(id, " ", "-"), Isolation: IsolationDatabase, ConnString: "host=x password=hush"}})
	}
	for id, change := range bad {
		d.SuperExec("update pgxtenant.tenant set " + change + " where id = '" + strings.ReplaceAll(id, " ", "-") + "'")
	}
	d.SuperExec("insert into pgxtenant.tenant (id, plan, isolation, schema, holds, conn, server, status, settings) values ('b d', '', 'row', '', '', '', '', 'active', '{}')")
	db := adminDB(t, d, func(c *Config) { c.Registry = &RegistryConfig{Key: key} })
	for id := range bad {
		err := db.Ping(WithTenantID(ctx, strings.ReplaceAll(id, " ", "-")))
		require.Error(t, err, id)
		require.NotErrorIs(t, err, ErrTenantNotFound, id)
		require.NotContains(t, err.Error(), "hush", id)
		require.NotContains(t, err.Error(), "%!", id)
	}
	require.ErrorIs(t, db.Ping(WithTenantID(ctx, "b d")), ErrInvalidTenantID)
	require.NoError(t, db.Ping(WithTenantID(ctx, "aaa")))

	var seen, unread []string
	for rec, err := range r.All(ctx) {
		seen = append(seen, rec.ID)
		if err != nil {
			require.ErrorContains(t, err, fmt.Sprintf("tenant %q", rec.ID))
			require.NotContains(t, err.Error(), "hush")
			unread = append(unread, rec.ID)
		}
	}
	require.Len(t, seen, len(bad)+3)
	require.Equal(t, "aaa", seen[0])
	require.Equal(t, "zzz", seen[len(seen)-1])
	require.ElementsMatch(t, []string{"status", "isolation", "settings", "sealed", "damaged"}, unread)

	// The key is changed for all that can be read, however often the others fail.
	rotated := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.Key, c.OldKeys = []byte(strings.Repeat("n", 32)), [][]byte{key} })
	n, err := rotated.Reseal(ctx)
	require.Error(t, err)
	require.Contains(t, err.Error(), `tenant "damaged"`)
	require.Contains(t, err.Error(), `tenant "sealed"`)
	require.NotContains(t, err.Error(), "hush")
	require.Positive(t, n)
	again, err := rotated.Reseal(ctx)
	require.Error(t, err)
	require.Zero(t, again)
	fresh := openRegistry(t, d.OwnerURL(), func(c *RegistryConfig) { c.Key = []byte(strings.Repeat("n", 32)) })
	tenant, err := fresh.Lookup(ctx, "zzz")
	require.NoError(t, err)
	require.Equal(t, "host=z password=hush", tenant.ConnString)
	for _, id := range []string{"status", "sealed", "damaged"} {
		require.NoError(t, r.Delete(ctx, id), "the way out")
	}
}

// Several processes change the same tenants at random while their listeners are cut off again and again. No
// look-up fails, and in the end all answer what the table says.
func TestTheRegistryUnderRandomChangesAndCuts(t *testing.T) {
	t.Parallel()
	const tenants = 8
	short := func(c *RegistryConfig) { c.TTL, c.NegativeTTL = time.Second, time.Second }
	d, first := newRegistryDB(t, short)
	ctx := context.Background()
	rs := []*Registry{first, openRegistry(t, d.OwnerURL(), short), openRegistry(t, d.OwnerURL(), short)}
	id := func() string { return fmt.Sprint("t", rand.IntN(tenants)) }
	cuts := make(chan struct{})
	running := func() bool {
		select {
		case <-cuts:
			return false
		default:
			return true
		}
	}
	var wg sync.WaitGroup
	for w, r := range rs {
		wg.Go(func() {
			for n := 0; running(); n++ {
				plan := fmt.Sprint(w, "-", n)
				change := []func() error{
					func() error { _, err := r.Create(ctx, Record{Tenant: Tenant{ID: id(), Plan: plan}}); return err },
					func() error {
						_, err := r.Update(ctx, id(), func(rec *Record) error { rec.Plan = plan; return nil })
						return err
					},
					func() error { return r.Suspend(ctx, id()) },
					func() error { return r.Delete(ctx, id()) },
				}
				err := change[rand.IntN(len(change))]()
				if err == nil {
					_, err = r.Lookup(ctx, id())
				}
				if err != nil && !errors.Is(err, ErrTenantExists) && !errors.Is(err, ErrTenantNotFound) {
					t.Error(err)
					return
				}
			}
		})
	}
	super := d.Connect(d.SuperURL())
	for range 20 {
		listening(t, rs...)
		_, err := super.Exec(ctx, "select pg_terminate_backend(pid) from pg_stat_activity where query ilike 'listen pgx%' and datname = current_database()")
		require.NoError(t, err)
	}
	close(cuts)
	wg.Wait()
	for i := range tenants {
		want := strs(t, super, ctx, "select plan || status from pgxtenant.tenant where id = $1", fmt.Sprint("t", i))
		for _, r := range rs {
			eventually(t, "all agree", func() bool {
				got, err := r.Lookup(ctx, fmt.Sprint("t", i))
				if len(want) == 0 {
					return errors.Is(err, ErrTenantNotFound)
				}
				return err == nil && got.Plan+got.Status.String() == want[0]
			})
		}
	}
}
