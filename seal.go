package pgxtenant

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// DefaultSealTTL is how long a seal is good for unless SealConfig.TTL says otherwise.
const DefaultSealTTL = time.Minute

// MinSealKeyLen is the length of the shortest key of a SealConfig, in bytes.
const MinSealKeyLen = 32

// SealConfig makes tenants sealed: with the tenant's ID a signature of it is bound, which the policies of
// EnableRLS check once in a statement. SQL that is injected into the service can then set another tenant's ID
// as ever, but cannot sign it, and the statements after it fail (42501) rather than reach the other's rows.
//
// The signature is an HMAC-SHA256 over the ID, the setting's name and a time. [SealConfig.Install] puts the
// keys into a table that nobody but its owner may read, with the function that checks signatures. For a
// service that is in use: give every process its Seal, then InstallSeal, then EnableRLS, which replaces the policies.
//
// A key is replaced without a pause by InstallSeal from a process that has the new one as Key and the old
// one in OldKeys; then all other processes change over, in any order; and RetireSealKeys ends it.
//
// It protects the rows of tables under these policies, and nothing else: not the schemas of schema tenants.
// docs/sealed-tenants.md tells what was tried against it and what it costs.
type SealConfig struct {
	// Key signs: MinSealKeyLen (32) bytes or more, from a source of randomness. It is required.
	Key []byte

	// OldKeys are accepted besides, once InstallSeal has been called.
	OldKeys [][]byte

	// TTL is how long after it was made a signature is accepted in a new transaction; one that is under way
	// outlives it. Signatures are renewed when half of it is over, so the clocks of the service and the server may
	// differ by that much. It bounds the use of one that leaked, through a server's log for example.
	//
	// Zero means DefaultSealTTL (1 minute). Anything else below 1 second is refused.
	TTL time.Duration
}

// sealSetting carries the signature: the key's name, the Unix time at which it ends, and the HMAC in
// hexadecimal, joined by dots.
const sealSetting = ownSchema + ".seal"

// sealFunction returns the bound tenant if its signature is right, NULL if none is bound, and fails otherwise.
const sealFunction = ownSchema + ".sealed_tenant"

// sealSteps are the versions of what Install makes. Never change one: add another.
//
// The key is kept as the two blocks that HMAC makes of it, so that two calls of sha256 are all that is left to
// do. Hashes are compared, not texts, so that the time that it takes tells nothing. search_path is fixed, and
// the time that counts is the transaction's beginning: what was allowed then is allowed to its end.
var sealSteps = []string{
	`create table pgxtenant.seal_key (
		name text collate "C" primary key,
		inner_block bytea not null,
		outer_block bytea not null,
		added timestamptz not null default now()
	);
	create function pgxtenant.sealed_tenant(setting text) returns text
		language plpgsql stable parallel safe security definer set search_path = pg_catalog, pg_temp as $$
	declare
		tenant text := current_setting(setting, true);
		seal text[] := string_to_array(current_setting('pgxtenant.seal', true), '.');
		key record;
	begin
		if coalesce(tenant, '') = '' then
			return null;
		end if;
		if coalesce(array_length(seal, 1), 0) <> 3 then
			raise insufficient_privilege using message = format('pgxtenant: tenant %L is not sealed', tenant),
				hint = 'These policies take only tenants that pgxtenant has signed. Set Config.Seal.';
		end if;
		select inner_block, outer_block into key from pgxtenant.seal_key where name = seal[1];
		if not found then
			raise insufficient_privilege using message = format('pgxtenant: tenant %L is sealed with a key that this database does not know', tenant),
				hint = 'Call InstallSeal with the Config.Seal that is in use.';
		end if;
		if sha256(convert_to(seal[3], 'UTF8')) is distinct from sha256(convert_to(encode(sha256(key.outer_block ||
			sha256(key.inner_block || convert_to(seal[2] || '.' || lower(setting) || '=' || tenant, 'UTF8'))), 'hex'), 'UTF8')) then
			raise insufficient_privilege using message = format('pgxtenant: the seal is not that of tenant %L', tenant);
		end if;
		if to_timestamp(seal[2]::bigint) < transaction_timestamp() then
			raise insufficient_privilege using message = format('pgxtenant: the seal of tenant %L has expired', tenant),
				hint = 'Compare the clock of the service with that of the server.';
		end if;
		return tenant;
	end $$;
	revoke all on table pgxtenant.seal_key from public;
	revoke all on function pgxtenant.sealed_tenant(text) from public;`,
}

// Install makes the database of conn accept the keys of c, those that it accepts already remaining, and lets
// appRole ask for the check. It is what [TenantDB.InstallSeal] does, for further databases: that of a database
// tenant by DatabaseOptions.Setup, for example. conn's role becomes the owner of what is made, and needs CREATE on
// the database.
func (c *SealConfig) Install(ctx context.Context, conn *pgx.Conn, appRole string) error {
	if err := errors.Join(c.problems()...); err != nil {
		return fmt.Errorf("pgxtenant: SealConfig%w", err)
	}
	return c.install(ctx, conn, appRole, false)
}

// InstallSeal makes the shared database accept the keys of Config.Seal, and lets the role of Config.Shared ask
// for the check. Keys that it accepts already remain: RetireSealKeys removes them. It runs on the Admin pool, may be
// called at each start, and by any number of processes.
func (db *TenantDB) InstallSeal(ctx context.Context) error { return db.installSeal(ctx, false) }

// RetireSealKeys is InstallSeal that also removes all other keys. Processes that still sign with one of
// them fail from then on.
func (db *TenantDB) RetireSealKeys(ctx context.Context) error { return db.installSeal(ctx, true) }

func (db *TenantDB) installSeal(ctx context.Context, retire bool) error {
	admin, err := db.adminPool()
	switch {
	case err != nil:
		return err
	case db.config.Seal == nil:
		return errNoSeal
	}
	return db.config.Seal.install(ctx, admin, db.appRole(), retire)
}

var errNoSeal = errors.New("pgxtenant: Config.Seal is not set")

func (c *SealConfig) install(ctx context.Context, on beginner, appRole string, retire bool) error {
	if err := install(ctx, on, "seal", sealSteps); err != nil {
		return err
	}
	err := installing(ctx, on, func(tx pgx.Tx) error {
		names := make([]string, 0, 1+len(c.OldKeys))
		for _, key := range c.keys() {
			k := newSealKey(key)
			names = append(names, k.name)
			if _, err := tx.Exec(ctx, "insert into pgxtenant.seal_key (name, inner_block, outer_block) values ($1, $2, $3) on conflict (name) do nothing",
				k.name, concealedBytes(hmacBlock(key, 0x36)), concealedBytes(hmacBlock(key, 0x5c))); err != nil {
				return err
			}
		}
		if retire {
			if _, err := tx.Exec(ctx, "delete from pgxtenant.seal_key where name <> all($1)", names); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, fmt.Sprintf("grant usage on schema pgxtenant to %[1]s; grant execute on function pgxtenant.sealed_tenant(text) to %[1]s", ident(appRole)))
		return err
	})
	if err != nil {
		return fmt.Errorf("pgxtenant: install the keys of sealed tenants: %w", adminError(err))
	}
	return nil
}

func (c *SealConfig) keys() [][]byte { return append([][]byte{c.Key}, c.OldKeys...) }

func (c *SealConfig) copy() *SealConfig {
	if c == nil {
		return nil
	}
	d := *c
	d.Key, d.OldKeys = slices.Clone(c.Key), cloneKeys(c.OldKeys)
	return &d
}

func (c *SealConfig) problems() (errs []error) {
	for i, key := range c.keys() {
		if len(key) >= MinSealKeyLen {
			continue
		}
		field := ".Key"
		if i > 0 {
			field = fmt.Sprintf(".OldKeys[%d]", i-1)
		}
		errs = append(errs, fmt.Errorf("%s has %d bytes; want %d or more", field, len(key), MinSealKeyLen))
	}
	if c.TTL != 0 && c.TTL < time.Second {
		errs = append(errs, fmt.Errorf(".TTL is %v; want 1s or more, or 0 for %v", c.TTL, DefaultSealTTL))
	}
	return errs
}

// sealer signs tenants. It is immutable and safe for concurrent use.
type sealer struct {
	key     sealKey
	setting string // in lower case, as the server compares names
	ttl     time.Duration
}

type sealKey struct {
	name   string // the beginning of the key's hash, so that the right one of several is found
	secret []byte
}

func newSealKey(secret []byte) sealKey {
	sum := sha256.Sum256(append([]byte("pgxtenant seal key name\x00"), secret...))
	return sealKey{hex.EncodeToString(sum[:8]), secret}
}

// newSealer returns nil for a nil c.
func newSealer(c *SealConfig, setting string) *sealer {
	if c == nil {
		return nil
	}
	return &sealer{newSealKey(c.Key), strings.ToLower(setting), orDefault(c.TTL, DefaultSealTTL)}
}

// seal signs a tenant's ID, and tells when to sign it anew. The empty ID, of no tenant, needs no signature, and a nil
// sealer makes none.
func (s *sealer) seal(id string) (seal string, renew time.Time) {
	if s == nil || id == "" {
		return "", time.Time{}
	}
	now := time.Now()
	end := strconv.FormatInt(now.Add(s.ttl+time.Second-1).Unix(), 10) // rounded up
	mac := hmac.New(sha256.New, s.key.secret)
	mac.Write([]byte(end + "." + s.setting + "=" + id)) // never fails
	return s.key.name + "." + end + "." + hex.EncodeToString(mac.Sum(nil)), now.Add(s.ttl / 2)
}

// hmacBlock is one of the two blocks that HMAC-SHA256 hashes ahead of all else, made with the given pad.
func hmacBlock(key []byte, pad byte) []byte {
	if len(key) > sha256.BlockSize {
		sum := sha256.Sum256(key)
		key = sum[:]
	}
	block := make([]byte, sha256.BlockSize)
	copy(block, key)
	for i := range block {
		block[i] ^= pad
	}
	return block
}
