package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// settings are what all commands share. A flag counts before the environment, and that before the config file.
type settings struct {
	Config             string        `yaml:"-"`
	Database           string        `yaml:"database"`
	Admin              string        `yaml:"admin"`
	Setting            string        `yaml:"setting"`
	Template           string        `yaml:"template"`
	TemplateReference  []string      `yaml:"template_reference"`
	SharedSchemas      []string      `yaml:"shared_schemas"`
	RegistryTTL        time.Duration `yaml:"registry_ttl"`
	RegistryStale      time.Duration `yaml:"registry_stale"`
	RegistryReferences bool          `yaml:"registry_references"`

	// In no flag, for a command line can be read by everybody on the machine.
	RegistryKey string            `yaml:"registry_key"`
	SealKey     string            `yaml:"seal_key"`
	Servers     map[string]server `yaml:"servers"`
	Audit       struct {
		Allow []allowed `yaml:"allow"`
	} `yaml:"audit"`
	Top struct {
		URL     string            `yaml:"url"`
		Headers map[string]string `yaml:"headers"`
	} `yaml:"top"`

	warning string   // about the config file
	further []string // connection strings that came another way
	hidden  []string // other secrets that did
}

type server struct {
	Admin     string        `yaml:"admin"`
	Database  string        `yaml:"database"`
	Template  string        `yaml:"template"`
	AppRole   string        `yaml:"app_role"`
	Owner     string        `yaml:"owner"`
	ConnLimit int           `yaml:"conn_limit"`
	Grace     time.Duration `yaml:"grace"`
}

type allowed struct {
	Code   string `yaml:"code"`
	Object string `yaml:"object"`
}

const envPrefix = "PGXTENANT_"

func (s *settings) flags(f *pflag.FlagSet) {
	f.StringVar(&s.Config, "config", "", "config `file` in YAML (default: pgxtenant/config.yaml in the user's config folder, if it is there)")
	f.StringVar(&s.Admin, "admin", "", "connection string `URL` of the role that owns the tables")
	f.StringVar(&s.Database, "database", "", "connection string `URL` of the service itself")
	f.StringVar(&s.Setting, "setting", "", "`name` of the setting that carries the tenant (default app.current_tenant_id)")
	f.StringVar(&s.Template, "template", "", "`schema` that tenants' schemas are copies of")
	f.StringSliceVar(&s.TemplateReference, "template-reference", nil, "`tables` of the template whose rows are copied too")
	f.StringSliceVar(&s.SharedSchemas, "shared-schemas", nil, "`schemas` that follow a tenant's own (default public)")
	f.DurationVar(&s.RegistryTTL, "registry-ttl", 0, "how long the service keeps tenants in memory, RegistryConfig.TTL (default 30s)")
	f.DurationVar(&s.RegistryStale, "registry-stale", 0, "how much longer while it cannot read the registry, RegistryConfig.StaleOnError")
	f.BoolVar(&s.RegistryReferences, "registry-references", false, "the registry holds references, not connection strings")
}

// load reads the config file, then the environment, into what no flag has set.
func (s *settings) load(f *pflag.FlagSet) error {
	var given []func() error            // put back what flags have set
	f.VisitAll(func(flag *pflag.Flag) { // Visit knows nothing of a flag that a command below has parsed
		if !flag.Changed {
			return
		}
		text := flag.Value.String()
		restore := func() error { return flag.Value.Set(text) }
		if list, ok := flag.Value.(pflag.SliceValue); ok {
			values := list.GetSlice()
			restore = func() error { return list.Replace(values) }
		}
		given = append(given, restore)
	})
	if err := s.readFile(f.Changed("config")); err != nil {
		return err
	}
	var errs []error
	f.VisitAll(func(flag *pflag.Flag) {
		name := envName(flag.Name)
		if value := os.Getenv(name); value != "" && flag.Name != "config" && flag.Name != "help" && !flag.Changed {
			if err := flag.Value.Set(value); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		}
	})
	for name, field := range map[string]*string{"REGISTRY_KEY": &s.RegistryKey, "SEAL_KEY": &s.SealKey, "TOP_URL": &s.Top.URL} {
		if value := os.Getenv(envPrefix + name); value != "" {
			*field = value
		}
	}
	for _, restore := range given {
		errs = append(errs, restore())
	}
	return errors.Join(errs...)
}

func envName(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// readFile reads the config file; one that was named must be there. A field that there is none of is an error. Of a file
// with secrets that others can read it warns, and no more: in a container that may well be so.
func (s *settings) readFile(byFlag bool) error {
	path, named := s.Config, byFlag
	if env := os.Getenv(envPrefix + "CONFIG"); !byFlag && env != "" {
		path, named = env, true
	}
	if !named {
		folder, err := os.UserConfigDir()
		if err != nil {
			return nil
		}
		path = filepath.Join(folder, "pgxtenant", "config.yaml")
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return fmt.Errorf("config file: %w", err)
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(s); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("config file %s: %w", path, withoutValues(err))
	}
	var alone settings // what flags have set is not in the file
	_ = yaml.Unmarshal(text, &alone)
	info, err := os.Stat(path)
	if err == nil && runtime.GOOS != "windows" && info.Mode().Perm()&0o044 != 0 && alone.hasSecret() {
		s.warning = fmt.Sprintf("config file %s holds secrets, and others can read it: chmod 600 it", path)
	}
	return nil
}

func (s *settings) hasSecret() bool {
	if s.RegistryKey+s.SealKey != "" || len(s.Top.Headers) > 0 {
		return true
	}
	return slices.ContainsFunc(s.connStrings(), func(conn string) bool {
		u, err := url.Parse(conn)
		if err == nil && u.User != nil {
			if _, ok := u.User.Password(); ok {
				return true
			}
		}
		return passwordWord.MatchString(conn)
	})
}

var yamlValue = regexp.MustCompile("(?s)'.*' referenced|`.*`|'.*' value")

// withoutValues leaves out of a YAML error what it repeats of the file, which may be a secret: the lines remain, and
// the names of fields that there are none of.
func withoutValues(err error) error {
	var typed *yaml.TypeError
	if !errors.As(err, &typed) {
		// Of the form, with nothing but a line, unless it is one of these.
		return errors.New(yamlValue.ReplaceAllString(err.Error(), "a value"))
	}
	var lines []string
	for _, e := range typed.Errors {
		if before, _, found := strings.Cut(e, ": cannot unmarshal"); found {
			e = before + ": a value of a wrong kind"
		} else if at, _, found := strings.Cut(e, " in type "); found {
			e = at
		}
		lines = append(lines, e)
	}
	return errors.New(strings.Join(lines, "; "))
}

// secrets are the texts that no message may hold.
func (s *settings) secrets() (list []string) {
	add := func(text string) {
		// Of one that is shorter, the gaps in a message would tell more than they hide.
		if len(text) >= 4 {
			list = append(list, text)
		}
	}
	for _, conn := range s.connStrings() {
		add(conn)
		for _, password := range passwordsOf(conn) {
			add(password)
		}
	}
	add(s.RegistryKey)
	add(s.SealKey)
	add(s.Top.URL)
	for _, value := range s.Top.Headers {
		add(value)
	}
	for _, text := range s.hidden {
		add(text)
	}
	slices.SortFunc(list, func(a, b string) int { return len(b) - len(a) })
	return list
}

func (s *settings) hide(text string) { s.hidden = append(s.hidden, text) }

func (s *settings) connStrings() []string {
	all := append([]string{s.Database, s.Admin}, s.further...)
	for _, server := range s.Servers {
		all = append(all, server.Admin, server.Database)
	}
	return all
}

var passwordInURL = regexp.MustCompile(`(://[^\s/:@"]*:)[^\s"]*@`)

// masked is the last line of defence: what speaks of connection strings does not repeat them in the first place.
func (s *settings) masked(text string) string {
	for _, secret := range s.secrets() {
		text = strings.ReplaceAll(text, secret, "****")
	}
	// What was given in a wrong place is known to be one by its form alone.
	return passwordInURL.ReplaceAllString(text, "$1****@")
}

// key decodes a key of the config file or environment, base64 or hexadecimal.
func key(name, text string) ([]byte, error) {
	if text == "" {
		return nil, nil
	}
	if raw, err := hex.DecodeString(text); err == nil {
		return raw, nil
	}
	if raw, err := base64.StdEncoding.DecodeString(text); err == nil {
		return raw, nil
	}
	return nil, usagef("%s: want bytes in base64 or hexadecimal", name)
}
