package tenantcache

import "encoding/json"

// A Codec turns values into bytes and back. It must be safe for concurrent use.
type Codec[V any] interface {
	Encode(value V) ([]byte, error)

	// Decode must neither keep nor change data, which others may be reading too.
	Decode(data []byte) (V, error)
}

// JSON is the codec of encoding/json: what it does not write, such as unexported fields, is not cached.
type JSON[V any] struct{}

// Encode implements Codec.
func (JSON[V]) Encode(value V) ([]byte, error) { return json.Marshal(value) }

// Decode implements Codec.
func (JSON[V]) Decode(data []byte) (value V, err error) {
	err = json.Unmarshal(data, &value)
	return value, err
}
