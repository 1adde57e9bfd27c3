package tenantgoose

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgxtenant/pgxtenant"
)

// ErrEdited means that a file is not what was applied under its version, be it to one tenant. Nothing was done. Undo the
// edit, and write what it was to achieve as a further migration; if it has no effect, AcceptEdits takes it.
var ErrEdited = errors.New("tenantgoose: a migration was edited after it had been applied")

// sums keep what the files were when they were first seen as applied anywhere, in the database of the registry: once for all
// tenants, since goose itself has nothing of the kind in its ledgers.
type sums struct {
	db     *pgxtenant.TenantDB
	accept []int64

	mu   sync.Mutex
	kept map[sumKey]bool // those that this process need not write
}

type sumKey struct {
	folder  string
	version int64
}

const createSums = `do $$ begin
	if to_regclass('pgxtenant.goose_sum') is null then
		perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgxtenant goose_sum', 0));
		create table if not exists pgxtenant.goose_sum (
			folder  text not null,
			version bigint not null,
			sum     text not null,  -- SHA-256 of the file
			seen    timestamptz not null default now(),
			primary key (folder, version)
		);
	end if;
end $$`

// check compares the files with what was applied. Those of the versions in passed, and of AcceptEdits, are taken as they
// are, and kept as that.
func (s *sums) check(ctx context.Context, folders []*folder, passed ...int64) error {
	return s.tx(ctx, "compare", func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, createSums); err != nil {
			return err
		}
		accepted, err := s.compare(ctx, tx, folders, passed...)
		if err != nil {
			return err
		}
		for _, mi := range accepted {
			if _, err := tx.Exec(ctx, "update pgxtenant.goose_sum set sum = $3 where folder = $1 and version = $2", mi.folder(), mi.Version, mi.sum); err != nil {
				return err
			}
		}
		return nil
	})
}

// look is check that writes nothing.
func (s *sums) look(ctx context.Context, folders []*folder) error {
	return s.tx(ctx, "compare", func(tx pgx.Tx) error {
		var there bool
		if err := tx.QueryRow(ctx, "select pg_catalog.to_regclass('pgxtenant.goose_sum') is not null").Scan(&there); err != nil || !there {
			return err
		}
		_, err := s.compare(ctx, tx, folders)
		return err
	})
}

// compare returns the migrations whose files were edited, all of which are accepted.
func (s *sums) compare(ctx context.Context, tx pgx.Tx, folders []*folder, passed ...int64) (accepted []*migration, err error) {
	passed = append(passed, s.accept...)
	var edited []Migration
	for _, f := range folders {
		rows, err := tx.Query(ctx, "select version, sum from pgxtenant.goose_sum where folder = $1 order by version", f.name)
		if err != nil {
			return nil, err
		}
		var version int64
		var sum string
		_, err = pgx.ForEachRow(rows, []any{&version, &sum}, func() error {
			switch mi := f.find(version); {
			case mi == nil || mi.sum == "" || mi.sum == sum:
			case slices.Contains(passed, version):
				accepted = append(accepted, mi)
			default:
				edited = append(edited, mi.Migration)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if len(edited) == 0 {
		return accepted, nil
	}
	var names, numbers []string
	for _, mi := range edited {
		names, numbers = append(names, mi.Name), append(numbers, strconv.FormatInt(mi.Version, 10))
	}
	return nil, fmt.Errorf("%w: %s; undo the edit and write another migration or, if it has no effect, take it by AcceptEdits(%s)",
		ErrEdited, strings.Join(names, ", "), strings.Join(numbers, ", "))
}

// record keeps the sums of files that are applied somewhere, unless they are kept already.
func (s *sums) record(ctx context.Context, f *folder, applied []int64) error {
	s.mu.Lock()
	var versions []int64
	var list []string
	for _, v := range applied {
		if mi := f.find(v); mi != nil && mi.sum != "" && !s.kept[sumKey{f.name, v}] {
			versions, list = append(versions, v), append(list, mi.sum)
		}
	}
	s.mu.Unlock()
	if len(versions) == 0 {
		return nil
	}
	err := s.tx(ctx, "keep", func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `insert into pgxtenant.goose_sum (folder, version, sum) select $1, v, s from unnest($2::bigint[], $3::text[]) x (v, s)
			on conflict do nothing`, f.name, versions, list)
		return err
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept == nil {
		s.kept = make(map[sumKey]bool)
	}
	for _, v := range versions {
		s.kept[sumKey{f.name, v}] = true
	}
	return nil
}

// forget drops the sums of what is above a version.
func (s *sums) forget(ctx context.Context, f *folder, version int64) error {
	err := s.tx(ctx, "drop", func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "delete from pgxtenant.goose_sum where folder = $1 and version > $2", f.name, version)
		return err
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = nil
	return err
}

func (s *sums) tx(ctx context.Context, what string, f func(pgx.Tx) error) error {
	err := pgx.BeginFunc(ctx, s.db.Admin(), f)
	var pgErr *pgconn.PgError
	switch {
	case err == nil || errors.Is(err, ErrEdited):
		return err
	case errors.As(err, &pgErr) && pgErr.Code == "3F000":
		return fmt.Errorf("tenantgoose: %s the files' sums: call Registry.Install first: %w", what, err)
	}
	return fmt.Errorf("tenantgoose: %s the files' sums: %w", what, err)
}
