//! The account at the CA: made once, then kept.

use std::path::Path;

use instant_acme::{Account, AccountCredentials, NewAccount};
use proxy_core::config::Acme;
use serde::{Deserialize, Serialize};

use super::{AcmeError, cache, error::Step, external_key, https::Https};

/// The file. The key in it is the account.
#[derive(Serialize, Deserialize)]
struct Kept {
    credentials: AccountCredentials,
    /// As the CA knows them.
    contact: Vec<String>,
}

/// The account of the cache, or a new one.
pub(super) async fn open(acme: &Acme, https: &Https) -> Result<Account, AcmeError> {
    let file = acme.account();
    let Some(content) = cache::read(&file)? else { return create(acme, https, &file).await };
    let bad = |why: String| AcmeError::Account { file: file.clone(), why };
    let kept: Kept = serde_json::from_slice(&content).map_err(|error| bad(error.to_string()))?;
    let builder = Account::builder_with_http(Box::new(https.clone()));
    let account = builder.from_credentials(kept.credentials).await;
    let account = account.map_err(|error| AcmeError::of(Step::Account, error))?;
    if kept.contact != acme.contact {
        let update = account.update_contacts(&contact(acme)).await;
        update.map_err(|error| AcmeError::of(Step::Account, error))?;
        // What else is in it is as it was.
        let mut content: serde_json::Value =
            serde_json::from_slice(&content).map_err(|error| bad(error.to_string()))?;
        content["contact"] = acme.contact.clone().into();
        cache::write(&file, content.to_string().as_bytes())?;
        tracing::info!(account = account.id(), contact = ?acme.contact, "contact of the ACME account changed");
    }
    Ok(account)
}

/// The CA has forgotten it: the next order makes another.
pub(super) fn forget(acme: &Acme) {
    let file = acme.account();
    if let Err(error) = std::fs::remove_file(&file) {
        tracing::warn!(%error, file = %file.display(), "not removed");
    }
}

async fn create(acme: &Acme, https: &Https, file: &Path) -> Result<Account, AcmeError> {
    let contact = contact(acme);
    let wanted = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
    let external = external_key(acme)?;
    let builder = Account::builder_with_http(Box::new(https.clone()));
    let made = builder.create(&wanted, acme.directory.clone(), external.as_ref()).await;
    let (account, credentials) = made.map_err(|error| AcmeError::of(Step::Account, error))?;
    let kept = Kept { credentials, contact: acme.contact.clone() };
    let content = serde_json::to_vec(&kept);
    let content = content.map_err(|error| AcmeError::Account { file: file.to_owned(), why: error.to_string() })?;
    cache::write(file, &content)?;
    tracing::info!(account = account.id(), directory = acme.directory, "ACME account made");
    Ok(account)
}

fn contact(acme: &Acme) -> Vec<&str> {
    acme.contact.iter().map(String::as_str).collect()
}
