# Short names for the commands that the README and CI use; nothing here is needed to build or to test.

# Lists the recipes.
default:
    @just --list

# Runs the server with its embedded database in ./postern-data.
serve *arguments:
    cargo run --release -- serve {{ arguments }}

# Runs the tests on SQLite and PostgreSQL (--rust or --clients for one half, --nightly for the full size).
test *arguments:
    scripts/test {{ arguments }}

# Runs the tests of one client library: go, java, python, rust or typescript.
client language:
    scripts/test --client {{ language }}

# Runs what decides whether a change lands (--nightly for what also runs every night).
ci *arguments:
    .ci/run {{ arguments }}

# Builds the container image, and checks it and docker-compose.yml.
image *arguments:
    scripts/image {{ arguments }}

# Checks format, Rust lints and the contract.
lint:
    scripts/tools buf
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings
    target/tools/bin/buf lint
    target/tools/bin/buf format --diff --exit-code

# Formats the Rust code and the contract.
fmt:
    scripts/tools buf
    cargo fmt
    target/tools/bin/buf format --write

# Checks the contract, and that it breaks no client of the main branch.
proto:
    scripts/tools buf
    target/tools/bin/buf lint
    target/tools/bin/buf breaking --against '.git#branch=main'
