//go:build unix

package redistest

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestAServerIsKilledPausedAndStartedAgain(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, err := Start(ctx, "--maxmemory", "2mb")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	_, err = s.do(ctx, "SET", "k", "v")
	require.NoError(t, err)
	value, err := s.do(ctx, "GET", "k")
	require.NoError(t, err)
	require.Equal(t, "v", value)
	_, err = s.do(ctx, "NONSENSE")
	require.ErrorContains(t, err, "unknown command")

	require.NoError(t, s.Pause())
	brief, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err = s.do(brief, "PING")
	require.Error(t, err, "it says nothing")
	require.NoError(t, s.Resume())
	_, err = s.do(ctx, "PING")
	require.NoError(t, err)

	s.Kill()
	s.Kill()
	_, err = s.do(ctx, "PING")
	require.Error(t, err)
	require.NoError(t, s.Restart())
	value, err = s.do(ctx, "GET", "k")
	require.NoError(t, err)
	require.Empty(t, value, "it is empty")

	require.NoError(t, s.Close())
	require.NoError(t, s.Close())
	require.NoDirExists(t, s.dir)
}

func TestACallerMayGiveUp(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Start(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

func TestABadSettingIsToldWithTheLog(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := Start(ctx, "--no-such-setting", "1")
	require.ErrorContains(t, err, "no-such-setting")
}

func TestAClusterIsOne(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	servers, err := StartCluster(ctx)
	require.NoError(t, err)
	moved := 0
	for _, s := range servers {
		if _, err := s.do(ctx, "SET", "k", "v"); err != nil {
			require.ErrorContains(t, err, "MOVED")
			moved++
		}
	}
	require.Equal(t, 2, moved, "one has the key's slot")
	for _, s := range servers {
		require.NoError(t, s.Close())
		_, err := os.Stat(s.dir)
		require.ErrorIs(t, err, os.ErrNotExist)
	}
}
