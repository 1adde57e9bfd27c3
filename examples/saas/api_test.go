package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

// apart are two tenants of each isolation.
var apart = []string{"apart-row-1", "apart-row-2", "apart-schema-1", "apart-schema-2", "apart-database-1", "apart-database-2"}

func TestNoTenantReachesAnothersProjects(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	s.clear(t, apart...)

	// Each has one, and has read it, so that it is in the cache.
	own := make(map[string]Project)
	for _, tenant := range apart {
		r := s.as(t, tenant, "POST", "/projects", named("of "+tenant))
		require.Equal(t, http.StatusCreated, r.code, r.body)
		own[tenant] = r.project(t)
		require.Equal(t, "/projects/"+own[tenant].ID.String(), r.header.Get("Location"))
		require.Equal(t, own[tenant], s.as(t, tenant, "GET", r.header.Get("Location"), "").project(t))
		require.Equal(t, []Project{own[tenant]}, s.as(t, tenant, "GET", "/projects", "").list(t))
	}
	nobodys := "/projects/" + uuid.NewString()
	for _, tenant := range apart {
		for other, p := range own {
			if other == tenant {
				continue
			}
			path := "/projects/" + p.ID.String()
			for _, c := range [][2]string{{"GET", ""}, {"PUT", named("stolen")}, {"DELETE", ""}} {
				got, none := s.as(t, tenant, c[0], path, c[1]), s.as(t, tenant, c[0], nobodys, c[1])
				require.Equal(t, http.StatusNotFound, got.code)
				require.Equal(t, none.body, got.body, "another's project and nobody's are told alike")
			}
		}
		before := uuid.UUID{15: 1} // another key in the cache than the whole list's
		for _, path := range []string{"/projects", "/projects?after=" + before.String()} {
			require.Equal(t, []Project{own[tenant]}, s.as(t, tenant, "GET", path, "").list(t), tenant)
		}
	}
	var all sync.WaitGroup
	for _, tenant := range apart {
		all.Go(func() {
			r, err := s.send(t.Context(), tenant+"."+domain, tenant+"-key", "GET", "/report", "")
			if err != nil || strings.TrimSpace(r.body) != fmt.Sprintf(`{"projects":1,"longest_name":%d}`, len("of "+tenant)) {
				t.Errorf("%s's report is %v %s, %v", tenant, r.code, r.body, err)
			}
		})
	}
	all.Wait()
}

// The same ID, and so the same key in the cache, is each tenant's own.
func TestTheSameIDInEveryTenant(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	id := uuid.New()
	path := "/projects/" + id.String()
	all := []string{"same-row-1", "same-row-2", "same-schema", "same-database"}
	for _, tenant := range all {
		_, err := s.db.Exec(pgxtenant.WithTenantID(t.Context(), tenant),
			"insert into project (id, name, description) values ($1, $2, '')", id, "the same of "+tenant)
		require.NoError(t, err)
	}
	for range 2 { // from the database, then from the cache
		for _, tenant := range all {
			require.Equal(t, "the same of "+tenant, s.as(t, tenant, "GET", path, "").project(t).Name)
		}
	}
	for i, tenant := range all {
		require.Equal(t, http.StatusOK, s.as(t, tenant, "PUT", path, named("changed")).code)
		for j, other := range all {
			want := "the same of " + other
			if j == i {
				want = "changed"
			}
			if j < i {
				continue // it has been deleted
			}
			require.Equal(t, want, s.as(t, other, "GET", path, "").project(t).Name)
		}
		require.Equal(t, http.StatusNoContent, s.as(t, tenant, "DELETE", path, "").code)
		for _, method := range []string{"GET", "DELETE"} {
			require.Equal(t, http.StatusNotFound, s.as(t, tenant, method, path, "").code)
		}
	}
}

func TestWhoIsRefused(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	for _, c := range []struct {
		host, key string
		want      int
		problem   string
	}{
		{"acme.localhost", "acme-key", http.StatusOK, ""},
		{"api.localhost", "acme-key", http.StatusOK, ""},
		{"127.0.0.1", "acme-key", http.StatusOK, ""},
		{"acme.localhost", "", http.StatusUnauthorized, "unauthenticated"},
		{"api.localhost", "", http.StatusUnauthorized, "unauthenticated"},
		{"acme.localhost", "acme", http.StatusUnauthorized, "unauthenticated"},
		{"nobody.localhost", "", http.StatusUnauthorized, "unauthenticated"},
		{"globex.localhost", "acme-key", http.StatusForbidden, "forbidden"},
		{"nobody.localhost", "acme-key", http.StatusForbidden, "forbidden"}, // does not tell that there is none
		{"vandelay.localhost", "acme-key", http.StatusForbidden, "forbidden"},
		{"vandelay.localhost", "vandelay-key", http.StatusForbidden, "suspended"},
		{"api.localhost", "hooli-key", http.StatusNotFound, "unknown"},
		{"a..localhost", "acme-key", http.StatusBadRequest, "malformed"},
	} {
		for _, path := range []string{"/projects", "/projects/" + uuid.NewString(), "/debug/tenants", "/metrics"} {
			r, err := s.send(t.Context(), c.host, c.key, "GET", path, "")
			require.NoError(t, err)
			want := c.want
			if want == http.StatusOK && path != "/projects" {
				want = http.StatusNotFound // operators' pages are not here
			}
			require.Equal(t, want, r.code, "%+v %s: %s", c, path, r.body)
			if want >= 400 {
				require.Equal(t, "application/problem+json", r.header.Get("Content-Type"))
			}
			require.Contains(t, r.body, c.problem)
		}
	}
}

func TestTwoKeysAreNone(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	for _, keys := range [][]string{{"acme-key"}, {"acme-key", "globex-key"}, {"acme-key", "acme-key"}, {"", "acme-key"}} {
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+s.public+"/projects", nil)
		require.NoError(t, err)
		for _, key := range keys {
			r.Header.Add("Authorization", "Bearer "+key)
		}
		r.Host = "api." + domain
		answer, err := s.client.Do(r)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, len(keys) == 1, answer.StatusCode == http.StatusOK, keys)
	}
}

// Neither the cache nor a connection that is there already serves it then.
func TestASuspendedTenantIsRefusedFromTheNextRequestOn(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	path := s.as(t, "tardy", "POST", "/projects", named("a")).header.Get("Location")
	require.Equal(t, http.StatusOK, s.as(t, "tardy", "GET", path, "").code)
	require.NoError(t, s.db.Registry().Suspend(t.Context(), "tardy"))
	require.Equal(t, http.StatusForbidden, s.as(t, "tardy", "GET", path, "").code)
	require.NoError(t, s.db.Registry().Resume(t.Context(), "tardy"))
	require.Equal(t, http.StatusOK, s.as(t, "tardy", "GET", path, "").code)
}

func TestWhatClientsMaySend(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	mine := s.as(t, "valid", "POST", "/projects", `{"name":"Fahrplan 🚆","description":"first\nsecond"}`)
	require.Equal(t, http.StatusCreated, mine.code, mine.body)
	require.Equal(t, "Fahrplan 🚆", mine.project(t).Name)
	for _, c := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/projects", ``, http.StatusBadRequest},
		{"POST", "/projects", `[]`, http.StatusBadRequest},
		{"POST", "/projects", `{"name":"a"}{"name":"b"}`, http.StatusBadRequest},
		{"POST", "/projects", `{"name":"a","tenant_id":"globex"}`, http.StatusBadRequest},
		{"POST", "/projects", `{}`, http.StatusUnprocessableEntity},
		{"POST", "/projects", `{"name":" \t"}`, http.StatusUnprocessableEntity},
		{"POST", "/projects", `{"name":"a\u0000"}`, http.StatusUnprocessableEntity},
		{"POST", "/projects", `{"name":"a","description":"\u0000"}`, http.StatusUnprocessableEntity},
		{"POST", "/projects", named(strings.Repeat("ä", maxName+1)), http.StatusUnprocessableEntity},
		{"POST", "/projects", named(strings.Repeat("ä", maxName)), http.StatusCreated},
		{"POST", "/projects", named(strings.Repeat("a", maxBody)), http.StatusRequestEntityTooLarge},
		{"PUT", mine.header.Get("Location"), `{}`, http.StatusUnprocessableEntity},
		{"PUT", "/projects/1", named("a"), http.StatusNotFound},
		{"GET", "/projects/1", "", http.StatusNotFound},
		{"GET", "/projects/" + strings.ToUpper(mine.project(t).ID.String()), "", http.StatusOK},
		{"GET", "/projects?after=1", "", http.StatusBadRequest},
		{"DELETE", "/projects", "", http.StatusMethodNotAllowed},
		{"POST", mine.header.Get("Location"), named("a"), http.StatusMethodNotAllowed},
		{"GET", "/", "", http.StatusNotFound},
	} {
		r := s.as(t, "valid", c.method, c.path, c.body)
		require.Equal(t, c.want, r.code, "%s %s %.80s: %s", c.method, c.path, c.body, r.body)
		if c.want >= 400 {
			require.Equal(t, "application/problem+json", r.header.Get("Content-Type"))
		}
		require.Equal(t, c.want == http.StatusMethodNotAllowed, r.header.Get("Allow") != "")
	}
}

func TestWhatTheServerRefusesIsNoFailure(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	require.Equal(t, http.StatusOK, s.as(t, "frozen", "GET", "/projects", "").code)
	for _, c := range []struct {
		tenant, method, path, body string
		want                       int
		detail                     string
	}{
		{"frozen", "POST", "/projects", named("a"), http.StatusForbidden, "not changed"},
		{"hurried", "GET", "/report", "", http.StatusServiceUnavailable, "longer than"},
	} {
		r := s.as(t, c.tenant, c.method, c.path, c.body)
		require.Equal(t, c.want, r.code, r.body)
		require.Contains(t, r.body, c.detail)
	}
}

func TestAListComesInPages(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	ctx := pgxtenant.WithTenantID(t.Context(), "paged")
	_, err := s.db.Exec(ctx, "insert into project (id, name, description) select gen_random_uuid(), 'n' || i, '' from generate_series(1, $1) i", 2*pageSize)
	require.NoError(t, err)
	seen := make(map[uuid.UUID]bool)
	path, pages := "/projects?after="+uuid.Nil.String(), 0
	for path != "" {
		page := s.as(t, "paged", "GET", path, "").list(t)
		require.LessOrEqual(t, len(page), pageSize)
		path = ""
		for _, p := range page {
			require.False(t, seen[p.ID])
			seen[p.ID] = true
			path = "/projects?after=" + p.ID.String()
		}
		pages++
	}
	require.GreaterOrEqual(t, len(seen), 2*pageSize)
	require.GreaterOrEqual(t, pages, 3)
}

// What is cached is not what the database says, until a write comes through the API.
func TestAWriteIsReadAtOnce(t *testing.T) {
	t.Parallel()
	s := sharedService(t)
	s.clear(t, "fresh")
	behind := func(name string) {
		t.Helper()
		_, err := s.db.Exec(pgxtenant.WithTenantID(t.Context(), "fresh"), "update project set name = $1", name)
		require.NoError(t, err)
	}
	path := s.as(t, "fresh", "POST", "/projects", named("first")).header.Get("Location")
	names := func() (one, listed string) {
		t.Helper()
		return s.as(t, "fresh", "GET", path, "").project(t).Name, s.as(t, "fresh", "GET", "/projects", "").list(t)[0].Name
	}
	one, listed := names()
	require.Equal(t, []string{"first", "first"}, []string{one, listed})
	behind("behind its back")
	one, listed = names()
	require.Equal(t, []string{"first", "first"}, []string{one, listed}, "both come from the cache")

	for n := range 20 {
		want := fmt.Sprintf("change %d", n)
		require.Equal(t, want, s.as(t, "fresh", "PUT", path, named(want)).project(t).Name)
		one, listed = names()
		require.Equal(t, []string{want, want}, []string{one, listed})
	}
	second := s.as(t, "fresh", "POST", "/projects", named("second"))
	require.Len(t, s.as(t, "fresh", "GET", "/projects", "").list(t), 2)
	require.Equal(t, http.StatusNoContent, s.as(t, "fresh", "DELETE", path, "").code)
	require.Equal(t, http.StatusNotFound, s.as(t, "fresh", "GET", path, "").code)
	require.Equal(t, []Project{second.project(t)}, s.as(t, "fresh", "GET", "/projects", "").list(t))
}

func TestTheFreePlanEndsAtItsBurst(t *testing.T) {
	t.Parallel()
	server, err := redistest.Start(t.Context()) // which has seen no call yet
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := start(t, settings{redis: &redis.Options{Addr: server.Addr}, patience: time.Minute}, slog.DiscardHandler)
	begun := time.Now()
	r := s.as(t, "frugal", "GET", "/projects", "")
	passed := 0
	for ; r.code == http.StatusOK && passed < 100; passed++ {
		r = s.as(t, "frugal", "GET", "/projects", "")
	}
	require.Equal(t, http.StatusTooManyRequests, r.code, r.body)
	burst := callLimits()["free"].Rate.Burst
	require.GreaterOrEqual(t, passed, burst)
	require.LessOrEqual(t, passed, burst+1+int(time.Since(begun).Seconds()), "one more flows in each second")
	require.Equal(t, "application/problem+json", r.header.Get("Content-Type"))
	after, err := strconv.Atoi(r.header.Get("Retry-After"))
	require.NoError(t, err)
	require.Equal(t, 1, after)
	require.Equal(t, http.StatusOK, s.as(t, "thrifty", "GET", "/projects", "").code, "the limit is each tenant's own")

	time.Sleep(time.Duration(after) * time.Second)
	require.Equal(t, http.StatusOK, s.as(t, "frugal", "GET", "/projects", "").code, "Retry-After is true")
}
