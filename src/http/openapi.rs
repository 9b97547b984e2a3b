//! The OpenAPI 3.1 description of the REST API, made from the contract. `postern openapi` prints it, and
//! `/openapi.json` serves it. Its descriptions are the comments of the proto files, and its paths are the routes of the
//! gateway.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use prost_reflect::{
    Cardinality, DescriptorPool, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor,
    prost_types::source_code_info::Location,
};
use serde_json::{Map, Value, json};

use crate::{
    error::Error,
    grpc::{LONGEST_CALL, MAX_MESSAGE},
    proto,
};

use super::routes::{self, BodyBinding, Route};

/// The responses of every operation except 200.
const REFUSALS: [(&str, &str); 8] = [
    ("400", "A field or the body is malformed, and `BadRequest` names each field. Or a precondition is not met."),
    ("401", "The credential is missing or not valid."),
    ("403", "The caller does not have the required role."),
    ("404", "There is no such resource, or the caller may not know of it."),
    ("409", "The resource already exists."),
    ("429", "There are too many requests. `Retry-After` says when to retry."),
    ("503", "The database is unavailable. `Retry-After` says when to retry."),
    ("504", "The deadline has passed."),
];

/// Additional responses of an operation with a body.
fn body_refusals() -> [(&'static str, String); 3] {
    [
        ("408", format!("The body did not arrive within {} s.", LONGEST_CALL.as_secs())),
        ("413", format!("The body is larger than {MAX_MESSAGE} bytes.")),
        ("415", "The body's content type is not application/json.".to_owned()),
    ]
}

/// The description of the contract of this build.
pub fn contract_document() -> Result<Value, Error> {
    let contract = DescriptorPool::decode(proto::CONTRACT).map_err(Error::internal)?;
    Ok(document(&routes::routes(&contract)?))
}

/// The description of a set of routes.
pub fn document(routes: &[Route]) -> Value {
    let mut schemas = Schemas::default();
    for route in routes {
        schemas.add_to_requests(&route.rpc.input());
    }
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    let mut tags = BTreeSet::new();
    for route in routes {
        let operation = operation(route, &mut schemas);
        let method = route.method.as_str().to_ascii_lowercase();
        paths.entry(route.template.as_str()).or_default().insert(method, operation);
        tags.insert(route.rpc.parent_service().name().to_owned());
    }
    let mut schemas = schemas.by_name;
    schemas.insert("Error".to_owned(), error_schema());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Postern",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Accounts, passwords and JWT sessions: the gRPC contract postern.auth.v1 as REST.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": tags.iter().map(|name| json!({"name": name})).collect::<Vec<_>>(),
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"accessToken": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    })
}

/// The schemas of messages.
#[derive(Default)]
struct Schemas {
    by_name: BTreeMap<String, Value>,
    /// The messages that requests contain, by their full names.
    in_requests: HashSet<String>,
}

impl Schemas {
    fn add_to_requests(&mut self, message: &MessageDescriptor) {
        if self.in_requests.insert(message.full_name().to_owned()) {
            for field in message.fields() {
                if let Kind::Message(message) = field.kind() {
                    self.add_to_requests(&message);
                }
            }
        }
    }

    /// The fields that every message of this type has in JSON: a request may leave every field out, and an answer has all
    /// whose absence means nothing else than their default (`json::of_message`).
    fn required(&self, message: &MessageDescriptor) -> Vec<String> {
        if self.in_requests.contains(message.full_name()) {
            return Vec::new();
        }
        let always_there = message.fields().filter(|field| !field.supports_presence());
        always_there.map(|field| field.json_name().to_owned()).collect()
    }
}

fn operation(route: &Route, schemas: &mut Schemas) -> Value {
    let (input, output) = (route.rpc.input(), route.rpc.output());
    let comment = comment(&route.rpc.parent_file(), route.rpc.path());
    let summary = comment.split("\n\n").next().unwrap_or_default().replace('\n', " ");
    let ok = json!({"description": "OK", "content": {"application/json": {"schema": reference(&output, schemas)}}});
    let mut responses = Map::from_iter([("200".to_owned(), ok)]);
    let mut refusals = REFUSALS.map(|(code, why)| (code, why.to_owned())).to_vec();
    if route.body != BodyBinding::Absent {
        refusals.extend(body_refusals());
    }
    for (code, why) in refusals {
        let content = json!({"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}});
        responses.insert(code.to_owned(), json!({"description": why, "content": content}));
    }
    let mut operation = Map::from_iter([
        ("operationId".to_owned(), json!(route.rpc.name())),
        ("tags".to_owned(), json!([route.rpc.parent_service().name()])),
        ("summary".to_owned(), json!(summary)),
        ("description".to_owned(), json!(comment)),
        ("responses".to_owned(), Value::Object(responses)),
    ]);
    let parameters = parameters(route, schemas);
    if !parameters.is_empty() {
        operation.insert("parameters".to_owned(), Value::Array(parameters));
    }
    let body = match &route.body {
        BodyBinding::Absent => None,
        BodyBinding::Whole => Some(reference(&input, schemas)),
        BodyBinding::Field(name) => input.get_field_by_name(name).map(|field| schema(&field, schemas)),
    };
    if let Some(body) = body {
        let body = json!({"required": true, "content": {"application/json": {"schema": body}}});
        operation.insert("requestBody".to_owned(), body);
    }
    if needs_token(route) {
        operation.insert("security".to_owned(), json!([{"accessToken": []}]));
    }
    Value::Object(operation)
}

/// Whether the RPC's `(access)` is anything but public.
fn needs_token(route: &Route) -> bool {
    crate::grpc::declared_access(&route.rpc) != proto::Access::Public
}

fn parameters(route: &Route, schemas: &mut Schemas) -> Vec<Value> {
    let in_path = |field: &FieldDescriptor| route.path_fields.iter().any(|name| name == field.name());
    let in_body = |field: &FieldDescriptor| match &route.body {
        BodyBinding::Absent => false,
        BodyBinding::Whole => true,
        BodyBinding::Field(name) => name == field.name(),
    };
    let fields: Vec<_> = route.rpc.input().fields().filter(|field| in_path(field) || !in_body(field)).collect();
    fields
        .iter()
        .map(|field| {
            let path = in_path(field);
            json!({
                "name": if path { field.name() } else { field.json_name() },
                "in": if path { "path" } else { "query" },
                "required": path,
                "description": comment(&field.parent_message().parent_file(), field.path()),
                "schema": schema(field, schemas),
            })
        })
        .collect()
}

/// A `$ref` to the schema of a message. Adds the schema if it does not exist yet.
fn reference(message: &MessageDescriptor, schemas: &mut Schemas) -> Value {
    if message.full_name() == "google.protobuf.Timestamp" {
        return json!({"type": "string", "format": "date-time"});
    }
    let name = message.name().to_owned();
    if !schemas.by_name.contains_key(&name) {
        // Reserved before the fields are read, so that a recursive message does not lead to endless recursion.
        schemas.by_name.insert(name.clone(), Value::Null);
        let properties: Map<String, Value> = message
            .fields()
            .map(|field| {
                let mut schema = schema(&field, schemas);
                let description = comment(&message.parent_file(), field.path());
                if let Some(schema) = schema.as_object_mut() {
                    schema.insert("description".to_owned(), Value::String(description));
                }
                (field.json_name().to_owned(), schema)
            })
            .collect();
        let mut schema = Map::from_iter([
            ("type".to_owned(), json!("object")),
            ("description".to_owned(), json!(comment(&message.parent_file(), message.path()))),
            ("properties".to_owned(), Value::Object(properties)),
            ("additionalProperties".to_owned(), json!(false)),
        ]);
        let required = schemas.required(message);
        if !required.is_empty() {
            schema.insert("required".to_owned(), json!(required));
        }
        schemas.by_name.insert(name.clone(), Value::Object(schema));
    }
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// The schema of a field in proto3 JSON.
fn schema(field: &FieldDescriptor, schemas: &mut Schemas) -> Value {
    let one = match field.kind() {
        Kind::Bool => json!({"type": "boolean"}),
        Kind::String if is_secret(field) => json!({"type": "string", "format": "password"}),
        Kind::String => json!({"type": "string"}),
        Kind::Bytes => json!({"type": "string", "format": "byte"}),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => json!({"type": "integer", "format": "int32"}),
        Kind::Uint32 | Kind::Fixed32 => json!({"type": "integer", "format": "int64", "minimum": 0}),
        // Proto3 JSON writes 64-bit numbers as strings.
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => json!({"type": "string", "format": "int64"}),
        Kind::Uint64 | Kind::Fixed64 => json!({"type": "string", "format": "uint64"}),
        Kind::Float | Kind::Double => json!({"type": "number"}),
        Kind::Enum(values) => {
            json!({"type": "string", "enum": values.values().map(|value| value.name().to_owned()).collect::<Vec<_>>()})
        }
        Kind::Message(message) => reference(&message, schemas),
    };
    if field.cardinality() == Cardinality::Repeated { json!({"type": "array", "items": one}) } else { one }
}

fn is_secret(field: &FieldDescriptor) -> bool {
    field.options().get_field_by_name("debug_redact").is_some_and(|value| value.as_bool() == Some(true))
}

/// The error response (AIP-193) that `refusal.rs` writes.
fn error_schema() -> Value {
    json!({
        "type": "object",
        "description": "Why a call failed. docs/errors.md lists the reasons.",
        "required": ["error"],
        "properties": {"error": {
            "type": "object",
            "required": ["code", "status", "message", "details"],
            "properties": {
                "code": {"type": "integer", "description": "The HTTP status."},
                "status": {"type": "string", "description": "The gRPC code."},
                "message": {"type": "string", "description": "A text for people. It may change."},
                "details": {
                    "type": "array",
                    "description": "google.rpc.ErrorInfo, BadRequest and RetryInfo. Programs should use the reason in ErrorInfo.",
                    "items": {"type": "object", "required": ["@type"], "properties": {"@type": {"type": "string"}}},
                },
            },
        }},
    })
}

/// The comment of an element of a proto file, without its indentation.
fn comment(file: &FileDescriptor, path: &[i32]) -> String {
    let source = file.file_descriptor_proto().source_code_info.as_ref();
    let location = source.and_then(|source| source.location.iter().find(|location| location.path == path));
    let text = location.map(Location::leading_comments).unwrap_or_default();
    let lines: Vec<_> = text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end()).collect();
    lines.join("\n").trim().to_owned()
}
