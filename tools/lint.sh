#!/bin/sh
# Checks the format of every Go file, and each module with go vet and staticcheck.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
status=0

unformatted=$(find . -name '*.go' -not -path '*/testdata/*' -not -path './.git/*' -exec gofmt -l {} +)
if [ -n "$unformatted" ]; then
	echo "gofmt: $unformatted" >&2
	status=1
fi

staticcheck=$(go tool -modfile="$root/tools/go.mod" -n staticcheck)
for module in $(find . -name go.mod -not -path '*/testdata/*' | sort); do
	cd "$root/$(dirname "$module")"
	# A module may have nothing but its go.mod.
	[ -n "$(go list ./... 2>/dev/null)" ] || { go list ./... >/dev/null; continue; }
	go vet ./... || status=1
	"$staticcheck" ./... || status=1
done
exit $status
