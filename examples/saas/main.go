// Saas is a small service as one would build it with pgxtenant: a JSON API with projects per tenant, over HTTP, on
// tenants that share tables, that have a schema, and that have a database, with limits by plan, a cache, metrics and
// a page for operators. It runs on a PostgreSQL and a Redis server that it starts for itself and removes when it ends:
//
//	go run .          # serves, and prints what to try
//	go run . -load    # has one noisy tenant among quiet ones, and prints what page and metrics say of it
//
// To copy from: service.go wires everything, database.go has the tables and tenants, plans.go what a plan means,
// keys.go the authentication, projects.go the statements and the cache, api.go the handlers. postgres.go, which
// starts the server, and load.go are the demonstration's alone. README.md tells what to look at.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/redistest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "saas:", err)
		os.Exit(1)
	}
}

// Where the service is found, unless the environment says otherwise.
const (
	defaultAddr    = "127.0.0.1:8080"
	defaultOpsAddr = "127.0.0.1:8081"
	domain         = "localhost" // curl and browsers take names below it for this machine
)

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	flags := flag.NewFlagSet("saas", flag.ContinueOnError)
	load := flags.Bool("load", false, "send requests for a while, and print who the noisy tenant is")
	duration := flags.Duration("for", 15*time.Second, "how long -load sends requests")
	if err := flags.Parse(args); err != nil {
		return err
	}
	addr, opsAddr := env("SAAS_ADDR", defaultAddr), env("SAAS_OPS_ADDR", defaultOpsAddr)
	d := &driver{public: "http://" + addr, ops: "http://" + opsAddr, domain: domain, length: *duration}
	if *load && d.answers(ctx) {
		fmt.Fprintf(out, "Driving the service that runs at %s.\n", addr)
		return d.drive(ctx, out)
	}

	c, closeServers, err := findServers(ctx, out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeServers()) }()
	level := slog.LevelInfo
	if *load {
		level = slog.LevelWarn
	}
	// The handler adds the tenant to whatever is logged with a request's context.
	logger := slog.New(pgxtenant.LogHandler(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	s, err := openService(ctx, c, logger)
	if err != nil {
		return err
	}
	defer s.close()
	public, err := listen("SAAS_ADDR", addr)
	if err != nil {
		return err
	}
	ops, err := listen("SAAS_OPS_ADDR", opsAddr)
	if err != nil {
		return errors.Join(err, public.Close())
	}
	if !*load {
		fmt.Fprintf(out, welcome, public.Addr(), ops.Addr(), port(public))
		return s.serve(ctx, public, ops)
	}
	fmt.Fprintf(out, "Serving at %s for %v of load.\n", public.Addr(), *duration)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- s.serve(ctx, public, ops) }()
	err = d.drive(ctx, out)
	stop()
	return errors.Join(err, <-served)
}

const welcome = `
The API for customers is at %[1]s, the page and the metrics for operators are at
	http://%[2]s/debug/tenants
	http://%[2]s/metrics
Tenants: acme and globex share tables, wonka too and has the free plan, initech has a schema, umbrella a
database, vandelay is suspended. The key of each is its name and "-key". To try:

curl -H 'Authorization: Bearer acme-key' -H 'Content-Type: application/json' -d '{"name":"Roadmap"}' http://acme.localhost:%[3]s/projects
curl -H 'Authorization: Bearer acme-key' http://acme.localhost:%[3]s/projects
curl -H 'Authorization: Bearer initech-key' http://api.localhost:%[3]s/projects
curl -i -H 'Authorization: Bearer acme-key' http://globex.localhost:%[3]s/projects
curl -i -H 'Authorization: Bearer vandelay-key' http://api.localhost:%[3]s/projects

Ctrl-C stops it and removes its servers.
`

// findServers returns what the environment says, for anything that it does not say a server of the example's own, and a
// function that ends those.
func findServers(ctx context.Context, out io.Writer) (c settings, end func() error, err error) {
	c = settings{database: os.Getenv("SAAS_DATABASE_URL"), admin: os.Getenv("SAAS_ADMIN_DATABASE_URL"), domain: domain}
	var ends []func() error
	end = func() error {
		var errs []error
		for _, f := range ends {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, end())
		}
	}()
	if (c.database == "") != (c.admin == "") {
		return c, end, errors.New("SAAS_DATABASE_URL and SAAS_ADMIN_DATABASE_URL go together: the service's role, and the one that owns the tables")
	}
	if c.database == "" {
		fmt.Fprintln(out, "Starting a PostgreSQL server for this example alone ...")
		server, err := startPostgres(ctx)
		if err != nil {
			return c, end, err
		}
		ends = append(ends, server.close)
		c.database, c.admin = server.app(), server.owner()
	}
	switch url := os.Getenv("SAAS_REDIS_URL"); url {
	case "":
		server, err := redistest.Start(ctx)
		if errors.Is(err, exec.ErrNotFound) {
			fmt.Fprintln(out, "No redis-server is installed: cache and limits are kept within the process.")
			return c, end, nil
		}
		if err != nil {
			return c, end, err
		}
		ends = append(ends, server.Close)
		c.redis = &redis.Options{Addr: server.Addr}
	case "none":
		fmt.Fprintln(out, "Without Redis: cache and limits are kept within the process.")
	default:
		if c.redis, err = redis.ParseURL(url); err != nil {
			return c, end, errors.New("SAAS_REDIS_URL is no URL of a Redis server, such as redis://localhost:6379") // err has the password
		}
	}
	logging.Disable() // the stores log what matters of an outage: once, and not for each connection
	return c, end, nil
}

func listen(variable, addr string) (net.Listener, error) {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%w; %s chooses another address", err, variable)
	}
	return listener, nil
}

func port(l net.Listener) string {
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func env(name, byDefault string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return byDefault
}
