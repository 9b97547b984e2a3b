//! Whom mails are from: the one address in a mail that somebody configures, parsed so that nothing can be smuggled into
//! the head of a mail with it.

use lettre::message::Mailbox;

/// Whom mails are from: a name, if any, and an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sender(Mailbox);

/// What is wrong with a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be one address, such as Example <no-reply@example.com>")]
pub struct SenderError;

impl Sender {
    /// Reads `address` or `name <address>`.
    pub fn parse(text: &str) -> Result<Self, SenderError> {
        if text.chars().any(char::is_control) {
            return Err(SenderError);
        }
        let mailbox: Mailbox = text.parse().map_err(|_| SenderError)?;
        // lettre reads the first mailbox and lets the rest be.
        let ends_well = text.trim_end().ends_with(&format!("<{}>", mailbox.email));
        if ends_well || text.trim() == mailbox.email.to_string() { Self::checked(mailbox) } else { Err(SenderError) }
    }

    /// The sender of that name, which may be any text, and address.
    pub fn named(name: &str, address: &str) -> Result<Self, SenderError> {
        if name.chars().any(char::is_control) {
            return Err(SenderError);
        }
        Self::checked(Mailbox::new(Some(name.to_owned()), address.parse().map_err(|_| SenderError)?))
    }

    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.0
    }

    /// Without non-ASCII in the address, which some mail servers would not take.
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
