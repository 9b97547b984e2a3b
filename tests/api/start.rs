//! Starting: what the first start creates and who can read it, and what prevents a start.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use postern::{
    app::{self, BuildError},
    config::ConfigError,
    domain::{env::Env, master_key::MasterKeyError},
    store::OpenError,
};
use tempfile::TempDir;

use crate::{
    app::{MASTER_KEY, configuration, parse},
    support::{Engine, with_database},
};

const POSTGRES: &str = "--database-url=postgres://nobody@127.0.0.1:1/nowhere";

async fn build(arguments: &[&str]) -> Result<(), BuildError> {
    let ports = ["--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0", "--ops-addr=127.0.0.1:0"];
    let arguments: Vec<_> = ports.iter().chain(&["--argon2-memory-kib=64"]).chain(arguments).copied().collect();
    app::build(&parse(&arguments).expect("a configuration"), Env::system()).await.map(drop)
}

async fn config_error(arguments: &[&str]) -> ConfigError {
    match build(arguments).await.expect_err("it should not start") {
        BuildError::Config(error) => error,
        other => panic!("{other:?}"),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).permissions().mode() & 0o7777
}

/// A directory that does not exist yet, as `--data-dir`.
fn data_dir(root: &TempDir) -> (PathBuf, String) {
    let directory = root.path().join("below/postern-data");
    let argument = format!("--data-dir={}", directory.display());
    (directory, argument)
}

#[tokio::test]
async fn a_first_start_creates_private_files_and_a_second_keeps_them() {
    let root = TempDir::new().expect("a directory");
    let (directory, argument) = data_dir(&root);
    build(&[&argument]).await.expect("a first start");
    assert_eq!(mode(&directory), 0o700);
    let key = directory.join("postern.db.key");
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).expect("the directory") {
        let path = entry.expect("an entry").path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        found.push(path);
    }
    assert!(found.contains(&key) && found.contains(&directory.join("postern.db")), "{found:?}");

    let text = fs::read_to_string(&key).expect("the key");
    build(&[&argument]).await.expect("a second start");
    assert_eq!(fs::read_to_string(&key).expect("the key"), text);
    assert_eq!(text.trim_end().len(), MASTER_KEY.len(), "32 bytes in base64");
}

#[tokio::test]
async fn a_migrated_database_without_signing_keys_gets_a_new_master_key() {
    let root = TempDir::new().expect("a directory");
    let (_, argument) = data_dir(&root);
    let config = parse(&[&argument]).expect("a configuration");
    app::migrate(&config.store).await.expect("a schema");
    app::migrate(&config.store).await.expect("the same schema");
    build(&[&argument]).await.expect("a first start: nothing was ever sealed under a key");
}

#[tokio::test]
async fn a_missing_master_key_is_named_and_not_replaced() {
    let root = TempDir::new().expect("a directory");
    let (directory, argument) = data_dir(&root);
    build(&[&argument]).await.expect("a first start");
    let (key, aside) = (directory.join("postern.db.key"), directory.join("aside"));
    fs::rename(&key, &aside).expect("the key");

    let refusal = config_error(&[&argument]).await;
    assert!(matches!(refusal, ConfigError::MasterKeyLost { .. }), "{refusal:?}");
    let text = refusal.to_string();
    assert!(text.contains("postern.db.key") && text.contains("POSTERN_MASTER_KEY"), "{text}");
    assert!(!key.exists(), "a new key would hide that the old one is lost");

    // The old key works when it is configured. Another one does not.
    build(&[&argument, &format!("--master-key-file={}", aside.display())]).await.expect("the old key");
    let other = build(&[&argument, &format!("--master-key={MASTER_KEY}")]).await.expect_err("another key");
    assert!(matches!(other, BuildError::Domain(_)), "{other:?}");
    assert!(other.to_string().contains("POSTERN_MASTER_KEY"), "{other}");
    fs::rename(&aside, &key).expect("the key");
    build(&[&argument]).await.expect("the key is back");
}

#[tokio::test]
async fn postgres_requires_a_valid_master_key() {
    assert!(matches!(config_error(&[POSTGRES]).await, ConfigError::MasterKeyMissing));
    let root = TempDir::new().expect("a directory");
    let file = root.path().join("key");
    for (text, expected) in [
        ("changeme", MasterKeyError::Malformed),
        ("", MasterKeyError::Malformed),
        ("AAECAwQFBgcICQoLDA0ODw==", MasterKeyError::Malformed),
        ("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", MasterKeyError::Placeholder),
        ("eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHg=", MasterKeyError::Placeholder),
    ] {
        fs::write(&file, text).expect("a file");
        let given = config_error(&[POSTGRES, &format!("--master-key={text}")]).await;
        let read = config_error(&[POSTGRES, &format!("--master-key-file={}", file.display())]).await;
        for (refusal, variable, in_file) in
            [(given, "POSTERN_MASTER_KEY ", false), (read, "POSTERN_MASTER_KEY_FILE ", true)]
        {
            assert!(refusal.to_string().starts_with(variable), "{refusal}");
            let ConfigError::MasterKey { name, source } = refusal else {
                panic!("{refusal:?}");
            };
            assert_eq!((name.ends_with("_FILE"), &source), (in_file, &expected), "{text}");
        }
    }
    let missing = config_error(&[POSTGRES, "--master-key-file=/no/such/file"]).await;
    assert!(missing.to_string().contains("POSTERN_MASTER_KEY_FILE: /no/such/file"), "{missing}");
}

#[tokio::test]
async fn an_impossible_configuration_stops_the_start() {
    let root = TempDir::new().expect("a directory");
    let (directory, argument) = data_dir(&root);
    let refusal = config_error(&[&argument, "--grpc-addr=0.0.0.0:0"]).await;
    assert!(matches!(refusal, ConfigError::Plaintext(..)), "{refusal:?}");
    let refusal = config_error(&[&argument, "--refresh-retry-window=61s"]).await;
    assert!(matches!(refusal, ConfigError::OutOfRange("POSTERN_REFRESH_RETRY_WINDOW", _)), "{refusal:?}");
    assert!(!directory.exists(), "a refused configuration creates no directory");
    let refusal = config_error(&["--data-dir=/proc/postern"]).await;
    assert!(matches!(refusal, ConfigError::Unwritable { .. }), "{refusal:?}");
}

#[tokio::test]
async fn an_address_in_use_is_named_in_the_error() {
    let root = TempDir::new().expect("a directory");
    let (_, argument) = data_dir(&root);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    for flag in ["--grpc-addr", "--http-addr", "--ops-addr"] {
        let refusal = build(&[&argument, &format!("{flag}={address}")]).await.expect_err("it is taken");
        assert!(matches!(refusal, BuildError::Listen { address: named, .. } if named == address), "{refusal:?}");
        assert!(refusal.to_string().contains(&address.to_string()), "{refusal}");
    }
}

#[tokio::test]
async fn serve_does_not_migrate_a_shared_database() {
    with_database(Engine::Postgres, async |database| {
        database.clear().await;
        let config = configuration(database, &[]);
        let refusal = app::build(&config, Env::system()).await.expect_err("there is no schema");
        assert!(matches!(refusal, BuildError::Store(OpenError::SchemaOutdated(1))), "{refusal:?}");
        assert!(refusal.to_string().contains("postern migrate"), "{refusal}");
        app::migrate(&config.store).await.expect("a schema");
        app::build(&config, Env::system()).await.expect("a service");
        // Its keys are encrypted now, so another master key cannot decrypt them.
        let other = format!("--master-key={}", MASTER_KEY.replace("AAECAw", "AwIBAA"));
        let refusal = app::build(&configuration(database, &[&other]), Env::system()).await.expect_err("another key");
        assert!(refusal.to_string().contains("POSTERN_MASTER_KEY"), "{refusal}");
    })
    .await;
}
