//! HTTPS to the CA: a connection for each request, in whole, within a time and a size.

use std::{
    error::Error as StdError,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, Response, Uri,
    body::Bytes,
    client::conn::http1,
    header::{CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER},
};
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use proxy_core::{config::Acme, renewal::Time};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::AcmeError;
use crate::tls::{client_trusting, now};

/// For a request and its answer.
const REQUEST: Duration = Duration::from_secs(30);
/// A chain has some kilobytes.
const MOST: usize = 1 << 20;

/// How the CA's own certificate is verified.
pub(super) fn trust(acme: &Acme) -> Result<Arc<ClientConfig>, AcmeError> {
    client_trusting(acme.ca.as_deref()).map(Arc::new).map_err(AcmeError::Trust)
}

#[derive(Debug, Clone)]
pub(super) struct Https {
    trust: Arc<ClientConfig>,
    wish: Arc<Mutex<Option<Time>>>,
}

impl Https {
    pub fn new(acme: &Acme) -> Result<Self, AcmeError> {
        Ok(Self { trust: trust(acme)?, wish: Arc::default() })
    }

    /// When the CA wants to be asked again, if it has said so with a refusal.
    pub fn wish(&self) -> Option<Time> {
        *self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HttpClient for Https {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let this = self.clone();
        Box::pin(async move {
            let to = request.uri().clone();
            let why = |error: String| Error::Other(format!("{to}: {error}").into());
            let answer = timeout(REQUEST, exchange(this.trust, request)).await;
            let answer = answer
                .map_err(|_| why(format!("no answer within {} s", REQUEST.as_secs())))?
                .map_err(|error| why(whole(&*error)))?;
            if answer.status().as_u16() >= 400 {
                let wish = answer.headers().get(RETRY_AFTER).and_then(retry_after);
                *this.wish.lock().unwrap_or_else(PoisonError::into_inner) = wish;
                let kind = answer.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
                // Words that are not the CA's, but of something in front of it.
                if !kind.starts_with("application/problem+json") {
                    return Err(why(format!("answered {}", answer.status())));
                }
            }
            Ok(BytesResponse::from(answer))
        })
    }
}

type Failure = Box<dyn StdError + Send + Sync>;

async fn exchange(
    trust: Arc<ClientConfig>,
    mut request: Request<BodyWrapper<Bytes>>,
) -> Result<Response<Full<Bytes>>, Failure> {
    let uri = request.uri().clone();
    let host = uri.host().filter(|_| uri.scheme_str() == Some("https")).ok_or("not an https:// address")?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(host.clone())?;
    let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(443))).await?;
    let stream = TlsConnector::from(trust).connect(name, stream).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let authority = uri.authority().map_or(host.as_str(), |authority| authority.as_str());
    request.headers_mut().insert(HOST, HeaderValue::from_str(authority)?);
    *request.uri_mut() = Uri::from(uri.path_and_query().cloned().ok_or("no path")?);
    let answer = async {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MOST).collect().await?.to_bytes();
        Ok(Response::from_parts(parts, Full::new(body)))
    };
    // The connection is driven as long as its answer is waited for, and not longer.
    tokio::pin!(answer, connection);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        ended = &mut connection => match ended {
            // What it has said may be complete.
            Ok(()) => answer.await,
            Err(error) => Err(error.into()),
        },
    }
}

/// Seconds or a date (RFC 9110 §10.2.3).
fn retry_after(value: &HeaderValue) -> Option<Time> {
    let text = value.to_str().ok()?.trim();
    match text.parse::<u32>() {
        Ok(seconds) => Some(now() + i64::from(seconds)),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            i64::try_from(date.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs()).ok()
        }
    }
}

/// An error and what caused it.
fn whole(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wish_of_a_ca_is_seconds_or_a_date() {
        let wish = |text: &str| retry_after(&HeaderValue::from_str(text).expect("a value"));
        let in_two_minutes = wish("120").expect("seconds") - now();
        assert!((119..=121).contains(&in_two_minutes), "{in_two_minutes}");
        assert_eq!(wish("Fri, 31 Dec 1999 23:59:59 GMT"), Some(946_684_799));
        assert_eq!(wish("soon"), None);
    }

    #[test]
    fn an_error_is_told_with_its_cause_and_nothing_twice() {
        let inner = std::io::Error::other("certificate expired");
        let outer = std::io::Error::other(AcmeError::file(std::path::Path::new("/a"), inner));
        assert_eq!(whole(&outer), "/a: certificate expired");
    }
}
