package pgtest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Proxy stands between clients and a server, over TCP on the loopback: it delays,
// counts, holds back and cuts. It needs no test, so benchmarks and programs may use
// it too. Its methods are safe for concurrent use.
type Proxy struct {
	listener net.Listener
	upstream string

	delay                     atomic.Int64 // one way, in nanoseconds
	conns, writes, roundTrips atomic.Int64
	up, down                  atomic.Int64 // bytes

	wg sync.WaitGroup // accept, and each connection's goroutines

	// mu guards what follows. Nothing blocks under it.
	mu      sync.Mutex
	open    map[*proxyConn]struct{}
	stalled [2]bool // by direction
	resumed *sync.Cond
	closed  bool
}

// ProxyStats counts what has passed a Proxy since it was started.
type ProxyStats struct {
	Conns      int64 // connections accepted
	BytesUp    int64 // client to server
	BytesDown  int64 // server to client
	Writes     int64 // times that the client's bytes were read: at most its writes
	RoundTrips int64 // times that the client spoke first or after the server did
}

// The directions of a connection.
const (
	up = iota
	down
)

// NewProxy starts a Proxy in front of the server at upstream, host and port, and
// closes it after the test.
func NewProxy(t testing.TB, upstream string) *Proxy {
	t.Helper()
	p, err := StartProxy(upstream)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// StartProxy starts a Proxy in front of the server at upstream, host and port.
func StartProxy(upstream string) (*Proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("pgtest: proxy: %w", err)
	}
	p := &Proxy{listener: listener, upstream: upstream, open: map[*proxyConn]struct{}{}}
	p.resumed = sync.NewCond(&p.mu)
	p.wg.Go(p.accept)
	return p, nil
}

// Addr is the host and port where clients connect.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// SetDelay makes every byte that arrives from now on take d longer, in each
// direction: a round trip takes 2d longer. It does not bound the throughput.
func (p *Proxy) SetDelay(d time.Duration) { p.delay.Store(int64(d)) }

// Stats returns the counts so far.
func (p *Proxy) Stats() ProxyStats {
	return ProxyStats{
		Conns:      p.conns.Load(),
		BytesUp:    p.up.Load(),
		BytesDown:  p.down.Load(),
		Writes:     p.writes.Load(),
		RoundTrips: p.roundTrips.Load(),
	}
}

// Stall holds back every byte in both directions, as a network does that lost its
// way: connections stay open and say nothing. What was held passes after Resume.
func (p *Proxy) Stall() { p.stall(true, true) }

// StallReplies holds back the server's bytes only: it still gets, and carries out,
// what clients send.
func (p *Proxy) StallReplies() { p.stall(false, true) }

// Resume ends Stall and StallReplies.
func (p *Proxy) Resume() { p.stall(false, false) }

// Cut breaks every open connection with a reset. New ones are still accepted.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		c.abortLocked()
	}
}

// Close breaks every connection, refuses new ones, and waits until all is gone.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	for c := range p.open {
		c.abortLocked()
	}
	p.mu.Unlock()
	_ = p.listener.Close()
	p.wg.Wait()
}

func (p *Proxy) stall(toServer, toClient bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stalled = [2]bool{up: toServer, down: toClient}
	p.resumed.Broadcast()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		p.conns.Add(1)
		p.wg.Go(func() { p.serve(client) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	c := &proxyConn{proxy: p, client: client}
	if !p.add(c) {
		return
	}
	defer p.remove(c)
	server, err := net.DialTimeout("tcp", p.upstream, 10*time.Second)
	if err != nil {
		return
	}
	if !c.setServer(server) {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { c.pass(up, server, client) })
	wg.Go(func() { c.pass(down, client, server) })
	wg.Wait()
}

// add registers a connection for Cut and Close, which must find every one.
func (p *Proxy) add(c *proxyConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.abortLocked()
		return false
	}
	p.open[c] = struct{}{}
	return true
}

func (p *Proxy) remove(c *proxyConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, c)
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
}

// proxyConn is a client's connection and its own to the server.
type proxyConn struct {
	proxy    *Proxy
	client   net.Conn
	answered atomic.Bool // the server spoke last

	server  net.Conn // guarded by proxy.mu
	aborted bool     // guarded by proxy.mu
}

func (c *proxyConn) setServer(server net.Conn) bool {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	c.server = server
	c.answered.Store(true)
	return !c.aborted
}

func (c *proxyConn) abort() {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	c.abortLocked()
}

func (c *proxyConn) abortLocked() {
	c.aborted = true
	for _, conn := range []net.Conn{c.client, c.server} {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // a reset, not an orderly end
			_ = tcp.Close()
		}
	}
	c.proxy.resumed.Broadcast()
}

// pass moves one direction's bytes until it ends or breaks.
func (c *proxyConn) pass(direction int, to, from net.Conn) {
	q := newDelayQueue()
	var wg sync.WaitGroup
	wg.Go(func() { c.deliver(direction, to, q) })
	defer wg.Wait()
	defer q.end()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			c.count(direction, n)
			due := time.Now().Add(time.Duration(c.proxy.delay.Load()))
			if !q.push(chunk{bytes.Clone(buf[:n]), due}) {
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				c.abort()
			}
			return
		}
	}
}

func (c *proxyConn) count(direction, n int) {
	if direction == down {
		c.proxy.down.Add(int64(n))
		c.answered.Store(true)
		return
	}
	c.proxy.up.Add(int64(n))
	c.proxy.writes.Add(1)
	if c.answered.Swap(false) {
		c.proxy.roundTrips.Add(1)
	}
}

// deliver writes what the queue holds, each chunk when it is due, and at the end
// passes the end on.
func (c *proxyConn) deliver(direction int, to net.Conn, q *delayQueue) {
	for chunks := q.take(); len(chunks) > 0; chunks = q.take() {
		for len(chunks) > 0 {
			if d := time.Until(chunks[0].due); d > 0 {
				sleep(d)
			}
			if !c.waitResumed(direction) {
				q.discard()
				return
			}
			// All that is due in one call, or a fast sender would be slowed down.
			var due net.Buffers
			for now := time.Now(); len(chunks) > 0 && !chunks[0].due.After(now); chunks = chunks[1:] {
				due = append(due, chunks[0].bytes)
			}
			if _, err := due.WriteTo(to); err != nil {
				q.discard()
				c.abort()
				return
			}
		}
	}
	if c.waitResumed(direction) {
		_ = to.(*net.TCPConn).CloseWrite()
	}
}

// waitResumed waits while the direction is stalled, and reports whether the
// connection is still there.
func (c *proxyConn) waitResumed(direction int) bool {
	p := c.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.stalled[direction] && !c.aborted {
		p.resumed.Wait()
	}
	return !c.aborted
}

// chunk is some bytes and when they are to be written.
type chunk struct {
	bytes []byte
	due   time.Time
}

// delayQueue holds the chunks under way in one direction, in order: the line
// between two ends, and as much as fits in it.
type delayQueue struct {
	mu      sync.Mutex
	changed *sync.Cond
	chunks  []chunk
	size    int // bytes in chunks
	ended   bool
	dropped bool
}

// maxQueued is enough for 1 GB/s at 50 ms one way. It bounds the memory of a
// connection that is stalled.
const maxQueued = 64 << 20

func newDelayQueue() *delayQueue {
	q := &delayQueue{}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// push waits while the queue is full. It reports false when nobody will read it.
func (q *delayQueue) push(c chunk) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.size >= maxQueued && !q.dropped {
		q.changed.Wait()
	}
	q.chunks = append(q.chunks, c)
	q.size += len(c.bytes)
	q.changed.Signal() // the other end's goroutine is the only one that waits
	return !q.dropped
}

// take waits for chunks and returns all there are. It returns none after the last.
func (q *delayQueue) take() []chunk {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.chunks) == 0 && !q.ended {
		q.changed.Wait()
	}
	taken := q.chunks
	q.chunks, q.size = nil, 0
	q.changed.Signal()
	return taken
}

// end says that nothing will be pushed any more.
func (q *delayQueue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = true
	q.changed.Signal()
}

// discard says that nothing will be taken any more.
func (q *delayQueue) discard() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dropped = true
	q.chunks = nil
	q.changed.Signal()
}
