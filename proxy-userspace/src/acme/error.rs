//! Why there is no certificate.

use std::{
    io,
    path::{Path, PathBuf},
};

use instant_acme::{Error, Problem};
use proxy_core::renewal::Scope;

use super::Outcome;
use crate::tls::TlsError;

#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    #[error("{}: {error}", file.display())]
    File { file: PathBuf, error: io::Error },
    #[error("{}: {why}", file.display())]
    Account { file: PathBuf, why: String },
    #[error("acme.eab: {}: {why}", file.display())]
    Eab { file: PathBuf, why: String },
    #[error("acme.ca: {0}")]
    Trust(TlsError),
    #[error("the CA cannot be talked to: {0}")]
    Unreachable(String),
    #[error("the CA refuses the account: {0}")]
    AccountRefused(String),
    /// It is not there (any more): a CA for tests forgets what it knew.
    #[error("the CA does not know the account: {0}")]
    AccountUnknown(String),
    #[error("the CA has had too many orders: {0}")]
    RateLimited(String),
    #[error("the CA refuses the order: {0}")]
    Refused(String),
    #[error("the CA does not offer tls-alpn-01 for it")]
    NoChallenge,
    #[error("the CA did not find it to be here: {0}")]
    Challenge(String),
    #[error("the order did not come to an end within {0} s")]
    Slow(u64),
    #[error("what the CA has issued cannot be used: {0}")]
    Certificate(String),
}

/// What was being asked of the CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Account,
    Order,
    /// To look at the name.
    Proof,
    Issue,
}

impl AcmeError {
    pub(super) fn file(file: &Path, error: io::Error) -> Self {
        Self::File { file: file.to_owned(), error }
    }

    pub(super) fn of(step: Step, error: Error) -> Self {
        let problem = match error {
            Error::Api(problem) => problem,
            other => return Self::Unreachable(other.to_string()),
        };
        let told = told(&problem);
        let kind = problem.r#type.as_deref().and_then(|kind| kind.strip_prefix("urn:ietf:params:acme:error:"));
        match (kind, step) {
            (Some("rateLimited"), _) => Self::RateLimited(told),
            (Some("serverInternal" | "badNonce"), _) => Self::Unreachable(told),
            (Some("accountDoesNotExist"), _) => Self::AccountUnknown(told),
            (_, Step::Account) | (Some("unauthorized" | "userActionRequired"), Step::Order) => {
                Self::AccountRefused(told)
            }
            _ if problem.status.is_some_and(|status| status >= 500) => Self::Unreachable(told),
            (_, Step::Proof) => Self::Challenge(told),
            (_, Step::Order | Step::Issue) => Self::Refused(told),
        }
    }

    pub fn scope(&self) -> Scope {
        match self {
            Self::File { .. }
            | Self::Account { .. }
            | Self::Eab { .. }
            | Self::Trust(_)
            | Self::Unreachable(_)
            | Self::AccountRefused(_)
            | Self::AccountUnknown(_) => Scope::Authority,
            Self::RateLimited(_)
            | Self::Refused(_)
            | Self::NoChallenge
            | Self::Challenge(_)
            | Self::Slow(_)
            | Self::Certificate(_) => Scope::Name,
        }
    }

    pub fn outcome(&self) -> Outcome {
        match self {
            Self::File { .. } | Self::Account { .. } | Self::Eab { .. } | Self::Trust(_) | Self::Certificate(_) => {
                Outcome::Failed
            }
            Self::Unreachable(_) | Self::Slow(_) => Outcome::Unreachable,
            Self::AccountRefused(_) | Self::AccountUnknown(_) => Outcome::Account,
            Self::RateLimited(_) => Outcome::RateLimited,
            Self::Refused(_) => Outcome::Refused,
            Self::NoChallenge | Self::Challenge(_) => Outcome::Challenge,
        }
    }

    /// One line of how to mend it.
    pub fn mend(&self) -> String {
        match self {
            Self::File { .. } => {
                "the user that shunt runs as must be able to read it, and to write into acme.cache".into()
            }
            Self::Account { file, .. } => format!("remove {}: another account is made", file.display()),
            Self::Eab { .. } => "the file must hold the key as the CA gave it, in base64url, and nothing else".into(),
            Self::Trust(error) => error.mend(),
            Self::Unreachable(_) => {
                "is acme.directory right, and does this machine reach it? A private CA needs acme.ca".into()
            }
            Self::AccountRefused(_) => "see acme.contact and acme.eab: key_id and hmac_key are from the CA".into(),
            Self::AccountUnknown(_) => "another account is made with the next order".into(),
            Self::RateLimited(_) => "nothing but to wait; a CA for tests has other limits".into(),
            Self::Refused(_) => "the CA says why; its rules for names are its own".into(),
            Self::NoChallenge => "another CA, or certificates from files".into(),
            Self::Challenge(_) => {
                "the name must lead here in the DNS, and port 443 there to a listen address of the route".into()
            }
            Self::Slow(_) => "it is tried again".into(),
            Self::Certificate(_) => "is the clock of this machine right?".into(),
        }
    }
}

/// The words of the CA, on one line: they go into the log.
pub(super) fn told(problem: &Problem) -> String {
    let text = problem.to_string();
    let text = text.strip_prefix("API error: ").unwrap_or(&text);
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of a problem of this type.
    fn of(step: Step, kind: &str, status: u16) -> (Scope, Outcome, String) {
        let json = format!(
            "{{\"type\": \"urn:ietf:params:acme:error:{kind}\", \"detail\": \"first\\nsecond\", \"status\": {status}}}"
        );
        let error = AcmeError::of(step, Error::Api(serde_json::from_str(&json).expect("a problem")));
        (error.scope(), error.outcome(), error.to_string())
    }

    #[test]
    fn what_a_ca_says_holds_up_what_it_is_about() {
        for (step, kind, status, scope, outcome) in [
            (Step::Account, "unauthorized", 403, Scope::Authority, Outcome::Account),
            (Step::Account, "externalAccountRequired", 403, Scope::Authority, Outcome::Account),
            (Step::Account, "invalidContact", 400, Scope::Authority, Outcome::Account),
            (Step::Order, "unauthorized", 403, Scope::Authority, Outcome::Account),
            (Step::Order, "rejectedIdentifier", 400, Scope::Name, Outcome::Refused),
            (Step::Order, "rateLimited", 429, Scope::Name, Outcome::RateLimited),
            (Step::Order, "serverInternal", 500, Scope::Authority, Outcome::Unreachable),
            (Step::Order, "odd", 503, Scope::Authority, Outcome::Unreachable),
            (Step::Proof, "unauthorized", 403, Scope::Name, Outcome::Challenge),
            (Step::Issue, "badCSR", 400, Scope::Name, Outcome::Refused),
        ] {
            let (found, counted, _) = of(step, kind, status);
            assert_eq!((found, counted), (scope, outcome), "{step:?} {kind}");
        }
    }

    #[test]
    fn the_words_of_a_ca_are_one_line() {
        let (_, _, told) = of(Step::Order, "rejectedIdentifier", 400);
        assert_eq!(told, "the CA refuses the order: first second (urn:ietf:params:acme:error:rejectedIdentifier)");
    }
}
