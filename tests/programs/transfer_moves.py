"""The ways to write and to read of the transfer matrix: each moves a part, and says how much it was."""

import os
import random
import select
import socket
import tempfile
import time

from common import check


def pattern(seed, size):
    """Bytes that differ at every place, so that a lost, doubled or swapped piece shows."""
    source, piece = random.Random(seed * 1_000_003 + size), 1 << 24
    return b"".join(source.randbytes(min(piece, size - at)) for at in range(0, size, piece))


def same(got, wanted):
    if got != wanted:
        differ = next((at for at, (a, b) in enumerate(zip(got, wanted)) if a != b), None)
        check(False, f"{len(wanted)} bytes are wanted, {len(got)} came, first difference at {differ}")


def retry(sock, writes, move):
    """The move, tried again whenever a socket that does not block has become ready for it."""
    while True:
        try:
            return move()
        except BlockingIOError:
            select.select([] if writes else [sock], [sock] if writes else [], [])


# Writing: a function of the socket, the data, and a part's begin and end.

def send(sock, data, at, end):
    return retry(sock, True, lambda: sock.send(data[at:end]))


def send_more(sock, data, at, end):
    """Says of everything but the last that more will come."""
    flags = socket.MSG_MORE if end < len(data) else 0
    return retry(sock, True, lambda: sock.send(data[at:end], flags))


def send_scattered(sock, data, at, end):
    middle = at + (end - at) // 3
    return retry(sock, True, lambda: sock.sendmsg([data[at:middle], data[middle:end]]))


class Sendfile:
    def __init__(self):
        self.file = None

    def __call__(self, sock, data, at, end):
        if self.file is None:
            self.file = tempfile.TemporaryFile()
            self.file.write(data)
            self.file.flush()
        return retry(sock, True, lambda: os.sendfile(sock.fileno(), self.file.fileno(), at, end - at))


class SpliceOut:
    def __init__(self):
        self.out, self.into = os.pipe()

    def __call__(self, sock, data, at, end):
        # As much as a pipe takes at once.
        left = count = os.write(self.into, data[at:min(end, at + 65_536)])
        while left:
            left -= retry(sock, True, lambda: os.splice(self.out, sock.fileno(), left))
        return count

    def __del__(self):
        os.close(self.out)
        os.close(self.into)


# Reading: a function of the socket and of how much to ask for.

def receive(sock, size):
    return retry(sock, False, lambda: sock.recv(size))


def receive_scattered(sock, size):
    buffers = [bytearray(part) for part in (1, 10, size)]
    count = retry(sock, False, lambda: sock.recvmsg_into(buffers)[0])
    return b"".join(buffers)[:count]


def receive_whole(sock, size):
    """Waits for all of it; less comes at the end only."""
    return sock.recv(size, socket.MSG_WAITALL)


def peek(sock, size):
    """Looks first; what is taken then is what was seen."""
    seen = retry(sock, False, lambda: sock.recv(size, socket.MSG_PEEK))
    taken = b""
    while len(taken) < len(seen):
        taken += sock.recv(len(seen) - len(taken))
    check(taken == seen, "what was taken is not what was seen")
    return taken


class SpliceIn:
    def __init__(self):
        self.out, self.into = os.pipe()

    def __call__(self, sock, size):
        count = retry(sock, False, lambda: os.splice(sock.fileno(), self.into, size))
        return os.read(self.out, count) if count else b""

    def __del__(self):
        os.close(self.out)
        os.close(self.into)


WRITERS = {
    "send": lambda: send, "more": lambda: send_more, "scattered": lambda: send_scattered, "sendfile": Sendfile, "splice": SpliceOut,
}
READERS = {
    "receive": lambda: receive, "scattered": lambda: receive_scattered, "whole": lambda: receive_whole, "peek": lambda: peek,
    "splice": SpliceIn,
}


class Pauses:
    """A millisecond after so many bytes."""

    def __init__(self, every):
        self.every, self.since = every, 0

    def moved(self, count):
        self.since += count
        if self.every and self.since >= self.every:
            self.since = 0
            time.sleep(0.001)


def write(sock, data, manner):
    """Writes all of it, in pieces of the manner's size."""
    how, piece, every = manner
    move, pauses, view = WRITERS[how](), Pauses(every), memoryview(data)
    for begin in range(0, len(data), piece):
        at, end = begin, min(begin + piece, len(data))
        while at < end:
            count = move(sock, view, at, end)
            check(count > 0, "a write of nothing")
            at += count
        pauses.moved(end - begin)


def read(sock, manner):
    """Reads to the end."""
    how, piece, every = manner
    move, pauses, parts = READERS[how](), Pauses(every), []
    while part := move(sock, piece):
        parts.append(part)
        pauses.moved(len(part))
    return b"".join(parts)
