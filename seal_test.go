package pgxtenant

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// sealKeyOf is a key that tells which it is.
func sealKeyOf(b byte) []byte { return bytes.Repeat([]byte{b}, MinSealKeyLen) }

// sealedDB has the table note under a policy of sealed tenants, of which each of a and b has two rows.
func sealedDB(t testing.TB, adjust ...func(*Config)) (*pgtest.DB, *TenantDB) {
	t.Helper()
	ctx := context.Background()
	d := pgtest.New(t)
	db := adminDB(t, d, append([]func(*Config){func(c *Config) {
		c.Seal = &SealConfig{Key: sealKeyOf(1)}
		c.Shared.MaxConns = 1
	}}, adjust...)...)
	d.Exec("create table note (id int, body text)")
	require.NoError(t, db.InstallSeal(ctx))
	enabled(t, db, Tables("note")...)
	for _, id := range []string{"a", "b"} {
		_, err := db.Exec(as(id), "insert into note values (1, $1), (2, $2)", id+"1", id+"2")
		require.NoError(t, err)
	}
	return d, db
}

const readNotes = "select body from note order by id"

// Whatever way a statement is sent, it carries the seal.
func TestSealedTenantsReadTheirRows(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
		d, _ := sealedDB(t)
		db := openDB(t, d.AppURL(), func(c *Config) {
			c.Seal = &SealConfig{Key: sealKeyOf(1)}
			c.Shared.MaxConns = 1
			mode(m)(c.Shared)
		})
		for range 2 {
			for _, id := range []string{"a", "b"} {
				ctx, want := as(id), []string{id + "1", id + "2"}
				require.Equal(t, want, strs(t, db, ctx, readNotes))
				require.Equal(t, want[1:], strs(t, db, ctx, "select body from note where id = $1", 2))
				tag, err := db.Exec(ctx, "update note set id = id")
				require.NoError(t, err)
				require.EqualValues(t, 2, tag.RowsAffected())
				conn, err := db.Acquire(ctx)
				require.NoError(t, err)
				results, err := conn.Conn().PgConn().Exec(ctx, "select 'x'; begin;"+readNotes+";commit;"+readNotes).ReadAll()
				conn.Release()
				require.NoError(t, err)
				require.Len(t, results, 5)
				for _, r := range []int{2, 4} {
					require.Len(t, results[r].Rows, 2)
					require.Equal(t, want[0], string(results[r].Rows[0][0]))
				}
				n, err := db.CopyFrom(ctx, pgx.Identifier{"note"}, []string{"id", "body"}, rowsOf(500, func(i int) []any { return []any{i + 10, id + "x"} }))
				require.NoError(t, err)
				require.EqualValues(t, 500, n)
				require.NoError(t, pgx.BeginTxFunc(ctx, db, pgx.TxOptions{IsoLevel: pgx.Serializable}, func(tx pgx.Tx) error {
					tag, err := tx.Exec(ctx, "delete from note where id >= 10")
					require.EqualValues(t, 500, tag.RowsAffected())
					return err
				}))
				_, err = db.Exec(ctx, "insert into note (tenant_id, id) values ('other', 1)")
				require.Equal(t, "42501", pgCode(err))
			}
		}
		require.Empty(t, strs(t, db, WithoutTenant(context.Background()), readNotes))
	})
}

// Columns that are no text, and the empty and the unset setting, as without seals.
func TestSealedPoliciesOfEveryType(t *testing.T) {
	t.Parallel()
	d, db := sealedDB(t)
	ctx := context.Background()
	for typ, id := range map[string]string{"uuid": "00000000-0000-0000-0000-00000000000a", "integer": "7", "bigint": "9007199254740993"} {
		d.Exec("create table t_" + typ + " (body text)")
		enabled(t, db, RLSTable{Name: "t_" + typ, Type: typ})
		_, err := db.Exec(as(id), "insert into t_"+typ+" values ('mine')")
		require.NoError(t, err)
		require.Equal(t, []string{"mine"}, strs(t, db, as(id), "select body from t_"+typ))
		require.Empty(t, strs(t, db, as("nobody"), "select body from t_"+typ))
		for _, url := range []string{d.AppURL(), d.OwnerURL()} {
			fresh := d.Connect(url)
			require.Empty(t, strs(t, fresh, ctx, "select body from t_"+typ))
			_, err = fresh.Exec(ctx, "set app.current_tenant_id = ''")
			require.NoError(t, err)
			require.Empty(t, strs(t, fresh, ctx, "select body from t_"+typ))
		}
	}
}

// signed makes a seal as a sealer would, of any key, tenant, setting and end.
func signed(key []byte, tenant, setting string, end time.Duration) string {
	seal, _ := (&sealer{newSealKey(key), setting, end}).seal(tenant)
	return seal
}

// What an attacker can put into the session in place of a seal of the tenant's.
func TestForgedSeals(t *testing.T) {
	t.Parallel()
	d, _ := sealedDB(t)
	ctx := context.Background()
	raw := d.Connect(d.AppURL())
	good := signed(sealKeyOf(1), "b", DefaultSetting, time.Hour)
	name, rest, _ := strings.Cut(good, ".")
	end, mac, _ := strings.Cut(rest, ".")
	ofA := signed(sealKeyOf(1), "a", DefaultSetting, time.Hour)
	for what, seal := range map[string]string{
		"none":                  "",
		"of tenant a":           ofA,
		"of another setting":    signed(sealKeyOf(1), "b", "app.other", time.Hour),
		"of an unknown key":     signed(sealKeyOf(9), "b", DefaultSetting, time.Hour),
		"of the key's name":     newSealKey(sealKeyOf(1)).name + "." + end + "." + hex.EncodeToString(make([]byte, 32)),
		"expired":               signed(sealKeyOf(1), "b", DefaultSetting, -time.Minute),
		"later":                 name + "." + end + "0." + mac,
		"in upper case":         name + "." + end + "." + strings.ToUpper(mac),
		"cut":                   good[:len(good)-1],
		"longer":                good + "0",
		"with a part more":      good + ".",
		"dots":                  "..",
		"no hexadecimal digits": name + "." + end + ".zz",
		"a's end and mac":       ofA + "." + good,
		"a NUL":                 name + "." + end + `.\x00`,
		"an ID in the end":      name + "." + end + "." + DefaultSetting + "=b." + mac,
	} {
		for _, statement := range []string{
			readNotes, "select count(*)::text from note", "insert into note (id) values (3) returning 'x'", "update note set id = 9 returning body", "delete from note returning body",
			"with x as materialized (select set_config('app.current_tenant_id', 'b', false)) select body from x, note",
		} {
			tx, err := raw.Begin(ctx)
			require.NoError(t, err)
			_, err = tx.Exec(ctx, "select set_config('app.current_tenant_id', 'b', true), set_config('pgxtenant.seal', $1, true)", seal)
			require.NoError(t, err)
			rows, _ := tx.Query(ctx, statement)
			got, err := pgx.CollectRows(rows, pgx.RowTo[string])
			require.Empty(t, got, what)
			require.Equal(t, "42501", pgCode(err), "%s: %v", what, err)
			require.NotContains(t, err.Error(), "invalid input", what)
			require.NoError(t, tx.Rollback(ctx))
		}
	}
	// The one that is right is let through, so that the above is refused for what it is.
	_, err := raw.Exec(ctx, "select set_config('app.current_tenant_id', 'b', false), set_config('pgxtenant.seal', $1, false)", good)
	require.NoError(t, err)
	require.Equal(t, []string{"b1", "b2"}, strs(t, raw, ctx, readNotes))

	// The key cannot be read, nor the function be made to tell it.
	for _, sql := range []string{"select * from pgxtenant.seal_key", "select count(*) from pgxtenant.seal_key", "copy pgxtenant.seal_key to stdout",
		"create or replace function pgxtenant.sealed_tenant(setting text) returns text language sql as 'select ''b'''", "insert into pgxtenant.seal_key values ('x', '', '')",
		"alter function pgxtenant.sealed_tenant(text) reset all", "drop policy pgxtenant on note", "alter table note no force row level security"} {
		_, err := raw.Exec(ctx, sql)
		require.Equal(t, "42501", pgCode(err), sql)
	}
}

// SQL that is injected into a's statements, in whatever way they are sent, reads no row of b's and writes none.
func TestInjectedSQLCannotLeaveASealedTenant(t *testing.T) {
	t.Parallel()
	_, db := sealedDB(t)
	for _, injected := range []string{
		"with x as materialized (select set_config('app.current_tenant_id', 'b', true)) select body from x, note",
		"with x as materialized (select set_config('app.current_tenant_id', 'b', false)) select body from x, note",
		"select body from note where set_config('app.current_tenant_id', 'b', true) is not null",
		"select body from note where set_config('app.current_tenant_id', case when body like 'a%' then 'b' else 'a' end, true) is not null",
		"select set_config('app.current_tenant_id', 'b', true); select body from note",
		"set local app.current_tenant_id = 'b'; select body from note",
		"set app.current_tenant_id = 'b'; commit; select body from note",
		"commit; set app.current_tenant_id = 'b'; begin; set local app.current_tenant_id = 'b'; select body from note; commit",
		"select set_config('pgxtenant.seal', '', true), set_config('app.current_tenant_id', 'b', true); select body from note",
		"reset all; set local app.current_tenant_id = 'b'; select body from note",
		"do $$ begin perform set_config('app.current_tenant_id', 'b', false); end $$; select body from note",
		"do $$ begin execute 'deallocate pgxtenant_row_1'; execute 'prepare pgxtenant_row_1(text, text, text) as select set_config(''app.current_tenant_id'', ''b'', true)'; end $$; select body from note",
		"savepoint s; set local app.current_tenant_id = 'b'; rollback to s; select body from note",
		"set session authorization default; set role none; set row_security = off; select body from note",
		"update note set tenant_id = 'b' returning body",
		"insert into note (tenant_id, body) values ('b', 'planted') returning body",
		"begin; set local app.current_tenant_id = 'b'; declare c cursor with hold for select body from note; commit; fetch all from c",
		"select query_to_xml('select body from note where set_config(''app.current_tenant_id'', ''b'', false) is not null', true, true, '')::text",
		"create temp table note (body text)",
	} {
		conn, err := db.Acquire(as("a"))
		require.NoError(t, err)
		results, _ := conn.Conn().PgConn().Exec(context.Background(), injected).ReadAll()
		for _, r := range results {
			for _, row := range r.Rows {
				require.NotRegexp(t, "b[12]", string(row[0]), injected)
			}
		}
		for _, m := range []pgx.QueryExecMode{pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol, pgx.QueryExecModeCacheDescribe} {
			if !strings.Contains(injected, ";") {
				rows, _ := conn.Query(as("a"), injected, m)
				got, _ := pgx.CollectRows(rows, pgx.RowTo[string])
				require.NotRegexp(t, "b[12]", strings.Join(got, ","), injected)
			}
		}
		conn.Release()
		// And b, next on the connection, has what it had.
		require.Equal(t, []string{"b1", "b2"}, strs(t, db, as("b"), readNotes), injected)
		require.Equal(t, []string{"b"}, strs(t, db, as("b"), readTenant), injected)
	}
	require.Equal(t, []string{"a1", "a2"}, strs(t, db, as("a"), readNotes))
}

// A seal would be worth stealing if others could see it: every session of the same role is shown the texts of all.
func TestASealIsInNoStatementsText(t *testing.T) {
	t.Parallel()
	d, db := sealedDB(t)
	spy := d.Connect(d.AppURL())
	ctx := context.Background()
	name := newSealKey(sealKeyOf(1)).name
	for _, m := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeSimpleProtocol} {
		for _, sql := range []string{"select pg_advisory_xact_lock_shared(1)", "select body from note; select pg_advisory_xact_lock_shared(1)", "begin; select pg_advisory_xact_lock_shared(1); commit",
			"insert into note select 5, 'x' where pg_advisory_xact_lock_shared(1) is null"} {
			lock, err := spy.Begin(ctx)
			require.NoError(t, err)
			_, err = lock.Exec(ctx, "select pg_advisory_xact_lock(1)")
			require.NoError(t, err)
			done := make(chan error, 1)
			go func() {
				_, err := db.Exec(as("a"), sql, m)
				done <- err
			}()
			var texts []string
			eventually(t, "it waits", func() bool {
				texts = strs(t, lock, ctx, "select query from pg_stat_activity where usename = current_user and pid <> pg_backend_pid() and wait_event = 'advisory'")
				return len(texts) > 0
			})
			require.NotContains(t, strings.Join(texts, "\n"), name)
			require.NoError(t, lock.Rollback(ctx))
			require.NoError(t, <-done)
		}
	}
}

// A connection may be kept for longer than a seal is good for, and a transaction too.
func TestSealsAreRenewed(t *testing.T) {
	t.Parallel()
	_, db := sealedDB(t, func(c *Config) { c.Seal.TTL = 5 * time.Second })
	ctx := as("a")
	conn, err := db.Acquire(ctx)
	require.NoError(t, err)
	defer conn.Release()
	tx, err := conn.Begin(ctx)
	require.NoError(t, err)
	require.Len(t, strs(t, tx, ctx, readNotes), 2)
	first := strs(t, tx, ctx, "select current_setting('pgxtenant.seal')")[0]
	// Seals count in whole seconds: by then the first is over, for transactions that begin then.
	_, err = tx.Exec(ctx, "select pg_sleep(6.1)")
	require.NoError(t, err)
	require.Len(t, strs(t, tx, ctx, readNotes), 2, "the transaction began in time")
	require.Equal(t, []string{first}, strs(t, tx, ctx, "select current_setting('pgxtenant.seal')"))
	require.NoError(t, tx.Commit(ctx))
	require.Len(t, strs(t, conn, ctx, readNotes), 2)
	require.NotEqual(t, []string{first}, strs(t, conn, ctx, "select current_setting('pgxtenant.seal')"))

	_, err = conn.Exec(ctx, "begin; select 1; select set_config('pgxtenant.seal', "+literal(first)+", true); "+readNotes)
	require.Equal(t, "42501", pgCode(err))
	require.ErrorContains(t, err, "expired")
	_, err = conn.Exec(ctx, "rollback")
	require.NoError(t, err)
}

// Keys change without a statement that fails.
func TestSealKeysAreReplacedWithoutAPause(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d, old := sealedDB(t)
	next := adminDB(t, d, func(c *Config) { c.Seal = &SealConfig{Key: sealKeyOf(2), OldKeys: [][]byte{sealKeyOf(1)}} })
	read := func(db *TenantDB) error {
		_, err := db.Exec(as("a"), readNotes)
		return err
	}
	err := read(next)
	require.Equal(t, "42501", pgCode(err))
	require.ErrorContains(t, err, "does not know")

	require.NoError(t, next.InstallSeal(ctx))
	require.NoError(t, read(old))
	require.NoError(t, read(next))
	require.NoError(t, old.InstallSeal(ctx), "a process that starts late takes nothing away")
	require.NoError(t, read(next))
	require.NoError(t, next.RetireSealKeys(ctx))
	require.NoError(t, read(old), "OldKeys are still good")

	last := adminDB(t, d, func(c *Config) { c.Seal = &SealConfig{Key: sealKeyOf(2)} })
	require.NoError(t, last.RetireSealKeys(ctx))
	require.NoError(t, read(next))
	require.NoError(t, read(last))
	require.Equal(t, "42501", pgCode(read(old)))
}

// A service without seals is refused by their policies, told why, and has its way back.
func TestFromAndToPoliciesWithoutSeals(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d, db := sealedDB(t)
	plain := adminDB(t, d)
	_, err := plain.Exec(as("a"), readNotes)
	require.Equal(t, "42501", pgCode(err))
	require.ErrorContains(t, err, "is not sealed")
	require.ErrorIs(t, plain.InstallSeal(ctx), errNoSeal)

	require.NoError(t, plain.EnableRLS(ctx, Tables("note")...))
	for _, either := range []*TenantDB{plain, db} {
		require.Equal(t, []string{"a1", "a2"}, strs(t, either, as("a"), readNotes))
	}
	require.NoError(t, db.EnableRLS(ctx, Tables("note")...))
	require.Equal(t, []string{"a1", "a2"}, strs(t, db, as("a"), readNotes))

	// Before InstallSeal there is nothing that a policy could ask.
	bare := pgtest.New(t)
	bare.Exec("create table note (id int)")
	early := adminDB(t, bare, func(c *Config) { c.Seal = &SealConfig{Key: sealKeyOf(1)} })
	require.ErrorContains(t, early.EnableRLS(ctx, Tables("note")...), "call InstallSeal")
}

// The rows of a sealed tenant are deleted with it, and a database of a tenant's own is sealed by its Setup.
func TestSealsElsewhere(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d, db := sealedDB(t)
	require.NoError(t, db.deleteRows(ctx, db.admin, "a"))
	require.Empty(t, strs(t, db, as("a"), readNotes))
	require.Len(t, strs(t, db, as("b"), readNotes), 2)

	own := d.Database("app.current_tenant_id=big")
	require.NoError(t, db.config.Seal.Install(ctx, own.Connect(own.OwnerURL()), own.App))
	own.Exec("create table note (id int, body text, tenant_id text not null)",
		"create policy pgxtenant on note using ("+policyExpression(DefaultSetting, "tenant_id", "text", true)+")",
		"alter table note enable row level security, force row level security", "grant select, insert on note to "+ident(d.App))
	big := WithTenant(ctx, Tenant{ID: "big", Isolation: IsolationDatabase, ConnString: own.AppURL()})
	_, err := db.Exec(big, "insert into note values (1, 'x', 'big')")
	require.NoError(t, err)
	require.Equal(t, []string{"x"}, strs(t, db, big, readNotes))
}

func TestSealConfigIsChecked(t *testing.T) {
	t.Parallel()
	d := pgtest.New(t)
	secret := "not to be shown in any error....."
	for want, c := range map[string]SealConfig{
		"Config.Seal.Key has 0 bytes; want 32 or more":         {},
		"Config.Seal.Key has 31 bytes":                         {Key: []byte(secret)[:31]},
		"Config.Seal.OldKeys[1] has 5 bytes":                   {Key: sealKeyOf(1), OldKeys: [][]byte{sealKeyOf(2), []byte(secret)[:5]}},
		"Config.Seal.TTL is -1s; want 1s or more, or 0 for 1m": {Key: sealKeyOf(1), TTL: -time.Second},
		"Config.Seal.TTL is 1ms":                               {Key: sealKeyOf(1), TTL: time.Millisecond},
	} {
		config, err := ParseConfig(d.AppURL())
		require.NoError(t, err)
		config.Seal = &c
		_, err = NewWithConfig(context.Background(), config)
		require.ErrorContains(t, err, want)
		require.NotContains(t, fmt.Sprint(err), secret[:5])
		require.Error(t, c.Install(context.Background(), d.Connect(d.OwnerURL()), d.App))
	}
	_, err := openDB(t, d.AppURL()).Exec(WithTenant(context.Background(), Tenant{ID: "a", Settings: map[string]string{"PgxTenant.Seal": "x"}}), "select 1")
	require.ErrorIs(t, err, ErrInvalidTenant)
}

// HMAC in SQL is that of the Go library, for keys shorter than a block, as long, and longer.
func TestSealsOfKeysOfAnyLength(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	d, _ := sealedDB(t)
	for _, n := range []int{32, 63, 64, 65, 200} {
		key := bytes.Repeat([]byte{byte(n)}, n)
		db := adminDB(t, d, func(c *Config) { c.Seal = &SealConfig{Key: key} })
		require.NoError(t, db.InstallSeal(ctx))
		for _, id := range []string{"a", strings.Repeat("x", MaxIDLen), "A.b-c_" + strconv.Itoa(n)} {
			_, err := db.Exec(as(id), "insert into note values ($1)", n)
			require.NoError(t, err)
			require.Equal(t, 1, count(t, db, as(id), "select count(*) from note where id = $1", n))
		}
	}
}
