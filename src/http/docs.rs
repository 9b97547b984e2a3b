//! The API as a page for people: Swagger UI, built into the binary, shows `/openapi.json`. The page loads nothing from
//! elsewhere. `templates/docs` has the files and their licence.

use axum::{
    Router,
    body::Body,
    response::Response,
    routing::{MethodRouter, get},
};
use http::{HeaderName, HeaderValue, StatusCode, header};

/// What the page may do: run our two scripts and our style sheet, show the images in the style sheet, and call this server.
const SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'";
const CACHED: (&str, &str) = ("cache-control", "public, max-age=3600");
const GZIP: (&str, &str) = ("content-encoding", "gzip");

/// The page with its files, and the addresses that lead somewhere else. Locations are relative, so that a proxy may add a
/// path prefix.
pub fn router() -> Router {
    let script = "text/javascript; charset=utf-8";
    Router::new()
        .route("/", leads_to("docs"))
        // A Well-Known URL for Changing Passwords (W3C): password managers open it.
        .route("/.well-known/change-password", leads_to("../reset-password"))
        .route(
            "/docs",
            file(
                include_bytes!("../../templates/docs/index.html"),
                "text/html; charset=utf-8",
                &[("content-security-policy", SECURITY_POLICY)],
            ),
        )
        .route("/docs/start.js", file(include_bytes!("../../templates/docs/start.js"), script, &[CACHED]))
        .route(
            "/docs/swagger-ui-bundle.js",
            file(include_bytes!("../../templates/docs/swagger-ui-bundle.js.gz"), script, &[CACHED, GZIP]),
        )
        .route(
            "/docs/swagger-ui.css",
            file(include_bytes!("../../templates/docs/swagger-ui.css.gz"), "text/css; charset=utf-8", &[CACHED, GZIP]),
        )
}

fn leads_to(place: &'static str) -> MethodRouter {
    get(move || async move { (StatusCode::FOUND, [(header::LOCATION, place)]) })
}

fn file(
    content: &'static [u8],
    content_type: &'static str,
    headers: &'static [(&'static str, &'static str)],
) -> MethodRouter {
    get(move || async move {
        let mut response = Response::new(Body::from(content));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        for (name, value) in headers {
            response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        response
    })
}
