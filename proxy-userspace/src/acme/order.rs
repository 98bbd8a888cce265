//! One order: from the name to the certificate in the cache.

use std::{path::Path, time::Duration};

use instant_acme::{
    Account, AuthorizationStatus, CertificateIdentifier, ChallengeType, Error, Identifier, NewOrder, Order,
    OrderStatus, RetryPolicy,
};
use proxy_core::{
    config::{Acme, AcmeCertificate},
    renewal::Validity,
};
use tokio::time::timeout;

use super::{
    AcmeError, Challenges, account, cache,
    challenge::Prepared,
    error::{Step, told},
    https::Https,
};
use crate::tls::{Certificate, now};

/// For the whole of it.
const WHOLE: Duration = Duration::from_secs(180);
/// How the CA is asked whether it is done: after a quarter of a second, and then ever more rarely.
const PATIENCE: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(250)).backoff(1.5).timeout(Duration::from_secs(90));

/// Gets a certificate and puts it where the routes look for it.
pub(super) async fn place(
    acme: &Acme,
    wanted: &AcmeCertificate,
    https: &Https,
    challenges: &Challenges,
) -> Result<Validity, AcmeError> {
    let AcmeCertificate { name, file } = wanted.clone();
    // A disk can be slow.
    let before = tokio::task::spawn_blocking(move || Certificate::load_whole(&file).ok()).await.ok().flatten();
    let got = timeout(WHOLE, get(acme, &name, before.as_ref(), https, challenges)).await;
    let pem = got.map_err(|_| AcmeError::Slow(WHOLE.as_secs()))??;
    let file = wanted.file.clone();
    let kept = tokio::task::spawn_blocking(move || keep(&file, &name, &pem)).await;
    kept.map_err(|error| AcmeError::Certificate(error.to_string()))?
}

/// What is there is not replaced by what cannot be served.
fn keep(file: &Path, name: &str, pem: &str) -> Result<Validity, AcmeError> {
    let unusable = |why: String| Err(AcmeError::Certificate(why));
    let certificate = match Certificate::from_pem(file, pem.as_bytes()) {
        Ok(certificate) => certificate,
        Err(error) => return unusable(error.to_string()),
    };
    if !certificate.names.iter().any(|one| one == name) {
        return unusable(format!("it is for {}", certificate.names.join(", ")));
    }
    if certificate.expires <= now() {
        return unusable("it has expired already".to_owned());
    }
    cache::write(file, pem.as_bytes())?;
    Ok(certificate.validity())
}

/// Key and chain, in PEM. `before`: what the certificate comes after.
async fn get(
    acme: &Acme,
    name: &str,
    before: Option<&Certificate>,
    https: &Https,
    challenges: &Challenges,
) -> Result<String, AcmeError> {
    let failed = |error| AcmeError::of(Step::Order, error);
    let mut order = match begin(&account::open(acme, https).await?, name, before).await.map_err(failed) {
        Err(AcmeError::AccountUnknown(why)) => {
            tracing::warn!(why, "the CA does not know the account any more: another one is made");
            account::forget(acme);
            begin(&account::open(acme, https).await?, name, None).await.map_err(failed)?
        }
        order => order?,
    };
    // Dropped when the CA has looked, or this is given up.
    let prepared = prove(&mut order, name, challenges).await?;
    if order.state().status == OrderStatus::Pending {
        match order.poll_ready(&PATIENCE).await {
            Ok(OrderStatus::Ready | OrderStatus::Valid | OrderStatus::Processing) => {}
            Ok(OrderStatus::Invalid | OrderStatus::Pending) => return Err(refusal(&mut order).await),
            Err(error) => match refusal(&mut order).await {
                found @ AcmeError::Challenge(_) => return Err(found),
                _ => return Err(AcmeError::of(Step::Proof, error)),
            },
        }
    }
    drop(prepared);
    let failed = |error| AcmeError::of(Step::Issue, error);
    let key = order.finalize().await.map_err(failed)?;
    let chain = order.poll_certificate(&PATIENCE).await.map_err(failed)?;
    Ok(format!("{key}{chain}"))
}

/// Says which certificate the new one replaces, so that a CA that wanted it renewed knows that it was, and does not count the
/// order against its limits (RFC 9773 §5). One that does not take that gets the order without it.
async fn begin(account: &Account, name: &str, before: Option<&Certificate>) -> Result<Order, Error> {
    let names = [Identifier::Dns(name.to_owned())];
    let replaced = before.and_then(Certificate::leaf).and_then(|leaf| CertificateIdentifier::try_from(leaf).ok());
    if let Some(replaced) = replaced {
        match account.new_order(&NewOrder::new(&names).replaces(replaced)).await {
            // It says nothing of renewals, or has not repeated what is replaced.
            Err(Error::Unsupported(_) | Error::Other(_)) => {}
            // Another order has replaced it already, or the CA does not know it.
            Err(Error::Api(problem))
                if problem.status.is_some_and(|status| matches!(status, 400 | 403 | 404 | 409)) =>
            {
                tracing::debug!(name, why = told(&problem), "the CA is not told what the certificate replaces");
            }
            order => return order,
        }
    }
    account.new_order(&NewOrder::new(&names)).await
}

/// Everything the CA wants to see before it issues.
async fn prove(order: &mut Order, name: &str, challenges: &Challenges) -> Result<Vec<Prepared>, AcmeError> {
    let failed = |error| AcmeError::of(Step::Proof, error);
    let mut prepared = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization.map_err(failed)?;
        match authorization.status {
            // From an order before.
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            status => return Err(AcmeError::Refused(format!("the authorization is {status:?} from the start"))),
        }
        let mut challenge = authorization.challenge(ChallengeType::TlsAlpn01).ok_or(AcmeError::NoChallenge)?;
        prepared.push(challenges.prepare(name, challenge.key_authorization().digest().as_ref())?);
        challenge.set_ready().await.map_err(failed)?;
    }
    Ok(prepared)
}

/// What the CA says of a name that it did not find to be ours.
async fn refusal(order: &mut Order) -> AcmeError {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let Ok(mut authorization) = authorization else { continue };
        let Ok(state) = authorization.refresh().await else { continue };
        let problem = state.challenges.iter().find_map(|challenge| challenge.error.as_ref());
        if let Some(problem) = problem {
            return AcmeError::Challenge(told(problem));
        }
    }
    AcmeError::Refused("the order is invalid, and it does not say why".to_owned())
}
