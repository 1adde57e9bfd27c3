//go:build unix

package redistest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/pgxtenant/pgxtenant/internal/freeport"
)

// startNode starts a server that a cluster can be made of.
func startNode(ctx context.Context) (*Server, error) {
	dir, err := newDir()
	if err != nil {
		return nil, err
	}
	// Another process may take a port before the server does.
	for range 5 {
		var port, busPort int
		if port, err = freeport.Pick(); err == nil {
			busPort, err = freeport.Pick()
		}
		if err != nil {
			break
		}
		client, bus := strconv.Itoa(port), strconv.Itoa(busPort)
		s := newServer(dir, net.JoinHostPort("127.0.0.1", client), []string{
			"--bind", "127.0.0.1", "--port", client, "--cluster-port", bus, "--cluster-enabled", "yes"})
		s.busPort = bus
		if err = s.start(ctx); err == nil {
			return s, nil
		}
	}
	return nil, errors.Join(err, os.RemoveAll(dir))
}

// join makes a cluster of servers that know nothing of each other.
func join(ctx context.Context, servers []*Server) error {
	const slots = 16384
	for i, s := range servers {
		from, to := i*slots/len(servers), (i+1)*slots/len(servers)-1
		_, err := s.do(ctx, "CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(from), strconv.Itoa(to))
		for _, other := range servers[:i] {
			host, port, _ := net.SplitHostPort(other.Addr)
			_, e := s.do(ctx, "CLUSTER", "MEET", host, port, other.busPort)
			err = errors.Join(err, e)
		}
		if err != nil {
			return fmt.Errorf("redistest: %w", err)
		}
	}
	size := fmt.Sprintf("cluster_size:%d", len(servers))
	for _, s := range servers {
		if err := until(ctx, func(ctx context.Context) error {
			info, err := s.do(ctx, "CLUSTER", "INFO")
			if err == nil && (!strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, size)) {
				err = errors.New("the cluster is not joined: " + info)
			}
			return err
		}); err != nil {
			return fmt.Errorf("redistest: %w", err)
		}
	}
	return nil
}
