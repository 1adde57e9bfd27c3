// Otel shows the tenant on OpenTelemetry's spans of pgx, as otelpgx makes them, on a PostgreSQL server that it starts for
// itself and removes when it ends:
//
//	go run .
//
// Two tenants write and read, and every span is printed with its tenant. tenant.go is what a service needs for it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/pgxtenant/pgxtenant"
	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "otel:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
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

	exporter, err := stdouttrace.New(stdouttrace.WithPrettyPrint())
	if err != nil {
		return err
	}
	provider := newProvider(exporter)
	defer func() { err = errors.Join(err, provider.Shutdown(context.WithoutCancel(ctx))) }()
	db, err := open(ctx, d.AppURL(), provider)
	if err != nil {
		return err
	}
	defer db.Close()
	for _, tenant := range []string{"acme", "globex"} {
		if err := serve(pgxtenant.WithTenantID(ctx, tenant), db, provider.Tracer("service")); err != nil {
			return err
		}
	}
	return nil
}

// newProvider makes a provider whose spans have their tenant and go to the exporter as they end. A service exports them
// in batches, by sdktrace.WithBatcher.
func newProvider(exporter sdktrace.SpanExporter) *sdktrace.TracerProvider {
	return sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(tenantProcessor{}), sdktrace.WithSyncer(exporter))
}

// open makes a TenantDB that traces. The tracer is that of isolated pools too.
func open(ctx context.Context, url string, provider trace.TracerProvider) (*pgxtenant.TenantDB, error) {
	config, err := pgxtenant.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	config.Shared.ConnConfig.Tracer = boundTracer{otelpgx.NewTracer(otelpgx.WithTracerProvider(provider))}
	return pgxtenant.NewWithConfig(ctx, config)
}

// serve stands for a request. otelpgx makes spans only below another.
func serve(ctx context.Context, db *pgxtenant.TenantDB, tracer trace.Tracer) error {
	ctx, span := tracer.Start(ctx, "POST /notes", trace.WithSpanKind(trace.SpanKindServer))
	defer span.End()
	var batch pgx.Batch
	batch.Queue("insert into note (id, body) values (1, 'first')")
	batch.Queue("insert into note (id, body) values (2, 'second')")
	if err := db.SendBatch(ctx, &batch).Close(); err != nil {
		return err
	}
	var n int
	if err := db.QueryRow(ctx, "select count(*) from note").Scan(&n); err != nil {
		return err
	}
	if n != 2 {
		return fmt.Errorf("there are %d notes of this tenant; want 2", n)
	}
	return nil
}
