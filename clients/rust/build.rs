//! Generates the messages and the stubs from the contract. protox replaces protoc, so a build needs nothing but Rust.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto", "third_party"])?;
    compiler.include_imports(true);
    compiler.open_files([
        "postern/auth/v1/account_service.proto",
        "postern/auth/v1/admin_service.proto",
        "postern/auth/v1/auth_service.proto",
        "postern/auth/v1/errors.proto",
        "postern/auth/v1/token_service.proto",
    ])?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
