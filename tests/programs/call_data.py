"""Clients by what they do with a connected socket."""

import os
import select
import socket
import struct
import tempfile
import time

from calling import client
from common import SIZE, check, exchange, payload, read_all


@client
def sendfile(target):
    def send(sock, data):
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            at = 0
            while at < len(data):
                at += os.sendfile(sock.fileno(), file.fileno(), at, len(data) - at)

    with target.connect() as sock:
        exchange(sock, send=send)


@client
def splice(target):
    def send(sock, data):
        out, into = os.pipe()
        while data:
            count = left = os.write(into, data[:50_000])
            while left:
                left -= os.splice(out, sock.fileno(), left)
            data = data[count:]
        os.close(out)
        os.close(into)

    with target.connect() as sock:
        exchange(sock, send=send)


@client
def small_writes(target):
    def send(sock, data):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), 7):
            sock.send(data[at:at + 7])

    with target.connect() as sock:
        exchange(sock, 5_000, send=send)


@client
def more(target):
    """MSG_MORE and TCP_CORK hold back what is small, and nothing gets lost."""

    def send(sock, data):
        for at in range(0, 1_000, 10):
            sock.send(data[at:at + 10], socket.MSG_MORE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        sock.sendall(data[1_000:])
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    with target.connect() as sock:
        exchange(sock, send=send)


@client
def peek(target):
    def receive(sock):
        parts = []
        while seen := sock.recv(20_000, socket.MSG_PEEK):
            taken = sock.recv(len(seen), socket.MSG_WAITALL)
            check(taken == seen, "what was taken is not what was seen")
            parts.append(taken)
        return b"".join(parts)

    with target.connect() as sock:
        exchange(sock, receive=receive)


@client
def wait_all(target):
    """MSG_WAITALL for more than a record, and SO_RCVLOWAT set before the connect."""

    def receive(sock):
        parts = []
        while part := sock.recv(50_000, socket.MSG_WAITALL):
            check(len(part) == 50_000, "only", len(part), "bytes came")
            parts.append(part)
        return b"".join(parts)

    with target.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 5_000)
        sock.connect(target.address)
        check(SIZE % 50_000 == 0, "pieces")
        exchange(target.checked(sock), receive=receive)


@client
def options(target):
    """What was set before the connect is set after it."""
    tcp, sol = socket.IPPROTO_TCP, socket.SOL_SOCKET
    values = [
        (tcp, socket.TCP_NODELAY, 1), (sol, socket.SO_KEEPALIVE, 1), (tcp, socket.TCP_KEEPIDLE, 77), (tcp, socket.TCP_KEEPINTVL, 7),
        (tcp, socket.TCP_USER_TIMEOUT, 123_000), (sol, socket.SO_RCVBUF, 100_000), (sol, socket.SO_SNDBUF, 90_000),
        (sol, socket.SO_PRIORITY, 3), (sol, socket.SO_RCVLOWAT, 1), (tcp, socket.TCP_SYNCNT, 4),
    ]
    with target.socket() as sock:
        for level, option, value in values:
            sock.setsockopt(level, option, value)
        sock.setsockopt(tcp, socket.TCP_CONGESTION, b"reno")
        before = [sock.getsockopt(level, option) for level, option, _ in values]
        sock.connect(target.address)
        after = [sock.getsockopt(level, option) for level, option, _ in values]
        check(before == after, "options were", before, "and are", after)
        check(sock.getsockopt(tcp, socket.TCP_CONGESTION, 16).startswith(b"reno\0"), "another congestion control")
        exchange(target.checked(sock))


@client
def small_buffers(target):
    with target.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.connect(target.address)
        exchange(target.checked(sock))


@client
def zerocopy(target):
    with target.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, 60, 1)
        sock.connect(target.address)
        exchange(target.checked(sock))


@client
def silent(target):
    """Says nothing for a while."""
    with target.connect() as sock:
        time.sleep(0.3)
        exchange(sock)


@client
def waits_for_banner(target):
    with target.connect() as sock:
        line = sock.recv(100)
        check(line == b"welcome\n", "the server's first word is", line)
        exchange(sock)


@client
def listens_first(target):
    """The other end stops sending first; this one has not said a word by then, and is heard nevertheless."""
    with target.connect() as sock:
        check(read_all(sock) == payload(), "what came is not what was sent")
        time.sleep(0.1)
        sock.sendall(payload())


@client
def closes_at_once(target):
    """With everything still to be sent; the server says whether all came."""
    with target.connect() as sock:
        sock.sendall(payload())


@client
def linger(target):
    """The same, with a time limit that close waits for."""
    with target.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        sock.sendall(payload())


@client
def resets(target):
    with target.connect() as sock:
        check(sock.recv(100) == b"welcome\n", "the server's first word")
        sock.sendall(b"and no end")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@client
def is_reset(target):
    with target.connect() as sock:
        sock.sendall(payload())
        sock.shutdown(socket.SHUT_WR)
        try:
            data = read_all(sock)
        except ConnectionResetError:
            return
        check(False, "an end after", len(data), "bytes, and no reset")


@client
def ping_pong(target):
    """Small questions and answers over one connection, waited for with epoll, edge-triggered."""
    with target.connect() as sock, select.epoll() as epoll:
        sock.setblocking(False)
        epoll.register(sock, select.EPOLLIN | select.EPOLLET)
        for turn in range(200):
            question, answer = b"question %d" % turn, b""
            sock.send(question)
            while len(answer) < len(question):
                check(epoll.poll(60), "no answer to question", turn)
                try:
                    while True:
                        answer += sock.recv(100)
                except BlockingIOError:
                    pass
            check(answer == question, "asked", question, "answered", answer)
