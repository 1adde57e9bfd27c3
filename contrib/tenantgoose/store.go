package tenantgoose

import (
	"context"
	"fmt"
	"slices"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"
)

// store is goose's own for PostgreSQL, for one place and one call. Nobody else writes to the ledger meanwhile, so it is read once and
// not at each step, which is most of what a small migration costs goose.
type store struct {
	database.Store
	list []*database.ListMigrationsResult // the last one applied first; nil while it was not read
}

// nothingApplied is the ledger of a place that is only thought of.
type nothingApplied struct{ database.Store }

func (nothingApplied) Tablename() string { return ledgerTable }

func (nothingApplied) TableExists(context.Context, database.DBTxConn) (bool, error) { return true, nil }

func (nothingApplied) ListMigrations(context.Context, database.DBTxConn) ([]*database.ListMigrationsResult, error) {
	return []*database.ListMigrationsResult{{IsApplied: true}}, nil
}

func (nothingApplied) Insert(context.Context, database.DBTxConn, database.InsertRequest) error {
	return errEnded // of a file without a statement
}

func newStore() (*store, error) {
	s, err := database.NewStore(goose.DialectPostgres, ledgerTable)
	return &store{Store: s}, err
}

// TableExists looks into the first schema of the search_path alone: a shared schema further on has a ledger of its own.
func (s *store) TableExists(ctx context.Context, db database.DBTxConn) (exists bool, err error) {
	err = db.QueryRowContext(ctx, "select pg_catalog.to_regclass(pg_catalog.quote_ident(pg_catalog.current_schema()) || '."+ledgerTable+"') is not null").Scan(&exists)
	return exists, err
}

func (s *store) ListMigrations(ctx context.Context, db database.DBTxConn) (list []*database.ListMigrationsResult, err error) {
	if s.list != nil {
		return s.list, nil
	}
	if s.list, err = s.Store.ListMigrations(ctx, db); err != nil {
		return nil, err
	}
	var l ledger
	for _, m := range s.list {
		if !m.IsApplied && m.Version != 0 {
			l.doubt = append(l.doubt, m.Version)
		}
	}
	return s.list, l.doubtful()
}

// GetLatestVersion is asked at the end, for a log that nobody reads.
func (s *store) GetLatestVersion(ctx context.Context, db database.DBTxConn) (newest int64, err error) {
	list, err := s.ListMigrations(ctx, db)
	for _, m := range list {
		newest = max(newest, m.Version)
	}
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("tenantgoose: table %s is empty: %w", ledgerTable, database.ErrVersionNotFound)
	}
	return newest, err
}

// Insert notes a version. After a rollback, which takes it back, goose asks nothing more.
func (s *store) Insert(ctx context.Context, db database.DBTxConn, r database.InsertRequest) error {
	if s.list != nil {
		s.list = slices.Insert(s.list, 0, &database.ListMigrationsResult{Version: r.Version, IsApplied: true})
	}
	return s.Store.Insert(ctx, db, r)
}

func (s *store) Delete(ctx context.Context, db database.DBTxConn, version int64) error {
	s.list = slices.DeleteFunc(s.list, func(m *database.ListMigrationsResult) bool { return m.Version == version })
	return s.Store.Delete(ctx, db, version)
}
