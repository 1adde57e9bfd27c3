package pgxtenant

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// vault keeps connection strings in the registry's table so that no password can be read there. It is
// immutable and safe for concurrent use. What is stored begins with how: "plain:", "ref:", or "aes:", the
// key's name and a colon.
type vault struct {
	refs   bool
	sealer *vaultKey // encrypts; may be nil
	opener []*vaultKey
}

type vaultKey struct {
	name string // the beginning of the key's hash, so that the right one of several is tried
	aead cipher.AEAD
}

func newVault(c *RegistryConfig) (*vault, error) {
	v := &vault{refs: c.Resolve != nil}
	for i, key := range append([][]byte{c.Key}, c.OldKeys...) {
		if i == 0 && key == nil {
			continue
		}
		k, err := newVaultKey(key)
		if err != nil {
			if i == 0 {
				return nil, fmt.Errorf(".Key %w", err)
			}
			return nil, fmt.Errorf(".OldKeys[%d] %w", i-1, err)
		}
		if i == 0 {
			v.sealer = k
		}
		v.opener = append(v.opener, k)
	}
	return v, nil
}

func newVaultKey(key []byte) (*vaultKey, error) {
	if len(key) != 32 {
		return nil, fmt.Errorf("has %d bytes; want 32, for AES-256", len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append([]byte("pgxtenant key name\x00"), key...))
	return &vaultKey{hex.EncodeToString(sum[:4]), aead}, nil
}

// store returns what to write for the connection string, or reference, of the tenant with the given ID.
func (v *vault) store(id, connString string) (string, error) {
	switch {
	case connString == "":
		return "", nil
	case v.sealer != nil:
		nonce := make([]byte, v.sealer.aead.NonceSize())
		_, _ = rand.Read(nonce) // never fails
		sealed := v.sealer.aead.Seal(nonce, nonce, []byte(connString), vaultContext(id))
		return "aes:" + v.sealer.name + ":" + base64.StdEncoding.EncodeToString(sealed), nil
	case holdsPassword(connString) && v.refs:
		return "", fmt.Errorf("%w: its ConnString holds a password, and with RegistryConfig.Resolve it is stored as a reference; store one without", ErrInvalidTenant)
	case holdsPassword(connString):
		return "", fmt.Errorf("%w: its ConnString holds a password, which is not stored in clear; set RegistryConfig.Key or Resolve", ErrInvalidTenant)
	case v.refs:
		return "ref:" + connString, nil
	}
	return "plain:" + connString, nil
}

// load is the reverse of store.
func (v *vault) load(id, stored string) (string, error) {
	if stored == "" {
		return "", nil
	}
	kind, rest, _ := strings.Cut(stored, ":")
	switch {
	case kind == "ref" && v.refs, kind == "plain" && !v.refs:
		return rest, nil
	case kind == "ref":
		return "", fmt.Errorf("pgxtenant: registry: tenant %q's connection string is a reference, and RegistryConfig.Resolve is not set", id)
	case kind == "aes" && !v.refs:
		name, text, _ := strings.Cut(rest, ":")
		for _, k := range v.opener {
			if k.name == name {
				return k.open(id, text)
			}
		}
		return "", fmt.Errorf("pgxtenant: registry: tenant %q's connection string is encrypted with key %s, which is neither RegistryConfig.Key nor one of OldKeys", id, clip(name))
	}
	if kind != "plain" && kind != "aes" {
		kind = "neither plain, aes nor ref" // and is not shown: of a row that was written by hand it may be the whole secret
	}
	return "", fmt.Errorf("pgxtenant: registry: tenant %q's connection string is stored in a form (%s) that RegistryConfig does not allow", id, kind)
}

func (k *vaultKey) open(id, text string) (string, error) {
	sealed, err := base64.StdEncoding.DecodeString(text)
	if n := k.aead.NonceSize(); err == nil && len(sealed) >= n {
		if plain, err := k.aead.Open(nil, sealed[:n], sealed[n:], vaultContext(id)); err == nil {
			return string(plain), nil
		}
	}
	return "", fmt.Errorf("pgxtenant: registry: tenant %q's connection string does not decrypt: it was damaged, or made for another tenant", id)
}

// vaultContext ties a ciphertext to its tenant.
func vaultContext(id string) []byte { return []byte("pgxtenant connection string\x00" + id) }

var passwordWord = regexp.MustCompile(`(?i)password\s*=`)

// holdsPassword looks at the text alone: pgx would also take one from the environment. What cannot be read
// counts as one that does.
func holdsPassword(connString string) bool {
	if passwordWord.MatchString(connString) {
		return true // a parameter, in either form: sslpassword too
	}
	if !strings.Contains(connString, "://") {
		return false
	}
	u, err := url.Parse(connString)
	if err != nil || misplacedAt(connString) {
		return true
	}
	for name := range u.Query() { // a name may be escaped
		if strings.HasSuffix(strings.ToLower(name), "password") {
			return true
		}
	}
	_, has := u.User.Password()
	return has
}

var errNoKey = errors.New("pgxtenant: registry: reseal: RegistryConfig.Key is not set")
