//! Renders the pages from `templates/pages`. Each page is complete: it loads nothing, allows no script, and has the
//! security headers that it needs. The texts are in `copy.rs`.

use askama::Template;
use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderName, HeaderValue, StatusCode, header};

use crate::{body::ReadError, error::Error, http::refusal::ErrorResponse};

use super::{
    copy::{self, FormWords, NoticeWords},
    form::{FormError, NEW_PASSWORD, PasswordError, REPEAT_PASSWORD, Token},
    link::Link,
    outcome::{FormState, Notice, RequestState},
};

/// The style of all pages. It is inline, so a page needs no second request.
const STYLE: &str = include_str!("../../../templates/pages/style.css");
const OPENER_POLICY: HeaderName = HeaderName::from_static("cross-origin-opener-policy");

/// The options of the pages.
#[derive(Debug, Clone)]
pub struct PageOptions {
    /// The name of the platform, which is the heading of every page.
    pub service_name: String,
    /// The minimum length of a new password, in characters. It is only shown; the domain checks it.
    pub min_password_length: usize,
}

/// Renders the pages. Contains the parts that all of them share.
#[derive(Debug)]
pub struct PageRenderer {
    service_name: String,
    min_password_length: usize,
    style: &'static str,
    security_policy: HeaderValue,
}

impl PageRenderer {
    pub fn new(options: &PageOptions) -> Result<Self, Error> {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, STYLE.as_bytes());
        // The policy allows the style by its hash (CSP Level 3 §6.7.3.3), so no injected style applies.
        let security_policy = format!(
            "default-src 'none'; style-src 'sha256-{}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
            BASE64_STANDARD.encode(digest)
        );
        Ok(Self {
            service_name: options.service_name.clone(),
            min_password_length: options.min_password_length,
            style: STYLE,
            security_policy: HeaderValue::try_from(security_policy).map_err(Error::internal)?,
        })
    }

    /// Renders the form of a link.
    pub fn form(&self, link: Link, token: &Token, state: &FormState) -> Response {
        let (status, seconds) = match state {
            FormState::Fresh => (StatusCode::OK, None),
            FormState::Refused(_) => (StatusCode::BAD_REQUEST, None),
            FormState::TryAgain { status, seconds } => (*status, Some(*seconds)),
        };
        let page = FormPage {
            site: self,
            words: FormWords::of(link, &self.service_name),
            // Relative, so that a proxy may add a path prefix. It has no query, so that the token leaves the URL.
            action: link.path().trim_start_matches('/'),
            token: token.as_str(),
            retry_message: seconds.map(|seconds| copy::retry_message(link, seconds)),
            inputs: match link {
                Link::VerifyEmail | Link::ConfirmEmailChange => Vec::new(),
                Link::ResetPassword => self.password_inputs(state),
            },
        };
        let mut response = self.respond(status, page.render());
        if let Some(seconds) = seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// Renders the form that asks for a link for a new password.
    pub fn request(&self, state: &RequestState) -> Response {
        let (status, seconds) = match state {
            RequestState::Fresh => (StatusCode::OK, None),
            RequestState::NoAddress => (StatusCode::BAD_REQUEST, None),
            RequestState::TryAgain { status, seconds } => (*status, Some(*seconds)),
        };
        let page = RequestPage {
            site: self,
            words: FormWords::of_request(&self.service_name),
            action: Link::ResetPassword.path().trim_start_matches('/'),
            retry_message: seconds.map(|seconds| copy::retry_message(Link::VerifyEmail, seconds)),
            problem: matches!(state, RequestState::NoAddress).then_some(copy::NO_ADDRESS),
        };
        let mut response = self.respond(status, page.render());
        if let Some(seconds) = seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// Renders a page without a form.
    pub fn notice(&self, notice: Notice) -> Response {
        let status = match notice {
            Notice::EmailVerified { .. }
            | Notice::EmailVerifiedBefore
            | Notice::ResetRequested
            | Notice::PasswordReset
            | Notice::EmailChanged { .. } => StatusCode::OK,
            Notice::InvalidLink(_) => StatusCode::BAD_REQUEST,
            Notice::EmailTaken => StatusCode::CONFLICT,
            Notice::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Notice::Unreadable(fault) => match fault {
                FormError::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
                FormError::Body(ReadError::TooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
                FormError::Body(ReadError::TooSlow) => StatusCode::REQUEST_TIMEOUT,
                FormError::Body(ReadError::Disconnected) | FormError::Malformed => StatusCode::BAD_REQUEST,
            },
            Notice::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        };
        let page = NoticePage {
            site: self,
            is_good: status.is_success(),
            request_id: if let Notice::Failed { request_id } = notice { request_id } else { None },
            words: NoticeWords::of(notice, &self.service_name),
        };
        self.respond(status, page.render())
    }

    fn respond(&self, status: StatusCode, page: askama::Result<String>) -> Response {
        let page = match page {
            Ok(page) => page,
            Err(error) => return ErrorResponse::from(Error::internal(error)).into_response(),
        };
        let mut response = Response::new(Body::from(page));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        for (name, value) in [
            (header::CONTENT_TYPE, "text/html; charset=utf-8"),
            (header::CACHE_CONTROL, "no-store"),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            // The URL of the link contains the token.
            (header::REFERRER_POLICY, "no-referrer"),
            (OPENER_POLICY, "same-origin"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert(header::CONTENT_SECURITY_POLICY, self.security_policy.clone());
        response
    }

    /// The two fields for a new password. They are empty: a typed password is never sent back.
    fn password_inputs(&self, state: &FormState) -> Vec<PasswordInput> {
        let mut new = PasswordInput {
            name: NEW_PASSWORD,
            label: "New password",
            hint: Some(copy::password_hint(self.min_password_length)),
            described_by: format!("{NEW_PASSWORD}-hint"),
            ..PasswordInput::default()
        };
        let mut repeat =
            PasswordInput { name: REPEAT_PASSWORD, label: "Repeat the new password", ..PasswordInput::default() };
        match state {
            FormState::Fresh | FormState::TryAgain { .. } => {}
            FormState::Refused(PasswordError::NotAccepted(reasons)) => {
                new.problems = reasons.iter().map(|reason| copy::refused(reason)).collect();
                new.described_by = format!("{NEW_PASSWORD}-error {NEW_PASSWORD}-hint");
                new.is_invalid = true;
                new.has_focus = true;
            }
            FormState::Refused(PasswordError::NotTheSame) => {
                repeat.problems = vec![copy::NOT_THE_SAME.to_owned()];
                repeat.described_by = format!("{REPEAT_PASSWORD}-error");
                repeat.is_invalid = true;
                // It is unknown which one was mistyped, so the focus goes to the first.
                new.described_by = format!("{REPEAT_PASSWORD}-error {NEW_PASSWORD}-hint");
                new.is_invalid = true;
                new.has_focus = true;
            }
        }
        vec![new, repeat]
    }
}

#[derive(Template)]
#[template(path = "pages/form.html")]
struct FormPage<'a> {
    site: &'a PageRenderer,
    words: FormWords,
    action: &'static str,
    token: &'a str,
    /// Why the button has to be pressed again.
    retry_message: Option<String>,
    inputs: Vec<PasswordInput>,
}

impl FormPage<'_> {
    fn is_refused(&self) -> bool {
        self.inputs.iter().any(|input| input.is_invalid)
    }

    fn has_failed(&self) -> bool {
        self.retry_message.is_some() || self.is_refused()
    }
}

#[derive(Template)]
#[template(path = "pages/request.html")]
struct RequestPage<'a> {
    site: &'a PageRenderer,
    words: FormWords,
    action: &'static str,
    /// Why the button has to be pressed again.
    retry_message: Option<String>,
    problem: Option<&'static str>,
}

impl RequestPage<'_> {
    fn has_failed(&self) -> bool {
        self.retry_message.is_some() || self.problem.is_some()
    }
}

#[derive(Default)]
struct PasswordInput {
    /// The name in the form, and the id in the page.
    name: &'static str,
    label: &'static str,
    hint: Option<String>,
    problems: Vec<String>,
    /// The ids of the texts that describe the field, for screen readers.
    described_by: String,
    is_invalid: bool,
    has_focus: bool,
}

#[derive(Template)]
#[template(path = "pages/notice.html")]
struct NoticePage<'a> {
    site: &'a PageRenderer,
    words: NoticeWords,
    is_good: bool,
    request_id: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    const TOKEN: &str = "AZaz09-_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    const HOSTILE: &str = "\"><script src=//evil.example>'&";

    fn site(service_name: &str) -> PageRenderer {
        let options = PageOptions { service_name: service_name.to_owned(), min_password_length: 8 };
        PageRenderer::new(&options).expect("a site")
    }

    /// Every page with its name. The arguments are the texts that are inserted into pages.
    fn all_pages(site: &PageRenderer, email: &str, reason: &str, request_id: &str) -> Vec<(&'static str, Response)> {
        let token = Token::of_query(&format!("token={TOKEN}")).expect("a token");
        let form = |link, state| site.form(link, &token, &state);
        let weak = || PasswordError::NotAccepted(vec![reason.to_owned()]);
        let busy = || FormState::TryAgain { status: StatusCode::TOO_MANY_REQUESTS, seconds: 300 };
        let unavailable = || FormState::TryAgain { status: StatusCode::SERVICE_UNAVAILABLE, seconds: 1 };
        let email = || Some(email.to_owned());
        vec![
            ("verify-form", form(Link::VerifyEmail, FormState::Fresh)),
            ("verify-retry", form(Link::VerifyEmail, unavailable())),
            ("verify-done", site.notice(Notice::EmailVerified { email: email() })),
            ("verify-done-without-address", site.notice(Notice::EmailVerified { email: None })),
            ("verify-invalid-link", site.notice(Notice::InvalidLink(Link::VerifyEmail))),
            ("reset-form", form(Link::ResetPassword, FormState::Fresh)),
            ("reset-weak", form(Link::ResetPassword, FormState::Refused(weak()))),
            ("reset-differ", form(Link::ResetPassword, FormState::Refused(PasswordError::NotTheSame))),
            ("reset-retry", form(Link::ResetPassword, busy())),
            ("reset-done", site.notice(Notice::PasswordReset)),
            ("reset-invalid-link", site.notice(Notice::InvalidLink(Link::ResetPassword))),
            ("change-form", form(Link::ConfirmEmailChange, FormState::Fresh)),
            ("change-retry", form(Link::ConfirmEmailChange, busy())),
            ("change-done", site.notice(Notice::EmailChanged { email: email() })),
            ("change-done-without-address", site.notice(Notice::EmailChanged { email: None })),
            ("change-taken", site.notice(Notice::EmailTaken)),
            ("change-invalid-link", site.notice(Notice::InvalidLink(Link::ConfirmEmailChange))),
            ("failed", site.notice(Notice::Failed { request_id: Some(request_id) })),
            ("failed-without-id", site.notice(Notice::Failed { request_id: None })),
            ("not-understood", site.notice(Notice::Unreadable(FormError::MediaType))),
            ("method-not-allowed", site.notice(Notice::MethodNotAllowed)),
        ]
    }

    async fn html(page: Response) -> String {
        let bytes = page.into_body().collect().await.expect("a body").to_bytes();
        String::from_utf8(bytes.to_vec()).expect("UTF-8")
    }

    fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
        let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("no {start} in {text}"));
        rest.split_once(end).unwrap_or_else(|| panic!("no {end} in {text}")).0
    }

    /// All values of an attribute.
    fn values<'a>(html: &'a str, attribute: &str) -> Vec<&'a str> {
        let start = format!(" {attribute}=\"");
        html.match_indices(&start).map(|(position, _)| between(&html[position..], &start, "\"")).collect()
    }

    #[tokio::test]
    async fn the_pages_match_their_snapshots() {
        let site = site("Wren & Sons");
        let reason = "is too easy to guess: This is similar to a commonly used password.";
        for (name, page) in all_pages(&site, "ada@example.com", reason, "0198f2ab-7c11-7d6e-9c34-1f2e3d4c5b6a") {
            let html = html(page).await.replace(STYLE, "…");
            insta::with_settings!({prepend_module_to_snapshot => false, omit_expression => true}, {
                insta::assert_snapshot!(name, html);
            });
        }
    }

    #[tokio::test]
    async fn a_page_allows_only_its_own_style() {
        for (name, page) in all_pages(&site("Postern"), "ada@example.com", "is short", "1") {
            let headers = page.headers().clone();
            let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
            assert_eq!(header("content-type"), "text/html; charset=utf-8");
            assert_eq!(header("cache-control"), "no-store");
            assert_eq!(header("x-content-type-options"), "nosniff");
            assert_eq!(header("referrer-policy"), "no-referrer");
            assert_eq!(header("cross-origin-opener-policy"), "same-origin");
            let html = html(page).await;
            let style = between(&html, "<style>", "</style>");
            let hash = BASE64_STANDARD.encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, style.as_bytes()));
            let policy = format!(
                "default-src 'none'; style-src 'sha256-{hash}'; form-action 'self'; frame-ancestors 'none'; \
                base-uri 'none'"
            );
            assert_eq!(header("content-security-policy"), policy, "{name}");
            for forbidden in
                ["<script", "http", "//", "url(", "@import", "<img", "<link", "<iframe", "<base", "javascript:"]
            {
                assert!(!html.contains(forbidden), "{name}: {forbidden}");
            }
            for inline in ["style", "src", "onclick", "onload", "onfocus", "onsubmit"] {
                assert!(values(&html, inline).is_empty(), "{name}: {inline}");
            }
        }
    }

    #[tokio::test]
    async fn every_page_has_what_screen_readers_need() {
        for (name, page) in all_pages(&site("Postern"), "ada@example.com", "is short", "1") {
            let is_good = page.status().is_success();
            let html = html(page).await;
            for once in ["<!doctype html>", "<html lang=\"en\">", "<header>", "<main>", "<h1>", "name=\"viewport\""] {
                assert_eq!(html.matches(once).count(), 1, "{name}: {once}");
            }
            let heading = between(&html, "<h1>", "</h1>");
            let outcome = if is_good { "" } else { "Error: " };
            assert_eq!(between(&html, "<title>", "</title>"), format!("{outcome}{heading} – Postern"), "{name}");

            let ids = values(&html, "id");
            assert!(ids.iter().all(|id| ids.iter().filter(|other| other == &id).count() == 1), "{name}: {ids:?}");
            let labels = values(&html, "for");
            for input in html.split("<input ").skip(1).filter(|input| !input.starts_with("type=\"hidden\"")) {
                let (input, _) = input.split_once('>').expect("an end");
                assert!(labels.contains(&between(input, " id=\"", "\"")), "{name}: {input}");
                assert!(input.contains(" autocomplete=\"new-password\"") && input.contains(" spellcheck=\"false\""));
                assert!(!input.contains(" value="), "{name}: {input}");
            }
            let described_by = values(&html, "aria-describedby");
            let pointed_at = values(&html, "href").into_iter().map(|href| href.trim_start_matches('#'));
            for id in described_by.into_iter().flat_map(|list| list.split(' ')).chain(labels.clone()).chain(pointed_at)
            {
                assert!(ids.contains(&id), "{name}: {id}");
            }
            assert_eq!(html.contains("<form"), html.contains("<button type=\"submit\">"), "{name}");
        }
    }

    #[tokio::test]
    async fn inserted_text_is_escaped() {
        for (name, page) in all_pages(&site(HOSTILE), HOSTILE, HOSTILE, HOSTILE) {
            let html = html(page).await;
            assert!(!html.contains("<script") && !html.contains("'&<") && !html.contains("\">&"), "{name}: {html}");
            assert!(html.contains("&#34;&#62;&#60;script src=//evil.example&#62;&#39;&#38;"), "{name}: {html}");
        }
    }
}
