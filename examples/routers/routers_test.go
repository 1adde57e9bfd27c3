package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// Every router serves each tenant its own notes, over HTTP and from a real database, and refuses alike.
func TestEveryRouterKeepsTenantsApart(t *testing.T) {
	t.Parallel()
	for name, router := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := pgtest.New(t)
			d.RLSTable("note")
			s, err := openService(t.Context(), d.AppURL(), d.OwnerURL())
			require.NoError(t, err)
			t.Cleanup(s.db.Close)
			server := httptest.NewServer(router(s))
			t.Cleanup(server.Close)

			ask := func(method, host, tenant, token, body string) (int, string) {
				t.Helper()
				r, err := http.NewRequest(method, server.URL+"/notes", strings.NewReader(url.Values{"body": {body}}.Encode()))
				require.NoError(t, err)
				r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
				if host != "" {
					r.Host = host
				}
				if tenant != "" {
					r.Header.Set("X-Tenant-ID", tenant)
				}
				if token != "" {
					r.Header.Set("Authorization", "Bearer "+token)
				}
				res, err := server.Client().Do(r)
				require.NoError(t, err)
				defer res.Body.Close()
				said, err := io.ReadAll(res.Body)
				require.NoError(t, err)
				if res.StatusCode >= 400 {
					require.Equal(t, "application/problem+json", res.Header.Get("Content-Type"))
				}
				return res.StatusCode, strings.TrimSpace(string(said))
			}
			for _, id := range []string{"acme", "globex"} {
				code, _ := ask("POST", id+".example.com", "", id+"-token", "of "+id)
				require.Equal(t, http.StatusCreated, code)
			}
			for _, id := range []string{"acme", "globex"} {
				for _, c := range [][2]string{{id + ".example.com", ""}, {"notes." + id + ".test", ""}, {"", id}, {"", ""}} {
					code, said := ask("GET", c[0], c[1], id+"-token", "")
					require.Equal(t, http.StatusOK, code)
					require.JSONEq(t, `["of `+id+`"]`, said)
				}
			}
			for _, c := range []struct {
				want                int
				host, tenant, token string
			}{
				{http.StatusUnauthorized, "acme.example.com", "", ""},
				{http.StatusUnauthorized, "", "", ""},
				{http.StatusForbidden, "globex.example.com", "", "acme-token"},
				{http.StatusForbidden, "", "globex", "acme-token"},
				{http.StatusBadRequest, "acme.example.com", "globex", "acme-token"},
				{http.StatusBadRequest, "", "*", "acme-token"},
			} {
				for _, method := range []string{"GET", "POST"} {
					code, said := ask(method, c.host, c.tenant, c.token, "intruder")
					require.Equal(t, c.want, code, "%v: %s", c, said)
					require.True(t, json.Valid([]byte(said)), "nothing after the problem: %s", said)
				}
			}
			require.NoError(t, s.db.Registry().Suspend(t.Context(), "acme"))
			code, _ := ask("GET", "acme.example.com", "", "acme-token", "")
			require.Equal(t, http.StatusForbidden, code)
			_, said := ask("GET", "globex.example.com", "", "globex-token", "")
			require.JSONEq(t, `["of globex"]`, said, "no refused request has left a note")

			res, err := server.Client().Get(server.URL + "/healthz")
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			require.Equal(t, http.StatusOK, res.StatusCode, "without a tenant")
		})
	}
}
