//! Compiles the contract under `proto/` into Rust types, stubs and the descriptor set from which the server reads its access
//! rules. protox replaces protoc, so a build needs nothing but Rust.

use std::{env, error::Error, fmt::Write as _, fs, path::PathBuf};

use prost_reflect::{DescriptorPool, FieldDescriptor, MessageDescriptor, prost_types::FileDescriptorSet};

/// The files to compile. The compiler finds the files that they import.
const FILES: [&str; 5] = [
    "postern/auth/v1/account_service.proto",
    "postern/auth/v1/admin_service.proto",
    "postern/auth/v1/auth_service.proto",
    "postern/auth/v1/errors.proto",
    "postern/auth/v1/token_service.proto",
];

/// The file of Envoy's API with the service that decides about requests.
const ENVOY_FILE: &str = "envoy/service/auth/v3/external_auth.proto";

fn main() -> Result<(), Box<dyn Error>> {
    // tonic-prost-build gets descriptors, and so does not tell cargo about files.
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=third_party");

    let mut compiler = protox::Compiler::new(["proto", "third_party"])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    // The encoded form keeps our method options. `file_descriptor_set()` would drop them.
    let encoded = compiler.encode_file_descriptor_set();
    #[expect(clippy::disallowed_methods, reason = "cargo passes OUT_DIR to build scripts in the environment")]
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("contract.binpb"), &encoded)?;

    let pool = DescriptorPool::decode(encoded.as_slice())?;
    let secret_bearers: Vec<_> =
        pool.all_messages().filter(|message| message.fields().any(|field| is_secret(&field))).collect();
    fs::write(out.join("redacted_debug.rs"), redacting_debug(&secret_bearers)?)?;

    let descriptors: FileDescriptorSet = compiler.file_descriptor_set();
    tonic_prost_build::configure()
        .skip_debug(secret_bearers.iter().map(|message| message.full_name().to_owned()))
        .compile_fds(descriptors)?;

    let mut compiler = protox::Compiler::new(["third_party"])?;
    compiler.include_imports(true).open_file(ENVOY_FILE)?;
    fs::write(out.join("envoy.binpb"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .include_file("envoy_api.rs")
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        // A request holds the headers of another one, and so its token.
        .skip_debug(["."])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

fn is_secret(field: &FieldDescriptor) -> bool {
    let options = field.options();
    options.get_field_by_name("debug_redact").is_some_and(|value| value.as_bool() == Some(true))
}

/// Generates `Debug` for each message with a `debug_redact` field, which prost ignores. It prints the name of the field and
/// not its value.
fn redacting_debug(messages: &[MessageDescriptor]) -> Result<String, std::fmt::Error> {
    let mut code = String::new();
    for message in messages {
        let name = message.name();
        writeln!(code, "impl ::core::fmt::Debug for {name} {{")?;
        writeln!(code, "    fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {{")?;
        writeln!(code, "        f.debug_struct(\"{name}\")")?;
        for field in message.fields() {
            let field_name = field.name().to_owned();
            let value = if is_secret(&field) { "\"[redacted]\"".to_owned() } else { format!("self.{field_name}") };
            writeln!(code, "            .field(\"{field_name}\", &{value})")?;
        }
        writeln!(code, "            .finish()\n    }}\n}}")?;
    }
    Ok(code)
}
