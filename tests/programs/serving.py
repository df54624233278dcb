"""What all servers of `serve.py` are made of: listeners, accept, echoing, processes, and the table of servers."""

import os
import socket

from common import Wrong, check, echo, place, say

SERVERS = {}
PROCESSES = 3
# The server that this process is, once it is one.
_name = "serve"


def server(function):
    """Enters a server into the table: a function that gets a port and never returns."""
    SERVERS[function.__name__.rstrip("_").replace("_", "-")] = function
    return function


def begin(name):
    global _name
    _name = name


def listen(port, family=socket.AF_INET6, address="", reuseport=False, v6only=False):
    """On both families, unless told otherwise."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuseport:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
    listener.bind((address, port))
    listener.listen(64)
    return listener


def show(connection):
    """Every server says who came to it: the test compares that with what the client says of itself."""
    say(_name, "peer", place(connection.getpeername()))


def accept(listener):
    """As Python does it: accept4 with SOCK_CLOEXEC and an address."""
    connection, address = listener.accept()
    check(connection.getpeername()[:2] == address[:2], "accept said", address, "getpeername", connection.getpeername())
    check(connection.getsockname()[1] == listener.getsockname()[1], "the local end is", connection.getsockname())
    check(connection.family == listener.family, "family", connection.family)
    show(connection)
    return connection


def guarded(work, *arguments):
    """A server survives what goes wrong, and says it."""
    try:
        return work(*arguments)
    except ConnectionError as error:
        say(_name, "cut:", error.strerror)
    except (Wrong, OSError) as error:
        say(f"WRONG {_name}: {error!r}")


def spawn(work, *arguments):
    """A child that ends with the work."""
    child = os.fork()
    if child == 0:
        guarded(work, *arguments)
        os._exit(0)
    return child


def wait_children():
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def serve_one(listener, take=accept, serve=echo):
    serve(take(listener))


def each(listener, take=accept, serve=echo):
    """One connection after the other."""
    while True:
        guarded(serve_one, listener, take, serve)
