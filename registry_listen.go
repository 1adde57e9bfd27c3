package pgxtenant

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	listenRetryLeast = 50 * time.Millisecond
	listenRetryMost  = 5 * time.Second
	listenIdle       = 10 * time.Second // then the connection is tried
	listenTimeout    = 5 * time.Second  // of each step that waits for the server
)

// registryListener hears of changes and empties the cache of what they touch.
type registryListener struct {
	r         *Registry
	listening atomic.Bool

	// changed is called for each tenant that may have changed, and with "" for all, one call at a time. It
	// may take long: notifications are not kept waiting for it.
	changed func(ctx context.Context, id string)
	wake    chan struct{}

	mu      sync.Mutex
	pending map[string]struct{} // yet to be told
}

func (l *registryListener) init(r *Registry, changed func(context.Context, string)) {
	l.r, l.changed = r, changed
	l.wake, l.pending = make(chan struct{}, 1), make(map[string]struct{})
}

// run listens until the registry is closed.
func (l *registryListener) run() {
	ctx, log := l.r.ctx, l.r.config.Logger
	for retry := listenRetryLeast; ; retry = min(2*retry, listenRetryMost) {
		err := l.listen(ctx)
		if l.listening.Swap(false) {
			retry = listenRetryLeast
		}
		if ctx.Err() != nil {
			return
		}
		log.Warn("registry does not hear of changes; it reads them when RegistryConfig.TTL is over", "error", err, "retry", retry)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry):
		}
	}
}

// listen connects and listens until the connection is lost.
func (l *registryListener) listen(ctx context.Context) error {
	conn, err := l.connect(ctx)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(ctx)
	}()
	// The order matters: what was committed before LISTEN is not told, so nothing read before it may stay.
	if err := l.within(ctx, func(ctx context.Context) error {
		_, err := conn.Exec(ctx, "listen "+registryChannel)
		return err
	}); err != nil {
		return err
	}
	l.handle("*")
	l.listening.Store(true)
	l.r.config.Logger.Debug("registry listens for changes")
	for {
		idle, cancel := context.WithTimeout(ctx, listenIdle)
		n, err := conn.WaitForNotification(idle)
		cancel()
		switch {
		case err == nil:
			l.handle(n.Payload)
		case ctx.Err() != nil || conn.IsClosed():
			return err
		default:
			if err := l.within(ctx, conn.Ping); err != nil {
				return err
			}
		}
	}
}

func (l *registryListener) connect(ctx context.Context) (conn *pgx.Conn, err error) {
	config := l.r.config.ListenConn
	hook := false
	if config == nil {
		config, hook = l.r.pool.Config().ConnConfig, true
	}
	config = config.Copy()
	config.Tracer = nil
	return conn, l.within(ctx, func(ctx context.Context) error {
		if before := l.r.pool.Config().BeforeConnect; hook && before != nil {
			if err := before(ctx, config); err != nil {
				return err
			}
		}
		conn, err = pgx.ConnectConfig(ctx, config)
		return err
	})
}

func (l *registryListener) within(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	return f(ctx)
}

// handle drops from the cache what a notification names, and everything if it is not understood.
func (l *registryListener) handle(payload string) {
	id := ""
	switch {
	case len(payload) > 1 && payload[0] == 't':
		id = payload[1:]
		l.r.tenants.drop(id)
	case len(payload) > 1 && payload[0] == 'a':
		l.r.aliases.drop(payload[1:])
		return
	default:
		l.r.tenants.purge()
		l.r.aliases.purge()
	}
	if l.changed == nil {
		return
	}
	l.mu.Lock()
	if id == "" {
		clear(l.pending)
	}
	if _, all := l.pending[""]; !all {
		l.pending[id] = struct{}{}
	}
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// tell calls changed.
func (l *registryListener) tell() {
	for {
		select {
		case <-l.r.ctx.Done():
			return
		case <-l.wake:
		}
		l.mu.Lock()
		ids := l.pending
		l.pending = make(map[string]struct{})
		l.mu.Unlock()
		for id := range ids {
			l.changed(l.r.ctx, id)
		}
	}
}

// tenantChanged closes the pool of a tenant that is no longer served from it: moved, suspended or gone. For
// "" it looks at every open pool.
func (db *TenantDB) tenantChanged(ctx context.Context, id string) {
	for id, connString := range db.isolated.places(id) {
		ctx, cancel := context.WithTimeout(ctx, listenTimeout)
		t, err := db.registry.Lookup(ctx, id)
		cancel()
		if err != nil && !isNotFound(err) {
			continue // not known to be gone; a checkout will find out
		}
		if err != nil || check(&t) != nil || t.ConnString != connString {
			db.Evict(id)
		}
	}
}
