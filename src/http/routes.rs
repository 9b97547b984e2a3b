//! The REST routes of a contract: each `google.api.http` rule, read from the descriptor and checked. The gateway serves
//! them, and OpenAPI describes them.

use std::collections::HashSet;

use http::Method;
use prost_reflect::{DescriptorPool, Kind, MethodDescriptor, Value};

use crate::error::Error;

/// A REST route, as the `google.api.http` option of an RPC declares it.
#[derive(Debug, Clone)]
pub struct Route {
    pub method: Method,
    /// Such as `/v1/me/sessions/{session_id}`.
    pub template: String,
    /// The names in braces.
    pub path_fields: Vec<String>,
    pub body: BodyBinding,
    pub rpc: MethodDescriptor,
}

/// The part of the request message that is in the HTTP body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BodyBinding {
    /// None. The query string may set the fields that the path does not.
    Absent,
    /// All fields that the path does not set.
    Whole,
    /// One field. The query string may set the rest.
    Field(String),
}

impl Route {
    /// The path of the RPC in gRPC.
    pub fn rpc_path(&self) -> String {
        format!("/{}/{}", self.rpc.parent_service().full_name(), self.rpc.name())
    }
}

/// Reads the routes of a contract, ordered by template and method. Fails for two RPCs on one route, and for a rule that
/// the gateway cannot serve.
pub fn routes(contract: &DescriptorPool) -> Result<Vec<Route>, Error> {
    let mut routes = Vec::new();
    let mut taken = HashSet::new();
    for rpc in contract.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
        let Some(route) = route(&rpc)? else { continue };
        // `{a}` and `{b}` match the same paths.
        let shape: Vec<_> =
            route.template.split('/').map(|part| if part.starts_with('{') { "{}" } else { part }).collect();
        if !taken.insert((route.method.clone(), shape.join("/"))) {
            let (method, template) = (&route.method, &route.template);
            return Err(Error::internal(format!("{} is the second RPC on {method} {template}", rpc.full_name())));
        }
        routes.push(route);
    }
    routes.sort_by(|a, b| (&a.template, a.method.as_str()).cmp(&(&b.template, b.method.as_str())));
    Ok(routes)
}

fn route(rpc: &MethodDescriptor) -> Result<Option<Route>, Error> {
    let options = rpc.options();
    let rule = options.extensions().find(|(extension, _)| extension.full_name() == "google.api.http");
    let Some((_, Value::Message(rule))) = rule else { return Ok(None) };
    let unusable = |why: &str| Error::internal(format!("the google.api.http rule of {} {why}", rpc.full_name()));
    if rpc.is_client_streaming() || rpc.is_server_streaming() {
        return Err(unusable("is on a streaming RPC"));
    }
    let text = |name: &str| rule.get_field_by_name(name)?.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let (method, template) = [
        ("get", Method::GET),
        ("put", Method::PUT),
        ("post", Method::POST),
        ("delete", Method::DELETE),
        ("patch", Method::PATCH),
    ]
    .into_iter()
    .find_map(|(name, method)| Some((method, text(name)?)))
    .ok_or_else(|| unusable("has no path"))?;
    let mut path_fields = Vec::new();
    for part in template.split('/').filter(|part| part.contains(['{', '}', '*'])) {
        let name = part.strip_prefix('{').and_then(|part| part.strip_suffix('}')).unwrap_or_default();
        let is_string = rpc.input().get_field_by_name(name).is_some_and(|field| field.kind() == Kind::String);
        if !is_string {
            return Err(unusable("has a path part that is not a string field of the request"));
        }
        path_fields.push(name.to_owned());
    }
    let body = match text("body") {
        None => BodyBinding::Absent,
        Some(all) if all == "*" => BodyBinding::Whole,
        Some(field) if rpc.input().get_field_by_name(&field).is_some() => BodyBinding::Field(field),
        Some(_) => return Err(unusable("binds the body to an unknown field of the request")),
    };
    Ok(Some(Route { method, template, path_fields, body, rpc: rpc.clone() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;

    /// The routes of a contract with one service of these RPCs.
    fn routes_of(rpcs: &str) -> Result<Vec<Route>, Error> {
        let directory = tempfile::tempdir().expect("a directory");
        let source = format!(
            "syntax = \"proto3\"; package test; import \"google/api/annotations.proto\";\
             message M {{ string id = 1; int32 count = 2; string name = 3; }} service S {{ {rpcs} }}"
        );
        std::fs::write(directory.path().join("test.proto"), source).expect("a file");
        let includes = [directory.path(), std::path::Path::new("third_party")];
        let mut compiler = protox::Compiler::new(includes).expect("a compiler");
        compiler.include_imports(true).open_file("test.proto").expect("a proto");
        let contract = DescriptorPool::decode(compiler.encode_file_descriptor_set().as_slice()).expect("a descriptor");
        routes(&contract)
    }

    fn refusal(rpcs: &str) -> String {
        match routes_of(rpcs).expect_err("refused") {
            Error::Internal(cause) => cause.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_rpc_with_an_http_rule_becomes_a_route() {
        let routes = routes_of(
            r#"rpc Get(M) returns (M) { option (google.api.http) = { get: "/v1/things/{id}" }; }
               rpc Set(M) returns (M) { option (google.api.http) = { put: "/v1/things/{id}" body: "*" }; }
               rpc Hidden(M) returns (M);"#,
        )
        .expect("routes");
        let shown: Vec<_> = routes.iter().map(|route| (route.method.as_str(), route.rpc.name(), &route.body)).collect();
        assert_eq!(shown, [("GET", "Get", &BodyBinding::Absent), ("PUT", "Set", &BodyBinding::Whole)]);
        assert_eq!(routes[0].path_fields, ["id"]);
        assert_eq!(routes[0].rpc_path(), "/test.S/Get");
    }

    #[test]
    fn two_rpcs_on_one_route_are_refused_by_name() {
        let message = refusal(
            r#"rpc A(M) returns (M) { option (google.api.http) = { get: "/v1/things/{id}" }; }
               rpc B(M) returns (M) { option (google.api.http) = { get: "/v1/things/{name}" }; }"#,
        );
        assert_eq!(message, "test.S.B is the second RPC on GET /v1/things/{name}");
        let message = refusal(
            r#"rpc A(M) returns (M) { option (google.api.http) = { post: "/v1/things" body: "*" }; }
               rpc B(M) returns (M) { option (google.api.http) = { post: "/v1/things" body: "*" }; }"#,
        );
        assert_eq!(message, "test.S.B is the second RPC on POST /v1/things");
    }

    #[test]
    fn a_rule_that_cannot_be_served_is_refused() {
        for rule in [
            r#"get: "/v1/{nothing}""#,
            r#"get: "/v1/{count}""#,
            r#"get: "/v1/{id=things/*}""#,
            r#"get: "/v1/**""#,
            r#"post: "/v1/things" body: "nothing""#,
            r#"body: "*""#,
        ] {
            let message = refusal(&format!("rpc A(M) returns (M) {{ option (google.api.http) = {{ {rule} }}; }}"));
            assert!(message.contains("test.S.A"), "{rule}: {message}");
        }
        let streamed = r#"rpc A(M) returns (stream M) { option (google.api.http) = { get: "/v1/a" }; }"#;
        assert!(refusal(streamed).contains("stream"));
    }

    #[test]
    fn every_unary_rpc_of_the_contract_has_a_route() {
        let contract = DescriptorPool::decode(proto::CONTRACT).expect("the contract");
        let declared: HashSet<_> =
            routes(&contract).expect("routes").iter().map(|route| route.rpc.full_name().to_owned()).collect();
        let unary = contract.services().flat_map(|service| service.methods().collect::<Vec<_>>());
        for rpc in unary.filter(|rpc| !rpc.is_server_streaming() && !rpc.is_client_streaming()) {
            assert!(declared.contains(rpc.full_name()), "{} has no google.api.http rule", rpc.full_name());
        }
    }
}
