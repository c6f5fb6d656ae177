# Shared by the image recipes: options, progress, package download with a cache, atomic results.
# Sourced, not run. Every recipe obeys the same contract:
#   build.sh --out DIR --cache DIR
# prints "progress <percent> <text>" lines on stdout, everything else goes to stderr, and DIR appears
# whole or not at all. The result holds manifest.json and the files it names.

set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
# One fixed time for every file of an image, so that two builds from the same packages are equal.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-1735689600}"

OUT="" CACHE="" WORK=""

progress() { printf 'progress %s %s\n' "$1" "$2"; }
fail() {
	printf 'error %s\n' "$*" >&2
	exit 1
}

# Refuses to start when a tool is missing, and says which package brings it.
need() {
	local pair tool package missing=""
	for pair in "$@"; do
		tool=${pair%%:*} package=${pair##*:}
		command -v "$tool" >/dev/null 2>&1 || missing="$missing $package"
	done
	[ -z "$missing" ] || fail "missing packages:$missing (apt-get install$missing)"
}

cleanup() {
	local code=$?
	trap - EXIT
	[ "$code" = 0 ] || printf 'error the recipe ended with code %s, nothing was left behind\n' "$code" >&2
	[ -z "$WORK" ] || rm -rf --one-file-system "$WORK"
	exit "$code"
}

# begin "$@": reads the options and makes WORK, a private directory beside the result that is removed
# on every exit, also on a signal.
begin() {
	while [ $# -gt 0 ]; do
		case $1 in
		--out) OUT=${2:?--out needs a directory} && shift 2 ;;
		--cache) CACHE=${2:?--cache needs a directory} && shift 2 ;;
		*) fail "unknown option $1 (use --out DIR --cache DIR)" ;;
		esac
	done
	[ -n "$OUT" ] || fail "--out DIR is required"
	[ -n "$CACHE" ] || fail "--cache DIR is required"
	[ "$(id -u)" = 0 ] || fail "image recipes must run as root"
	[ "$(dpkg --print-architecture)" = amd64 ] || fail "only amd64 images can be built"
	mkdir -p "$CACHE/debs" "$(dirname "$OUT")"
	CACHE=$(realpath "$CACHE") OUT=$(realpath -m "$OUT")
	WORK=$(mktemp -d "$OUT.build-XXXXXX")
	trap cleanup EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
}

# finish DIR: makes DIR the result. What was there before is replaced in one rename.
finish() {
	sync -f "$1"
	if [ -e "$OUT" ]; then
		mv -T "$OUT" "$WORK/replaced"
	fi
	mv -T "$1" "$OUT"
	progress 100 done
}

APT() { apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 "$@"; }

# kernel_of METAPACKAGE: prints the kernel package that a metapackage stands for, nothing when the lists do not know it.
kernel_of() {
	# apt-cache answers 100 for a package it does not know: that is an answer, not a failure of the recipe.
	{ apt-cache depends "$1" 2>/dev/null || true; } | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }'
}

# refresh_lists: brings apt's lists up to date, once for each run of a recipe. Says why it could not.
LISTS_FRESH=""
refresh_lists() {
	local try
	[ -z "$LISTS_FRESH" ] || return 0
	LISTS_FRESH=yes
	for try in 1 2 3; do
		# Another recipe may hold the lock of the lists at this moment.
		if APT update >&2; then return 0; fi
		sleep "$((try * 3))"
	done
	printf 'warning apt-get update failed: going on with the lists and packages that are here\n' >&2
}

# fetch PACKAGE...: downloads each package once; DEB[package] is its file. A package that is in the
# cache with the right digest is not asked for again; without a mirror the newest cached one serves.
# Lists that name files which the mirror has replaced since are refreshed, once.
declare -A DEB
fetch() {
	local package file
	if ! fetch_listed "$@"; then
		refresh_lists
		fetch_listed "$@" || true
	fi
	for package in "$@"; do
		[ -z "${DEB[$package]:-}" ] || continue
		file=$(find "$CACHE/debs" -name "${package}_*.deb" | sort -V | tail -n 1)
		[ -n "$file" ] || fail "package $package is neither at the mirror nor in the cache"
		DEB[$package]=$file
	done
}

# fetch_listed PACKAGE...: what apt's lists name now, downloaded. Fails when something is missing.
fetch_listed() {
	local package file sum size uri missing=0
	# One question for all: apt needs half a second to read its lists.
	APT --print-uris download "$@" >"$WORK/uris" 2>"$WORK/uris.log" || {
		cat "$WORK/uris.log" >&2
		return 1
	}
	# 'URL' file size SHA256:digest
	while read -r uri file size sum; do
		package=${file%%_*} sum=${sum#SHA256:}
		if ! deb_is "$CACHE/debs/$file" "$sum"; then
			if ! (cd "$WORK" && APT download "$package" >&2) || ! deb_is "$WORK/$file" "$sum"; then
				printf 'warning package %s could not be downloaded (%s bytes from %s)\n' "$package" "$size" "$uri" >&2
				rm -f "$WORK/$file"
				missing=1
				continue
			fi
			mv "$WORK/$file" "$CACHE/debs/$file"
		fi
		DEB[$package]="$CACHE/debs/$file"
	done <"$WORK/uris"
	return "$missing"
}

deb_is() {
	[ -f "$1" ] && [ -n "$2" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]
}

# unpack PACKAGE... DIR
unpack() {
	local dir=${*: -1} package
	mkdir -p "$dir"
	for package in "${@:1:$#-1}"; do
		dpkg-deb -x "${DEB[$package]}" "$dir"
	done
}

# applets BUSYBOX DIR: one relative link per applet into DIR/bin, sbin, usr/bin, usr/sbin.
applets() {
	local path up
	"$1" --list-full | while read -r path; do
		case $path in
		bin/busybox | linuxrc) continue ;;
		usr/*) up=../../bin/busybox ;;
		bin/*) up=busybox ;;
		*) up=../bin/busybox ;;
		esac
		mkdir -p "$2/$(dirname "$path")"
		[ -e "$2/$path" ] || [ -L "$2/$path" ] || ln -s "$up" "$2/$path"
	done
}

# stamp DIR: every file gets the one fixed time.
stamp() { find "$1" -xdev -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; }

# file_json PATH -> "sha256:…"
digest_of() { printf 'sha256:%s' "$(sha256sum "$1" | cut -d' ' -f1)"; }
