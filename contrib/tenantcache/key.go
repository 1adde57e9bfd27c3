package tenantcache

import (
	"strconv"
	"strings"
)

// layout is how entries are named in Redis. No two of them share a name, whatever their tenants, namespaces and keys
// hold: the tenant ends with a byte that no ID has, the namespace has its length before it, and the key comes last.
//
//	prefix{}acme:e7:invoice:42    an entry
//	prefix{}acme:t                the tenant's generation
//	prefix{}acme:n:invoice        the namespace's
//
// With one slot per tenant it is prefix{acme}:e7:invoice:42 and so on. An empty pair of braces makes Redis Cluster, and
// go-redis, take the whole name for the slot: otherwise braces in a key would choose it.
type layout struct {
	prefix  string
	oneSlot bool
}

func (l layout) tenant(id string) string {
	if l.oneSlot {
		return l.prefix + "{" + id + "}:"
	}
	return l.prefix + "{}" + id + ":"
}

func (l layout) tenantGeneration(tenant string) string { return l.tenant(tenant) + "t" }

func (l layout) namespaceGeneration(tenant, namespace string) string {
	return l.tenant(tenant) + "n:" + namespace
}

func (l layout) entry(e *entry) string {
	return l.tenant(e.tenant.ID) + "e" + strconv.Itoa(len(e.namespace)) + ":" + e.namespace + ":" + e.key
}

// parse is the reverse of entry, and false for all names that it does not make.
func (l layout) parse(name string) (e entry, ok bool) {
	rest, ok := strings.CutPrefix(name, l.prefix+"{")
	if !ok {
		return e, false
	}
	if l.oneSlot {
		e.tenant.ID, rest, ok = strings.Cut(rest, "}:")
	} else if rest, ok = strings.CutPrefix(rest, "}"); ok {
		e.tenant.ID, rest, ok = strings.Cut(rest, ":")
	}
	if !ok {
		return e, false
	}
	digits, rest, ok := strings.Cut(rest, ":")
	n, err := strconv.Atoi(strings.TrimPrefix(digits, "e"))
	if !ok || err != nil || n < 0 || n >= len(rest) || rest[n] != ':' {
		return e, false
	}
	e.namespace, e.key = rest[:n], rest[n+1:]
	return e, l.entry(&e) == name
}
