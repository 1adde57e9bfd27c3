package pgxtenant

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"
)

// DatabaseServer is a server that tenants' databases are made on; see Config.Servers.
type DatabaseServer struct {
	// Admin leads to a maintenance database of the server, as the role that makes and drops databases; it
	// must come from pgxpool.ParseConfig. [DatabaseManager] says which rights the role needs.
	Admin *pgxpool.Config

	// ConnString leads the application to the server, in any form that pgxpool.ParseConfig takes. The
	// database that it names is replaced by the tenant's.
	ConnString string

	// DatabaseOptions say what a new database is. An empty AppRole is the user of ConnString, and an empty
	// Setting is Config.Setting.
	DatabaseOptions
}

// servers are the managers of Config.Servers, by name.
type servers map[string]*DatabaseManager

func openServers(ctx context.Context, config *Config) (servers, error) {
	open := make(servers, len(config.Servers))
	for name, s := range config.Servers {
		admin, err := pgxpool.NewWithConfig(ctx, s.Admin.Copy())
		if err != nil {
			open.close()
			return nil, fmt.Errorf("pgxtenant: admin pool of server %q: %w", name, err)
		}
		o := s.DatabaseOptions
		o.Setting = orDefault(o.Setting, config.Setting)
		if o.AppRole == "" {
			app, _ := pgxpool.ParseConfig(s.ConnString) // validate has done so
			o.AppRole = app.ConnConfig.User
		}
		if open[name], err = NewDatabaseManager(admin, o); err != nil {
			admin.Close()
			open.close()
			return nil, fmt.Errorf("pgxtenant: server %q: %w", name, err)
		}
	}
	return open, nil
}

func (s servers) close() {
	for _, m := range s {
		m.admin.Close()
	}
}

// Databases returns the manager of the tenants' databases on the server of that name in Config.Servers. It
// ends with the TenantDB.
func (db *TenantDB) Databases(server string) (*DatabaseManager, error) {
	if db.closed.Load() {
		return nil, ErrClosed
	}
	if m, ok := db.servers[server]; ok {
		return m, nil
	}
	if len(db.servers) == 0 {
		return nil, errors.New("pgxtenant: Config.Servers is empty: there is no server to make databases on")
	}
	return nil, fmt.Errorf("pgxtenant: Config.Servers names no server %q, only %q", clip(server), slices.Sorted(maps.Keys(db.config.Servers)))
}

// on is the manager for a call that is made on the Admin pool, or for a plan.
func (m *DatabaseManager) on(on adminRunner, server string) *DatabaseManager {
	p := planOf(on)
	if p == nil {
		return m
	}
	p.note("what follows is for database " + ident(m.admin.Config().ConnConfig.Database) + " of server " + ident(server))
	p.elsewhere = true
	return &DatabaseManager{m.admin, m.o, p}
}

// place returns the connection string of a database that Provision made.
func (db *TenantDB) place(server, tenantID string) (string, error) {
	s, ok := db.config.Servers[server]
	if !ok {
		_, err := db.Databases(server)
		return "", err
	}
	return withDatabase(s.ConnString, DatabaseName(tenantID))
}

// problems reports what makes a server unfit for use.
func (s *DatabaseServer) problems() (errs []error) {
	for _, err := range poolProblems(s.Admin) {
		errs = append(errs, fmt.Errorf(".Admin%w", err))
	}
	if s.ConnString == "" {
		errs = append(errs, errors.New(".ConnString is empty"))
	} else if _, err := parsePoolConfig(s.ConnString); err != nil {
		errs = append(errs, fmt.Errorf(".ConnString: %w", err))
	}
	if s.ConnLimit < 0 {
		errs = append(errs, fmt.Errorf(".ConnLimit is %d; want 0 or more", s.ConnLimit))
	}
	return errs
}

// withDatabase returns connString, which is valid, with another database in it.
func withDatabase(connString, database string) (string, error) {
	if !strings.HasPrefix(connString, "postgres://") && !strings.HasPrefix(connString, "postgresql://") {
		// Of a key that is given twice the last one counts.
		return connString + " dbname='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(database) + "'", nil
	}
	u, err := url.Parse(connString)
	if err != nil {
		return "", errors.New("pgxtenant: invalid connection string") // err would repeat it
	}
	u.Path, u.RawPath = "/"+database, ""
	if query := u.Query(); query.Has("dbname") || query.Has("database") {
		query.Del("dbname")
		query.Del("database")
		u.RawQuery = query.Encode()
	}
	return u.String(), nil
}
