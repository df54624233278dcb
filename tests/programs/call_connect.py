"""Clients by their way to connect: blocking or not, with each way of waiting, from many threads, over shared descriptors."""

import errno
import os
import select
import signal
import socket
import sys
import threading

from calling import client
from common import LIBC, Wrong, call, check, exchange, pack_address, payload, read_all, say, wait_readable, wrap
from uring import Uring

AT_ONCE = 12


def connect_raw(fd, packed, length=None):
    return call(LIBC.connect, fd, packed, len(packed) if length is None else length)


@client
def plain(target):
    with target.connect() as sock:
        exchange(sock)


@client
def four_times(target):
    for size in (1, 100, 20_000, 100_000):
        with target.connect() as sock:
            exchange(sock, size)


@client
def little(target):
    """Says little, and that it was all, before anybody can have looked at the connection."""
    with target.connect() as sock:
        sock.sendall(payload(100))
        sock.shutdown(socket.SHUT_WR)
        check(read_all(sock) == payload(100), "what came back is not what was sent")


@client
def poll(target):
    with target.begin() as sock:
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        check(poller.poll(60_000), "never writable")
        exchange(target.finished(sock))


@client
def select_(target):
    with target.begin() as sock:
        check(select.select([], [sock], [], 60)[1], "never writable")
        exchange(target.finished(sock))


def epoll_first(target, flags):
    """Registered before the connect, as Java's selectors are: what was registered must tell of the connection."""
    with target.socket() as sock, select.epoll() as epoll:
        sock.setblocking(False)
        epoll.register(sock, select.EPOLLOUT | select.EPOLLIN | flags)
        # A socket that was never connected has hung up, says the kernel: that edge is taken away here.
        epoll.poll(0)
        target.begin_on(sock)
        while True:
            events = epoll.poll(60)
            check(events, "never writable")
            if events[0][1] & select.EPOLLOUT and not events[0][1] & select.EPOLLHUP:
                break
        target.finished(sock)
        sock.setblocking(False)
        # And of what comes later: the echo, then the end.
        sock.send(b"over an edge")
        got, ended = b"", False
        while True:
            check(epoll.poll(60), "no event for what came")
            try:
                while data := sock.recv(100):
                    got += data
                break
            except BlockingIOError:
                if got == b"over an edge" and not ended:
                    sock.shutdown(socket.SHUT_WR)
                    ended = True
        check(got == b"over an edge", "came:", got)


@client
def epoll_level(target):
    epoll_first(target, 0)


@client
def epoll_edge(target):
    epoll_first(target, select.EPOLLET)


@client
def timeout(target):
    with target.socket() as sock:
        sock.settimeout(60)
        sock.connect(target.address)
        exchange(target.checked(sock))


@client
def send_timeout(target):
    """SO_SNDTIMEO limits a connect that blocks."""
    with target.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, (60).to_bytes(8, "little") + b"\0" * 8)
        sock.connect(target.address)
        exchange(target.checked(sock))


@client
def bound(target):
    """From an address and a port of its own choice."""
    with target.socket() as sock:
        sock.bind((target.own, 0))
        before = sock.getsockname()
        sock.connect(target.address)
        check(sock.getsockname() == before, "bound to", before, "and now", sock.getsockname())
        exchange(target.checked(sock))


@client
def mapped(target):
    """An IPv6 socket to a mapped IPv4 address; over IPv6 it is as any other."""
    if target.number == 4:
        target.family = socket.AF_INET6
        target.own, target.address = "::ffff:" + target.own, ("::ffff:" + target.address[0], target.address[1])
    with target.connect() as sock:
        exchange(sock)


@client
def signals(target):
    """Signals with SA_RESTART keep coming while connect blocks."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        with target.socket() as sock:
            check(connect_raw(sock.fileno(), pack_address(sock, target.address)) == 0, "connect failed")
            exchange(target.checked(sock))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@client
def mistakes(target):
    """Calls that must fail, with the errno that they have without a mesh; then the same socket connects, and not twice."""

    def expect(result, number, what):
        check(result == -number, what, "gave", result, "and not", errno.errorcode[number])

    with target.socket() as sock:
        packed = pack_address(sock, target.address)
        expect(connect_raw(sock.fileno(), packed, 3), errno.EINVAL, "a short address")
        expect(call(LIBC.connect, sock.fileno(), 8, len(packed)), errno.EFAULT, "an address that is none")
        expect(connect_raw(999, packed), errno.EBADF, "no descriptor")
        expect(connect_raw(1, packed), errno.ENOTSOCK, "a file")
        other = b"\x63" + packed[1:]
        expect(connect_raw(sock.fileno(), other), errno.EAFNOSUPPORT, "a family that is none")
        sock.connect(target.address)
        expect(connect_raw(sock.fileno(), packed), errno.EISCONN, "a second connect")
        exchange(target.checked(sock))


@client
def refused(target):
    """Nobody listens there: said at once, or at the first look; then the same again."""
    for _ in range(2):
        with target.socket() as sock:
            try:
                sock.connect(target.address)
                data = sock.recv(100)
            except (ConnectionRefusedError, ConnectionResetError):
                continue
            raise Wrong("connected, and read " + repr(data))


@client
def threads(target):
    failures = []

    def work():
        try:
            with target.connect() as sock:
                exchange(sock, 20_000)
        except (Wrong, OSError) as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(AT_ONCE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    check(not failures, len(failures), "failed, the first:", failures[:1])


@client
def burst(target):
    """All are begun before any is waited for, by one thread."""
    socks = [target.begin() for _ in range(AT_ONCE)]
    for sock in socks:
        check(select.select([], [sock], [], 60)[1], "never writable")
    for sock in socks:
        with target.finished(sock):
            exchange(sock, 20_000)


def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except (Wrong, OSError) as error:
            say("in a child:", repr(error))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    check(status == 0, "the child ended with", status)


@client
def fork(target):
    """Connected by a child, used by it and by the parent."""
    with target.socket() as sock:
        in_child(lambda: (sock.connect(target.address), sock.sendall(b"from the child, ")))
        target.checked(sock)
        sock.sendall(b"from the parent")
        wait_readable(sock)
        sock.shutdown(socket.SHUT_WR)
        check(read_all(sock) == b"from the child, from the parent", "what came back is not what both had sent")


@client
def pass_(target):
    """Connected here, used by another process that got the descriptor in a message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work():
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
        with socket.socket(fileno=fd) as sock:
            exchange(sock)

    with target.connect() as sock:
        socket.send_fds(ours, [b"x"], [sock.fileno()])
    in_child(work)


@client
def exec_(target):
    """Connected here, used by another program."""
    with target.connect() as sock:
        sock.set_inheritable(True)
        fd = sock.fileno()
        in_child(lambda: os.execv(sys.executable, [sys.executable, "-B", sys.argv[0], "--inherited", str(fd)]))


@client
def dup(target):
    """Connected by one descriptor, used by another of the same socket."""
    with target.socket() as first:
        second = wrap(os.dup(first.fileno()))
        first.connect(target.address)
    with second:
        exchange(target.checked(second))


@client
def io_uring(target):
    """connect, send and recv without the system calls of these names."""
    import ctypes

    ring = Uring()
    with target.socket() as sock:
        packed = ctypes.create_string_buffer(pack_address(sock, target.address))
        result = ring.do(Uring.CONNECT, sock.fileno(), ctypes.addressof(packed), offset=len(packed) - 1)
        check(result == 0, "io_uring connect:", result)
        target.checked(sock)

        def receive(sock):
            parts = []
            while part := ring.recv(sock.fileno()):
                parts.append(part)
            return b"".join(parts)

        exchange(sock, receive=receive)


@client
def fast_open(target):
    """Connected by the first send."""
    with target.socket() as sock:
        check(sock.sendto(b"at once", socket.MSG_FASTOPEN, target.address) == 7, "a short send")
        target.checked(sock)
        wait_readable(sock)
        sock.shutdown(socket.SHUT_WR)
        check(read_all(sock) == b"at once", "what came back is not what was sent")
