module github.com/pgxtenant/pgxtenant/contrib/tenantprom/internal/dashboardtest

go 1.26.0

require (
	github.com/jackc/pgx/v5 v5.12.0
	github.com/pgxtenant/pgxtenant v0.0.0
	github.com/pgxtenant/pgxtenant/contrib/tenantcache v0.0.0
	github.com/pgxtenant/pgxtenant/contrib/tenantlimit v0.0.0
	github.com/pgxtenant/pgxtenant/contrib/tenantprom v0.0.0-00010101000000-000000000000
	github.com/prometheus/client_golang v1.24.1
	github.com/prometheus/client_model v0.6.2
	github.com/prometheus/common v0.70.1
	github.com/prometheus/prometheus v0.312.0
	github.com/redis/go-redis/v9 v9.22.0
	github.com/stretchr/testify v1.12.1
	go.yaml.in/yaml/v3 v3.0.5
)

require (
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/dennwc/varint v1.0.0 // indirect
	github.com/felixge/httpsnoop v1.1.0 // indirect
	github.com/grafana/regexp v0.0.0-20250905093917-f7b3be9d1853 // indirect
	github.com/hashicorp/golang-lru/v2 v2.0.7 // indirect
	github.com/jackc/pgpassfile v1.0.0 // indirect
	github.com/jackc/pgservicefile v0.0.0-20240606120523-5a60cdf6a761 // indirect
	github.com/jackc/puddle/v2 v2.2.3 // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/prometheus/procfs v0.21.1 // indirect
	github.com/sony/gobreaker/v2 v2.4.0 // indirect
	go.uber.org/atomic v1.12.0 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	golang.org/x/sync v0.22.0 // indirect
	golang.org/x/sys v0.48.0 // indirect
	golang.org/x/text v0.41.0 // indirect
	golang.org/x/time v0.15.0 // indirect
	google.golang.org/protobuf v1.36.11 // indirect
)

replace github.com/pgxtenant/pgxtenant => ../../../..

replace github.com/pgxtenant/pgxtenant/contrib/tenantcache => ../../../tenantcache

replace github.com/pgxtenant/pgxtenant/contrib/tenantlimit => ../../../tenantlimit

replace github.com/pgxtenant/pgxtenant/contrib/tenantprom => ../..
