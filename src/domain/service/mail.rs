//! Mail that an operation causes: new mails, and requests for mail to an address.

use std::net::IpAddr;

use crate::{
    domain::{
        account::Email,
        ids::{MailId, UserId},
        mail::{MailKind, NewMail},
        ports::Enqueued,
    },
    error::Error,
    trace::TraceParent,
};

use super::Service;

impl Service {
    /// A new mail, created now.
    pub(super) fn new_mail(&self, kind: MailKind, recipient: Email, user_id: Option<UserId>) -> Result<NewMail, Error> {
        let id = MailId(self.env.uuid()?);
        let (create_time, trace) = (self.env.now(), TraceParent::current());
        Ok(NewMail { id, kind, recipient, user_id, new_email: None, create_time, trace })
    }

    /// The mail to the owner of a taken address, where the deployment conceals which accounts exist.
    pub(super) fn owner_notice(&self, email: &Email) -> Result<Option<NewMail>, Error> {
        let conceal = self.mails.conceal_existing_accounts;
        conceal.then(|| self.new_mail(MailKind::AccountExists, email.clone(), None)).transpose()
    }

    /// Queues mail that was requested for an address. The account is not looked up here, so neither the answer nor its
    /// time reveals whether one exists. A caller over its limit gets the same answer and no mail.
    pub(super) async fn request_mail(
        &self,
        kind: MailKind,
        recipient: Email,
        client_ip: Option<IpAddr>,
    ) -> Result<(), Error> {
        self.store.ensure_reachable()?;
        if self.mails.limiter.check(client_ip).is_err() {
            count_withheld("client");
            return Ok(());
        }
        let mail = self.new_mail(kind, recipient, None)?;
        match self.store.request_mail(mail, self.mails.per_address).await? {
            Enqueued::Queued => {}
            Enqueued::OverLimit => count_withheld("address"),
        }
        Ok(())
    }
}

pub(super) fn count_withheld(limit: &'static str) {
    metrics::counter!("postern_mails_withheld_total", "limit" => limit).increment(1);
    tracing::debug!(limit, "a mail was caused too often and was not queued");
}
