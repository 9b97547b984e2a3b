# syntax=docker/dockerfile:1

FROM rust:1.95-slim-bookworm AS builder
# The image has gcc and libc6-dev, which is enough: aws-lc-sys is built with cc and without CMake, SQLite is bundled, and
# the proto files are compiled by protox instead of protoc.
WORKDIR /build

# Builds the dependencies in a layer of their own, which is reused until Cargo.toml or Cargo.lock changes. They take most of
# the build's time. They are built for an empty crate with the same name and targets. The benchmarks stay empty, because
# Cargo.toml names them and the image does not need them.
COPY .cargo .cargo
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
    && echo 'fn main() {}' > build.rs \
    && cp build.rs src/main.rs \
    && cp build.rs benches/load.rs \
    && cp build.rs benches/instructions.rs \
    && touch src/lib.rs \
    && cargo build --release --locked \
    && rm -r build.rs src

COPY . .
# COPY keeps the times of the files, which are older than the empty crate. Without `touch`, cargo would not build again.
RUN find build.rs src -type f -exec touch {} + \
    && cargo build --release --locked

FROM debian:bookworm-slim
# The certificate authorities that verify the mail server. The version is not pinned, so that they are the newest ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
# The user has a number instead of a name, so that Kubernetes can check that it is not root (runAsNonRoot).
RUN install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/postern
COPY --from=builder /build/target/release/postern /usr/local/bin/postern
USER 10001:10001
# The only directory that Postern writes to: the embedded database and its master key, unless PostgreSQL is configured.
ENV POSTERN_DATA_DIR=/var/lib/postern
VOLUME /var/lib/postern
# The default, loopback, cannot be reached from outside the container. With these addresses Postern starts only if
# POSTERN_ALLOW_PLAINTEXT=true states that a proxy, a mesh or the host protects the connections.
ENV POSTERN_GRPC_ADDR=0.0.0.0:50051 POSTERN_HTTP_ADDR=0.0.0.0:8080 POSTERN_OPS_ADDR=0.0.0.0:9090
EXPOSE 50051 8080 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["postern", "healthcheck"]
ENTRYPOINT ["postern"]
CMD ["serve"]
