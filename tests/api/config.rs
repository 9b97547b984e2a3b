//! Configuration: what is refused, how the error names it, and what is never printed.

use postern::{
    cli::Cli,
    config::{Config, ConfigError, check_variables},
    database_url::DatabaseUrl,
    mail::TransportSettings,
};

use crate::app::{MASTER_KEY, parse};

/// Every variable of the contract.
const CONTRACT: &str = "POSTERN_GRPC_ADDR POSTERN_HTTP_ADDR POSTERN_OPS_ADDR POSTERN_DATA_DIR POSTERN_DATABASE_URL \
     POSTERN_DATABASE_URL_FILE POSTERN_MASTER_KEY POSTERN_MASTER_KEY_FILE POSTERN_PREVIOUS_MASTER_KEY \
     POSTERN_PREVIOUS_MASTER_KEY_FILE POSTERN_ISSUER POSTERN_AUDIENCE POSTERN_PUBLIC_URL POSTERN_SIGNING_ALGORITHM \
     POSTERN_ACCESS_TOKEN_TTL POSTERN_REFRESH_TOKEN_TTL POSTERN_SESSION_MAX_LIFETIME POSTERN_REFRESH_RETRY_WINDOW \
     POSTERN_ARGON2_MEMORY_KIB POSTERN_ARGON2_ITERATIONS POSTERN_HASH_THREADS POSTERN_HASH_QUEUE \
     POSTERN_PASSWORD_MIN_LENGTH POSTERN_PASSWORD_MIN_SCORE POSTERN_LOGIN_MAX_FAILURES POSTERN_MAIL_URL \
     POSTERN_MAIL_FROM POSTERN_REQUIRE_VERIFIED_EMAIL POSTERN_CONCEAL_EXISTING_ACCOUNTS POSTERN_REFLECTION \
     POSTERN_MAIL_URL_FILE POSTERN_MAIL_PASSWORD_FILE POSTERN_SERVICE_NAME POSTERN_VERIFY_EMAIL_URL \
     POSTERN_RESET_PASSWORD_URL POSTERN_CONFIRM_EMAIL_CHANGE_URL POSTERN_MAIL_LIMIT_PER_ADDRESS \
     POSTERN_MAIL_LIMIT_PER_CLIENT POSTERN_TRUSTED_PROXIES POSTERN_TLS_CERT POSTERN_TLS_KEY POSTERN_TLS_CLIENT_CA \
     POSTERN_SERVICE_IDENTITIES POSTERN_ALLOW_PLAINTEXT \
     POSTERN_LOG POSTERN_LOG_FORMAT";

fn check(names: &[&str]) -> Result<(), ConfigError> {
    check_variables::<Cli>(names.iter().map(|name| (*name).to_owned()))
}

fn config(arguments: &[&str]) -> Config {
    parse(arguments).expect("a configuration")
}

#[test]
fn an_unknown_variable_is_refused_and_named() {
    for name in
        ["POSTERN_GRPC_ADRR", "POSTERN_", "POSTERN_PORTS", "POSTERN_SERVICE", "POSTERN_ISSUER_", "POSTERN_issuer"]
    {
        let refusal = check(&["PATH", "POSTERN_ISSUER", name]).expect_err(name);
        assert!(matches!(&refusal, ConfigError::UnknownVariable { name: named, .. } if named == name), "{refusal:?}");
        assert!(refusal.to_string().contains(name), "{refusal}");
    }
}

#[test]
fn variables_without_our_prefix_are_ignored() {
    let others = ["PATH", "HOME", "postern_issuer", "MY_POSTERN_ISSUER", "POSTERNS", "PGPASSWORD", ""];
    check(&others).expect("nothing of ours");
}

#[test]
fn every_variable_of_the_contract_is_known() {
    for name in CONTRACT.split_whitespace() {
        check(&[name]).expect(name);
    }
}

#[test]
fn kubernetes_variables_of_a_service_named_postern_are_accepted() {
    let links = [
        "POSTERN_SERVICE_HOST",
        "POSTERN_SERVICE_PORT",
        "POSTERN_SERVICE_PORT_GRPC",
        "POSTERN_PORT",
        "POSTERN_PORT_50051_TCP",
        "POSTERN_PORT_50051_TCP_PROTO",
        "POSTERN_PORT_50051_TCP_PORT",
        "POSTERN_PORT_50051_TCP_ADDR",
    ];
    check(&links).expect("accepted");
}

#[test]
fn no_secret_prints() {
    let url = "postgres://postern:hunter2@db.example/postern";
    let config = config(&[&format!("--master-key={MASTER_KEY}"), &format!("--database-url={url}")]);
    let location = config.store.database().expect("a location");
    let key = config.master_key.configured(&location).expect("a key").expect("one was given");
    for print in [format!("{config:?}"), format!("{config:#?}"), format!("{location:?}"), format!("{key:?}")] {
        assert!(!print.contains(MASTER_KEY), "{print}");
        assert!(!print.contains("hunter2") && !print.contains(url), "{print}");
    }
    assert!(format!("{config:?}").contains("localhost:8080"), "the rest is shown");

    // An error does not quote the value that it refuses.
    let bad_key = crate::config::config(&["--master-key=hunter2"]);
    let refusal = bad_key.master_key.configured(&location).expect_err("no key");
    assert!(!format!("{refusal} {refusal:?}").contains("hunter2"));
    let bad_url = crate::config::config(&["--database-url=mysql://u:hunter2@db"]).store.database().expect_err("no URL");
    assert!(!format!("{bad_url} {bad_url:?}").contains("hunter2"));
}

#[test]
fn reflection_is_served_beyond_loopback_only_if_it_is_asked_for() {
    let beyond = "--grpc-addr=0.0.0.0:50051";
    assert!(config(&["--grpc-addr=[::1]:50051"]).listen.serves_reflection());
    assert!(!config(&[beyond]).listen.serves_reflection());
    assert!(config(&[beyond, "--reflection"]).listen.serves_reflection());
    assert!(!config(&["--reflection=false"]).listen.serves_reflection());
}

#[test]
fn plaintext_beyond_loopback_requires_a_setting() {
    for (flag, variable) in [("--grpc-addr", "POSTERN_GRPC_ADDR"), ("--http-addr", "POSTERN_HTTP_ADDR")] {
        for address in ["127.0.0.1:0", "127.8.9.10:50051", "[::1]:50051"] {
            config(&[&format!("{flag}={address}")]).listen.validate().expect(address);
        }
        for address in ["0.0.0.0:5000", "[::]:5000", "192.0.2.1:0", "169.254.1.1:1"] {
            let argument = format!("{flag}={address}");
            let refusal = config(&[&argument]).listen.validate().expect_err(address);
            assert!(matches!(refusal, ConfigError::Plaintext(..)), "{refusal:?}");
            let text = refusal.to_string();
            assert!(text.starts_with(&format!("{variable}={address} ")), "{text}");
            assert!(text.contains("POSTERN_ALLOW_PLAINTEXT") && text.contains("POSTERN_TLS_CERT"), "{text}");
            config(&[&argument, "--allow-plaintext"]).listen.validate().expect("allowed");
            config(&[&argument, "--tls-cert=a", "--tls-key=b"]).listen.validate().expect("TLS");
            config(&[&argument, "--allow-plaintext=false"]).listen.validate().expect_err("not allowed");
        }
    }
}

#[test]
fn the_database_url_alone_names_the_database() {
    let location = |url: &str| config(&[&format!("--database-url={url}")]).store.database();
    for (url, file) in [("sqlite:a.db", "a.db"), ("sqlite:/var/a.db", "/var/a.db"), ("sqlite:///var/a.db", "/var/a.db")]
    {
        assert!(matches!(location(url), Ok(DatabaseUrl::Sqlite(path)) if path.to_str() == Some(file)), "{url}");
    }
    for url in ["postgres://localhost/postern", "postgresql://u@[::1]:5433/postern"] {
        assert!(matches!(location(url), Ok(DatabaseUrl::Postgres { .. })), "{url}");
    }
    let unusable = ["", "mysql://localhost/postern", "sqlite:", "sqlite::memory:", "sqlite:a.db?mode=ro", "a.db"];
    for url in unusable.into_iter().chain(["POSTGRES://localhost/postern"]) {
        assert!(matches!(location(url), Err(ConfigError::DatabaseUrl)), "{url}");
    }
    let embedded = config(&["--data-dir=/var/lib/postern"]).store.database();
    assert!(matches!(embedded, Ok(DatabaseUrl::Sqlite(path)) if path.to_str() == Some("/var/lib/postern/postern.db")));
    let both = parse(&["--database-url=sqlite:a.db", "--database-url-file=b"]).expect_err("one or the other");
    assert_eq!(both.kind(), clap::error::ErrorKind::ArgumentConflict);
}

#[test]
fn lifetimes_out_of_range_are_refused_by_name() {
    for (argument, variable) in [
        ("--access-token-ttl=0s", "POSTERN_ACCESS_TOKEN_TTL"),
        ("--access-token-ttl=25h", "POSTERN_ACCESS_TOKEN_TTL"),
        ("--refresh-token-ttl=500ms", "POSTERN_REFRESH_TOKEN_TTL"),
        ("--refresh-token-ttl=4000d", "POSTERN_REFRESH_TOKEN_TTL"),
        ("--session-max-lifetime=0s", "POSTERN_SESSION_MAX_LIFETIME"),
        ("--refresh-retry-window=61s", "POSTERN_REFRESH_RETRY_WINDOW"),
        ("--refresh-lost-answer-window=3651d", "POSTERN_REFRESH_LOST_ANSWER_WINDOW"),
        ("--issuer=", "POSTERN_ISSUER"),
        ("--issuer=http://a b", "POSTERN_ISSUER"),
        ("--issuer=urn:x", "POSTERN_ISSUER"),
        ("--issuer=https://a.example?b", "POSTERN_ISSUER"),
        ("--issuer=https://a.example#b", "POSTERN_ISSUER"),
        ("--audience=", "POSTERN_AUDIENCE"),
        ("--audience=a\nb", "POSTERN_AUDIENCE"),
    ] {
        let refusal = config(&[argument]).tokens.validate().expect_err(argument);
        assert!(refusal.to_string().starts_with(variable), "{refusal}");
    }
    for fine in [
        "--access-token-ttl=24h",
        "--refresh-retry-window=0s",
        "--refresh-retry-window=60s",
        "--issuer=https://a.example/b",
    ] {
        config(&[fine]).tokens.validate().expect(fine);
    }
    for nonsense in ["--access-token-ttl=15", "--access-token-ttl=-1s", "--refresh-token-ttl=soon"] {
        assert!(parse(&[nonsense]).is_err(), "{nonsense}");
    }
}

#[test]
fn hashing_settings_out_of_range_are_refused() {
    for nonsense in [
        "--argon2-memory-kib=7",
        "--argon2-memory-kib=1048577",
        "--argon2-iterations=0",
        "--hash-threads=0",
        "--hash-queue=0",
        "--password-min-length=0",
        "--password-min-score=5",
        "--database-max-connections=0",
        "--mail-limit-per-address=0",
        "--mail-limit-per-address=1001",
        "--mail-limit-per-client=-1",
    ] {
        assert!(parse(&[nonsense]).is_err(), "{nonsense}");
    }
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let config = config(&[]);
    assert_eq!(config.listen.grpc_addr.to_string(), "127.0.0.1:50051");
    assert!(config.listen.serves_reflection() && !config.listen.allow_plaintext);
    let tokens = &config.tokens;
    assert_eq!((tokens.issuer.as_str(), tokens.audience.as_str()), ("http://localhost:8080", "postern"));
    let lifetimes =
        [tokens.access_token_ttl, tokens.refresh_token_ttl, tokens.session_max_lifetime, tokens.refresh_retry_window];
    assert_eq!(lifetimes.map(|lifetime| lifetime.as_secs()), [15 * 60, 7 * 86_400, 90 * 86_400, 10]);
    assert!(!tokens.require_verified_email);
    let hasher = config.passwords.hasher_config(10);
    assert_eq!((hasher.memory_kib, hasher.iterations), (19_456, 2));
    assert_eq!(hasher.queue, 16 * hasher.threads);
    assert_eq!((config.passwords.password_min_length, config.passwords.password_min_score), (8, 2));
    assert!(matches!(config.mail.transport(), Ok(TransportSettings::Log)));
    assert!(!config.mail.conceal_existing_accounts);
    let limit = config.mail.address_limit();
    assert_eq!((limit.burst, limit.interval.as_secs()), (10, 6 * 60));
    assert_eq!(config.mail.client_limit().map(u32::from), Some(60));
}

#[test]
fn the_words_of_the_services_name_count_as_guessable() {
    let words = |name: &str| config(&[]).passwords.policy(name).common_words;
    assert_eq!(words("Postern"), ["postern", "postern"]);
    assert_eq!(words("Ångström-Cloud 9"), ["postern", "ångström", "cloud", "9"]);
}

#[test]
fn hashing_must_fit_into_the_memory_of_the_process() {
    let config = parse(&["--hash-threads=4", "--argon2-memory-kib=19456"]).expect("settings");
    let needed = 4 * 19_456 * 1_024;
    assert!(config.passwords.validate(None).is_ok());
    assert!(config.passwords.validate(Some(needed)).is_ok());
    let error = config.passwords.validate(Some(needed - 1)).expect_err("too little").to_string();
    assert!(error.contains("POSTERN_HASH_THREADS") && error.contains("POSTERN_ARGON2_MEMORY_KIB"), "{error}");
}
