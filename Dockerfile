# The only image from outside. It is pinned here: where a build has to be repeatable, append its digest (name:tag@sha256:…).
ARG RUST_IMAGE=rust:1.95-slim-bookworm

FROM ${RUST_IMAGE} AS builder
# The image has gcc and libc6-dev, which is enough: aws-lc-sys is built with cc and without CMake, SQLite is bundled, and
# the proto files are compiled by protox instead of protoc.
WORKDIR /build

# Writes the list of dependencies into the binary, where scanners for vulnerabilities find it.
RUN cargo install --locked cargo-auditable@0.7.7
# Symbols are a quarter of the binary.
ENV CARGO_PROFILE_RELEASE_STRIP=symbols

# Builds the dependencies in a layer of their own, which is reused until Cargo.toml or Cargo.lock changes. They take most of
# the build's time. They are built for an empty crate with the same name and targets. The benchmarks and the client library stay
# empty, because Cargo.toml names them and the image does not need them.
COPY .cargo .cargo
COPY Cargo.toml Cargo.lock ./
COPY clients/rust/Cargo.toml clients/rust/
RUN mkdir src benches clients/rust/src clients/rust/benches \
    && touch clients/rust/src/lib.rs clients/rust/benches/checks.rs \
    && echo 'fn main() {}' > build.rs \
    && cp build.rs src/main.rs \
    && cp build.rs benches/load.rs \
    && cp build.rs benches/instructions.rs \
    && touch src/lib.rs \
    && cargo auditable build --release --locked \
    && rm -r build.rs src

COPY . .
# COPY keeps the times of the files, which are older than the empty crate. Without `touch`, cargo would not build again.
RUN find build.rs src -type f -exec touch {} + \
    && cargo auditable build --release --locked

# The files of the image: the binary, the libraries that it needs, and the certificate authorities that verify databases and
# mail servers. No shell, no package manager.
FROM builder AS files
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /files
RUN install -D --mode=0755 /build/target/release/postern usr/local/bin/postern \
    && ldd usr/local/bin/postern | grep --only-matching '/[^ ]*' > /libraries \
    && xargs cp --parents --dereference --target-directory=. < /libraries \
    && cp --parents --dereference /etc/ssl/certs/ca-certificates.crt . \
    # What the packages of these files are called, in the form in which scanners read it, and their licenses.
    && mkdir --parents var/lib/dpkg/status.d \
    && for package in $(xargs dpkg-query --search < /libraries | cut --delimiter=: --fields=1 | sort --unique) ca-certificates; do \
        dpkg-query --status "$package" > "var/lib/dpkg/status.d/$package" \
        && cp --parents --dereference "/usr/share/doc/$package/copyright" . || exit 1; \
    done \
    && cp /etc/debian_version /etc/os-release etc/ \
    && echo 'hosts: files dns' > etc/nsswitch.conf \
    && printf '%s\n' 'root:x:0:0::/:/sbin/nologin' 'postern:x:10001:10001::/var/lib/postern:/sbin/nologin' > etc/passwd \
    && printf '%s\n' 'root:x:0:' 'postern:x:10001:' > etc/group \
    && install --directory --mode=0700 --owner=10001 --group=10001 /data/postern

FROM scratch
COPY --from=files /files /
# The only directory that Postern writes to: the embedded database and its master key, unless PostgreSQL is configured. It is
# no VOLUME: each start would leave a nameless one behind. It is the working directory so that `postern backup FILE` has a
# place to write to.
COPY --from=files --chown=10001:10001 /data /var/lib
WORKDIR /var/lib/postern
COPY LICENSE /usr/share/doc/postern/copyright
# The user has a number instead of a name, so that Kubernetes can check that it is not root (runAsNonRoot).
USER 10001:10001
ENV PATH=/usr/local/bin POSTERN_DATA_DIR=/var/lib/postern
# The default, loopback, cannot be reached from outside the container. Plaintext on these addresses wants
# POSTERN_ALLOW_PLAINTEXT=true, which states that a proxy, a mesh or the host protects the connections.
ENV POSTERN_GRPC_ADDR=0.0.0.0:50051 POSTERN_HTTP_ADDR=0.0.0.0:8080 POSTERN_OPS_ADDR=0.0.0.0:9090
EXPOSE 50051 8080 9090
# Whether the process answers. The database may be away meanwhile: to restart every replica would not bring it back.
HEALTHCHECK --interval=10s --timeout=5s --start-period=40s --retries=3 CMD ["postern", "healthcheck", "--live"]
ENTRYPOINT ["postern"]
CMD ["serve"]
# scripts/image says what they are. They come last, because each commit has other ones.
ARG VERSION=unknown REVISION=unknown CREATED=unknown
LABEL org.opencontainers.image.title="Postern" \
    org.opencontainers.image.description="An authentication service: accounts, passwords and JWT sessions behind gRPC and REST" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"
