package pgxtenant

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
)

// forwardedHost is what a reverse proxy tells the name in that its client asked for.
const forwardedHost = "X-Forwarded-Host"

// host returns the host name that the request was made to, in the form of normalHost.
func (m *middleware) host(r *http.Request) (string, error) {
	if len(m.proxies) == 0 {
		return normalHost(r.Host)
	}
	values := r.Header[forwardedHost]
	if len(values) == 0 || !m.fromProxy(r.RemoteAddr) {
		return normalHost(r.Host)
	}
	// Each proxy of a chain appends to the list. That all say the same is the one case without a doubt.
	host, first := "", true
	for _, v := range values {
		for part := range strings.SplitSeq(v, ",") {
			h, err := normalHost(strings.TrimSpace(part))
			switch {
			case err != nil:
				return "", err
			case !first && h != host:
				return "", fmt.Errorf("%w, in "+forwardedHost, ErrAmbiguousTenant)
			}
			host, first = h, false
		}
	}
	return host, nil
}

// fromProxy reports whether a request came over a connection from a trusted proxy.
func (m *middleware) fromProxy(remote string) bool {
	at, err := netip.ParseAddrPort(remote)
	if err != nil {
		return false
	}
	addr := at.Addr().Unmap().WithZone("")
	for _, p := range m.proxies {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// normalHost returns the name in a Host header: without port and final dot, in lower case. It returns ""
// where there is none: the header is missing or empty, or has an IPv6 literal. Anything that no host could be
// called by is an error; names outside ASCII are, since on the wire they are Punycode.
func normalHost(header string) (string, error) {
	if header == "" {
		return "", nil
	}
	name := header
	if name[0] == '[' {
		literal, port, closed := strings.Cut(name[1:], "]")
		if addr, err := netip.ParseAddr(literal); err != nil || !closed || !addr.Is6() || port != "" && !validPort(port) {
			return "", malformedHost(header)
		}
		return "", nil
	}
	if i := strings.IndexByte(name, ':'); i >= 0 {
		if !validPort(name[i:]) {
			return "", malformedHost(header)
		}
		name = name[:i]
	}
	name = strings.TrimSuffix(name, ".")
	upper, ok := validHostName(name)
	if !ok {
		return "", malformedHost(header)
	}
	if upper {
		name = strings.ToLower(name)
	}
	return name, nil
}

// validHostName reports whether name is a series of labels, and whether there is upper case in it. An
// underscore inside a label is taken, since browsers take it and IDs may have one.
func validHostName(name string) (upper, ok bool) {
	if len(name) < 1 || len(name) > 253 {
		return false, false
	}
	start := 0 // of the label
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if n := i - start; n < 1 || n > 63 || !alphanumeric(name[start]) || !alphanumeric(name[i-1]) {
				return false, false
			}
			start = i + 1
			continue
		}
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			upper = true
		} else if !alphanumeric(c) && c != '-' && c != '_' {
			return false, false
		}
	}
	return upper, true
}

func alphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || 'A' <= c && c <= 'Z'
}

// validPort reports whether s is a colon and a port, which may be missing.
func validPort(s string) bool {
	if s[0] != ':' || len(s) > len(":65535") {
		return false
	}
	for i := 1; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

func malformedHost(header string) error {
	return fmt.Errorf("%w: the host %q is malformed", ErrInvalidTenantID, clip(header))
}
