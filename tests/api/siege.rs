//! An attacker goes on for a day against one account, and its owner gets in at every hour.

use postern::{domain::mail::MailKind, proto::SignUpRequest};
use time::ext::NumericalDuration as _;

use crate::{
    app::TestApp,
    support::{Database, on_each_engine, wait_until},
};

on_each_engine![the_owner_gets_in_at_every_hour_of_a_day_of_attack];

const ADA: &str = "ada@example.com";

async fn the_owner_gets_in_at_every_hour_of_a_day_of_attack(database: &Database) {
    // The attacker has so many addresses that no limit of a client holds.
    let unlimited = ["--login-limit-per-client=0", "--mail-limit-per-client=0", "--sign-up-limit-per-client=0"];
    let app = TestApp::start(database, &unlimited).await;
    app.sign_up("ada").await;
    let again = SignUpRequest {
        username: "ada".to_owned(),
        email: ADA.to_owned(),
        password: "the attacker's choice".to_owned(),
    };
    for hour in 0..24 {
        for guess in 0..15 {
            assert!(app.try_log_in(ADA, &format!("guess {guess} of hour {hour}")).await.is_err());
        }
        for _ in 0..12 {
            app.resend_verification(ADA).await.expect("the same answer as always");
            app.request_reset(ADA).await.expect("the same answer as always");
            assert!(app.try_sign_up(again.clone()).await.is_err(), "the address is taken");
        }

        // The owner presses the button too. Whoever asked for it, the newest link works.
        app.request_reset(ADA).await.expect("the same answer as always");
        let token = newest_reset(&app, database).await;
        let password = format!("the owner's password at hour {hour}");
        app.reset_password(&token, &password).await.expect("a live link");
        app.try_log_in(ADA, &password).await.expect("the right password");
        app.pass(1.hours());
    }
    app.stop().await;
}

/// The token of the newest mail for a reset, when every mail has been sent.
async fn newest_reset(app: &TestApp<'_>, database: &Database) -> String {
    let waiting = "SELECT count(*) FROM mail_outbox WHERE dead_time IS NULL";
    wait_until("the outbox is empty", async || (database.sql.number(waiting).await == 0).then_some(())).await;
    let sent = app.mails.take();
    let mut resets = sent.into_iter().filter(|mail| mail.content.kind == MailKind::ResetPassword);
    let link = resets.next_back().expect("a mail for a reset").content.link.expect("a link");
    link.split_once("token=").expect("a token in the link").1.to_owned()
}
