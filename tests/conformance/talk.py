"""A TLS client that does one thing wrong, and what it hears for it."""

import socket

from tlslite.api import HandshakeSettings, TLSConnection
from tlslite.constants import AlertDescription
from tlslite.errors import TLSAbruptCloseError, TLSLocalAlert, TLSRemoteAlert
from tlslite.messages import Message

PATIENCE = 5


class Client(TLSConnection):
    """`tamper(client, message)` gives what is sent instead of a message: messages, or `None` for the message as it is."""

    def __init__(self, sock, tamper=None):
        super().__init__(sock)
        self.tamper = tamper

    def _sendMsg(self, msg, randomizeFirstBlock=True, update_hashes=True):
        instead = self.tamper(self, msg) if self.tamper else None
        for one in [msg] if instead is None else instead:
            yield from super()._sendMsg(one, randomizeFirstBlock, update_hashes)

    def say(self, content_type, data):
        """Bytes as content of their own type, protected as the connection is by now."""
        for _ in TLSConnection._sendMsg(self, Message(content_type, bytearray(data))):
            pass

    def say_whole(self, content_type, data):
        """In one record, however long."""
        for _ in self._sendMsgThroughSocket(Message(content_type, bytearray(data))):
            pass

    def raw(self, data):
        """Past TLS."""
        self.sock.flush()
        self.sock.socket.sendall(bytes(data))


def settings(version, **more):
    chosen = HandshakeSettings()
    chosen.minVersion = chosen.maxVersion = version
    for key, value in more.items():
        setattr(chosen, key, value)
    return chosen


def alert(number):
    return AlertDescription.toStr(number)


def attempt(where, chosen, tamper=None, after=None, **handshake):
    """`ok`: shaken hands, and the echo came back. Otherwise the alert, or how the connection ended."""
    sock = socket.create_connection(where, timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client = Client(sock, tamper)
    try:
        client.handshakeClientCert(settings=chosen, serverName="web.example", **handshake)
        try:
            if after:
                after(client)
            client.write(b"ping")
        except (ConnectionError, OSError):
            pass  # It was told why before; that is read now.
        return "ok" if client.read(max=4, min=4) == b"ping" else "closed"
    except TLSRemoteAlert as heard:
        return alert(heard.description)
    except TLSAbruptCloseError:
        return "closed"
    except TLSLocalAlert as said:
        return f"(the client gives up: {alert(said.description)})"
    except socket.timeout:
        return "silence"
    except (ConnectionError, OSError):
        return heard_before_the_reset(sock)
    finally:
        sock.close()


def heard_before_the_reset(sock):
    """An alert in the clear may still be in the socket."""
    try:
        return plain_answer(sock)
    except (ConnectionError, OSError):
        return "reset"


def plain_answer(sock):
    """The first record: an alert, the type of another one, or the end."""
    head = sock.recv(5, socket.MSG_WAITALL)
    if len(head) < 5:
        return "closed"
    body = sock.recv(int.from_bytes(head[3:], "big"), socket.MSG_WAITALL)
    if head[0] == 21 and len(body) == 2:
        return alert(body[1])
    return {22: "a ServerHello"}.get(head[0], f"a record of type {head[0]}")


def opening(where, data, finish=False):
    """What is heard for these bytes at the beginning."""
    sock = socket.create_connection(where, timeout=PATIENCE)
    try:
        sock.sendall(bytes(data))
        if finish:
            sock.shutdown(socket.SHUT_WR)
        return plain_answer(sock)
    except socket.timeout:
        return "silence"
    except (ConnectionError, OSError):
        return heard_before_the_reset(sock)
    finally:
        sock.close()
