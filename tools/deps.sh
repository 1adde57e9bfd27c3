#!/bin/sh
# Installs what the tests need and this machine lacks: PostgreSQL's programs (a
# running Docker engine will do), PgBouncer, Redis, Chromium, tmux, and a C compiler for the race detector.
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

# A terminal for the command line's tests.
have_tmux() {
	command -v tmux >/dev/null
}

# One that starts: where Ubuntu has no snap, its packages of Chromium are stubs. Where debug_test.go looks too.
have_browser() {
	for browser in "${CHROMIUM:-}" chromium google-chrome google-chrome-stable chromium-browser chrome \
		"/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" /Applications/Chromium.app/Contents/MacOS/Chromium; do
		[ -n "$browser" ] && "$browser" --version >/dev/null 2>&1 && return
	done
	return 1
}

have_compiler() {
	command -v "${CC:-gcc}" >/dev/null || command -v clang >/dev/null
}

may_install() {
	[ "$(id -u)" = 0 ] || command -v sudo >/dev/null
}

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# All else can be tested without.
warn_of_browser() {
	echo "deps: found no Chromium to install that starts, so TestDebugPageInABrowser will be skipped; install one, or name it in CHROMIUM" >&2
}

apt_install() {
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

# Ubuntu has Chromium as a snap only, which does not run in containers: Google's own package does.
install_chrome() {
	[ "$(dpkg --print-architecture)" = amd64 ] || return 1
	echo "deps: installing google-chrome-stable from dl.google.com"
	command -v curl >/dev/null || apt_install curl ca-certificates || return 1
	folder=$(mktemp -d)
	chmod 755 "$folder" # apt reads it as a user of its own
	curl -fsSL --connect-timeout 20 -o "$folder/chrome.deb" https://dl.google.com/linux/direct/google-chrome-stable_current_amd64.deb &&
		apt_install "$folder/chrome.deb"
	status=$?
	rm -rf "$folder"
	return $status
}

missing=
if command -v apt-get >/dev/null; then
	have_postgres || missing="$missing postgresql"
	have_pgbouncer || missing="$missing pgbouncer"
	have_redis || missing="$missing redis-server"
	have_tmux || missing="$missing tmux"
	have_compiler || missing="$missing gcc libc6-dev"
	chrome=
	if ! have_browser; then
		if grep -qE '^ID(_LIKE)?=.*ubuntu' /etc/os-release; then chrome=1; else missing="$missing chromium"; fi
	fi
	[ -n "$missing$chrome" ] || exit 0
	if ! may_install; then
		[ -z "$missing" ] || { echo "deps: missing:$missing; here is neither root nor sudo: have root run apt-get install$missing" >&2; exit 1; }
		warn_of_browser
		exit 0
	fi
	as_root apt-get update -qq
	if [ -n "$missing" ]; then
		echo "deps: installing$missing with apt-get"
		# shellcheck disable=SC2086 # a list
		apt_install $missing
	fi
	[ -z "$chrome" ] || install_chrome || true
	have_browser || warn_of_browser
elif command -v brew >/dev/null; then
	have_postgres || missing="$missing postgresql@17"
	have_pgbouncer || missing="$missing pgbouncer"
	have_redis || missing="$missing redis"
	have_tmux || missing="$missing tmux"
	have_browser || missing="$missing google-chrome"
	[ -n "$missing" ] || exit 0
	echo "deps: installing$missing with brew"
	# shellcheck disable=SC2086 # a list
	brew install $missing
else
	have_postgres || missing="$missing PostgreSQL (or Docker),"
	have_pgbouncer || missing="$missing PgBouncer,"
	have_redis || missing="$missing Redis,"
	have_tmux || missing="$missing tmux,"
	have_browser || missing="$missing Chromium,"
	have_compiler || missing="$missing a C compiler (or make RACE=),"
	[ -n "$missing" ] || exit 0
	echo "deps: neither apt-get nor brew here; please install:${missing%,}" >&2
	exit 1
fi
