// Package freeport finds ports for servers that tests and examples start.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

// Pick picks a loopback port that nothing listens on. It stays below the range that systems hand to outgoing
// connections: else one of those could take it before a server does, or while a server that was stopped is not there.
func Pick() (int, error) {
	var err error
	for range 100 {
		port := 20000 + rand.IntN(12000)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("freeport: none is free: %w", err)
}
