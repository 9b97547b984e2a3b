//! The `postern` binary. All of its code is in the library.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    postern::cli::run().await
}
