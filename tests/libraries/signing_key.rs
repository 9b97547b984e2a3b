//! Prints a private signing key of a SQLite database as PEM (PKCS #8), so that `vectors.py` can sign what Postern never
//! would: `signing_key DATABASE KID`. Only tests use it; whoever has the master key could do the same.

use std::{error::Error, path::PathBuf};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use postern::{
    database_url::{DatabaseUrl, key_beside},
    domain::{master_key::MasterKey, signing_key::unseal},
    store::{Migrate, connect},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [database, kid] = arguments.as_slice() else {
        return Err("usage: signing_key DATABASE KID".into());
    };
    let database = PathBuf::from(database);
    let master = MasterKey::parse(std::fs::read_to_string(key_beside(&database))?.trim())?;
    let store = connect(&DatabaseUrl::Sqlite(database), Migrate::Check).await?;
    let keys = store.signing_keys().await?;
    let key = keys.iter().find(|key| key.kid == *kid).ok_or("the database has no such key")?;
    let unsealed = unseal(&key.sealed_private_key, &key.kid, &key.algorithm, &master)?;
    let pkcs8 = unsealed.ok_or("the key was not encrypted with this master key")?;
    println!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----", BASE64_STANDARD.encode(&pkcs8));
    Ok(())
}
