//! Authorization: reads the `(access)` option of each RPC from the descriptor of the contract, and enforces it. An RPC
//! that declares nothing is denied. `authenticate.rs` identifies the caller; this layer decides.

use std::collections::HashMap;

use axum::{extract::Request, response::Response};
use prost_reflect::{DescriptorPool, MethodDescriptor, Value};
use tonic::Status;

use crate::{
    domain::role::{Caller, Role},
    error::Error,
    proto::{self, Access},
};

use super::{authenticate::Identity, next::Next, response::respond};

/// Public services of other packages. Their proto files are not ours, so they cannot declare `(access)`. To ask about a
/// request of somebody, a proxy needs nothing but their token, like a caller of `IntrospectToken`.
const OPEN_SERVICES: [&str; 4] = [
    "envoy.service.auth.v3.Authorization",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// The rule of every RPC of the contract, by its path.
#[derive(Debug)]
pub struct AccessRules(HashMap<String, Access>);

impl AccessRules {
    /// Reads the rules of every service in the descriptor set. An RPC that declares none gets [`Access::Unspecified`],
    /// which is refused for every caller.
    pub fn from_contract(encoded_descriptor_set: &[u8]) -> Result<Self, Error> {
        let pool = DescriptorPool::decode(encoded_descriptor_set).map_err(Error::internal)?;
        let rules = pool
            .services()
            .flat_map(|service| service.methods().collect::<Vec<_>>())
            .map(|method| (path(&method), declared_access(&method)))
            .collect();
        Ok(Self(rules))
    }

    /// Every RPC and its rule, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Access)> {
        self.0.iter().map(|(path, access)| (path.as_str(), *access))
    }

    fn of(&self, path: &str) -> Option<Access> {
        let open = || {
            let (service, method) = path.strip_prefix('/')?.split_once('/')?;
            (OPEN_SERVICES.contains(&service) && !method.is_empty()).then_some(Access::Public)
        };
        self.0.get(path).copied().or_else(open)
    }
}

fn path(method: &MethodDescriptor) -> String {
    format!("/{}/{}", method.parent_service().full_name(), method.name())
}

/// The rule that an RPC declares.
pub fn declared_access(method: &MethodDescriptor) -> Access {
    let options = method.options();
    let extension = options.extensions().find(|(extension, _)| extension.full_name() == "postern.auth.v1.access");
    match extension {
        Some((_, Value::EnumNumber(number))) => Access::try_from(*number).unwrap_or(Access::Unspecified),
        _ => Access::Unspecified,
    }
}

/// In the extensions of a call: only a service may make it, although the RPC is open to others. The OAuth endpoints ask for
/// that where their RFC requires an authenticated caller.
#[derive(Debug, Clone, Copy)]
pub struct ServicesOnly;

/// Passes a call on or refuses it. Adds the `Caller` of an authenticated call to its extensions.
pub async fn authorize(rules: &AccessRules, mut request: Request, next: impl Next) -> Response {
    let Some(access) = rules.of(request.uri().path()) else {
        return respond(Status::unimplemented("no such RPC"));
    };
    let identity = request.extensions_mut().remove::<Identity>().unwrap_or(Identity::Anonymous);
    let services_only = request.extensions_mut().remove::<ServicesOnly>().is_some();
    let decision = decide(access, identity.clone())
        .and_then(|caller| if services_only { decide(Access::Service, identity) } else { Ok(caller) });
    match decision {
        Ok(Some(caller)) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Ok(None) => next.run(request).await,
        Err(error) => respond(error.into()),
    }
}

/// Decides about a call: the caller to act for, if there is one, or an error.
fn decide(access: Access, identity: Identity) -> Result<Option<Caller>, Error> {
    match (access, identity) {
        // A public RPC needs no caller. In particular, an expired token must not prevent a login. The certificate of a
        // service is enough for what is for services. It stands for no account, so there is no caller to act for.
        (Access::Public, Identity::Anonymous | Identity::Invalid(_) | Identity::Certified(_))
        | (Access::Service, Identity::Certified(_)) => Ok(None),
        // A certificate has no roles, and nothing is its own.
        (Access::Authenticated | Access::Admin | Access::Service, Identity::Anonymous)
        | (Access::Authenticated | Access::Admin, Identity::Certified(_)) => Err(Error::TokenMissing),
        (Access::Authenticated | Access::Admin | Access::Service, Identity::Invalid(fault)) => Err(fault.into()),
        // Every authenticated RPC is about the caller's own account, and a service has none.
        (Access::Authenticated, Identity::Known(Caller::Service(_))) => Err(Error::UserRequired),
        (Access::Service, Identity::Known(Caller::Person(_))) => Err(Error::ServiceRequired),
        (Access::Public | Access::Authenticated | Access::Service, Identity::Known(caller)) => Ok(Some(caller)),
        (Access::Admin, Identity::Known(caller)) if caller.has_role(Role::ADMIN) => Ok(Some(caller)),
        // An undeclared RPC is refused for every caller.
        (Access::Admin, Identity::Known(_)) | (Access::Unspecified, _) => Err(Error::RoleRequired),
    }
}

/// The rules of the contract of this build.
pub fn contract_rules() -> Result<AccessRules, Error> {
    AccessRules::from_contract(proto::CONTRACT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        ids::{SessionId, UserId},
        role::Person,
        service_identity::ServiceIdentity,
        token::AccessTokenError,
    };

    fn certified() -> Identity {
        Identity::Certified(ServiceIdentity::parse("billing.example.org").expect("a name"))
    }

    fn caller(role: &str) -> Identity {
        let id = uuid::Uuid::nil();
        let roles = vec![Role::parse(role).expect("a role")];
        Identity::Known(Caller::Person(Person { user_id: UserId(id), session_id: SessionId(id), roles }))
    }

    #[test]
    fn every_rpc_of_the_contract_declares_who_may_call_it() {
        let rules = contract_rules().expect("the contract");
        let undeclared: Vec<_> = rules.iter().filter(|(_, access)| *access == Access::Unspecified).collect();
        assert!(undeclared.is_empty(), "RPCs without option (access): {undeclared:?}");
        assert!(rules.iter().count() >= 5);
    }

    #[test]
    fn an_undeclared_rpc_is_refused_for_every_caller() {
        for identity in
            [Identity::Anonymous, Identity::Invalid(AccessTokenError::Invalid), caller("user"), caller("admin")]
        {
            assert!(decide(Access::Unspecified, identity.clone()).is_err());
            assert!(decide(Access::Service, identity).is_err());
        }
    }

    #[test]
    fn each_rule_admits_exactly_the_callers_that_it_names() {
        assert!(matches!(decide(Access::Public, Identity::Anonymous), Ok(None)));
        assert!(matches!(decide(Access::Public, Identity::Invalid(AccessTokenError::Expired)), Ok(None)));
        assert!(matches!(decide(Access::Public, caller("user")), Ok(Some(_))));
        assert!(matches!(decide(Access::Authenticated, Identity::Anonymous), Err(Error::TokenMissing)));
        assert!(matches!(
            decide(Access::Authenticated, Identity::Invalid(AccessTokenError::Expired)),
            Err(Error::TokenExpired)
        ));
        assert!(matches!(decide(Access::Authenticated, caller("user")), Ok(Some(_))));
        assert!(matches!(decide(Access::Admin, caller("user")), Err(Error::RoleRequired)));
        assert!(matches!(decide(Access::Admin, caller("admin")), Ok(Some(_))));
    }

    #[test]
    fn a_client_certificate_opens_what_is_for_services_and_nothing_else() {
        assert!(matches!(decide(Access::Service, certified()), Ok(None)));
        assert!(matches!(decide(Access::Public, certified()), Ok(None)));
        for access in [Access::Authenticated, Access::Admin] {
            assert!(matches!(decide(access, certified()), Err(Error::TokenMissing)), "{access:?}");
        }
        assert!(decide(Access::Unspecified, certified()).is_err());
    }

    #[test]
    fn only_an_exact_path_finds_a_rule() {
        let rules = contract_rules().expect("the contract");
        assert_eq!(rules.of("/postern.auth.v1.AuthService/GetMe"), Some(Access::Authenticated));
        for path in [
            "",
            "/",
            "postern.auth.v1.AuthService/GetMe",
            "//postern.auth.v1.AuthService/GetMe",
            "/postern.auth.v1.AuthService//GetMe",
            "/postern.auth.v1.AuthService/GetMe/",
            "/postern.auth.v1.AuthService/getme",
            "/Postern.auth.v1.AuthService/GetMe",
            "/postern.auth.v1.AuthService/%47etMe",
            "/grpc.health.v1.Health",
            "/grpc.health.v1.Health/",
        ] {
            assert_eq!(rules.of(path), None, "{path:?}");
        }
    }
}
