// Routers serves the same small API with net/http, chi, gin or echo, each with pgxtenant.Middleware in front of
// the routes that have a tenant, on a PostgreSQL server that it starts for itself and removes when it ends:
//
//	go run . chi    # or net/http, gin, echo
//
// It prints what to try. nethttp.go, chi.go, gin.go and echo.go are what differs; notes.go is the service.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

// routers are the ways to serve the API.
var routers = map[string]func(*service) http.Handler{"net/http": netHTTP, "chi": chiRouter, "gin": ginRouter, "echo": echoRouter}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "routers:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) != 1 || routers[args[0]] == nil {
		return errors.New("say which: net/http, chi, gin or echo")
	}
	server, err := pgtest.Start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	d, err := server.Create(ctx)
	if err != nil {
		return err
	}
	d.RLSTable("note")
	s, err := openService(ctx, d.AppURL(), d.OwnerURL())
	if err != nil {
		return err
	}
	defer s.db.Close()

	listener, err := net.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		return err
	}
	fmt.Print(`Serving on 127.0.0.1:8080. For instance:

	curl -H 'Host: acme.example.com' -H 'Authorization: Bearer acme-token' -d body=hello 127.0.0.1:8080/notes
	curl -H 'Host: acme.example.com' -H 'Authorization: Bearer acme-token' 127.0.0.1:8080/notes
	curl -H 'X-Tenant-ID: globex' -H 'Authorization: Bearer acme-token' 127.0.0.1:8080/notes
	curl -H 'X-Tenant-ID: globex' -H 'Authorization: Bearer globex-token' 127.0.0.1:8080/notes
	curl 127.0.0.1:8080/healthz

`)
	web := &http.Server{Handler: routers[args[0]](s), ReadHeaderTimeout: 5 * time.Second}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- web.Shutdown(end)
	}()
	if err := web.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}
