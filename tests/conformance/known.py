"""Where shunt differs, and why: name of the case to what is heard and the reason. Functions are those of rustls 0.23.46."""

_TOO_MANY = (
    "closed",
    "`ConnectionCore::process_more_input` (conn.rs) takes 32 in a row, then `TooManyEmptyFragments`, without an alert",
)

KNOWN = {
    "TLS 1.3: no key_share": (
        "handshake_failure",
        "`CompleteClientHelloHandling::handle_client_hello` (server/tls13.rs) says so for `KeyShareExtensionRequired`",
    ),
    "TLS 1.3: no supported_groups": (
        "handshake_failure",
        "`ExpectClientHello::choose_suite_and_kx_group` (server/hs.rs) takes it for an empty list: `NoKxGroupsInCommon`",
    ),
    "TLS 1.3: no signature_algorithms": (
        "handshake_failure",
        "`process_client_hello` (server/hs.rs) says so for `SignatureAlgorithmsExtensionRequired`",
    ),
    "TLS 1.3: an empty handshake fragment": (
        "ok",
        "only the header outside is looked at (`read_opaque_message_header`); of a deciphered one "
        "`DissectHandshakeIter::next` makes nothing, and it counts as one of 32 empty records",
    ),
    "TLS 1.3: an unknown content type": (
        "decode_error",
        "`MessagePayload::new` finds `InvalidContentType`, and that is `decode_error` for every `InvalidMessage` (error.rs)",
    ),
    "TLS 1.2: an unknown content type": (
        "decode_error",
        "`read_opaque_message_header` finds `InvalidContentType`, and `ConnectionCore::handle_deframe_error` says "
        "`decode_error` for every `InvalidMessage`",
    ),
    "TLS 1.2: heartbeat nobody agreed on": (
        "decode_error",
        "a type that is known, but `MessagePayload::new` has nothing for it: `InvalidContentType`, as above",
    ),
    "TLS 1.2: an empty ClientKeyExchange": (
        "closed",
        "`decode_kx_params` (tls12/mod.rs) hands the error of `T::decode` on without an alert; only for bytes behind it there is one",
    ),
    "TLS 1.2: no ChangeCipherSpec": (
        "closed",
        "the enciphered Finished is read as it is; its length is beyond 64 KiB, and `ConnectionCore::process_more_input` "
        "hands `HandshakePayloadTooLarge` of `HandshakeDeframer::coalesce` on without an alert",
    ),
    "TLS 1.2: 1,000 records of nothing": _TOO_MANY,
    "TLS 1.3: 1,000 records of nothing": _TOO_MANY,
}
