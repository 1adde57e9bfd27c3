package freeport

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPortsStayBelowTheEphemeralRange(t *testing.T) {
	t.Parallel()
	for range 100 {
		port, err := Pick()
		require.NoError(t, err)
		require.True(t, port >= 20000 && port < 32000, port)
	}
}
