//! Why a connection ended: the `reason` label. Exactly one per connection, counted once.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident => $label:literal,)*) => {
        /// Why a connection ended.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The value of the `reason` label.
            pub const fn label(self) -> &'static str {
                match self { $(Reason::$variant => $label,)* }
            }
        }
    };
}

reasons! {
    /// Both sides finished; the client's FIN came first.
    FinishedClientFirst => "finished_client_first",
    /// Both sides finished; the backend's FIN came first.
    FinishedBackendFirst => "finished_backend_first",
    /// The client sent a reset.
    ResetByClient => "reset_by_client",
    /// The backend sent a reset after it had accepted.
    ResetByBackend => "reset_by_backend",
    /// The backend answered the dial with a reset.
    ConnectRefused => "connect_refused",
    /// The backend did not answer within `timeouts.connect`.
    ConnectTimeout => "connect_timeout",
    /// No route to the backend.
    ConnectUnreachable => "connect_unreachable",
    /// No backend of the route is up.
    NoBackend => "no_backend",
    /// The port is served, but no route matches this client.
    NoRoute => "no_route",
    /// The first bytes did not come within `timeouts.initial_data`.
    InitialDataTimeout => "initial_data_timeout",
    /// The TLS handshake failed.
    TlsHandshakeFailed => "tls_handshake_failed",
    /// The TLS handshake did not end within `timeouts.tls_handshake`.
    TlsHandshakeTimeout => "tls_handshake_timeout",
    /// The certificate for the name that was asked for has not been issued yet.
    CertificatePending => "certificate_pending",
    /// It was the CA, which has been shown that the name is this machine's (TLS-ALPN-01, RFC 8737).
    ChallengeAnswered => "challenge_answered",
    /// A trusted peer sent no valid PROXY header.
    ProxyHeaderInvalid => "proxy_header_invalid",
    /// The client is in `deny`, or not in `allow`.
    Denied => "denied",
    /// `limits.connections` is reached.
    LimitConnections => "limit_connections",
    /// `limits.connections_per_client` is reached.
    LimitPerClient => "limit_per_client",
    /// `limits.rate_per_client` is reached.
    LimitRate => "limit_rate",
    /// No byte in either direction for `timeouts.idle`.
    IdleTimeout => "idle_timeout",
    /// One side had finished, the other was silent for `timeouts.half_closed`.
    HalfClosedTimeout => "half_closed_timeout",
    /// The connection lived for `timeouts.lifetime`.
    LifetimeExceeded => "lifetime_exceeded",
    /// Cut when `timeouts.drain` had passed.
    Drained => "drained",
    /// Ended by `shunt kill`.
    Killed => "killed",
    /// A kernel-forwarded flow that conntrack let go without saying how.
    KernelExpired => "kernel_expired",
    /// A defect in shunt: must stay 0.
    InternalError => "internal_error",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}
