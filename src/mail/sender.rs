//! The sender of mails. An operator configures it, and parsing makes sure that it cannot add other headers to a mail.

use lettre::message::Mailbox;

/// The sender of mails: an address, with or without a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sender(Mailbox);

/// The text is not a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be one address, such as Example <no-reply@example.com>")]
pub struct SenderError;

impl Sender {
    /// Parses `address` or `name <address>`.
    pub fn parse(text: &str) -> Result<Self, SenderError> {
        if text.chars().any(char::is_control) {
            return Err(SenderError);
        }
        let mailbox: Mailbox = text.parse().map_err(|_| SenderError)?;
        // lettre parses the first mailbox and ignores the rest.
        let is_complete = text.trim_end().ends_with(&format!("<{}>", mailbox.email));
        if is_complete || text.trim() == mailbox.email.to_string() { Self::checked(mailbox) } else { Err(SenderError) }
    }

    /// The sender with this name, which may be any text, and this address.
    pub fn named(name: &str, address: &str) -> Result<Self, SenderError> {
        if name.chars().any(char::is_control) {
            return Err(SenderError);
        }
        Self::checked(Mailbox::new(Some(name.to_owned()), address.parse().map_err(|_| SenderError)?))
    }

    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.0
    }

    /// Refuses an address that is not ASCII, because some mail servers do.
    fn checked(mailbox: Mailbox) -> Result<Self, SenderError> {
        let address: &str = mailbox.email.as_ref();
        if address.bytes().all(|byte| byte.is_ascii_graphic()) { Ok(Self(mailbox)) } else { Err(SenderError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_is_one_address_with_or_without_a_name() {
        for good in [
            "no-reply@example.com",
            "no-reply@localhost",
            "<no-reply@example.com>",
            "Example <no-reply@example.com>",
            " Example Inc. <no-reply@example.com> ",
            "\"Doe, Jane\" <jane@example.com>",
            "Café Zoë <no-reply@example.com>",
        ] {
            assert!(Sender::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "Example",
            "Example <>",
            "Example <no-reply>",
            "no-reply@",
            "a@example.com, b@example.com",
            "A <a@example.com>, B <b@example.com>",
            "a@example.com b",
            "A <a@example.com> b",
            "zoë@example.com",
            "a@bücher.example",
        ] {
            assert_eq!(Sender::parse(bad), Err(SenderError), "{bad}");
        }
    }
}
