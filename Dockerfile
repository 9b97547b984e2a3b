# syntax=docker/dockerfile:1

FROM rust:1.95-slim-bookworm AS builder
# The image has gcc and libc6-dev, which is all that the C in the tree asks for: aws-lc-sys is built with cc, not cmake,
# SQLite is bundled, and the contract is compiled by protox, not protoc.
WORKDIR /build

# The dependencies, in a layer of their own that stays until Cargo.toml or Cargo.lock changes: they are nearly all of the
# build's time. What they are built for is an empty crate of the same name and shape. Its benchmark stays empty: Cargo.toml
# names it, and the image has no use for the real one.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
    && echo 'fn main() {}' > build.rs \
    && cp build.rs src/main.rs \
    && cp build.rs benches/cheap_calls.rs \
    && touch src/lib.rs \
    && cargo build --release --locked \
    && rm -r build.rs src

COPY . .
# COPY keeps the files' times, which are older than the empty crate's; cargo would take that for the finished build.
RUN find build.rs src -type f -exec touch {} + \
    && cargo build --release --locked

FROM debian:bookworm-slim
# The roots that the mail server's certificate is checked against. The newest ones, so not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
# By number, so that Kubernetes can see that it is not root (runAsNonRoot).
RUN install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/postern
COPY --from=builder /build/target/release/postern /usr/local/bin/postern
USER 10001:10001
# All that it writes: the embedded database and its master key, where no PostgreSQL is configured.
ENV POSTERN_DATA_DIR=/var/lib/postern
VOLUME /var/lib/postern
# Loopback, the default, is of no use inside a container. Postern then starts only with TLS, or when told that something
# else protects the connection (POSTERN_ALLOW_PLAINTEXT=true).
ENV POSTERN_GRPC_ADDR=0.0.0.0:50051 POSTERN_HTTP_ADDR=0.0.0.0:8080 POSTERN_OPS_ADDR=0.0.0.0:9090
EXPOSE 50051 8080 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["postern", "healthcheck"]
ENTRYPOINT ["postern"]
CMD ["serve"]
