module github.com/pgxtenant/pgxtenant/bench

go 1.25.7

require (
	github.com/jackc/pgx/v5 v5.12.0
	github.com/jackc/puddle/v2 v2.2.3
	github.com/pgxtenant/pgxtenant v0.0.0
	github.com/pgxtenant/pgxtenant/contrib/tenantgoose v0.0.0
	github.com/pressly/goose/v3 v3.27.3
)

require (
	github.com/hashicorp/golang-lru/v2 v2.0.7 // indirect
	github.com/jackc/pgpassfile v1.0.0 // indirect
	github.com/jackc/pgservicefile v0.0.0-20240606120523-5a60cdf6a761 // indirect
	github.com/mfridman/interpolate v0.0.2 // indirect
	github.com/sethvargo/go-retry v0.4.0 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	go.uber.org/multierr v1.11.0 // indirect
	golang.org/x/sync v0.22.0 // indirect
	golang.org/x/text v0.41.0 // indirect
)

replace github.com/pgxtenant/pgxtenant => ../

replace github.com/pgxtenant/pgxtenant/contrib/tenantgoose => ../contrib/tenantgoose
