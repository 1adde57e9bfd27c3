package tenantcache

import (
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"time"

	"github.com/pgxtenant/pgxtenant"
)

// entry says whose value is meant, and which.
type entry struct {
	tenant         pgxtenant.Tenant
	namespace, key string
}

// generations are what an entry must have been written under to be valid. They are random, never counted: one
// that Redis evicted or lost comes back as another, so what was written before stays invalid. The store may
// have none yet, of a tenant without entries.
type generations struct {
	tenant, namespace string
	known             bool
}

func newGeneration() string {
	return string(binary.BigEndian.AppendUint64(nil, rand.Uint64()))
}

// What a stored entry looks like: kind (1 byte), stamp (16), nonce (8), end in Unix milliseconds (8), payload.
// The head tells two writes of an entry apart, even if all else is the same.
const (
	headLen   = 1 + stampLen + 8
	headerLen = headLen + 8
	stampLen  = 16

	kindValue   = 'v'
	kindError   = 'e' // a remembered error; the payload is its text
	kindDeleted = 'd' // holds the place for a while, so that a load that began before does not take it
)

// stamp proves that a stored entry is this tenant's, namespace's and key's, and of these generations. The
// store's key says so too; but a reply that a broken connection gave to the wrong request would say so of another.
func (e *entry) stamp(g generations) (stamp [stampLen]byte) {
	var room [256]byte
	text := room[:0]
	for _, part := range [...]string{g.tenant, g.namespace, e.tenant.ID, e.namespace, e.key} {
		text = binary.AppendUvarint(text, uint64(len(part)))
		text = append(text, part...)
	}
	sum := sha256.Sum256(text)
	return [stampLen]byte(sum[:])
}

// seal makes what the store keeps.
func (e *entry) seal(g generations, kind byte, payload []byte, ttl time.Duration) []byte {
	stamp := e.stamp(g)
	raw := make([]byte, 0, headerLen+len(payload))
	raw = append(raw, kind)
	raw = append(raw, stamp[:]...)
	raw = binary.BigEndian.AppendUint64(raw, rand.Uint64())
	raw = binary.BigEndian.AppendUint64(raw, uint64(time.Now().Add(ttl).UnixMilli()))
	return append(raw, payload...)
}

// tombstone is what is left in the place of a deleted entry.
func tombstone() []byte {
	raw := make([]byte, 1+stampLen, headLen)
	raw[0] = kindDeleted
	return binary.BigEndian.AppendUint64(raw, rand.Uint64())
}

// found is what the store has of an entry.
type found struct {
	generations
	raw []byte // nil if there is none
}

// head is what must still be there when a loaded value is stored. Empty means nothing.
func (f *found) head() string { return string(f.raw[:min(len(f.raw), headLen)]) }

// open returns what was sealed, if it is e's and of the present generations.
func (f *found) open(e *entry) (kind byte, payload []byte, ok bool) {
	if !f.known || len(f.raw) < headerLen || f.raw[0] == kindDeleted {
		return 0, nil, false
	}
	stamp := e.stamp(f.generations)
	if string(stamp[:]) != string(f.raw[1:1+stampLen]) {
		return 0, nil, false
	}
	return f.raw[0], f.raw[headerLen:], true
}

// left is how long an entry that opens is still kept, by this machine's clock.
func (f *found) left() time.Duration {
	end := time.UnixMilli(int64(binary.BigEndian.Uint64(f.raw[headLen:headerLen])))
	return time.Until(end)
}
