//! The pages that links in mails open. A link only shows a form, because mail scanners open links too. The button of
//! the form calls an RPC through the gRPC layers, and the result is shown as a page. There is no script, no cookie and
//! no redirect. This file decides which RPC is called and which page shows each outcome; the texts are in `copy.rs`.

mod copy;
mod form;
mod link;
mod outcome;
mod view;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    response::Response,
    routing::get,
};
use http::{HeaderMap, HeaderName, Uri, request::Parts};
use prost::Message;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    error::Error,
    grpc,
    listen::ClientAddr,
    proto::{
        ConfirmEmailChangeRequest, ConfirmEmailChangeResponse, ErrorReason, RequestPasswordResetRequest,
        RequestPasswordResetResponse, ResetPasswordRequest, ResetPasswordResponse, User, VerifyEmailRequest,
        VerifyEmailResponse,
    },
};

use super::{call::call, refusal};

pub use self::view::PageOptions;
use self::{
    form::{Form, FormError, NEW_PASSWORD, PasswordError, Token},
    link::Link,
    outcome::{FormState, Notice, RequestState},
    view::PageRenderer,
};

/// The header of a W3C trace context, which connects the call of a page to the trace of a proxy.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Whether a page of the same origin made the request (W3C Fetch Metadata). Older browsers do not say.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// The RPC that mails a link for a new password.
const REQUEST_RESET: &str = "/postern.auth.v1.AccountService/RequestPasswordReset";
/// The retry delay if the status has none, in seconds.
const RETRY: u64 = 5;

/// A router that serves the pages through the gRPC layers.
pub fn router(grpc: &Router, options: &PageOptions) -> Result<Router, Error> {
    let pages = Arc::new(Pages { site: PageRenderer::new(options)?, grpc: grpc.clone() });
    let router = Link::ALL.into_iter().fold(Router::new(), |router, link| {
        let show = move |State(pages): State<Arc<Pages>>, uri: Uri| async move { pages.show(link, &uri) };
        let submit =
            move |State(pages): State<Arc<Pages>>, request: Request| async move { pages.submit(link, request).await };
        let refuse = |State(pages): State<Arc<Pages>>| async move { pages.site.notice(Notice::MethodNotAllowed) };
        router.route(link.path(), get(show).post(submit).fallback(refuse))
    });
    Ok(router.with_state(pages))
}

/// The state that the handlers of the pages share.
#[derive(Debug)]
struct Pages {
    site: PageRenderer,
    grpc: Router,
}

impl Pages {
    /// The form that a link opens. It calls no RPC, so the token is only checked when the button is pressed.
    fn show(&self, link: Link, uri: &Uri) -> Response {
        match Token::of_query(uri.query().unwrap_or_default()) {
            Some(token) => self.site.form(link, &token, &FormState::Fresh),
            // Password managers lead here (`docs.rs`), and so may an application.
            None if link == Link::ResetPassword && form::has_no_token(uri.query().unwrap_or_default()) => {
                self.site.request(&RequestState::Fresh)
            }
            None => self.site.notice(Notice::InvalidLink(link)),
        }
    }

    /// Handles the button of the form.
    ///
    /// There is no CSRF token, because there is no cookie: the token in the form is the only authority, and a caller
    /// who knows it does not need another person's browser.
    async fn submit(&self, link: Link, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let form = match Form::read(&parts.headers, body).await {
            Ok(form) => form,
            Err(fault) => return self.site.notice(Notice::Unreadable(fault)),
        };
        if let Some(email) = form.email().filter(|_| link == Link::ResetPassword) {
            return self.request_reset(&parts, email).await;
        }
        let Some(token) = form.token() else {
            return self.site.notice(Notice::InvalidLink(link));
        };
        let outcome = match link {
            Link::VerifyEmail => {
                let message = VerifyEmailRequest { token: token.as_str().to_owned() };
                let answer = self.call::<VerifyEmailResponse>(link.rpc_path(), &parts, &message).await;
                answer.map(|answer| Notice::EmailVerified { email: email_of(answer.user) })
            }
            Link::ResetPassword => match form.into_new_password() {
                Ok(password) => self.reset_password(&parts, &token, password).await,
                Err(fault) => return self.site.form(link, &token, &FormState::Refused(fault)),
            },
            Link::ConfirmEmailChange => {
                let message = ConfirmEmailChangeRequest { token: token.as_str().to_owned() };
                let answer = self.call::<ConfirmEmailChangeResponse>(link.rpc_path(), &parts, &message).await;
                answer.map(|answer| Notice::EmailChanged { email: email_of(answer.user) })
            }
        };
        match outcome {
            Ok(done) => self.site.notice(done),
            Err(status) => self.failed(link, &token, &status, &parts.headers),
        }
    }

    /// Asks for a mail with a link for a new password. The answer is the same for every address.
    ///
    /// A page of somebody else must not make its visitors' browsers ask for mails.
    async fn request_reset(&self, parts: &Parts, email: &str) -> Response {
        if parts.headers.get(FETCH_SITE).is_some_and(|site| !matches!(site.as_bytes(), b"same-origin" | b"none")) {
            return self.site.notice(Notice::Unreadable(FormError::Malformed));
        }
        let message = RequestPasswordResetRequest { email: email.to_owned() };
        match self.call::<RequestPasswordResetResponse>(REQUEST_RESET, parts, &message).await {
            Ok(RequestPasswordResetResponse {}) => self.site.notice(Notice::ResetRequested),
            Err(status) => match status.code() {
                Code::InvalidArgument => self.site.request(&RequestState::NoAddress),
                code @ (Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded) => {
                    let seconds = refusal::retry_after(&status).unwrap_or(RETRY);
                    self.site.request(&RequestState::TryAgain { status: refusal::http_status(code), seconds })
                }
                code => self.unexpected(REQUEST_RESET, code, &parts.headers),
            },
        }
    }

    async fn reset_password(
        &self,
        parts: &Parts,
        token: &Token,
        mut password: Zeroizing<String>,
    ) -> Result<Notice<'static>, Status> {
        let mut message =
            ResetPasswordRequest { token: token.as_str().to_owned(), new_password: std::mem::take(&mut *password) };
        let answer = self.call::<ResetPasswordResponse>(Link::ResetPassword.rpc_path(), parts, &message).await;
        message.new_password.zeroize();
        answer.map(|ResetPasswordResponse {}| Notice::PasswordReset)
    }

    /// Passes on the id, the trace and the client address of the request. The RPC does not use the other headers.
    async fn call<A: Message + Default>(
        &self,
        rpc_path: &str,
        parts: &Parts,
        message: &impl Message,
    ) -> Result<A, Status> {
        let mut metadata = HeaderMap::new();
        for name in [grpc::REQUEST_ID, TRACEPARENT] {
            if let Some(value) = parts.headers.get(&name) {
                metadata.insert(name, value.clone());
            }
        }
        let peer = parts.extensions.get::<ClientAddr>().copied();
        let answer = call(self.grpc.clone(), rpc_path, message, metadata, peer).await?;
        Ok(A::decode(answer).map_err(Error::internal)?)
    }

    /// The page for a failed call.
    fn failed(&self, link: Link, token: &Token, status: &Status, request: &HeaderMap) -> Response {
        if grpc::is_spent_link(status) {
            return self.site.notice(Notice::EmailVerifiedBefore);
        }
        let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
        if reason == grpc::reason_name(ErrorReason::OneTimeTokenInvalid) {
            return self.site.notice(Notice::InvalidLink(link));
        }
        if reason == grpc::reason_name(ErrorReason::EmailTaken) {
            return self.site.notice(Notice::EmailTaken);
        }
        match status.code() {
            Code::InvalidArgument => match refused_passwords(status) {
                problems if problems.is_empty() => self.site.notice(Notice::Unreadable(FormError::Malformed)),
                problems => self.site.form(link, token, &FormState::Refused(PasswordError::NotAccepted(problems))),
            },
            code @ (Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded) => {
                let seconds = refusal::retry_after(status).unwrap_or(RETRY);
                self.site.form(link, token, &FormState::TryAgain { status: refusal::http_status(code), seconds })
            }
            code => self.unexpected(link.rpc_path(), code, request),
        }
    }

    /// The page for a status that no other page is for.
    fn unexpected(&self, rpc: &str, code: Code, request: &HeaderMap) -> Response {
        let request_id = request.get(grpc::REQUEST_ID).and_then(|id| id.to_str().ok());
        // An internal error was logged where it happened. Any other status is unexpected.
        if code != Code::Internal {
            let code = grpc::code_name(code);
            tracing::error!(rpc, code, request_id, "a page has no text for this status");
        }
        self.site.notice(Notice::Failed { request_id })
    }
}

fn email_of(user: Option<User>) -> Option<String> {
    user.map(|user| user.email).filter(|email| !email.is_empty())
}

/// Why the new password was refused: the descriptions of the violations, which continue after the name of the field.
fn refused_passwords(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
    violations
        .into_iter()
        .filter(|violation| violation.field == NEW_PASSWORD)
        .map(|violation| violation.description)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use axum::{body::Body, routing::post};
    use http::{HeaderValue, Method, StatusCode, header};
    use http_body_util::{BodyExt, Full};
    use tower::ServiceExt;

    use super::*;
    use crate::{
        error::{FieldReason, FieldViolation, StoreError},
        http::pages::form::TOKEN,
    };

    const GOOD: &str = "AZaz09-_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    const PASSWORD: &str = "tin-whistle-77";
    const ID: &str = "0198f2ab-7c11-7d6e-9c34-1f2e3d4c5b6a";

    /// The head and the body of a call.
    type Call = (Parts, Vec<u8>);

    /// The pages in front of a gRPC service of the test, which records its calls.
    #[derive(Clone)]
    struct TestPages {
        pages: Router,
        calls: Arc<Mutex<Vec<Call>>>,
    }

    /// A page as the client received it.
    struct Page {
        status: StatusCode,
        headers: HeaderMap,
        html: String,
    }

    impl TestPages {
        /// Every RPC returns this answer.
        fn answering(answer: impl Fn() -> Result<Vec<u8>, Error> + Clone + Send + Sync + 'static) -> Self {
            let calls = Arc::new(Mutex::new(Vec::new()));
            let log = Arc::clone(&calls);
            let rpc = move |request: Request| async move {
                let (parts, body) = request.into_parts();
                let frame = body.collect().await.expect("a body").to_bytes();
                log.lock().unwrap_or_else(PoisonError::into_inner).push((parts, frame.to_vec()));
                match answer() {
                    Ok(message) => {
                        let length = u32::try_from(message.len()).expect("a short message").to_be_bytes();
                        let frame = [&[0][..], &length, &message].concat();
                        let trailers = HeaderMap::from_iter([(
                            HeaderName::from_static("grpc-status"),
                            HeaderValue::from_static("0"),
                        )]);
                        Response::new(Body::new(Full::from(frame).with_trailers(async { Some(Ok(trailers)) })))
                    }
                    Err(error) => Status::from(error).into_http::<tonic::body::Body>().map(Body::new),
                }
            };
            let grpc = Router::new().route("/postern.auth.v1.AccountService/{method}", post(rpc));
            let options = PageOptions { service_name: "Ada & Sons".to_owned(), min_password_length: 8 };
            Self { pages: router(&grpc, &options).expect("a router"), calls }
        }

        fn failing(error: impl Fn() -> Error + Clone + Send + Sync + 'static) -> Self {
            Self::answering(move || Err(error()))
        }

        /// Every RPC succeeds.
        fn succeeding() -> Self {
            let user = User { email: "ada@example.com".to_owned(), ..User::default() };
            let message = VerifyEmailResponse { user: Some(user) }.encode_to_vec();
            Self::answering(move || Ok(message.clone()))
        }

        async fn ask(&self, request: http::Request<Body>) -> Page {
            let response = self.pages.clone().oneshot(request).await.expect("infallible");
            let (parts, body) = response.into_parts();
            let html = body.collect().await.expect("a body").to_bytes();
            let html = String::from_utf8(html.to_vec()).expect("UTF-8");
            assert!(!html.contains("tin-whistle"), "no answer shows a password: {html}");
            Page { status: parts.status, headers: parts.headers, html }
        }

        async fn open(&self, link: Link, query: &str) -> Page {
            self.ask(http::Request::get(format!("{}?{query}", link.path())).body(Body::empty()).expect("a request"))
                .await
        }

        async fn send(&self, link: Link, fields: &[(&str, &str)]) -> Page {
            let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
            let request = http::Request::post(link.path())
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .header(grpc::REQUEST_ID, ID)
                .body(Body::from(body));
            self.ask(request.expect("a request")).await
        }

        /// Presses the button of a link's form. Every field is valid.
        async fn press(&self, link: Link) -> Page {
            let fields = [(TOKEN, GOOD), (NEW_PASSWORD, PASSWORD), (form::REPEAT_PASSWORD, PASSWORD)];
            self.send(link, if link == Link::ResetPassword { &fields } else { &fields[..1] }).await
        }

        fn call_count(&self) -> usize {
            self.calls.lock().unwrap_or_else(PoisonError::into_inner).len()
        }
    }

    impl Page {
        fn header(&self, name: impl header::AsHeaderName) -> &str {
            self.headers.get(name).map(|value| value.to_str().expect("ASCII")).unwrap_or_default()
        }

        fn title(&self) -> &str {
            between(&self.html, "<title>", "</title>")
        }
    }

    fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
        let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("no {start} in {text}"));
        rest.split_once(end).unwrap_or_else(|| panic!("no {end} in {text}")).0
    }

    fn weak() -> Error {
        Error::field(
            "new_password",
            FieldReason::TooWeak,
            "is too easy to guess: <b>\"This\"</b> is a common password.",
        )
    }

    fn throttled() -> Error {
        Error::Throttled { retry_after: Duration::from_millis(299_001) }
    }

    fn unavailable() -> Error {
        Error::StoreUnavailable(StoreError::Unavailable("gone".into()))
    }

    #[tokio::test]
    async fn opening_a_link_calls_no_rpc() {
        for link in Link::ALL {
            let pages = TestPages::succeeding();
            let page = pages.open(link, &format!("token={GOOD}")).await;
            assert_eq!(page.status, StatusCode::OK);
            assert!(page.html.contains(&format!(r#"<input type="hidden" name="token" value="{GOOD}">"#)));
            assert_eq!(pages.call_count(), 0, "{link:?}");
        }
    }

    #[tokio::test]
    async fn the_button_calls_its_rpc_once_with_only_the_allowed_headers() {
        for link in Link::ALL {
            let pages = TestPages::succeeding();
            let page = pages.press(link).await;
            assert_eq!(page.status, StatusCode::OK, "{}", page.html);
            assert!(!page.html.contains(GOOD) && !page.html.contains("<form"));
            assert_eq!(pages.call_count(), 1);
            let (parts, frame) = pages.calls.lock().expect("calls").remove(0);
            assert_eq!(parts.uri.path(), link.rpc_path());
            let sent = ResetPasswordRequest::decode(&frame[5..]).expect("a message");
            assert_eq!(sent.token, GOOD);
            assert_eq!(sent.new_password, if link == Link::ResetPassword { PASSWORD } else { "" });
        }

        let pages = TestPages::succeeding();
        let mut request = http::Request::post("/verify-email").extension(ClientAddr(([192, 0, 2, 7], 4711).into()));
        for (name, value) in [
            ("content-type", "APPLICATION/x-www-form-urlencoded ; charset=UTF-8"),
            ("x-request-id", ID),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ("host", "evil.example"),
            ("x-forwarded-host", "evil.example"),
            ("x-forwarded-for", "198.51.100.1"),
            ("authorization", "Bearer stale"),
            ("cookie", "a=b"),
            ("origin", "https://evil.example"),
            ("grpc-timeout", "1n"),
        ] {
            request = request.header(name, value);
        }
        let page = pages.ask(request.body(Body::from(format!("token={GOOD}"))).expect("a request")).await;
        assert_eq!(page.status, StatusCode::OK);
        assert!(!page.html.contains("evil"));
        let (parts, _) = pages.calls.lock().expect("calls").remove(0);
        let mut names: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "te", "traceparent", "x-request-id"]);
        assert_eq!(
            parts.extensions.get::<ClientAddr>().map(|peer| peer.0.to_string()).as_deref(),
            Some("192.0.2.7:4711")
        );
    }

    #[tokio::test]
    async fn each_outcome_has_its_page() {
        type Case = (fn() -> Error, u16, &'static str, &'static str, bool);
        let cases: [Case; 10] = [
            (|| Error::OneTimeTokenInvalid, 400, "Error: This link no longer works", "", false),
            (|| Error::OneTimeTokenSpent, 200, "Your email address is already confirmed", "", false),
            (|| Error::EmailTaken, 409, "Error: This address is already in use", "", false),
            (unavailable, 503, "Error: Choose a new password", "1", true),
            (throttled, 429, "Error: Choose a new password", "300", true),
            (|| Error::DeadlineExceeded, 504, "Error: Choose a new password", "5", true),
            (weak, 400, "Error: Choose a new password", "", true),
            (|| FieldViolation::required("token").into(), 400, "Error: This request was not understood", "", false),
            (|| Error::internal("tulip"), 500, "Error: Something went wrong", "", false),
            (|| Error::RoleRequired, 500, "Error: Something went wrong", "", false),
        ];
        for (error, status, title, retry_after, has_form) in cases {
            let page = TestPages::failing(error).press(Link::ResetPassword).await;
            assert_eq!(page.status.as_u16(), status, "{:?}", error());
            assert_eq!(page.title(), format!("{title} – Ada &#38; Sons"));
            assert_eq!(page.header(header::RETRY_AFTER), retry_after);
            assert_eq!(page.html.contains(GOOD), has_form, "the token is kept for another try: {:?}", error());
            assert!(!page.html.contains("tulip"));
            assert_eq!(page.html.contains(ID), status == 500, "the request id is shown for internal errors only");
        }
    }

    #[tokio::test]
    async fn a_refused_password_is_explained_at_its_field() {
        let page = TestPages::failing(weak).press(Link::ResetPassword).await;
        let html = page.html;
        let violation_message =
            "The new password is too easy to guess: &#60;b&#62;&#34;This&#34;&#60;/b&#62; is a common password.";
        assert_eq!(html.matches(violation_message).count(), 2, "in the summary and at the field: {html}");
        assert!(html.contains(r#"role="alert""#));
        assert!(html.contains(r##"<a href="#new_password">"##));
        let input = between(&html, r#"<input type="password" id="new_password""#, ">");
        for attribute in
            [r#"aria-invalid="true""#, r#"aria-describedby="new_password-error new_password-hint""#, "autofocus"]
        {
            assert!(input.contains(attribute), "{input}");
        }
        assert!(!between(&html, r#"id="repeat_password""#, ">").contains("aria-invalid"));

        let several = || {
            let violation = |field, text| FieldViolation::new(field, FieldReason::TooShort, text);
            Error::InvalidFields(vec![
                violation("new_password", "is A"),
                violation("new_password", "is B"),
                violation("token", "is C"),
            ])
        };
        let html = TestPages::failing(several).press(Link::ResetPassword).await.html;
        assert!(html.contains("The new password is A.") && html.contains("The new password is B."));
        assert!(!html.contains("is C"));
    }

    #[tokio::test]
    async fn passwords_that_differ_are_not_sent() {
        let pages = TestPages::succeeding();
        let fields = [(TOKEN, GOOD), (NEW_PASSWORD, PASSWORD), (form::REPEAT_PASSWORD, "tin-whistle-78")];
        let page = pages.send(Link::ResetPassword, &fields).await;
        assert_eq!(page.status, StatusCode::BAD_REQUEST);
        assert_eq!(page.html.matches("The two passwords are not the same.").count(), 2);
        assert_eq!(pages.call_count(), 0);
    }

    #[tokio::test]
    async fn text_that_is_not_a_token_is_not_shown_again() {
        let longer = format!("{GOOD}A");
        for token in ["", "tulip", "\"><script>alert(1)</script>", "'tulip\u{0}", &longer, &format!("<{}", &GOOD[1..])]
        {
            let pages = TestPages::succeeding();
            let query = form_urlencoded::Serializer::new(String::new()).append_pair(TOKEN, token).finish();
            let opened = pages.open(Link::VerifyEmail, &query).await;
            let sent = pages.send(Link::ConfirmEmailChange, &[(TOKEN, token)]).await;
            let without = pages.open(Link::ConfirmEmailChange, "").await;
            for page in [opened, sent, without] {
                assert_eq!(page.status, StatusCode::BAD_REQUEST);
                assert!(page.title().starts_with("Error: This link no longer works"));
                assert!(token.is_empty() || !page.html.contains(token));
                assert!(!page.html.contains("tulip") && !page.html.contains(&GOOD[1..]));
            }
            assert_eq!(pages.call_count(), 0);
        }
    }

    #[tokio::test]
    async fn only_short_forms_are_accepted() {
        let pages = TestPages::succeeding();
        let form = "application/x-www-form-urlencoded";
        let long = format!("token={GOOD}&x={}", "x".repeat(64 * 1024));
        let twice = format!("token={GOOD}&token={GOOD}");
        for (content_type, body, status) in [
            ("application/json", "{}", 415),
            ("text/plain", "token=", 415),
            ("multipart/form-data; boundary=x", "", 415),
            ("", "", 415),
            (form, long.as_str(), 413),
            (form, twice.as_str(), 400),
        ] {
            let request = http::Request::post("/verify-email").header(header::CONTENT_TYPE, content_type);
            let page = pages.ask(request.body(Body::from(body.to_owned())).expect("a request")).await;
            assert_eq!(page.status.as_u16(), status, "{content_type}");
            assert_eq!(page.title(), "Error: This request was not understood – Ada &#38; Sons");
        }
        assert_eq!(pages.call_count(), 0);
    }

    #[tokio::test]
    async fn head_is_answered_and_other_methods_are_refused() {
        let pages = TestPages::succeeding();
        let uri = format!("/reset-password?token={GOOD}");
        let head = pages.ask(http::Request::head(&uri).body(Body::empty()).expect("a request")).await;
        assert_eq!((head.status, head.html.as_str()), (StatusCode::OK, ""));
        assert_eq!(head.header(header::CONTENT_TYPE), "text/html; charset=utf-8");
        for method in [Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS] {
            let page = pages
                .ask(http::Request::builder().method(method).uri(&uri).body(Body::empty()).expect("a request"))
                .await;
            assert_eq!(page.status, StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(page.header(header::ALLOW), "GET,HEAD,POST");
        }
        assert_eq!(pages.call_count(), 0);
    }
}
