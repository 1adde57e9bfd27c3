# Every target works on all modules of the repository and, where it says deps, on a
# fresh machine too: as root or not, on Debian, Ubuntu and macOS.

# For test and fuzz; empty where there is no C compiler.
RACE ?= -race
# For each fuzz target.
FUZZTIME ?= 10s

.PHONY: test demo bench lint fuzz deps

# Ends with the line "N passed, N failed, N skipped".
test: deps
	@go run tools/gotest/main.go $(RACE)

demo: deps
	@go run ./examples/quickstart

bench: deps
	@cd bench && go test -run '^$$' -bench . ./...

lint:
	@tools/lint.sh

fuzz: deps
	@tools/fuzz.sh $(FUZZTIME)

# Installs what the tests need and the machine lacks; does nothing when all is there.
deps:
	@tools/deps.sh
