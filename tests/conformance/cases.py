"""What is tried: name, the RFC's word on it, what may be heard, and how it is done."""

from tlslite.constants import CipherSuite, ContentType, ExtensionType, GroupName, HandshakeType
from tlslite.extensions import ClientKeyShareExtension, KeyShareEntry, TLSExtension
from tlslite.messages import Alert, ChangeCipherSpec, ClientHello, Message

from talk import attempt, opening, settings

TLS12, TLS13 = (3, 3), (3, 4)
CASES = []


def case(name, source, *wanted):
    """Registers a function `(where) -> heard`."""

    def register(function):
        CASES.append((name, source, wanted, function))
        return function

    return register


def kind(message):
    """The type of a handshake message, or `None`."""
    if getattr(message, "contentType", None) != ContentType.handshake:
        return None
    return getattr(message, "handshakeType", None) or (bytes(message.write()) or b"\0")[0]


def on(which, change):
    """A tamper function: `change(client, message)` for messages of one handshake type."""
    return lambda client, message: change(client, message) if kind(message) == which else None


def drop(which):
    return on(which, lambda client, message: [])


def twice(which):
    return on(which, lambda client, message: [message, Message(ContentType.handshake, message.write())])


def hello(change):
    """`change(hello)` on the ClientHello, in place."""

    def tamper(client, message):
        change(message)
        return [message]

    return on(HandshakeType.client_hello, tamper)


def without(extension):
    return hello(lambda h: setattr(h, "extensions", [e for e in h.extensions if e.extType != extension]))


def with_extension(number, data, first=False):
    new = TLSExtension(extType=number).create(number, bytearray(data))
    return hello(lambda h: h.extensions.insert(0 if first else len(h.extensions), new))


def replace(number, data):
    def change(h):
        new = TLSExtension(extType=number).create(number, bytearray(data))
        h.extensions = [new if e.extType == number else e for e in h.extensions]

    return hello(change)


def ccs(client, message):
    return message.contentType == ContentType.change_cipher_spec


def flip(at):
    """A message with one bit changed."""

    def change(client, message):
        data = bytearray(message.write())
        data[at] ^= 1
        return [Message(ContentType.handshake, data)]

    return change


def raw_hello(version=TLS12, body=None, suites=(0xC02F, 0xC02B), extensions=None, session=b"", compression=b"\0"):
    """The bytes of a ClientHello in a record, made by hand."""
    if body is None:
        ext = b"".join(n.to_bytes(2, "big") + len(d).to_bytes(2, "big") + d for n, d in extensions or ORDINARY)
        body = bytes(version) + bytes(32) + bytes([len(session)]) + session
        body += (2 * len(suites)).to_bytes(2, "big") + b"".join(s.to_bytes(2, "big") for s in suites)
        body += bytes([len(compression)]) + compression + len(ext).to_bytes(2, "big") + ext
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return record(22, message)


def record(content, data, version=(3, 1)):
    return bytes([content, *version]) + len(data).to_bytes(2, "big") + data


SNI = (0, b"\0\x0e\0\0\x0bweb.example")
GROUPS = (10, b"\0\x04\0\x1d\0\x17")
SIGNATURES = (13, b"\0\x08\x04\x03\x08\x04\x04\x01\x08\x09")
ORDINARY = [SNI, GROUPS, SIGNATURES, (11, b"\x01\0"), (23, b""), (0xFF01, b"\0")]
VERSIONS13 = (43, b"\x02\x03\x04")


def share(group, length, byte=9):
    return (51, (4 + length).to_bytes(2, "big") + group.to_bytes(2, "big") + length.to_bytes(2, "big") + bytes([byte]) * length)


def hello13(*extensions, **more):
    return raw_hello(suites=(0x1301,), session=bytes(32), extensions=list(extensions), **more)


# --- what has to work ------------------------------------------------------------------------------------------------

for name, number in [("TLS 1.2", TLS12), ("TLS 1.3", TLS13)]:
    case(f"{name}: handshake, echo", "", "ok")(lambda where, v=number: attempt(where, settings(v)))
    case(f"{name}: handshake messages in records of 64 bytes", "RFC 8446 §5.1", "ok")(
        lambda where, v=number: attempt(
            where,
            settings(v),
            tamper=on(
                HandshakeType.client_hello,
                lambda client, m: setattr(client, "recordSize", 64),
            ),
        )
    )
    case(f"{name}: an extension nobody knows, and GREASE", "RFC 8701", "ok")(
        lambda where, v=number: attempt(where, settings(v), tamper=with_extension(0x2A2A, b"\0\1"))
    )
    case(f"{name}: without a server name", "RFC 6066 §3", "ok")(
        lambda where, v=number: attempt(where, settings(v), tamper=without(ExtensionType.server_name))
    )
    case(f"{name}: ALPN nobody speaks here", "RFC 7301 §3.2", "no_application_protocol")(
        lambda where, v=number: attempt((where[0], where[1] + 1), settings(v), alpn=[b"nobody"])
    )
    case(f"{name}: two close_notify", "RFC 8446 §6.1", "closed", "ok", "close_notify")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: [c.say(21, b"\1\0"), c.say(21, b"\1\0")])
    )

for suite in ["aes128gcm", "aes256gcm", "chacha20-poly1305"]:
    for name, number in [("TLS 1.2", TLS12), ("TLS 1.3", TLS13)]:
        case(f"{name}: {suite}", "", "ok")(
            lambda where, v=number, s=suite: attempt(where, settings(v, cipherNames=[s]))
        )

for group in ["x25519", "secp256r1", "secp384r1"]:
    case(f"TLS 1.3: {group}", "", "ok")(
        lambda where, g=group: attempt(where, settings(TLS13, keyShares=[g], eccCurves=[g]))
    )
case("TLS 1.3: a share of no group (HelloRetryRequest)", "RFC 8446 §4.1.4", "ok")(
    lambda where: attempt(where, settings(TLS13, keyShares=[]))
)
case("TLS 1.3: padded records", "RFC 8446 §5.4", "ok")(
    lambda where: attempt(
        where,
        settings(TLS13, padding_cb=lambda length, content, most: 300 if length < 1000 else 0),
    )
)
case("TLS 1.3: KeyUpdate, asked for an answer", "RFC 8446 §4.6.3", "ok")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: [None for _ in c.send_keyupdate_request(1)])
)
case("TLS 1.3: 20 KeyUpdates", "RFC 8446 §4.6.3", "ok")(
    lambda where: attempt(
        where, settings(TLS13), after=lambda c: [None for _ in range(20) for _ in c.send_keyupdate_request(1)]
    )
)
case("TLS 1.3: a ClientHello of TLS 1.3 without session id", "RFC 8446 §4.1.2", "ok")(
    lambda where: attempt(where, settings(TLS13), tamper=hello(lambda h: setattr(h, "session_id", bytearray())))
)

# --- the first message -----------------------------------------------------------------------------------------------

case("SSL 2 ClientHello", "RFC 6176", "closed", "reset", "protocol_version", "handshake_failure")(
    lambda where: opening(where, b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37))
)
for name, number in [("SSL 3", (3, 0)), ("TLS 1.0", (3, 1)), ("TLS 1.1", (3, 2))]:
    case(f"only {name}", "RFC 8996", "protocol_version", "handshake_failure")(
        lambda where, v=number: opening(where, raw_hello(version=v))
    )
case("TLS 1.2 with a fallback marked", "RFC 7507", "a ServerHello", "inappropriate_fallback")(
    lambda where: opening(where, raw_hello(suites=(0xC02F, 0xC02B, 0x5600)))
)
case("TLS 1.1 with a fallback marked", "RFC 7507", "inappropriate_fallback", "protocol_version")(
    lambda where: opening(where, raw_hello(version=(3, 2), suites=(0xC02F, 0xC02B, 0x5600)))
)
case("a version of the future", "RFC 8446 §4.1.2", "a ServerHello")(
    lambda where: opening(where, raw_hello(version=(3, 9)))
)
case("supported_versions of the future only", "RFC 8446 §4.2.1", "protocol_version")(
    lambda where: opening(where, raw_hello(extensions=ORDINARY + [(43, b"\x02\x03\x09")]))
)
case("no cipher suite in common", "RFC 5246 §7.2.2", "handshake_failure")(
    lambda where: opening(where, raw_hello(suites=(0x0005, 0x002F)))
)
case("no cipher suite at all", "RFC 5246 §7.4.1.2", "decode_error", "handshake_failure", "illegal_parameter")(
    lambda where: opening(where, raw_hello(suites=()))
)
case("RSA key exchange, export and null suites", "RFC 9325 §4.1", "handshake_failure")(
    lambda where: opening(where, raw_hello(suites=(0x0035, 0x0003, 0x0001, 0x000A, 0xC012)))
)
case("no compression method", "RFC 5246 §7.4.1.2", "decode_error", "illegal_parameter")(
    lambda where: opening(where, raw_hello(compression=b""))
)
case("compression without the null one", "RFC 5246 §7.4.1.2", "illegal_parameter", "decode_error", "handshake_failure")(
    lambda where: opening(where, raw_hello(compression=b"\x01"))
)
case("TLS 1.3 with compression offered", "RFC 8446 §4.1.2", "illegal_parameter")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, share(29, 32), compression=b"\x01\x00"))
)
case("session id of 33 bytes", "RFC 8446 §4.1.2", "decode_error", "illegal_parameter")(
    lambda where: opening(where, raw_hello(session=bytes(33)))
)
case("no curve in common (TLS 1.2)", "RFC 8422 §5.1", "handshake_failure")(
    lambda where: opening(where, raw_hello(extensions=[SNI, (10, b"\0\x02\0\x01"), SIGNATURES]))
)
case("no signature algorithm in common (TLS 1.2)", "RFC 5246 §7.4.1.4.1", "handshake_failure")(
    lambda where: opening(where, raw_hello(extensions=[SNI, GROUPS, (13, b"\0\x02\x02\x02")]))
)
case("an extension twice", "RFC 8446 §4.2", "illegal_parameter", "decode_error")(
    lambda where: opening(where, raw_hello(extensions=ORDINARY + [SNI]))
)
case("an extension longer than the rest", "RFC 8446 §6.2", "decode_error")(
    lambda where: opening(where, raw_hello(body=raw_hello()[9:-4] + b"\xff\x01\x00\x09"))
)
case("bytes behind the extensions", "RFC 8446 §6.2", "decode_error")(
    lambda where: opening(where, raw_hello(body=raw_hello()[9:] + b"\0\0\0"))
)
case("a hello cut short", "RFC 8446 §6.2", "decode_error")(
    lambda where: opening(where, raw_hello(body=raw_hello()[9:60]))
)
case("an empty hello", "RFC 8446 §6.2", "decode_error")(lambda where: opening(where, raw_hello(body=b"")))
case("an empty server name", "RFC 6066 §3", "decode_error", "illegal_parameter", "unrecognized_name")(
    lambda where: opening(where, raw_hello(extensions=[(0, b"\0\x03\0\0\0"), GROUPS, SIGNATURES]))
)
case("a server name with a zero in it", "RFC 6066 §3", "decode_error", "illegal_parameter", "unrecognized_name")(
    lambda where: opening(where, raw_hello(extensions=[(0, b"\0\x06\0\0\3a\0b"), GROUPS, SIGNATURES]))
)
case("an empty ALPN list", "RFC 7301 §3.1", "decode_error", "illegal_parameter")(
    lambda where: opening(where, raw_hello(extensions=ORDINARY + [(16, b"\0\0")]))
)
case("an empty name in ALPN", "RFC 7301 §3.1", "decode_error", "illegal_parameter")(
    lambda where: opening(where, raw_hello(extensions=ORDINARY + [(16, b"\0\x04\0\2h2")]))
)
case("a record of 2^14 + 1 bytes in the clear", "RFC 8446 §5.1", "record_overflow", "decode_error")(
    lambda where: opening(where, record(22, b"\1\0\x40\x10" + bytes(2**14 - 3)))
)
case("a hello of a megabyte announced", "RFC 8446 §6.2", "decode_error", "illegal_parameter", "record_overflow", "handshake_failure")(
    lambda where: opening(where, record(22, b"\1\x10\0\0" + bytes(16000)))
)
case("an empty handshake record", "RFC 8446 §5.1", "unexpected_message", "decode_error", "closed", "reset")(
    lambda where: opening(where, record(22, b""), finish=True)
)
case("application data first", "RFC 8446 §5", "unexpected_message", "closed", "reset")(
    lambda where: opening(where, record(23, b"GET / HTTP/1.1\r\n\r\n"))
)
case("an alert first", "RFC 8446 §6", "unexpected_message", "closed", "reset")(lambda where: opening(where, record(21, b"\2\x28")))
case("ChangeCipherSpec first", "RFC 8446 §5", "unexpected_message", "closed", "reset")(lambda where: opening(where, record(20, b"\1")))
case("heartbeat first (Heartbleed)", "RFC 6520 §3", "unexpected_message", "closed", "reset")(
    lambda where: opening(where, record(24, b"\1\x40\0"))
)
case("another handshake message first", "RFC 8446 §4", "unexpected_message", "closed", "reset")(
    lambda where: opening(where, record(22, b"\x10\0\0\1\0"))
)
case("HTTP in the clear", "RFC 8446 §5", "unexpected_message", "protocol_version", "decode_error", "closed", "reset")(
    lambda where: opening(where, b"GET / HTTP/1.1\r\nHost: web.example\r\n\r\n")
)

# --- TLS 1.3 -----------------------------------------------------------------------------------------------------------

case("TLS 1.3: no key_share", "RFC 8446 §9.2", "missing_extension")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13))
)
case("TLS 1.3: no supported_groups", "RFC 8446 §9.2", "missing_extension")(
    lambda where: opening(where, hello13(SNI, SIGNATURES, VERSIONS13, share(29, 32)))
)
case("TLS 1.3: no signature_algorithms", "RFC 8446 §9.2", "missing_extension")(
    lambda where: opening(where, hello13(SNI, GROUPS, VERSIONS13, share(29, 32)))
)
case("TLS 1.3: two shares of one group", "RFC 8446 §4.2.8", "illegal_parameter")(
    lambda where: opening(
        where,
        hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, (51, b"\0\x48" + (b"\0\x1d\0\x20" + bytes([9]) * 32) * 2)),
    )
)
case("TLS 1.3: a share of zeros (x25519)", "RFC 7748 §6.1", "illegal_parameter")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, share(29, 32, 0)))
)
case("TLS 1.3: a share that is too short (x25519)", "RFC 8446 §4.2.8.2", "illegal_parameter", "decode_error")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, share(29, 31)))
)
case("TLS 1.3: a point off the curve (secp256r1)", "RFC 8446 §4.2.8.2", "illegal_parameter")(
    lambda where: opening(where, hello13(SNI, (10, b"\0\2\0\x17"), SIGNATURES, VERSIONS13, share(23, 65, 4)))
)
case("TLS 1.3: an encapsulation key of 0xff (X25519MLKEM768)", "draft-ietf-tls-ecdhe-mlkem §4", "illegal_parameter")(
    lambda where: opening(where, hello13(SNI, (10, b"\0\2\x11\xec"), SIGNATURES, VERSIONS13, share(0x11EC, 1216, 0xFF)))
)
case("TLS 1.3: a short share of X25519MLKEM768", "draft-ietf-tls-ecdhe-mlkem §4", "illegal_parameter", "decode_error")(
    lambda where: opening(where, hello13(SNI, (10, b"\0\2\x11\xec"), SIGNATURES, VERSIONS13, share(0x11EC, 1215)))
)
PSK = (41, b"\0\x0a\0\x04abcd\0\0\0\0\0\x21\x20" + bytes(32))
MODES = (45, b"\1\1")
case("TLS 1.3: pre_shared_key is not the last", "RFC 8446 §4.2.11", "illegal_parameter")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, MODES, PSK, share(29, 32)))
)
case("TLS 1.3: pre_shared_key without its modes", "RFC 8446 §4.2.9", "missing_extension")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, share(29, 32), PSK))
)
case("TLS 1.3: a ticket of nobody", "RFC 8446 §4.2.11", "a ServerHello")(
    lambda where: opening(where, hello13(SNI, GROUPS, SIGNATURES, VERSIONS13, MODES, share(29, 32), PSK))
)
case("TLS 1.3: Finished with a bit changed", "RFC 8446 §4.4.4", "decrypt_error")(
    lambda where: attempt(where, settings(TLS13), tamper=on(HandshakeType.finished, flip(-1)))
)
case("TLS 1.3: Finished one byte short", "RFC 8446 §6.2", "decode_error", "decrypt_error")(
    lambda where: attempt(
        where,
        settings(TLS13),
        tamper=on(
            HandshakeType.finished,
            lambda c, m: [Message(22, b"\x14" + (len(m.write()) - 5).to_bytes(3, "big") + bytes(m.write()[4:-1]))],
        ),
    )
)
case("TLS 1.3: no Finished, data instead", "RFC 8446 §4.4.4", "unexpected_message", "bad_record_mac", "decrypt_error")(
    lambda where: attempt(where, settings(TLS13), tamper=drop(HandshakeType.finished))
)
case("TLS 1.3: Finished twice", "RFC 8446 §4.4.4", "unexpected_message", "bad_record_mac")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say(22, b"\x14\0\0\x30" + bytes(48)))
)
case("TLS 1.3: a certificate that nobody asked for", "RFC 8446 §4.4.2", "unexpected_message")(
    lambda where: attempt(
        where,
        settings(TLS13),
        tamper=on(HandshakeType.finished, lambda c, m: [Message(22, b"\x0b\0\0\4\0\0\0\0"), m]),
    )
)
case("TLS 1.3: ChangeCipherSpec with another value", "RFC 8446 §5", "unexpected_message", "illegal_parameter", "decode_error")(
    lambda where: attempt(
        where,
        settings(TLS13),
        tamper=on(HandshakeType.finished, lambda c, m: c.raw(record(20, b"\2", (3, 3)))),
    )
)
case("TLS 1.3: ChangeCipherSpec after the handshake", "RFC 8446 §5", "unexpected_message")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.raw(record(20, b"\1", (3, 3))))
)
case("TLS 1.3: ClientHello after the handshake", "RFC 8446 §4.1.2", "unexpected_message")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say(22, raw_hello()[5:]))
)
case("TLS 1.3: KeyUpdate of a third kind", "RFC 8446 §4.6.3", "illegal_parameter", "decode_error")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say(22, b"\x18\0\0\1\2"))
)
case("TLS 1.3: a message behind KeyUpdate in its record", "RFC 8446 §5.1", "unexpected_message")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say(22, b"\x18\0\0\1\0\x18\0\0\1\0"))
)
case("TLS 1.3: EndOfEarlyData without early data", "RFC 8446 §4.5", "unexpected_message")(
    lambda where: attempt(
        where,
        settings(TLS13),
        tamper=on(HandshakeType.finished, lambda c, m: [Message(22, b"\5\0\0\0"), m]),
    )
)
case("TLS 1.3: data in the clear in the middle", "RFC 8446 §5.2", "bad_record_mac", "unexpected_message", "closed")(
    lambda where: attempt(
        where,
        settings(TLS13),
        tamper=on(HandshakeType.finished, lambda c, m: c.raw(record(23, b"x" * 40, (3, 3)))),
    )
)
case("TLS 1.3: an empty handshake fragment", "RFC 8446 §5.1", "unexpected_message")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say_whole(22, b""))
)
case("TLS 1.3: 2^14 + 1 bytes in a record", "RFC 8446 §5.4", "record_overflow")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say_whole(23, bytes(2**14 + 1)))
)
case("TLS 1.3: an unknown content type", "RFC 8446 §5", "unexpected_message")(
    lambda where: attempt(where, settings(TLS13), after=lambda c: c.say_whole(99, b"x"))
)

# --- TLS 1.2 -----------------------------------------------------------------------------------------------------------

case("TLS 1.2: Finished with a bit changed", "RFC 5246 §7.4.9", "decrypt_error")(
    lambda where: attempt(where, settings(TLS12), tamper=on(HandshakeType.finished, flip(-1)))
)
case("TLS 1.2: no ClientKeyExchange", "RFC 5246 §7.3", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), tamper=drop(HandshakeType.client_key_exchange))
)
case("TLS 1.2: ClientKeyExchange twice", "RFC 5246 §7.3", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), tamper=twice(HandshakeType.client_key_exchange))
)
case("TLS 1.2: ClientHello twice", "RFC 5246 §7.3", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), tamper=twice(HandshakeType.client_hello))
)
case("TLS 1.2: a point that is none", "RFC 8422 §5.7", "illegal_parameter", "decode_error", "handshake_failure", "decrypt_error")(
    lambda where: attempt(
        where,
        settings(TLS12, eccCurves=["secp256r1"], keyShares=["secp256r1"]),
        tamper=on(HandshakeType.client_key_exchange, lambda c, m: [Message(22, b"\x10\0\0\x42\x41\4" + b"\7" * 64)]),
    )
)
case("TLS 1.2: an empty ClientKeyExchange", "RFC 5246 §7.2.2", "decode_error", "illegal_parameter", "handshake_failure")(
    lambda where: attempt(
        where,
        settings(TLS12),
        tamper=on(HandshakeType.client_key_exchange, lambda c, m: [Message(22, b"\x10\0\0\0")]),
    )
)
case("TLS 1.2: ChangeCipherSpec before the key (CVE-2014-0224)", "RFC 5246 §7.1", "unexpected_message")(
    lambda where: attempt(
        where,
        settings(TLS12),
        tamper=on(HandshakeType.client_key_exchange, lambda c, m: [ChangeCipherSpec(), m]),
    )
)
case("TLS 1.2: ChangeCipherSpec twice", "RFC 5246 §7.1", "unexpected_message", "bad_record_mac", "decode_error")(
    lambda where: attempt(where, settings(TLS12), tamper=lambda c, m: [m, m] if ccs(c, m) else None)
)
case("TLS 1.2: no ChangeCipherSpec", "RFC 5246 §7.1", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), tamper=lambda c, m: [] if ccs(c, m) else None)
)
case("TLS 1.2: data before Finished", "RFC 5246 §7.3", "unexpected_message", "bad_record_mac")(
    lambda where: attempt(
        where, settings(TLS12), tamper=on(HandshakeType.finished, lambda c, m: [Message(23, b"early"), m])
    )
)
case("TLS 1.2: a certificate that nobody asked for", "RFC 5246 §7.4.6", "unexpected_message")(
    lambda where: attempt(
        where,
        settings(TLS12),
        tamper=on(HandshakeType.client_key_exchange, lambda c, m: [Message(22, b"\x0b\0\0\3\0\0\0"), m]),
    )
)
case("TLS 1.2: renegotiation", "RFC 9325 §3.5", "no_renegotiation", "unexpected_message", "ok")(
    lambda where: attempt(where, settings(TLS12), after=lambda c: c.say(22, raw_hello()[5:]))
)
case("TLS 1.2: HelloRequest by a client", "RFC 5246 §7.4.1.1", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), after=lambda c: c.say(22, b"\0\0\0\0"))
)
case("TLS 1.2: heartbeat nobody agreed on", "RFC 6520 §2", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), after=lambda c: c.say(24, b"\1\0\4ping" + bytes(16)))
)
case("TLS 1.2: an unknown content type", "RFC 5246 §6", "unexpected_message")(
    lambda where: attempt(where, settings(TLS12), after=lambda c: c.say_whole(99, b"x"))
)
case("TLS 1.2: 2^14 + 1 bytes in a record", "RFC 5246 §6.2.1", "record_overflow")(
    lambda where: attempt(where, settings(TLS12), after=lambda c: c.say_whole(23, bytes(2**14 + 1)))
)

for name, number in [("TLS 1.2", TLS12), ("TLS 1.3", TLS13)]:
    case(f"{name}: a record of noise", "RFC 8446 §5.2", "bad_record_mac")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: c.raw(record(23, bytes(range(200)), (3, 3))))
    )
    case(f"{name}: 2^14 + 300 bytes of ciphertext announced", "RFC 8446 §5.2", "record_overflow", "bad_record_mac")(
        lambda where, v=number: attempt(
            where, settings(v), after=lambda c: c.raw(record(23, bytes(2**14 + 300), (3, 3)))
        )
    )
    case(f"{name}: empty application data", "RFC 8446 §5.1", "ok")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: [c.say_whole(23, b"") for _ in range(5)])
    )
    case(f"{name}: 1,000 records of nothing", "", "ok", "unexpected_message")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: [c.say_whole(23, b"") for _ in range(1000)])
    )
    case(f"{name}: 100 warnings", "", "ok", "unexpected_message", "decode_error", "closed", "user_canceled")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: [c.say(21, b"\1\x5a") for _ in range(100)])
    )
    case(f"{name}: an alert of three bytes", "RFC 8446 §5.1", "decode_error", "unexpected_message")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: c.say(21, b"\1\0\0"))
    )
    case(f"{name}: a fatal alert ends it", "RFC 8446 §6.2", "closed", "reset")(
        lambda where, v=number: attempt(where, settings(v), after=lambda c: c.say(21, b"\2\x50"))
    )
