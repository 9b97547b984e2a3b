# shellcheck shell=bash
# What scripts/test, scripts/tools and .ci/run share. Sourced, never run.

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$(basename "$0"): $*"
  exit 1
}

# Installs Debian packages where that is allowed without asking: as root, with apt-get. Otherwise it fails, and the caller
# decides what to do without them. Its output goes to stderr, so that stdout stays the tests'.
apt_install() {
  [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null || return 1
  say "installing $* with apt-get"
  # A new machine has no package lists, or old ones that name versions which are gone.
  (
    # Scripts that run side by side wait for each other: apt-get itself waits for one of its two locks only.
    flock 8 \
      && apt-get update -qq >&2 8>&- \
      && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confold "$@" </dev/null >&2 8>&-
  ) 8>/tmp/postern-apt.lock
}
