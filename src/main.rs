//! The `service` binary: everything is in the library; see its layout there.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    postern::cli::run().await
}
