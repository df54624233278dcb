"""Servers by what they do with an accepted connection: sendfile, peeking, low-water marks, half-closing, lingering, resetting."""

import os
import random
import select
import socket
import struct
import tempfile

from common import check, echo, payload, read_all, say
from serving import accept, each, listen, server


@server
def sendfile(port):
    """Answers with sendfile(2), from a file."""

    def work(connection):
        with connection, tempfile.TemporaryFile() as file:
            file.write(read_all(connection))
            file.flush()
            size, at = file.tell(), 0
            while at < size:
                at += os.sendfile(connection.fileno(), file.fileno(), at, size - at)

    each(listen(port), serve=work)


@server
def peek(port):
    """Looks at everything before taking it, in two pieces, and waits for whole pieces."""

    def work(connection):
        with connection:
            while seen := connection.recv(3_000, socket.MSG_PEEK):
                first = len(seen) // 2
                taken = connection.recv(first, socket.MSG_WAITALL) if first else b""
                check(taken == seen[:first], "the first half is not what was seen")
                taken = connection.recv(len(seen) - first, socket.MSG_WAITALL)
                check(taken == seen[first:], "the second half is not what was seen")
                connection.sendall(seen)

    each(listen(port), serve=work)


@server
def lowat(port):
    """Is not to be woken for less than so many bytes, but at the end."""
    least = 10_000

    def work(connection):
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            ended = False
            while data := connection.recv(65_536):
                check(not ended, "more came after less than the mark")
                ended = len(data) < least
                connection.sendall(data)

    each(listen(port), serve=work)


@server
def scattered(port):
    """readv and writev."""

    def work(connection):
        with connection:
            while True:
                buffers = [bytearray(size) for size in (1, 10, 100, 16_384)]
                count = connection.recvmsg_into(buffers)[0]
                if count == 0:
                    return
                data = b"".join(buffers)[:count]
                while data:
                    third = len(data) // 3
                    data = data[connection.sendmsg([data[:third], data[third:]]):]

    each(listen(port), serve=work)


@server
def splice(port):
    """Through a pipe, without looking."""

    def work(connection):
        with connection:
            out, into = os.pipe()
            while count := os.splice(connection.fileno(), into, 65_536):
                while count:
                    count -= os.splice(out, connection.fileno(), count)
            os.close(out)
            os.close(into)

    each(listen(port), serve=work)


@server
def speaks_first(port):
    """Greets, and is done with sending before anything came; what comes then is checked here."""

    def work(connection):
        with connection:
            connection.sendall(payload())
            connection.shutdown(socket.SHUT_WR)
            check(read_all(connection) == payload(), "what came is not what was sent")
            say("speaks-first got it all")

    each(listen(port), serve=work)


@server
def takes_all(port):
    """Answers nothing; says that all came."""

    def work(connection):
        with connection:
            check(read_all(connection) == payload(), "what came is not what was sent")
            say("takes-all got it all")

    each(listen(port), serve=work)


@server
def linger(port):
    """Closes at once, with everything still to be sent; with a time limit that close waits for."""

    def work(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        with connection:
            data = read_all(connection)
            connection.sendall(data)

    each(listen(port), serve=work)


@server
def reset(port):
    """Reads all and answers with a reset."""

    def work(connection):
        data = read_all(connection)
        check(data == payload(), "what came is not what was sent")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    each(listen(port), serve=work)


@server
def is_reset(port):
    """Expects that its client resets."""

    def work(connection):
        connection.sendall(b"welcome\n")
        try:
            data = read_all(connection)
        except ConnectionResetError:
            say("is-reset was reset")
        else:
            check(False, "an end after", len(data), "bytes, and no reset")

    each(listen(port), serve=work)


@server
def idle(port):
    """An event loop that waits for all of input, output and hang-ups of every connection, level-triggered."""
    listener = listen(port)
    while True:
        with accept(listener) as connection, select.epoll() as epoll:
            connection.setblocking(False)
            epoll.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
            pending, ended = b"", False
            while pending or not ended:
                for _, events in epoll.poll():
                    if events & select.EPOLLIN and not ended and len(pending) < 100_000:
                        data = connection.recv(random.randint(1, 20_000))
                        pending, ended = pending + data, not data
                    if events & select.EPOLLOUT and pending:
                        pending = pending[connection.send(pending):]
                wanted = select.EPOLLOUT if pending else 0
                epoll.modify(connection, wanted | (0 if ended or len(pending) >= 100_000 else select.EPOLLIN))


@server
def banner(port):
    """A line first, then an echo: the client waits for the line before it says anything."""

    def work(connection):
        connection.sendall(b"welcome\n")
        echo(connection)

    each(listen(port), serve=work)
