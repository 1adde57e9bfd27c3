package tenantcache

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgxtenant/pgxtenant"
)

// No two entries share a name in Redis, nor a stamp with any other generations, and a name says whose it is.
func FuzzKey(f *testing.F) {
	f.Add("a", "b", "c", "g1", "g2", "a", "b", "c", "g1", "g3")
	f.Add("a", "b:c", "d", "", "", "a", "b", "c:d", "", "")
	f.Add("a", "1:b", "", "g", "", "a", "", "1:b", "", "g")
	f.Add("a", "*", "[a]?", "g", "g", "b", "🐘", "\x00{}", "g", "g")
	f.Add("a", "", "", "", "", "a", ":", "", "", "")
	f.Fuzz(func(t *testing.T, tenant1, namespace1, key1, tg1, ng1, tenant2, namespace2, key2, tg2, ng2 string) {
		if pgxtenant.ValidateID(tenant1) != nil || pgxtenant.ValidateID(tenant2) != nil {
			t.Skip("not a tenant's ID, and refused before")
		}
		e1 := entry{pgxtenant.Tenant{ID: tenant1}, namespace1, key1}
		e2 := entry{pgxtenant.Tenant{ID: tenant2}, namespace2, key2}
		g1, g2 := generations{tg1, ng1, true}, generations{tg2, ng2, true}
		same := tenant1 == tenant2 && namespace1 == namespace2 && key1 == key2
		require.Equal(t, same && g1 == g2, e1.stamp(g1) == e2.stamp(g2))
		for _, l := range []layout{{"p", false}, {"p", true}, {"a:e1:", false}, {"", true}} {
			require.Equal(t, same, l.entry(&e1) == l.entry(&e2))
			names := map[string]bool{l.entry(&e1): true, l.tenantGeneration(tenant1): true, l.namespaceGeneration(tenant1, namespace1): true}
			require.Len(t, names, 3)
			require.NotContains(t, names, l.tenantGeneration(tenant2)+"x")
			if !same {
				require.NotContains(t, names, l.entry(&e2))
			}
			if tenant1 != tenant2 {
				require.NotContains(t, names, l.tenantGeneration(tenant2))
				require.NotContains(t, names, l.namespaceGeneration(tenant2, namespace2))
			}
			parsed, ok := l.parse(l.entry(&e1))
			require.True(t, ok)
			require.Equal(t, e1, parsed)
			if p, ok := l.parse(key2); ok { // anything
				require.Equal(t, key2, l.entry(&p))
			}
			for _, generation := range []string{l.tenantGeneration(tenant1), l.namespaceGeneration(tenant1, namespace1)} {
				_, ok := l.parse(generation)
				require.False(t, ok, generation)
			}
		}
	})
}
