package main

import (
	"context"
	"crypto/sha256"
	"net/http"
	"strings"
)

// keyring knows whose API keys there are, by their SHA-256: who reads it has no key, and the time of a look-up tells
// nothing about one. A service keeps it in a table, or verifies signed tokens here instead.
type keyring map[[sha256.Size]byte]string

// demoKeys are one key for each tenant, and one of a tenant that there is no more.
func demoKeys() keyring {
	keys := keyring{sha256.Sum256([]byte("hooli-key")): "hooli"}
	for _, t := range tenants {
		keys[sha256.Sum256([]byte(t.ID+"-key"))] = t.ID
	}
	return keys
}

type callerKey struct{}

// authenticate puts the tenant whose key the request brings into the context. It refuses nobody: pgxtenant.Middleware,
// which comes next, answers a caller without a claim with 401. Two headers are none: what stands in front of the service may
// have looked at the other one.
func (k keyring) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := r.Header.Values("Authorization")
		if scheme, key, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && len(header) == 1 && strings.EqualFold(scheme, "Bearer") {
			if tenant, ok := k[sha256.Sum256([]byte(key))]; ok {
				r = r.WithContext(context.WithValue(r.Context(), callerKey{}, tenant))
			}
		}
		next.ServeHTTP(w, r)
	})
}

// tenantOfCaller is the claim: it comes from what was verified, never from what the request says.
func tenantOfCaller(ctx context.Context) (string, bool) {
	tenant, ok := ctx.Value(callerKey{}).(string)
	return tenant, ok
}
