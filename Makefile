# Every target works on all modules of the repository and, where it says deps, on a
# fresh machine too: as root or not, on Debian, Ubuntu and macOS.

# For test and fuzz; empty where there is no C compiler.
RACE ?= -race
# For each fuzz target.
FUZZTIME ?= 10s

.PHONY: test demo saas saas-load bench ratios policy-forms pgx-suite lint fuzz deps

# Ends with the line "N passed, N failed, N skipped".
test: deps
	@go test -count=1 -run '^(TestCheckoutAllocations|TestStatementAllocations|TestAnIdlePoolIsSmall|TestAMillion.*|TestTenThousandTenantsWaiting)$$' . # not to be told under -race
	@go run tools/gotest/main.go $(RACE) -timeout 14m

demo: deps
	@go run ./examples/quickstart

# A small service, until Ctrl-C; and what one noisy tenant does to it, in about 20 s or on the service that runs.
saas: deps
	@cd examples/saas && go build -o ../../bin/saas .
	@exec bin/saas

saas-load: deps
	@cd examples/saas && go build -o ../../bin/saas .
	@exec bin/saas -load

bench: deps
	@cd bench && go test -run '^$$' -bench . ./...

# What binding costs, as ratios against pgxpool alone and recipes written by hand.
ratios: deps
	@cd bench && go run ./cmd/ratios

# Forms of a policy on 1,000,000 rows, with the server's plans: about 10 minutes.
policy-forms: deps
	@cd bench && go run ./cmd/ratios -run '^Policy' -forms -rounds 9

# pgx's own tests, at the version of go.mod, with every connection bound: about 10 minutes.
pgx-suite: deps
	@go run ./internal/pgxsuite

lint:
	@tools/lint.sh

fuzz: deps
	@tools/fuzz.sh $(FUZZTIME)

# Installs what the tests need and the machine lacks; does nothing when all is there.
deps:
	@tools/deps.sh
