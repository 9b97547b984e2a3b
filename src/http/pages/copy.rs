//! The texts of the pages, for people who do not know Postern: what happened, and what they can do now. Causes that a
//! person cannot act on are not mentioned.

use super::{link::Link, outcome::Notice};

/// Shown if the two fields for the new password differ.
pub const NOT_THE_SAME: &str = "The two passwords are not the same.";

/// The texts of a page with a form.
pub struct FormWords {
    pub heading: &'static str,
    pub lead: String,
    pub button: &'static str,
    /// For a reader who did not ask for the mail.
    pub remark: &'static str,
}

impl FormWords {
    pub fn of(link: Link, service: &str) -> Self {
        match link {
            Link::VerifyEmail => Self {
                heading: "Confirm your email address",
                lead: format!(
                    "One more step for your {service} account: press the button to confirm that this \
                    address is yours."
                ),
                button: "Confirm my address",
                remark: "You did not sign up? Then close this page. Nothing will be confirmed.",
            },
            Link::ResetPassword => Self {
                heading: "Choose a new password",
                lead: format!(
                    "It will be the password of your {service} account. All your devices will be logged \
                    out; log in again with the new password."
                ),
                button: "Set the new password",
                remark: "You did not ask for this? Then close this page. Your password stays as it is.",
            },
            Link::ConfirmEmailChange => Self {
                heading: "Confirm your new email address",
                lead: format!(
                    "Press the button, and your {service} account changes to the address that this link \
                    was mailed to."
                ),
                button: "Change my address",
                remark: "You did not ask for this? Then close this page. No account will change.",
            },
        }
    }
}

impl FormWords {
    /// The texts of the page that asks for a link for a new password.
    pub fn of_request(service: &str) -> Self {
        Self {
            heading: "Reset your password",
            lead: format!(
                "Type the email address of your {service} account. A link is mailed to it, which lets you choose a new \
                password."
            ),
            button: "Mail me a link",
            remark: "Your password stays as it is until you choose a new one.",
        }
    }
}

/// Shown if the address could not be one.
pub const NO_ADDRESS: &str = "This is not an email address.";

/// The texts of a page without a form.
pub struct NoticeWords {
    pub heading: &'static str,
    /// What happened.
    pub lead: String,
    pub list: &'static [&'static str],
    /// What to do now.
    pub next: String,
}

/// Reasons shown to the user for why a link no longer works.
const INVALID_LINK_REASONS: [&str; 4] = [
    "It was used already. Each link works once.",
    "A newer mail has replaced it. Only the link in the newest one works.",
    "It has expired. Links work for a limited time.",
    "It was cut off on its way. Try to copy the whole link from the mail.",
];

impl NoticeWords {
    pub fn of(notice: Notice, service: &str) -> Self {
        let say = |heading, lead, next: &str| Self { heading, lead, next: next.to_owned(), list: &[] };
        match notice {
            Notice::EmailVerified { email } => say(
                "Your email address is confirmed",
                match email {
                    Some(email) => format!("{email} is now the confirmed address of your {service} account."),
                    None => format!("Your {service} account has a confirmed address now."),
                },
                "You can close this page and log in.",
            ),
            Notice::EmailVerifiedBefore => say(
                "Your email address is already confirmed",
                format!("This link has done its work: your {service} account has a confirmed address."),
                "You can close this page and log in.",
            ),
            Notice::ResetRequested => say(
                "Look into your mail",
                format!("If a {service} account has this address, a link for a new password is on its way to it."),
                "It may take a few minutes. Look for it among the unwanted mails too.",
            ),
            Notice::PasswordReset => say(
                "Your password is changed",
                format!("Your {service} account has its new password, and all devices were logged out."),
                "You can close this page and log in with the new password.",
            ),
            Notice::EmailChanged { email } => say(
                "Your email address is changed",
                match email {
                    Some(email) => format!("The address of your {service} account is now {email}."),
                    None => format!("Your {service} account has its new address."),
                },
                "You can close this page and log in with the new address.",
            ),
            Notice::InvalidLink(link) => Self {
                heading: "This link no longer works",
                lead: "There are a few reasons why that can be:".to_owned(),
                list: &INVALID_LINK_REASONS,
                next: advice_after_invalid_link(link, service),
            },
            Notice::EmailTaken => say(
                "This address is already in use",
                format!(
                    "Another {service} account has got this email address since the mail was sent. Your own \
                    account keeps the address that it has."
                ),
                "If that other account is yours too, you can log in to it. Otherwise log in as before and choose a \
                different address in your account.",
            ),
            Notice::Failed { .. } => say(
                "Something went wrong",
                "That is our fault, not yours, and it has been recorded.".to_owned(),
                "Please open the link in your mail again in a few minutes.",
            ),
            Notice::Unreadable(_) | Notice::MethodNotAllowed => say(
                "This request was not understood",
                "It is not what the form on this page sends, so nothing was changed.".to_owned(),
                "Please open the link in your mail again and use the button there.",
            ),
        }
    }
}

/// What to do now. The link may have been used already while the response was lost, so that case comes first.
fn advice_after_invalid_link(link: Link, service: &str) -> String {
    match link {
        Link::VerifyEmail => format!(
            "If you have confirmed your address before, just log in to {service}. If not, \
            ask for a new mail there."
        ),
        Link::ResetPassword => format!(
            "If you have just set a new password, log in to {service} with it. If not, \
            say there that you forgot your password, and a new link is mailed to you."
        ),
        Link::ConfirmEmailChange => format!(
            "If you have just changed your address, log in to {service} with the \
            new one. If not, log in with the old one and change it again in your account."
        ),
    }
}

/// What to do after a call that failed temporarily.
pub fn retry_message(link: Link, seconds: u64) -> String {
    let wait = match seconds {
        0..=10 => "a moment".to_owned(),
        11..=90 => plural(seconds, "second"),
        _ => plural(seconds.div_ceil(60), "minute"),
    };
    let again = match link {
        Link::VerifyEmail | Link::ConfirmEmailChange => "press the button again",
        // Passwords are not sent back with the page.
        Link::ResetPassword => "enter the new password again",
    };
    format!("This could not be done just now. Wait {wait}, then {again}.")
}

/// The rule for a new password.
pub fn password_hint(min_length: usize) -> String {
    let length = plural(min_length as u64, "character");
    format!("At least {length}. A few unrelated words are easy to remember and hard to guess.")
}

/// Why a new password was refused. Adds the full stop that most reasons lack.
pub fn refused(reason: &str) -> String {
    format!("The new password {}.", reason.trim_end_matches('.'))
}

fn plural(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_given_in_readable_units() {
        for (seconds, wait) in [
            (1, "a moment"),
            (10, "a moment"),
            (11, "11 seconds"),
            (90, "90 seconds"),
            (91, "2 minutes"),
            (300, "5 minutes"),
        ] {
            let retry_message = retry_message(Link::VerifyEmail, seconds);
            assert!(retry_message.contains(&format!("Wait {wait}, then press")), "{seconds}: {retry_message}");
        }
    }

    #[test]
    fn hints_and_refusals_are_correct_sentences() {
        assert!(password_hint(1).starts_with("At least 1 character."));
        assert!(password_hint(15).starts_with("At least 15 characters."));
        assert_eq!(refused("is short"), "The new password is short.");
        assert_eq!(refused("is weak: This is common."), "The new password is weak: This is common.");
    }
}
