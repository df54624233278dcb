"""What `serve.py` and `call.py` share: bytes to send, loops to move them, and libc's calls where Python's own hide their arguments.

A server or a client that sees anything but what the kernel would show it without a mesh raises `Wrong`.
"""

import ctypes
import os
import random
import select
import socket
import struct
import threading

# Long enough for many TLS records, short enough for an emulated processor.
SIZE = 150_000
LIBC = ctypes.CDLL(None, use_errno=True)


class Wrong(Exception):
    pass


def check(condition, *words):
    if not condition:
        raise Wrong(" ".join(str(word) for word in words))


def payload(size=SIZE):
    return random.Random(size).randbytes(size)


def say(*words):
    # One write for one line: many processes write to the same log.
    os.write(1, (" ".join(str(word) for word in words) + "\n").encode())


def place(address):
    return f"{address[0]} {address[1]}"


def read_all(sock, piece=65_536):
    parts = []
    while part := sock.recv(piece):
        parts.append(part)
    return b"".join(parts)


def wait_readable(sock):
    select.select([sock], [], [])


def echo(sock):
    """Gives back all that comes, and ends when the other has."""
    with sock:
        while part := sock.recv(65_536):
            sock.sendall(part)


def exchange(sock, size=SIZE, receive=read_all, send=None):
    """Sends so many bytes from a thread of its own, then the end; wants them all back, then the end.

    Little is ended only after the first of it has come back: the kernel takes no keys for a connection that the other end has ended, so
    a server's agent that is slower than the whole of it has to stay on the way."""
    sent, failures, answered = payload(size), [], threading.Event()

    def sender():
        try:
            if send is None:
                sock.sendall(sent)
            else:
                send(sock, sent)
            answered.wait()
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=sender)
    thread.start()
    if size < SIZE:
        wait_readable(sock)
    answered.set()
    got = receive(sock)
    thread.join()
    check(not failures, "sending:", failures)
    check(got == sent, len(got), "bytes came back for", len(sent), "or others")


def wrap(fd):
    """A socket object for a descriptor whose mode stays as it is: Python would make it blocking, or not, by its own rules."""
    sock = socket.socket(fileno=fd)
    sock.settimeout(None if os.get_blocking(fd) else 0)
    return sock


def call(function, *arguments):
    """A call into libc: its result, or the errno as a negative number."""
    result = function(*arguments)
    return -ctypes.get_errno() if result < 0 else result


def raw_accept(listener, room=128, flags=None):
    """accept(2), or accept4(2) if flags are given, with so much room for the address; none at all with `None`. Gives the descriptor
    (or minus the errno), the room's bytes and the length that the kernel wrote."""
    if room is None:
        arguments = (listener.fileno(), None, None)
        buffer, length = b"", ctypes.c_uint32(0)
    else:
        buffer, length = ctypes.create_string_buffer(b"\xaa" * 128, 128), ctypes.c_uint32(room)
        arguments = (listener.fileno(), ctypes.byref(buffer), ctypes.byref(length))
    fd = call(LIBC.accept, *arguments) if flags is None else call(LIBC.accept4, *arguments, flags)
    return fd, bytes(buffer), length.value


def pack_address(sock, address):
    """A sockaddr for the socket's family."""
    if sock.family == socket.AF_INET:
        return struct.pack("=HH4s8x", socket.AF_INET, socket.htons(address[1]), socket.inet_aton(address[0]))
    packed = socket.inet_pton(socket.AF_INET6, address[0])
    return struct.pack("=HHI16sI", socket.AF_INET6, socket.htons(address[1]), 0, packed, 0)


def unpack_address(data):
    """Address and port of a sockaddr of either family."""
    family, port = struct.unpack_from("=HH", data)
    if family == socket.AF_INET:
        return socket.inet_ntoa(data[4:8]), socket.ntohs(port)
    check(family == socket.AF_INET6, "a sockaddr of family", family)
    return socket.inet_ntop(socket.AF_INET6, data[8:24]), socket.ntohs(port)
