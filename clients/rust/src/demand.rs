//! Who may call a method.

use std::collections::HashMap;

use crate::{
    error::VerifyError,
    verifier::{Caller, SubjectType},
};

/// What a method demands of its caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    public: bool,
    subject_type: Option<SubjectType>,
    role: Option<String>,
    verified_email: bool,
}

impl Demand {
    /// Everybody. A token is not looked at.
    pub fn public() -> Self {
        Self { public: true, ..Self::default() }
    }

    /// Whoever has a valid access token.
    pub fn authenticated() -> Self {
        Self::default()
    }

    /// A person.
    pub fn person() -> Self {
        Self { subject_type: Some(SubjectType::User), ..Self::default() }
    }

    /// A service account.
    pub fn service() -> Self {
        Self { subject_type: Some(SubjectType::Service), ..Self::default() }
    }

    /// And with this role.
    #[must_use]
    pub fn role(self, role: impl Into<String>) -> Self {
        Self { public: false, role: Some(role.into()), ..self }
    }

    /// And with an address that was verified when the token was issued.
    #[must_use]
    pub fn verified_email(self) -> Self {
        Self { public: false, verified_email: true, ..self }
    }

    pub(crate) fn is_public(&self) -> bool {
        self.public
    }

    /// Whether a caller satisfies it.
    pub fn check(&self, caller: &Caller) -> Result<(), VerifyError> {
        match (self.subject_type, caller.subject_type) {
            (Some(SubjectType::User), SubjectType::Service) => return Err(VerifyError::UserRequired),
            (Some(SubjectType::Service), SubjectType::User) => return Err(VerifyError::ServiceRequired),
            _ => {}
        }
        if self.role.as_ref().is_some_and(|role| !caller.has_role(role)) {
            return Err(VerifyError::RoleRequired);
        }
        if self.verified_email && caller.email_verified != Some(true) {
            return Err(VerifyError::EmailNotVerified);
        }
        Ok(())
    }
}

/// The demands of the methods of gRPC services. A method without one is refused for every caller.
#[derive(Debug, Clone, Default)]
pub struct Demands(HashMap<String, Demand>);

impl Demands {
    /// Every method is refused.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares a method by its path, such as `/orders.v1.Orders/List`.
    #[must_use]
    pub fn method(mut self, path: impl Into<String>, demand: Demand) -> Self {
        self.0.insert(path.into(), demand);
        self
    }

    pub(crate) fn of(&self, path: &str) -> Option<&Demand> {
        self.0.get(path)
    }
}
