#!/bin/sh
# Fuzzes every target of every module for the time that the argument says.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
time=${1:-10s}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# file:func lines; the inner loop ends the script as soon as a target fails.
grep -rHo '^func Fuzz[A-Za-z0-9_]*(f \*testing\.F)' --include='*_test.go' . | sort | while IFS= read -r line; do
	file=${line%%:*}
	target=${line#*:func }
	target=${target%%(*}
	echo "fuzz: $target in $(dirname "$file") for $time"
	cd "$root/$(dirname "$file")"
	status=0
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" . >"$log" 2>&1 || status=$?
	cat "$log"
	# go test fails at times because its own time is over ("context deadline exceeded"), with no input to show.
	if [ $status != 0 ] && { grep -q 'Failing input written' "$log" || ! grep -q 'context deadline exceeded' "$log"; }; then
		exit $status
	fi
done
