"""Where shunt differs, and why: name of the case to what is heard and the reason."""

_HANDSHAKE_FAILURE = ("handshake_failure", "rustls says that there is nothing in common; the handshake ends either way")
_NO_ALERT = ("closed", "rustls ends it without an alert")
_UNKNOWN_TYPE = ("decode_error", "rustls cannot read it and says that; the connection ends either way")
_TOO_MANY = ("closed", "rustls takes 32 empty records in a row, then it is a flood")

KNOWN = {
    "TLS 1.3: no key_share": _HANDSHAKE_FAILURE,
    "TLS 1.3: no supported_groups": _HANDSHAKE_FAILURE,
    "TLS 1.3: no signature_algorithms": _HANDSHAKE_FAILURE,
    "TLS 1.3: an empty handshake fragment": ("ok", "rustls reads over it"),
    "TLS 1.3: an unknown content type": _UNKNOWN_TYPE,
    "TLS 1.2: an unknown content type": _UNKNOWN_TYPE,
    "TLS 1.2: heartbeat nobody agreed on": _UNKNOWN_TYPE,
    "TLS 1.2: an empty ClientKeyExchange": _NO_ALERT,
    "TLS 1.2: no ChangeCipherSpec": _NO_ALERT,
    "TLS 1.2: 1,000 records of nothing": _TOO_MANY,
    "TLS 1.3: 1,000 records of nothing": _TOO_MANY,
}
