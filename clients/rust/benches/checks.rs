//! How many checks a second one core makes: `tests/libraries/stage cargo bench -p postern-client`. It is no test.

use std::time::Instant;

use postern_client::{Credentials, FeedOptions, RevocationFeed, TokenSource, Verifier, WhenUnknown, endpoint};

const CHECKS: u32 = 200_000;
const FIRST_CHECKS: u32 = 2_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let postern = endpoint(format!("http://{}", variable("POSTERN_GRPC_ADDR")?))?.connect_lazy();
    let credentials = Credentials::Service {
        client_id: variable("POSTERN_CLIENT_ID")?,
        client_secret: variable("POSTERN_CLIENT_SECRET")?,
    };
    let tokens = TokenSource::new(postern.clone(), credentials);
    let token = tokens.token().await?;
    let feed = RevocationFeed::start(postern, tokens, FeedOptions::new(WhenUnknown::Refuse));
    feed.ready().await;
    let builder = || -> Result<_, String> {
        Ok(Verifier::builder(variable("POSTERN_ISSUER")?, variable("POSTERN_AUDIENCE")?).revocations(feed.clone()))
    };

    let verifier = builder()?.build()?;
    verifier.verify(&token).await?;
    let started = Instant::now();
    for _ in 0..CHECKS {
        verifier.verify(&token).await?;
    }
    let again = f64::from(CHECKS) / started.elapsed().as_secs_f64();

    // Each is another text, so none of them was seen before. The signature does not fit, which costs as much to find out.
    let started = Instant::now();
    for number in 0..FIRST_CHECKS {
        let (head, signature) = token.rsplit_once('.').ok_or("no token")?;
        let (header, _) = head.split_once('.').ok_or("no token")?;
        let _ = verifier.verify(&format!("{header}.{number:08}.{signature}")).await;
    }
    let first = f64::from(FIRST_CHECKS) / started.elapsed().as_secs_f64();
    println!("{again:.0} checks/s of a token seen before, {first:.0} checks/s of a new one");
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the stage passes its addresses in the environment")]
fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is missing: run tests/libraries/stage"))
}
