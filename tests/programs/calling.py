"""What all clients of `call.py` are made of: the target, connecting, and the table of clients."""

import errno
import socket

from common import check, place, say

CLIENTS = {}


def client(function):
    """Enters a client into the table: a function that gets a `Target`."""
    CLIENTS[function.__name__.rstrip("_").replace("_", "-")] = function
    return function


class Target:
    """Where to connect to, and from where."""

    def __init__(self, family, own, to, port):
        self.number, self.own, self.address = family, own, (to, port)
        self.family = socket.AF_INET if family == 4 else socket.AF_INET6

    def socket(self):
        return socket.socket(self.family, socket.SOCK_STREAM)

    def connect(self):
        """Blocking, and checked."""
        sock = self.socket()
        sock.connect(self.address)
        return self.checked(sock)

    def begin(self):
        """A socket that does not block, in the middle of a connect or already connected."""
        sock = self.socket()
        sock.setblocking(False)
        self.begin_on(sock)
        return sock

    def begin_on(self, sock):
        result = sock.connect_ex(self.address)
        check(result in (0, errno.EINPROGRESS), "connect without blocking gave", errno.errorcode.get(result, result))

    def finished(self, sock):
        """The socket after the wait for a connect that did not block, now blocking."""
        failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        check(failed == 0, "SO_ERROR is", errno.errorcode.get(failed, failed))
        sock.setblocking(True)
        return self.checked(sock)

    def checked(self, sock):
        """Both ends are what the program believes; the test compares the local one with what others saw."""
        check(sock.getpeername()[:2] == self.address, "the peer is", sock.getpeername(), "and not", self.address)
        check(sock.getsockname()[0] == self.own, "the own address is", sock.getsockname(), "and not", self.own)
        say(self.address[1], self.number, "local", place(sock.getsockname()))
        return sock
