package cli

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgxtenant/pgxtenant"
)

// needs are what a command cannot do without.
type needs struct {
	database bool // the service's own connection string, for grants to its role and for what it can reach
	template bool
}

// open makes the TenantDB of the settings. No connection is made yet, but the one that listens to the registry.
func (a *app) open(ctx context.Context, n needs) (*pgxtenant.TenantDB, error) {
	s := &a.settings
	switch {
	case s.Admin == "":
		return nil, usagef("this needs the role that owns the tables: --admin, %sADMIN, or admin in the config file", envPrefix)
	case s.Database == "" && n.database:
		return nil, usagef("this needs the service's own role: --database, %sDATABASE, or database in the config file", envPrefix)
	case s.Template == "" && n.template:
		return nil, usagef("this needs the schema that tenants' schemas are copies of: --template, %sTEMPLATE, or template in the config file", envPrefix)
	}
	config, err := s.tenantConfig()
	if err != nil {
		return nil, &exitError{exitUsage, err}
	}
	db, err := pgxtenant.NewWithConfig(ctx, config)
	if err != nil {
		return nil, &exitError{exitUsage, err}
	}
	return db, nil
}

func (s *settings) tenantConfig() (*pgxtenant.Config, error) {
	admin, err := poolConfig("admin", s.Admin)
	if err != nil {
		return nil, err
	}
	// What does not need the service's role does nothing as it, either.
	config, shared := &pgxtenant.Config{Shared: admin.Copy()}, s.Database
	if shared != "" {
		if config, err = pgxtenant.ParseConfig(shared); err != nil {
			return nil, fmt.Errorf("the connection string database: %w", err)
		}
		small(config.Shared)
	}
	config.Admin = admin
	config.RequireAudit = false // an audit is a command of its own
	config.Template, config.TemplateReference = s.Template, s.TemplateReference
	if s.Setting != "" {
		config.Setting = s.Setting
	}
	if s.SharedSchemas != nil {
		config.SharedSchemas = s.SharedSchemas
	}
	config.Registry = &pgxtenant.RegistryConfig{TTL: s.RegistryTTL, StaleOnError: s.RegistryStale}
	if s.RegistryReferences {
		config.Registry.Resolve = func(context.Context, string, pgxtenant.Tenant) (string, error) {
			return "", errors.New("the command line does not know where the registry's references lead")
		}
	}
	if config.Registry.Key, err = key("registry_key", s.RegistryKey); err != nil {
		return nil, err
	}
	seal, err := key("seal_key", s.SealKey)
	if err != nil {
		return nil, err
	}
	if seal != nil {
		config.Seal = &pgxtenant.SealConfig{Key: seal}
	}
	config.Servers = make(map[string]pgxtenant.DatabaseServer, len(s.Servers))
	for name, server := range s.Servers {
		admin, err := poolConfig("servers."+name+".admin", server.Admin)
		if err != nil {
			return nil, err
		}
		config.Servers[name] = pgxtenant.DatabaseServer{Admin: admin, ConnString: server.Database, DatabaseOptions: pgxtenant.DatabaseOptions{
			Template: server.Template, AppRole: server.AppRole, Owner: server.Owner, ConnLimit: server.ConnLimit, Grace: server.Grace,
		}}
	}
	for _, f := range s.Audit.Allow {
		config.AuditAllow = append(config.AuditAllow, pgxtenant.AllowedFinding{Code: f.Code, Object: f.Object})
	}
	return config, nil
}

// poolConfig parses a connection string by the package, whose errors repeat nothing of it.
func poolConfig(name, connString string) (*pgxpool.Config, error) {
	config, err := pgxtenant.ParseConfig(connString)
	if err != nil {
		return nil, fmt.Errorf("the connection string %s: %w", name, err)
	}
	small(config.Shared)
	return config.Shared, nil
}

// small keeps a pool to what a command needs, and says on the server whose it is.
func small(c *pgxpool.Config) {
	c.MaxConns, c.MinConns, c.MinIdleConns = min(c.MaxConns, 4), 0, 0
	if c.ConnConfig.RuntimeParams["application_name"] == "" {
		c.ConnConfig.RuntimeParams["application_name"] = "pgxtenant"
	}
}

var passwordWord = regexp.MustCompile(`(?i)\bpassword\s*=\s*('(?:[^'\\]|\\.)*'|[^\s&]+)`)

// passwordsOf finds what may be a password in a connection string, as it stands there and decoded.
func passwordsOf(connString string) (list []string) {
	if u, err := url.Parse(connString); err == nil && u.User != nil {
		if password, ok := u.User.Password(); ok {
			list = append(list, password, url.QueryEscape(password))
		}
	}
	for _, match := range passwordWord.FindAllStringSubmatch(connString, -1) {
		list = append(list, match[1])
	}
	if config, err := pgxpool.ParseConfig(connString); err == nil {
		list = append(list, config.ConnConfig.Password)
	}
	return list
}
