//! REST over gRPC: serves each route of the contract (`routes.rs`) and transcodes by its descriptor. A REST call
//! becomes a gRPC call that passes the same layers as those of gRPC clients, so there is no second policy and no code
//! for a route.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    extract::{RawPathParams, Request, rejection::RawPathParamsRejection},
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter, on},
};
use http::{HeaderMap, HeaderValue, header};
use hyper::body::Body as _;
use prost_reflect::{DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value};

use crate::{
    body::ReadError,
    error::{Error, FieldReason, FieldViolation, MOST_VIOLATIONS},
    grpc::MAX_MESSAGE,
    listen::ClientAddr,
};

use super::{
    call::{self, call},
    json,
    refusal::ErrorResponse,
    routes::{BodyBinding, Route},
};

/// What some editors and libraries write before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A router that serves the routes through the gRPC layers.
pub fn router(routes: Vec<Route>, grpc: &Router) -> Result<Router, Error> {
    let mut by_template: HashMap<String, MethodRouter> = HashMap::new();
    for route in routes {
        let filter = MethodFilter::try_from(route.method.clone()).map_err(Error::internal)?;
        let template = route.template.clone();
        let (route, grpc) = (Arc::new(route), grpc.clone());
        let handler = move |parameters: Result<RawPathParams, RawPathParamsRejection>, request: Request| {
            let (route, grpc) = (Arc::clone(&route), grpc.clone());
            async move {
                let parameters =
                    parameters.map_err(|_| Error::field("", FieldReason::Malformed, "the path is not UTF-8"))?;
                let answer = serve(&route, &parameters, request, grpc).await;
                answer.map_err(|refused| refused.in_json_names(&route.rpc.input()))
            }
        };
        let methods = by_template.remove(&template).unwrap_or_default();
        by_template.insert(template, methods.merge(on(filter, handler)));
    }
    Ok(by_template.into_iter().fold(Router::new(), |router, (template, methods)| router.route(&template, methods)))
}

async fn serve(
    route: &Route,
    parameters: &RawPathParams,
    request: Request,
    grpc: Router,
) -> Result<Response, ErrorResponse> {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default();
    // Before the body is asked for, which tells a client that expects 100-continue to go on.
    check_parameters(route, query)?;
    let object = read_body(route, &parts.headers, body).await?;
    let message = bind(route, parameters, query, object)?;

    let peer = parts.extensions.get::<ClientAddr>().copied();
    let answer = call(grpc, &route.rpc_path(), &message, forwarded(&parts.headers), peer).await?;
    to_json(&answer, route.rpc.output())
}

/// Reads the body as a JSON object, or for [`BodyBinding::Field`] as the value of that field. The body of a route
/// without one is read too: it is not ignored, because the client meant to send something (RFC 9110 §9.3.1).
async fn read_body(route: &Route, headers: &HeaderMap, body: Body) -> Result<Map<String, Value>, ErrorResponse> {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_json = content_type.is_some_and(is_json);
    // An empty body needs no content type. Where the headers tell that there is a body of another one, it is not read.
    if !is_json && !body.is_end_stream() && (content_type.is_some() || body.size_hint().lower() > 0) {
        return Err(ErrorResponse::unsupported_media_type());
    }
    let bytes = call::read_body(body).await.map_err(|fault| match fault {
        ReadError::TooLarge => ErrorResponse::too_large(MAX_MESSAGE),
        ReadError::Disconnected => Error::field("", FieldReason::Malformed, "the body is incomplete").into(),
        ReadError::TooSlow => ErrorResponse::request_timeout(),
    })?;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    if !is_json {
        return Err(ErrorResponse::unsupported_media_type());
    }
    // RFC 8259 §8.1: a parser may skip a byte order mark.
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    let value = json::parse(text)
        .map_err(|error| Error::field("", FieldReason::Malformed, format!("the body is not JSON: {error}")))?;
    match (&route.body, value) {
        (BodyBinding::Field(field), value) => Ok(Map::from_iter([(field.clone(), value)])),
        (BodyBinding::Whole, Value::Object(object)) => Ok(object),
        (BodyBinding::Absent, Value::Object(object)) => match object.keys().next() {
            None => Ok(object),
            Some(name) => {
                Err(violation(name, FieldReason::UnknownField, "is not allowed: this route has no body").into())
            }
        },
        (BodyBinding::Whole | BodyBinding::Absent, _) => {
            Err(Error::field("", FieldReason::Malformed, "the body must be a JSON object").into())
        }
    }
}

fn is_json(content_type: &[u8]) -> bool {
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

/// Refuses a query string with anything that is not a parameter of the route.
fn check_parameters(route: &Route, query: &str) -> Result<(), Error> {
    let input = route.rpc.input();
    let takes_parameters = route.body != BodyBinding::Whole;
    let strange =
        form_urlencoded::parse(query.as_bytes()).find(|(name, _)| !takes_parameters || field(&input, name).is_none());
    match strange {
        None => Ok(()),
        Some((name, _)) => Err(violation(&name, FieldReason::UnknownField, "is not a parameter of this route")),
    }
}

/// Merges body, query string and path into the request message. The path takes precedence.
fn bind(
    route: &Route,
    parameters: &RawPathParams,
    query: &str,
    mut object: Map<String, Value>,
) -> Result<DynamicMessage, Error> {
    let input = route.rpc.input();
    for (name, text) in form_urlencoded::parse(query.as_bytes()) {
        // `check_parameters` has refused the others.
        let Some(field) = field(&input, &name) else { continue };
        let value = from_text(&field, &text);
        if !field.is_list() {
            if object.insert(field.json_name().to_owned(), value).is_some() {
                return Err(violation(&name, FieldReason::Duplicate, "is given twice"));
            }
        } else if let Value::Array(values) = object.entry(field.json_name()).or_insert_with(|| Value::Array(Vec::new()))
        {
            values.push(value);
        }
    }
    for (name, text) in parameters {
        // The body must not contain the field, under either of its names.
        if let Some(field) = field(&input, name) {
            object.remove(field.name());
            object.insert(field.json_name().to_owned(), Value::String(text.to_owned()));
        }
    }
    read_message(&input, object)
}

fn field(message: &MessageDescriptor, name: &str) -> Option<FieldDescriptor> {
    message.get_field_by_name(name).or_else(|| message.get_field_by_json_name(name))
}

/// A query parameter as a JSON value. Proto3 JSON accepts numbers as strings.
fn from_text(field: &FieldDescriptor, text: &str) -> Value {
    match (field.kind(), text) {
        (Kind::Bool, "true") => Value::Bool(true),
        (Kind::Bool, "false") => Value::Bool(false),
        _ => Value::String(text.to_owned()),
    }
}

/// Converts proto3 JSON to a message. Both spellings of a field name are accepted; an unknown field is refused by name.
fn read_message(descriptor: &MessageDescriptor, object: Map<String, Value>) -> Result<DynamicMessage, Error> {
    let read = |object: Map<String, Value>| {
        let options = DeserializeOptions::new().deny_unknown_fields(true);
        DynamicMessage::deserialize_with_options(descriptor.clone(), Value::Object(object), &options)
    };
    let mut names = HashSet::new();
    for name in object.keys() {
        // `refresh_token` and `refreshToken` are the same field.
        if let Some(field) = field(descriptor, name)
            && !names.insert(field.number())
        {
            return Err(violation(name, FieldReason::Duplicate, "is given twice"));
        }
    }
    read(object.clone()).map_err(|_quotes_the_value| {
        // The library's error does not name the field, and it quotes the value, which may be a password. So each field
        // is read on its own, and the error names every one that fails, with the expected type.
        let mut violations: Vec<_> = object
            .into_iter()
            .filter(|(name, value)| read(Map::from_iter([(name.clone(), value.clone())])).is_err())
            // One more than an error names, so that it says that there are more.
            .take(MOST_VIOLATIONS + 1)
            .map(|(name, _)| {
                let (reason, description) = match field(descriptor, &name) {
                    Some(field) => (FieldReason::Malformed, expected_type(&field)),
                    None => (FieldReason::UnknownField, "is not a field of this request"),
                };
                FieldViolation::new(name, reason, description)
            })
            .collect();
        if violations.is_empty() {
            violations.push(FieldViolation::new("", FieldReason::Malformed, "the fields contradict each other"));
        }
        Error::InvalidFields(violations)
    })
}

/// The JSON type of a field.
fn expected_type(field: &FieldDescriptor) -> &'static str {
    if field.is_map() {
        return "must be an object";
    }
    if field.is_list() {
        return "must be an array of values of its type";
    }
    match field.kind() {
        Kind::Bool => "must be true or false",
        Kind::String => "must be a string",
        Kind::Bytes => "must be a string in base64",
        Kind::Message(_) => "must be an object of its type, or a string for a time",
        Kind::Enum(_) => "must be the name of one of its values",
        Kind::Float | Kind::Double => "must be a number",
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 | Kind::Uint32 | Kind::Fixed32 => {
            "must be a whole number of 32 bits"
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 | Kind::Uint64 | Kind::Fixed64 => {
            "must be a whole number of 64 bits"
        }
    }
}

fn violation(field: &str, reason: FieldReason, description: &str) -> Error {
    Error::InvalidFields(vec![FieldViolation::new(field.to_owned(), reason, description)])
}

/// The headers that are passed on as metadata: all except those that describe the HTTP exchange or the gRPC exchange.
/// A client's `grpc-timeout` is passed on.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    headers
        .iter()
        .filter(|(name, _)| {
            let name = name.as_str();
            name == "grpc-timeout"
                || !name.starts_with("grpc-")
                    && !name.starts_with("content-")
                    && !name.starts_with("accept")
                    && !name.starts_with("if-")
                    && !name.starts_with("sec-")
                    && !matches!(
                        name,
                        "connection"
                            | "host"
                            | "keep-alive"
                            | "te"
                            | "trailer"
                            | "transfer-encoding"
                            | "upgrade"
                            | "expect"
                            | "proxy-authorization"
                            | "cookie"
                            | "range"
                            | "origin"
                            | "referer"
                    )
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// The message of a gRPC reply as JSON.
fn to_json(message: &[u8], output: MessageDescriptor) -> Result<Response, ErrorResponse> {
    let message = DynamicMessage::decode(output, message).map_err(Error::internal)?;
    let json = json::of_message(&message).map_err(Error::internal)?.to_string();
    let content_type = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(([content_type], json).into_response())
}
