"""The ways of the transfer matrix to come to an end: each runs a connection of which it has one end."""

import select
import socket
import struct
import threading
import time

from common import Wrong, check
from transfer_moves import read, retry, same, write


def both(sock, end):
    """Both directions at once, each to its end."""
    failures = []

    def work():
        try:
            write(sock, end.sent, end.write)
            sock.shutdown(socket.SHUT_WR)
        except (Wrong, OSError) as error:
            failures.append(error)

    writer = threading.Thread(target=work)
    writer.start()
    try:
        same(read(sock, end.read), end.wanted)
    finally:
        writer.join()
    check(not failures, "writing:", failures)


def one_after_the_other(sock, end, first):
    """One end is done with sending before the other begins."""
    if first:
        write(sock, end.sent, end.write)
        sock.shutdown(socket.SHUT_WR)
        same(read(sock, end.read), end.wanted)
    else:
        same(read(sock, end.read), end.wanted)
        write(sock, end.sent, end.write)
        sock.shutdown(socket.SHUT_WR)


def late(sock, end, first):
    """What was sent and ended is read much later, and all of it is there."""
    if first:
        write(sock, end.sent, end.write)
        sock.shutdown(socket.SHUT_WR)
        check(retry(sock, False, lambda: sock.recv(1)) == b"", "more than the end")
    else:
        time.sleep(0.7)
        same(read(sock, end.read), end.wanted)


def close(sock, end, first):
    """Closes with everything on its way, and without another word."""
    if first:
        write(sock, end.sent, end.write)
    else:
        same(read(sock, end.read), end.wanted)


def fill(sock, end, first, shut):
    """Writes until the kernel takes no more, and closes or shuts down at once: what it had taken by then comes, to the last byte."""
    if first:
        at = 0
        try:
            while at < len(end.sent):
                at += sock.send(end.sent[at:at + end.write[1]])
        except BlockingIOError:
            pass
        if shut:
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.close()
        end.tell("sent", at)
        if shut:
            check(retry(sock, False, lambda: sock.recv(1)) == b"", "more than the end")
    else:
        time.sleep(0.2)
        got = read(sock, end.read)
        same(got, end.wanted[:len(got)])
        end.tell("got", len(got))


def reset(sock, end, first, half):
    """One end resets, perhaps after it had ended its half; the other sees a reset, and all that came before."""
    if not first:
        sees_a_reset(sock, end, half)
        return
    write(sock, end.sent, end.write)
    if half:
        sock.shutdown(socket.SHUT_WR)
    check(sock.recv(4) == b"seen", "the other's word that it has it all")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def sees_a_reset(sock, end, half):
    got = b""
    while len(got) < len(end.wanted):
        part = sock.recv(len(end.wanted) - len(got))
        check(part, "an end after", len(got), "bytes")
        got += part
    same(got, end.wanted)
    if half:
        check(sock.recv(10) == b"", "more than the end of the half")
    sock.sendall(b"seen")
    try:
        if half:
            # Nothing is read any more on this side: it shows on writing, or as an event.
            while True:
                select.select([], [sock], [])
                sock.sendall(bytes(1000))
        check(False, "a reset is wanted, and it ended after", len(sock.recv(10)), "more bytes")
    except (ConnectionResetError, BrokenPipeError):
        pass


def by(ending, client, *words):
    """The ending in which the client, or else the server, is first."""
    return lambda sock, end: ending(sock, end, end.is_client == client, *words)


ENDINGS = {
    "both": both,
    "client-first": by(one_after_the_other, True),
    "server-first": by(one_after_the_other, False),
    "client-late": by(late, True),
    "server-late": by(late, False),
    "client-closes": by(close, True),
    "server-closes": by(close, False),
    "client-fills-and-closes": by(fill, True, False),
    "server-fills-and-closes": by(fill, False, False),
    "client-fills-and-shuts": by(fill, True, True),
    "server-fills-and-shuts": by(fill, False, True),
    "client-resets": by(reset, True, False),
    "server-resets": by(reset, False, False),
    "client-half-resets": by(reset, True, True),
    "server-half-resets": by(reset, False, True),
}
