package pgxtenant

import (
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// What a checkout touches stays in as few cache lines as the comments say. An object begins with one if its size is a
// multiple of theirs.
func TestCheckoutsTouchFewCacheLines(t *testing.T) {
	t.Parallel()
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("laid out for 64 bits")
	}
	const line = 64
	var p isolatedPool
	require.Zero(t, unsafe.Sizeof(p)%line)
	require.LessOrEqual(t, int(unsafe.Offsetof(p.ready)), line)
	var b binding
	require.Zero(t, unsafe.Sizeof(b)%line)
	require.LessOrEqual(t, unsafe.Offsetof(b.tenant)+unsafe.Offsetof(b.tenant.ID)+unsafe.Sizeof(b.tenant.ID), uintptr(line))
	var w wireConn
	begin := unsafe.Offsetof(w.permit) + unsafe.Offsetof(w.permit.gate)
	end := unsafe.Offsetof(w.meter) + unsafe.Offsetof(w.meter.running) + 1
	require.Equal(t, uintptr(line), begin)
	require.LessOrEqual(t, end-begin, uintptr(2*line))
}
