package cli

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A flag counts before the environment, and that before the config file.
func TestWhereSettingsComeFrom(t *testing.T) {
	t.Parallel()
	s := installed(t)
	s.ok("tenant", "create", "acme")
	config := file(t, "config.yaml", "admin: "+s.OwnerURL()+"\ntemplate: template\nregistry_ttl: 1ms\n")
	byFile := []string{"PGXTENANT_CONFIG=" + config}
	require.Contains(t, (&shop{s.DB, t, byFile}).ok("tenant", "list"), "acme")
	require.Contains(t, (&shop{s.DB, t, nil}).ok("tenant", "list", "--config", config), "acme")
	run(t, append(byFile, "PGXTENANT_ADMIN=postgres://127.0.0.1:1/d"), "tenant", "list").fails(exitFailed, "connection refused")
	require.Contains(t, (&shop{s.DB, t, append(byFile, "PGXTENANT_ADMIN=postgres://127.0.0.1:1/d")}).ok("tenant", "list", "--admin", s.OwnerURL()), "acme")
	bad := file(t, "bad.yaml", "admin: postgres://127.0.0.1:1/d\ntemplate_reference: [a]\n")
	require.Contains(t, (&shop{s.DB, t, []string{"PGXTENANT_CONFIG=" + bad}}).ok("tenant", "list", "--admin", s.OwnerURL(), "--template-reference", "b,c"), "acme")
	require.Contains(t, (&shop{s.DB, t, []string{"PGXTENANT_CONFIG=" + bad, "PGXTENANT_ADMIN=" + s.OwnerURL()}}).ok("tenant", "list"), "acme")
	require.NoError(t, os.Chmod(config, 0o644))
	run(t, byFile, "tenant", "list").fails(0, "holds secrets, and others can read it: chmod 600 it")
	run(t, append(byFile, "PGXTENANT_REGISTRY_TTL=x"), "tenant", "list").fails(exitUsage, "PGXTENANT_REGISTRY_TTL")
}

func TestConfigFileBadInput(t *testing.T) {
	t.Parallel()
	passwords.Store("sEcret97", true)
	for text, says := range map[string]string{
		"admim: postgres://u:sEcret97@h/d":                            "line 1: field admim not found",
		"admin: [sEcret97]":                                           "line 1: a value of a wrong kind",
		"admin: \"postgres://sEcret97":                                "config file",
		"registry_key: *sEcret97":                                     "unknown anchor a value",
		"registry_key: !!int sEcret97":                                "cannot decode !!str a value",
		"registry_ttl: sEcret97":                                      "line 1: a value of a wrong kind",
		"servers: {eu: {admni: sEcret97}}":                            "field admni not found",
		"admin: postgres:///d\nregistry_key: sEcret97!":               "registry_key: want bytes in base64 or hexadecimal",
		"admin: postgres:///d\nregistry_key: abcd":                    "registry_key has 2 bytes",
		"admin: postgres:///d\nservers: {eu: {admin: postgres:///d}}": "ConnString is empty",
		"admin: postgres:///d\naudit: {allow: [{code: nope}]}":        "nope",
	} {
		run(t, nil, "--config", file(t, "c.yaml", text), "tenant", "list").fails(exitUsage, says)
	}
}

// Shortest first would leave pieces of the longest.
func TestSecretsAreMasked(t *testing.T) {
	t.Parallel()
	s := settings{Admin: "postgres://u:p%40ss%20word@h/d", Database: "host=h password='it''s'", RegistryKey: strings.Repeat("k", 44)}
	for _, secret := range append(s.secrets(), "p@ss word") {
		require.NotContains(t, s.masked("x "+secret+" y"), secret)
	}
	require.Equal(t, "nothing here", s.masked("nothing here"))

	// A connection string in the wrong place.
	passwords.Store("sEcret98", true)
	for _, args := range []string{"postgres://u:sEcret98@h/d", "init postgres://u:sEcret98@h/d", "tenant list --registry-ttl postgres://u:sEcret98@h/d"} {
		run(t, nil, strings.Fields(args)...).fails(exitUsage, "postgres://u:****@h/d")
	}
}
