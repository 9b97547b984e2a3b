//! The contract, read from its descriptor: what every RPC declares, what every service reports, and what is never
//! printed.

use std::collections::{BTreeMap, BTreeSet};

use postern::{
    grpc::AccessRules,
    proto::{self, Access},
};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MethodDescriptor, Value, prost_types::FileDescriptorSet};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::{
    app::TestApp,
    support::{Engine, with_database},
};

const PACKAGE: &str = "postern.auth.v1";
const SECRET: &str = "s3cr3t-7f1c";

fn pool() -> DescriptorPool {
    DescriptorPool::decode(proto::CONTRACT).expect("the contract")
}

fn methods(pool: &DescriptorPool) -> Vec<MethodDescriptor> {
    let services = pool.services().filter(|service| service.package_name() == PACKAGE);
    services.flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

fn access_rules(encoded: &[u8]) -> BTreeMap<String, Access> {
    let rules = AccessRules::from_contract(encoded).expect("rules");
    rules.iter().map(|(path, access)| (path.to_owned(), access)).collect()
}

/// `POST /v1/…`, as `(google.api.http)` declares it.
fn route(method: &MethodDescriptor) -> Option<String> {
    let options = method.options();
    let (_, rule) = options.extensions().find(|(extension, _)| extension.full_name() == "google.api.http")?;
    let rule = rule.as_message()?;
    let pattern = ["get", "put", "post", "delete", "patch"].into_iter().find(|verb| rule.has_field_by_name(verb))?;
    let path = rule.get_field_by_name(pattern)?;
    let body = rule.get_field_by_name("body")?;
    Some(format!("{} {} {}", pattern.to_uppercase(), path.as_str()?, body.as_str()?))
}

#[test]
fn every_rpc_declares_who_may_call_it_and_its_rest_route() {
    let rules = access_rules(proto::CONTRACT);
    let mut declared = BTreeMap::new();
    for method in methods(&pool()) {
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let access = rules.get(&path).copied().unwrap_or_default();
        assert_ne!(access, Access::Unspecified, "{path} has no option (access)");
        let route = route(&method);
        assert!(route.is_some() || method.is_server_streaming(), "{path} has no option (google.api.http)");
        declared.insert(method.full_name().to_owned(), (access, route.unwrap_or_default()));
    }
    // Clients depend on these.
    for (rpc, access, route) in [
        ("AuthService.SignUp", Access::Public, "POST /v1/auth/signup *"),
        ("AuthService.Login", Access::Public, "POST /v1/auth/login *"),
        ("AuthService.Refresh", Access::Public, "POST /v1/auth/refresh *"),
        ("AuthService.Logout", Access::Public, "POST /v1/auth/logout *"),
        ("AuthService.GetMe", Access::Authenticated, "GET /v1/me "),
        ("AccountService.VerifyEmail", Access::Public, "POST /v1/email/verify *"),
        ("AccountService.ResendVerificationEmail", Access::Public, "POST /v1/email/resend *"),
        ("AccountService.RequestPasswordReset", Access::Public, "POST /v1/password/forgot *"),
        ("AccountService.ResetPassword", Access::Public, "POST /v1/password/reset *"),
        ("AccountService.ChangePassword", Access::Authenticated, "POST /v1/me/password *"),
        ("AccountService.RequestEmailChange", Access::Authenticated, "POST /v1/me/email *"),
        ("AccountService.ConfirmEmailChange", Access::Public, "POST /v1/email/change *"),
        ("AccountService.ChangeUsername", Access::Authenticated, "POST /v1/me/username *"),
    ] {
        let found = declared.get(&format!("{PACKAGE}.{rpc}"));
        assert_eq!(found, Some(&(access, route.to_owned())), "{rpc}");
    }
}

#[test]
fn routes_and_rpcs_with_their_own_messages_are_all_different() {
    let (mut routes, mut messages) = (BTreeSet::new(), BTreeSet::new());
    for method in methods(&pool()) {
        assert!(routes.insert(route(&method)), "{} has the route of another", method.full_name());
        assert_eq!(method.input().name(), format!("{}Request", method.name()));
        assert_eq!(method.output().name(), format!("{}Response", method.name()));
        assert!(messages.insert(method.input().full_name().to_owned()));
        assert!(messages.insert(method.output().full_name().to_owned()));
    }
}

#[test]
fn an_undeclared_rpc_is_unspecified_and_does_not_change_others() {
    let pool = pool();
    let descriptor =
        pool.get_message_by_name("google.protobuf.FileDescriptorSet").expect("a descriptor of descriptors");
    let mut set = DynamicMessage::decode(descriptor, proto::CONTRACT).expect("the contract");
    let mut stripped = 0;
    for file in each(&mut set, "file") {
        for service in each(file, "service") {
            for method in each(service, "method") {
                if method.get_field_by_name("name").expect("a name").as_str() == Some("GetMe") {
                    method.clear_field_by_name("options");
                    stripped += 1;
                }
            }
        }
    }
    assert_eq!(stripped, 1);

    let mut expected = access_rules(proto::CONTRACT);
    let path = format!("/{PACKAGE}.AuthService/GetMe");
    assert_eq!(expected.insert(path, Access::Unspecified), Some(Access::Authenticated));
    assert_eq!(access_rules(&set.encode_to_vec()), expected);
}

/// The messages of a repeated field.
fn each<'a>(message: &'a mut DynamicMessage, field: &str) -> impl Iterator<Item = &'a mut DynamicMessage> {
    let list = message.get_field_by_name_mut(field).and_then(Value::as_list_mut).expect("a list");
    list.iter_mut().map(|value| value.as_message_mut().expect("a message"))
}

#[test]
fn a_descriptor_without_our_options_declares_no_access() {
    // These types have no extensions, so our options are lost.
    let set = FileDescriptorSet::decode(proto::CONTRACT).expect("the contract");
    let rules = access_rules(&set.encode_to_vec());
    assert_eq!(rules.len(), access_rules(proto::CONTRACT).len());
    assert!(rules.values().all(|access| *access == Access::Unspecified), "{rules:?}");
    assert!(AccessRules::from_contract(b"no descriptor").is_err());
}

#[tokio::test]
async fn every_service_reports_its_health() {
    with_database(Engine::Sqlite, async |database| {
        let app = TestApp::start(database, &[]).await;
        let services = pool().services().filter(|service| service.package_name() == PACKAGE).collect::<Vec<_>>();
        let mut names: Vec<_> = services.iter().map(|service| service.full_name().to_owned()).collect();
        names.push(String::new());
        for service in names {
            let asked = app.health().check(HealthCheckRequest { service: service.clone() }).await;
            let answer = asked.unwrap_or_else(|status| panic!("{service}: {status}")).into_inner();
            assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
        }
        app.abandon();
    })
    .await;
}

#[test]
fn every_secret_field_is_declared_as_secret() {
    let mut secrets = BTreeSet::new();
    for message in pool().all_messages().filter(|message| message.package_name() == PACKAGE) {
        for field in message.fields().filter(|field| field.kind() == Kind::String) {
            // A page token is no credential: it is encrypted and bound to its query.
            let bears_secret = ["token", "password", "secret"].iter().any(|ending| field.name().ends_with(ending))
                && !field.name().ends_with("page_token");
            let redacted = field.options().get_field_by_name("debug_redact").expect("an option").as_bool();
            assert_eq!(redacted, Some(bears_secret), "{}", field.full_name());
            if bears_secret {
                secrets.insert(field.full_name().to_owned());
            }
        }
    }
    let expected = [
        "ChangePasswordRequest.current_password",
        "ChangePasswordRequest.new_password",
        "ChangeUsernameRequest.password",
        "ConfirmEmailChangeRequest.token",
        "CreateServiceKeyResponse.client_secret",
        "DeleteAccountRequest.password",
        "IntrospectTokenRequest.token",
        "IssueServiceTokenRequest.client_secret",
        "IssueServiceTokenResponse.access_token",
        "LoginRequest.password",
        "LogoutRequest.refresh_token",
        "RefreshRequest.refresh_token",
        "RequestEmailChangeRequest.password",
        "ResetPasswordRequest.new_password",
        "ResetPasswordRequest.token",
        "RevokeTokenRequest.token",
        "SignUpRequest.password",
        "TokenPair.access_token",
        "TokenPair.refresh_token",
        "VerifyEmailRequest.token",
    ];
    for field in expected {
        assert!(secrets.contains(&format!("{PACKAGE}.{field}")), "{field}");
    }
}

#[test]
fn messages_print_everything_but_their_secrets() {
    let secret = || SECRET.to_owned();
    let shown = || "shown".to_owned();
    let tokens = proto::TokenPair {
        access_token: secret(),
        access_token_expire_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
        refresh_token: secret(),
        refresh_token_expire_time: None,
        token_type: shown(),
    };
    let prints = [
        format!("{:?}", proto::SignUpRequest { username: shown(), email: shown(), password: secret() }),
        format!("{:?}", proto::LoginRequest { email: shown(), password: secret() }),
        format!("{:#?}", proto::LogoutRequest { refresh_token: secret(), everywhere: true }),
        format!("{:?}", proto::RefreshRequest { refresh_token: secret() }),
        format!("{:?}", proto::LoginResponse { tokens: Some(tokens.clone()), user: None }),
        format!("{:#?}", proto::RefreshResponse { tokens: Some(tokens.clone()) }),
        format!("{tokens:?}"),
        format!("{:?}", tonic::Request::new(tokens.clone())),
        format!("{:?}", proto::ResetPasswordRequest { token: secret(), new_password: secret() }),
        format!("{:?}", proto::ChangePasswordRequest { current_password: secret(), new_password: secret() }),
        format!("{:?}", proto::RequestEmailChangeRequest { new_email: shown(), password: secret() }),
        format!("{:?}", proto::ChangeUsernameRequest { new_username: shown(), password: secret() }),
        format!("{:?}", proto::VerifyEmailRequest { token: secret() }),
        format!("{:?}", proto::ConfirmEmailChangeRequest { token: secret() }),
    ];
    for print in &prints {
        assert!(!print.contains(SECRET) && !print.contains("s3cr3t"), "{print}");
        assert!(print.contains("[redacted]"), "{print}");
    }
    assert!(prints[0].contains("shown") && prints[1].contains("shown") && prints[6].contains("shown"));
    assert!(prints[2].contains("everywhere: true"));
}

#[test]
fn the_number_of_our_option_is_derived_as_its_comment_says() {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, PACKAGE.as_bytes());
    let first: [u8; 4] = digest.as_ref()[..4].try_into().expect("four bytes");
    let number = ((1 << 28) + (u32::from_be_bytes(first) >> 4)) / 256 * 256;
    let option = pool().get_extension_by_name("postern.auth.v1.access").expect("the option");
    assert_eq!((option.number(), number), (0x1B54_6000, 0x1B54_6000));
}

#[test]
fn the_numbers_of_error_reasons_never_change() {
    // Numbers and names are compiled into clients: values may be added, but not changed.
    let reasons = [
        "UNSPECIFIED",
        "INVALID_FIELD",
        "EMAIL_TAKEN",
        "USERNAME_TAKEN",
        "INVALID_CREDENTIALS",
        "TOKEN_MISSING",
        "TOKEN_INVALID",
        "TOKEN_EXPIRED",
        "SESSION_REVOKED",
        "REFRESH_TOKEN_INVALID",
        "EMAIL_NOT_VERIFIED",
        "ONE_TIME_TOKEN_INVALID",
        "ROLE_REQUIRED",
        "LAST_ADMIN",
        "NOT_FOUND",
        "THROTTLED",
        "OVERLOADED",
        "STORE_UNAVAILABLE",
    ];
    let declared = pool().get_enum_by_name("postern.auth.v1.ErrorReason").expect("the enum");
    for (number, reason) in (0..).zip(reasons) {
        let value = declared.get_value(number).expect(reason);
        assert_eq!(value.name(), format!("ERROR_REASON_{reason}"));
    }
}
