package pgtest

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// echo listens, and serves each connection with handle.
func echo(t *testing.T, handle func(net.Conn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				handle(conn)
			}()
		}
	}()
	return l.Addr().String()
}

func copyBack(conn net.Conn) { _, _ = io.Copy(conn, conn) }

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func roundTrip(t *testing.T, conn net.Conn) time.Duration {
	t.Helper()
	start := time.Now()
	_, err := conn.Write([]byte("ping"))
	require.NoError(t, err)
	_, err = io.ReadFull(conn, make([]byte, 4))
	require.NoError(t, err)
	return time.Since(start)
}

func TestProxyDelaysByTheMillisecond(t *testing.T) {
	p := NewProxy(t, echo(t, copyBack))
	conn := dial(t, p.Addr())
	// The fastest of many tells what the proxy adds, the others how busy the machine is.
	fastest := func(enough time.Duration) time.Duration {
		best := time.Hour
		begun := time.Now()
		for n := 0; n < 100 || best >= enough && time.Since(begun) < time.Minute; n++ {
			best = min(best, roundTrip(t, conn))
		}
		return best
	}
	floor := fastest(time.Hour)
	for _, oneWay := range []time.Duration{500 * time.Microsecond, time.Millisecond, 5 * time.Millisecond} {
		p.SetDelay(oneWay)
		got := fastest(2*oneWay + time.Millisecond)
		t.Logf("2 x %v: %v (without: %v)", oneWay, got, floor)
		require.GreaterOrEqual(t, got, 2*oneWay)
		require.Less(t, got, 2*oneWay+time.Millisecond)
	}
}

func TestProxyKeepsOrderAndThroughput(t *testing.T) {
	sent := make([]byte, 32<<20)
	_, _ = rand.Read(sent)
	p := NewProxy(t, echo(t, copyBack))
	transfer := func() time.Duration {
		conn := dial(t, p.Addr())
		before, start := p.Stats(), time.Now()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			_, _ = conn.Write(sent)
			_ = conn.(*net.TCPConn).CloseWrite()
		})
		got, err := io.ReadAll(conn) // the end is passed on too, in both directions
		took := time.Since(start)
		require.NoError(t, err)
		require.True(t, bytes.Equal(sent, got))
		require.EqualValues(t, len(sent), p.Stats().BytesUp-before.BytesUp)
		require.EqualValues(t, len(sent), p.Stats().BytesDown-before.BytesDown)
		return took
	}
	without := transfer()
	p.SetDelay(50 * time.Millisecond)
	with := transfer()
	t.Logf("%v, with 2 x 50ms: %v", without, with)
	require.Less(t, with, 30*time.Second) // one read after the other would take 500 x 100 ms
}

func TestProxyCountsRoundTrips(t *testing.T) {
	t.Parallel()
	db := New(t)
	p := NewProxy(t, db.Server().Addr())
	via := db.Via(p.Addr())
	conn := via.Connect(via.AppURL())
	require.Equal(t, 1, scan[int](t, conn, "select 1"))
	before := p.Stats()
	const n = 10
	for range n {
		require.Equal(t, 1, scan[int](t, conn, "select 1")) // prepared by now
	}
	after := p.Stats()
	require.EqualValues(t, n, after.RoundTrips-before.RoundTrips)
	require.EqualValues(t, n, after.Writes-before.Writes)
	require.EqualValues(t, 1, after.Conns)
	require.Positive(t, after.BytesUp-before.BytesUp)
	require.Positive(t, after.BytesDown-before.BytesDown)
}

func TestProxyStallHoldsEverythingBack(t *testing.T) {
	t.Parallel()
	received := make(chan []byte, 10)
	p := NewProxy(t, echo(t, func(conn net.Conn) {
		for {
			buf := make([]byte, 4)
			if _, err := io.ReadFull(conn, buf); err != nil {
				return
			}
			received <- buf
			_, _ = conn.Write(buf)
		}
	}))
	conn := dial(t, p.Addr())
	roundTrip(t, conn)
	<-received

	requireSilence := func() {
		t.Helper()
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
		_, err := conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded, "open, and silent")
		require.NoError(t, conn.SetReadDeadline(time.Time{}))
	}
	p.Stall()
	_, err := conn.Write([]byte("ping"))
	require.NoError(t, err)
	requireSilence()
	require.Empty(t, received)
	p.Resume()
	_, err = io.ReadFull(conn, make([]byte, 4))
	require.NoError(t, err)
	<-received

	p.StallReplies()
	_, err = conn.Write([]byte("ping"))
	require.NoError(t, err)
	<-received
	requireSilence()
	p.Resume()
	_, err = io.ReadFull(conn, make([]byte, 4))
	require.NoError(t, err)
}

func TestProxyCutResetsAndStillAccepts(t *testing.T) {
	t.Parallel()
	p := NewProxy(t, echo(t, copyBack))
	conn := dial(t, p.Addr())
	roundTrip(t, conn)
	p.Stall() // a stalled connection is cut as well
	p.Cut()
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	p.Resume()
	roundTrip(t, dial(t, p.Addr()))
}

func TestProxyLeavesNoGoroutine(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p, err := StartProxy(l.Addr().String())
	require.NoError(t, err)
	p.SetDelay(10 * time.Millisecond)
	conn := dial(t, p.Addr())
	server, err := l.Accept()
	require.NoError(t, err)
	_, err = conn.Write(make([]byte, 1<<20)) // nobody reads it
	require.NoError(t, err)
	p.Stall()
	p.Close()
	p.Close()
	goleak.VerifyNone(t, ignore)
	require.NoError(t, server.Close())
	_, err = net.Dial("tcp", p.Addr())
	require.True(t, errors.Is(err, syscall.ECONNREFUSED), err)
	require.NoError(t, l.Close())
}

func TestProxyWithoutServerClosesTheClient(t *testing.T) {
	t.Parallel()
	p := NewProxy(t, "127.0.0.1:1")
	_, err := dial(t, p.Addr()).Read(make([]byte, 1))
	require.Error(t, err)
}
