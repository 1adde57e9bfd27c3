package pgxtenant

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// A source is a place where a request may name its tenant.
type source struct {
	name string // for logs
	vary string // header that the answer depends on by it, if any

	// read returns the ID found, which need not be valid, or "" if there is none. An error that wraps
	// ErrTenantNotFound means a name which is nobody's.
	read func(m *middleware, r *http.Request) (id string, err error)
}

// ByHeader takes the tenant's ID from a request header, such as X-Tenant-ID. A header that is there but empty is
// malformed, and one that is there twice must say the same.
func ByHeader(name string) MiddlewareOption {
	key := http.CanonicalHeaderKey(name)
	return func(m *middleware) {
		if !validToken(name) || key == "Host" {
			m.problems = append(m.problems, fmt.Errorf("ByHeader is given %q; want the name of a header other than Host", clip(name)))
		}
		m.add("header "+key, key, func(_ *middleware, r *http.Request) (string, error) {
			values := r.Header[key]
			if len(values) == 0 {
				return "", nil
			}
			return same(values)
		})
	}
}

// ByCookie takes the tenant's ID from a cookie. One that is there twice must say the same. Sites of one parent
// domain can set each other's cookies, unless the name begins with __Host-.
func ByCookie(name string) MiddlewareOption {
	return func(m *middleware) {
		if !validToken(name) {
			m.problems = append(m.problems, fmt.Errorf("ByCookie is given %q; want a cookie's name", clip(name)))
		}
		m.add("cookie "+name, "Cookie", func(_ *middleware, r *http.Request) (string, error) {
			return cookie(r.Header["Cookie"], name)
		})
	}
}

// BySubdomain takes the tenant's ID from the one label in front of any of these domains, in lower case: for
// example.com, acme.example.com is acme's. The domain itself, a.b.example.com, reserved labels and other hosts
// are nobody's. A domain outside ASCII is given as Punycode.
func BySubdomain(domains ...string) MiddlewareOption {
	return func(m *middleware) {
		if len(domains) == 0 {
			m.problems = append(m.problems, errors.New("BySubdomain is given no domain"))
		}
		for _, d := range domains {
			base, err := normalHost(d)
			if err != nil || base == "" {
				m.problems = append(m.problems, fmt.Errorf("BySubdomain is given %q; want a domain such as example.com, in Punycode if need be", clip(d)))
			}
			m.bases = append(m.bases, base)
		}
		m.add("host", "", (*middleware).subdomain)
	}
}

// ByDomain takes the tenant by the whole host name, which is an alias of the tenant's in the directory: an
// [AliasDirectory] is needed. Hosts that belong to BySubdomain, or are reserved, are not looked up, so that no
// tenant can take another's address for an alias.
func ByDomain() MiddlewareOption {
	return func(m *middleware) {
		m.domains = true
		m.add("domain", "", func(m *middleware, r *http.Request) (string, error) {
			host, err := m.host(r)
			if err != nil || host == "" || m.reserved[host] {
				return "", err
			}
			if base, _ := m.base(host); base != "" {
				return "", nil
			}
			return m.gate.byAlias(r.Context(), host)
		})
	}
}

// ByPath takes the tenant's ID from the segment of the path that follows prefix: for "/t/", /t/acme/invoices is
// acme's. Escapes in it are malformed. The path is passed on as it is.
func ByPath(prefix string) MiddlewareOption {
	return func(m *middleware) {
		if !strings.HasPrefix(prefix, "/") || !strings.HasSuffix(prefix, "/") {
			m.problems = append(m.problems, fmt.Errorf("ByPath is given %q; want a prefix that begins and ends with a slash", clip(prefix)))
		}
		m.add("path", "", func(m *middleware, r *http.Request) (string, error) {
			rest, ok := strings.CutPrefix(r.URL.Path, prefix)
			if !ok {
				return "", nil
			}
			id, _, _ := strings.Cut(rest, "/")
			if raw := r.URL.RawPath; raw != "" && raw != prefix+id && !strings.HasPrefix(raw, prefix+id+"/") {
				// A router that goes by the raw path would see another segment.
				return "", fmt.Errorf("%w: %q is escaped in the path", ErrInvalidTenantID, clip(id))
			}
			if m.reserved[strings.ToLower(id)] {
				return "", nil
			}
			return id, nil
		})
	}
}

// By takes the tenant's ID from where f finds it. "" means that the request does not name a tenant there. An
// error that wraps ErrTenantNotFound means that the name found is nobody's; one that wraps ErrInvalidTenantID that
// it cannot be anybody's; any other is answered with 503 if it wraps ErrUnreachable, and else with 500. f is
// called for several requests at once. Add to the answer's Vary header what f goes by.
func By(f func(r *http.Request) (tenantID string, err error)) MiddlewareOption {
	return func(m *middleware) {
		if f == nil {
			m.problems = append(m.problems, errors.New("By is given nil"))
		}
		m.add("function", "", func(_ *middleware, r *http.Request) (string, error) { return f(r) })
	}
}

func (m *middleware) add(name, vary string, read func(*middleware, *http.Request) (string, error)) {
	m.sources = append(m.sources, source{name, vary, read})
}

// subdomain reads the tenant's ID from the host.
func (m *middleware) subdomain(r *http.Request) (string, error) {
	host, err := m.host(r)
	if err != nil || host == "" {
		return "", err
	}
	base, label := m.base(host)
	if base == "" || m.reserved[label] || strings.Contains(label, ".") {
		return "", nil
	}
	return label, nil
}

// base returns the longest of the domains of BySubdomain that host belongs to, and what is in front of it,
// which is empty for the domain itself.
func (m *middleware) base(host string) (base, front string) {
	for _, b := range m.bases {
		front, ok := strings.CutSuffix(host, b)
		if ok && front == "" {
			return b, ""
		}
		if ok && front[len(front)-1] == '.' {
			return b, front[:len(front)-1]
		}
	}
	return "", ""
}

// setVary says which headers the answer depends on by way of the tenant, lest a shared cache give one tenant's
// page to another.
func (m *middleware) setVary() {
	var names []string
	for _, s := range m.sources {
		if s.vary != "" && !slices.Contains(names, s.vary) {
			names = append(names, s.vary)
		}
	}
	if len(m.proxies) > 0 {
		names = append(names, forwardedHost)
	}
	if names != nil {
		m.vary = []string{strings.Join(names, ", ")}
	}
}

// cookie returns the value of the cookie with the given name, or "" if there is none. net/http's own parser makes
// several allocations, and takes a malformed cookie for none.
func cookie(lines []string, name string) (value string, err error) {
	found := false
	for _, line := range lines {
		for line != "" {
			var pair string
			pair, line, _ = strings.Cut(line, ";")
			n, v, _ := strings.Cut(strings.TrimSpace(pair), "=")
			if n != name {
				continue
			}
			if found && v != value {
				return "", fmt.Errorf("%w: %q and %q", ErrAmbiguousTenant, clip(value), clip(v))
			}
			value, found = v, true
		}
	}
	if found && value == "" {
		return "", errEmpty
	}
	return value, nil
}

var errEmpty = ValidateID("")

// same returns the one value that all values are.
func same(values []string) (string, error) {
	for _, v := range values[1:] {
		if v != values[0] {
			return "", fmt.Errorf("%w: %q and %q", ErrAmbiguousTenant, clip(values[0]), clip(v))
		}
	}
	if values[0] == "" {
		return "", errEmpty
	}
	return values[0], nil
}

// validToken reports whether s can name a header or a cookie.
func validToken(s string) bool {
	for i := range len(s) {
		if c := s[i]; !alphanumeric(c) && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return s != ""
}
