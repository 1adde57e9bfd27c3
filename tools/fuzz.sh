#!/bin/sh
# Fuzzes every target of every module for the time that the argument says.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
time=${1:-10s}

# file:func lines; the inner loop ends the script as soon as a target fails.
grep -rHo '^func Fuzz[A-Za-z0-9_]*(f \*testing\.F)' --include='*_test.go' . | sort | while IFS= read -r line; do
	file=${line%%:*}
	target=${line#*:func }
	target=${target%%(*}
	echo "fuzz: $target in $(dirname "$file") for $time"
	cd "$root/$(dirname "$file")"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" .
done
