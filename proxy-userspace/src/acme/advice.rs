//! When the CA wants a certificate to be renewed (ARI, RFC 9773).

use std::{path::Path, time::Duration};

use instant_acme::{CertificateIdentifier, Error};
use proxy_core::{config::Acme, renewal::Advice};
use tokio::time::timeout;

use super::{account, https::Https};
use crate::tls::{Certificate, now};

/// It is not important enough to hold up an order for longer.
const WHOLE: Duration = Duration::from_secs(30);

/// Without it, two thirds of the certificate's life are good enough: what goes wrong here is nobody's affair.
pub(super) async fn ask(acme: &Acme, file: &Path, https: &Https) -> Advice {
    match timeout(WHOLE, asked(acme, file, https)).await {
        Ok(Ok(advice)) => advice,
        Ok(Err(why)) => {
            tracing::debug!(file = %file.display(), why, "no advice from the CA");
            Advice::NotHeard
        }
        Err(_) => Advice::NotHeard,
    }
}

async fn asked(acme: &Acme, file: &Path, https: &Https) -> Result<Advice, String> {
    let certificate = Certificate::load_whole(file).map_err(|error| error.to_string())?;
    let leaf = certificate.leaf().ok_or("no certificate")?;
    // A certificate of a CA that does not say who it is cannot be asked for.
    let Ok(identifier) = CertificateIdentifier::try_from(leaf) else { return Ok(Advice::NotOffered) };
    let account = account::open(acme, https).await.map_err(|error| error.to_string())?;
    match account.renewal_info(&identifier).await {
        Ok((info, again)) => {
            let window = info.suggested_window;
            let (first, last) = (window.start.unix_timestamp(), window.end.unix_timestamp());
            let again = now().saturating_add(i64::try_from(again.as_secs()).unwrap_or(i64::MAX));
            let because = info.explanation_url.unwrap_or_default();
            tracing::debug!(file = %file.display(), first, last, because, "advice from the CA");
            Ok(Advice::Between { first, last, again })
        }
        Err(Error::Unsupported(_)) => Ok(Advice::NotOffered),
        Err(error) => Err(error.to_string()),
    }
}
