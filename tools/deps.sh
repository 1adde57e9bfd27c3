#!/bin/sh
# Installs what the tests need and this machine lacks: PostgreSQL's programs (a
# running Docker engine will do), PgBouncer, Redis, and a C compiler for the race detector.
# Says what it installs, and nothing when all is there.
set -eu

# Where internal/pgtest looks too.
have_postgres() {
	command -v initdb >/dev/null && return
	for initdb in /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb \
		/opt/homebrew/opt/postgresql*/bin/initdb /usr/local/opt/postgresql*/bin/initdb \
		/Applications/Postgres.app/Contents/Versions/*/bin/initdb /usr/local/pgsql/bin/initdb; do
		[ -x "$initdb" ] && return
	done
	docker info >/dev/null 2>&1
}

have_pgbouncer() {
	command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || [ -x /opt/homebrew/bin/pgbouncer ]
}

have_redis() {
	command -v redis-server >/dev/null
}

have_compiler() {
	command -v "${CC:-gcc}" >/dev/null || command -v clang >/dev/null
}

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		echo "deps: neither root nor sudo; as root, run: $*" >&2
		exit 1
	fi
}

missing=
if command -v apt-get >/dev/null; then
	have_postgres || missing="$missing postgresql"
	have_pgbouncer || missing="$missing pgbouncer"
	have_redis || missing="$missing redis-server"
	have_compiler || missing="$missing gcc libc6-dev"
	[ -n "$missing" ] || exit 0
	echo "deps: installing$missing with apt-get"
	as_root apt-get update -qq
	# shellcheck disable=SC2086 # a list
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
elif command -v brew >/dev/null; then
	have_postgres || missing="$missing postgresql@17"
	have_pgbouncer || missing="$missing pgbouncer"
	have_redis || missing="$missing redis"
	[ -n "$missing" ] || exit 0
	echo "deps: installing$missing with brew"
	# shellcheck disable=SC2086 # a list
	brew install $missing
else
	have_postgres || missing="$missing PostgreSQL (or Docker),"
	have_pgbouncer || missing="$missing PgBouncer,"
	have_redis || missing="$missing Redis,"
	have_compiler || missing="$missing a C compiler (or make RACE=),"
	[ -n "$missing" ] || exit 0
	echo "deps: neither apt-get nor brew here; please install:${missing%,}" >&2
	exit 1
fi
