"""Servers by their way to call accept: families, flags, arguments, errors, time limits, signals, io_uring."""

import errno
import fcntl
import os
import select
import signal
import socket
import tempfile
import time

from common import LIBC, call, check, echo, raw_accept, read_all, unpack_address, wrap
from serving import accept, each, guarded, listen, serve_one, server, show, spawn, wait_children
from uring import Uring


@server
def plain(port):
    each(listen(port))


@server
def v4(port):
    each(listen(port, socket.AF_INET))


@server
def v6(port):
    each(listen(port, socket.AF_INET6, v6only=True))


@server
def two_families(port):
    for listener in (listen(port, socket.AF_INET), listen(port, socket.AF_INET6, v6only=True)):
        spawn(each, listener)
    wait_children()


def flags_of(fd):
    cloexec = bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    return cloexec, not os.get_blocking(fd)


def checked_accept(listener, room, flags, cloexec, nonblock):
    fd, buffer, length = raw_accept(listener, room, flags)
    check(fd >= 0, "accept:", fd)
    connection = wrap(fd)
    size = 16 if listener.family == socket.AF_INET else 28
    if room is not None:
        check(length == size, "the length of the address is", length)
        check(buffer[min(size, room):] == b"\xaa" * (128 - min(size, room)), "memory beyond the address was written to")
        if room >= size:
            peer = connection.getpeername()[:2]
            check(unpack_address(buffer) == peer, "accept said", unpack_address(buffer), "getpeername", peer)
    check(flags_of(fd) == (cloexec, nonblock), "flags (cloexec, nonblock) are", flags_of(fd))
    os.set_blocking(fd, True)
    connection.settimeout(None)
    show(connection)
    return connection


@server
def bare_accept(port):
    """accept(2): no flags, with room for the address, none, and too little."""
    listener = listen(port)
    while True:
        for room in (128, None, 8, 0):
            guarded(serve_one, listener, lambda found: checked_accept(found, room, None, False, False))


@server
def accept4_flags(port):
    """All flags, also from a listener that does not block, whose mode accepted sockets do not get."""
    listener = listen(port)
    listener.setblocking(False)
    while True:
        for flags in (0, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK):
            select.select([listener], [], [])
            cloexec, nonblock = bool(flags & socket.SOCK_CLOEXEC), bool(flags & socket.SOCK_NONBLOCK)
            guarded(serve_one, listener, lambda found: checked_accept(found, 128, flags, cloexec, nonblock))


def expect(result, number, what):
    check(result == -number, what, "gave", result, "and not", errno.errorcode[number])


@server
def mistakes(port):
    """Calls that must fail, with the errno that they have without a mesh; then one that works."""
    listener = listen(port)
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        expect(raw_accept(idle)[0], errno.EINVAL, "a socket that does not listen")
        expect(raw_accept(datagrams)[0], errno.EOPNOTSUPP, "a socket for datagrams")
        expect(call(LIBC.accept, 999, None, None), errno.EBADF, "no descriptor")
        expect(call(LIBC.accept, 1, None, None), errno.ENOTSOCK, "a file")
        expect(raw_accept(listener, 128, 1)[0], errno.EINVAL, "an unknown flag")
        listener.setblocking(False)
        expect(raw_accept(listener)[0], errno.EAGAIN, "nobody's connection")
        listener.setblocking(True)
    each(listener)


@server
def timeout(port):
    """SO_RCVTIMEO on a listener that blocks."""
    listener = listen(port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, b"\0" * 8 + (200_000).to_bytes(8, "little"))
    expect(raw_accept(listener)[0], errno.EAGAIN, "the time limit")
    while True:
        fd, _, _ = raw_accept(listener)
        if fd != -errno.EAGAIN:
            check(fd >= 0, "accept:", fd)
            connection = wrap(fd)
            show(connection)
            guarded(echo, connection)


@server
def interrupted(port):
    """A signal without SA_RESTART ends an accept that blocks; one with it does not."""
    listener, seen = listen(port), []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    check(raw_accept(listener)[0] == -errno.EINTR and seen, "a signal came while accept waited")
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    while True:
        fd, _, _ = raw_accept(listener)
        check(fd >= 0, "accept with SA_RESTART:", fd)
        connection = wrap(fd)
        show(connection)
        guarded(echo, connection)


@server
def late(port):
    """Several wait before the first is taken."""
    listener = listen(port)
    while True:
        select.select([listener], [], [])
        time.sleep(0.3)
        listener.setblocking(False)
        try:
            while True:
                connection = accept(listener)
                connection.setblocking(True)
                guarded(echo, connection)
        except BlockingIOError:
            pass


@server
def inherit(port):
    """Options of a listener that accepted sockets get."""
    listener = listen(port)
    tcp, sol = socket.IPPROTO_TCP, socket.SOL_SOCKET
    options = [
        (tcp, socket.TCP_NODELAY, 1), (sol, socket.SO_KEEPALIVE, 1), (tcp, socket.TCP_KEEPIDLE, 77), (tcp, socket.TCP_KEEPINTVL, 7),
        (tcp, socket.TCP_USER_TIMEOUT, 123_000), (sol, socket.SO_RCVBUF, 100_000), (sol, socket.SO_SNDBUF, 90_000),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x20), (sol, socket.SO_RCVLOWAT, 2),
    ]
    for level, option, value in options:
        listener.setsockopt(level, option, value)

    def look(connection):
        for level, option, _ in options:
            want, found = listener.getsockopt(level, option), connection.getsockopt(level, option)
            check(found == want, "level", level, "option", option, "is", found, "and not", want)
        echo(connection)

    each(listener, serve=look)


@server
def elsewhere(port):
    """What is no TCP, or does not leave the pod, is as ever: Unix sockets by name, datagrams, loopback. Then the usual."""
    local = listen(0)
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(directory + "/socket")
        unix.listen()
        child = spawn(lambda: echo(unix.accept()[0]))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(directory + "/socket")
            client.sendall(b"over a file")
            client.shutdown(socket.SHUT_WR)
            check(read_all(client) == b"over a file", "the Unix socket")
        os.waitpid(child, 0)
    with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as other:
        one.bind(("127.0.0.1", 0))
        other.connect(one.getsockname())
        other.send(b"datagram")
        check(one.recv(100) == b"datagram", "the datagram")
    for address in ("127.0.0.1", "::1"):
        child = spawn(lambda: echo(local.accept()[0]))
        with socket.create_connection((address, local.getsockname()[1])) as client:
            client.sendall(b"to myself")
            client.shutdown(socket.SHUT_WR)
            check(read_all(client) == b"to myself", "over loopback")
        os.waitpid(child, 0)
    each(listen(port))


@server
def io_uring(port):
    """accept, recv and send without the system calls of these names."""
    listener, ring = listen(port), Uring()
    while True:
        fd = ring.do(Uring.ACCEPT, listener.fileno())
        check(fd >= 0, "io_uring accept:", fd)
        with wrap(os.dup(fd)) as connection:
            show(connection)
        while data := ring.recv(fd):
            ring.send_all(fd, data)
        os.close(fd)
