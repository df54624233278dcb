"""Servers by their processes and by how they wait: fork, prefork, threads, exec, descriptors passed on; select, poll and epoll."""

import os
import select
import signal
import socket
import sys
import threading

from common import echo
from serving import PROCESSES, accept, each, guarded, listen, serve_one, server, spawn, wait_children


class Select:
    def __init__(self):
        self.known = set()

    def add(self, fd):
        self.known.add(fd)

    def remove(self, fd):
        self.known.discard(fd)

    def ready(self):
        return select.select(list(self.known), [], [])[0]


class Poll:
    def __init__(self):
        self.poll = select.poll()

    def add(self, fd):
        self.poll.register(fd, select.POLLIN)

    def remove(self, fd):
        self.poll.unregister(fd)

    def ready(self):
        return [fd for fd, _ in self.poll.poll()]


class Epoll:
    def __init__(self, flags=0, listener_flags=0):
        self.epoll, self.flags, self.next_flags = select.epoll(), flags, flags | listener_flags

    def add(self, fd):
        self.epoll.register(fd, select.EPOLLIN | self.next_flags)
        self.next_flags = self.flags

    def remove(self, fd):
        self.epoll.unregister(fd)

    def ready(self):
        return [fd for fd, _ in self.epoll.poll()]


def event_loop(listener, watcher, edge=False):
    """Echoes, and blocks nowhere but in the watcher. With `edge` everything is taken until there is nothing more."""
    listener.setblocking(False)
    connections, watched = {}, watcher()
    watched.add(listener.fileno())

    def come():
        while True:
            connection = accept(listener)
            connection.setblocking(False)
            connections[connection.fileno()] = connection
            watched.add(connection.fileno())
            if not edge:
                return

    def turn(connection):
        while True:
            data = connection.recv(65_536)
            if not data:
                watched.remove(connection.fileno())
                del connections[connection.fileno()]
                connection.close()
                return
            # Waiting until it is written is no art of event loops, but echoing is not what is tested here.
            connection.setblocking(True)
            connection.sendall(data)
            connection.setblocking(False)
            if not edge:
                return

    while True:
        for fd in watched.ready():
            try:
                come() if fd == listener.fileno() else turn(connections[fd])
            except BlockingIOError:
                pass


@server
def select_(port):
    event_loop(listen(port), Select)


@server
def poll(port):
    event_loop(listen(port), Poll)


@server
def epoll_level(port):
    event_loop(listen(port), Epoll)


@server
def epoll_edge(port):
    event_loop(listen(port), lambda: Epoll(select.EPOLLET), edge=True)


@server
def fork(port):
    """A child for each connection; the parent closes its own descriptor at once."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = listen(port)
    while True:
        connection = accept(listener)
        spawn(echo, connection)
        connection.close()


@server
def prefork(port):
    """Children that all block in accept on one listener."""
    listener = listen(port)
    for _ in range(PROCESSES):
        spawn(each, listener)
    wait_children()


@server
def prefork_epoll(port):
    """Children with an epoll of their own on one listener, woken one at a time."""
    listener = listen(port)
    for _ in range(PROCESSES):
        spawn(event_loop, listener, lambda: Epoll(listener_flags=select.EPOLLEXCLUSIVE))
    wait_children()


@server
def threads(port):
    """Threads that all block in accept on one listener."""
    listener = listen(port)
    workers = [threading.Thread(target=each, args=(listener,)) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@server
def reuseport(port):
    """Processes with a listener of their own on one port."""
    for _ in range(PROCESSES):
        spawn(lambda: each(listen(port, reuseport=True)))
    wait_children()


@server
def exec_(port):
    """The listener is inherited by another program."""
    listener = listen(port)
    listener.set_inheritable(True)
    os.execv(sys.executable, [sys.executable, "-B", sys.argv[0], "--inherited", str(listener.fileno())])


@server
def pass_connection(port):
    """Accepted here, served by another process that got the descriptor in a message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work():
        while True:
            _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
            guarded(echo, socket.socket(fileno=fd))

    spawn(work)
    listener = listen(port)
    while True:
        with accept(listener) as connection:
            socket.send_fds(ours, [b"x"], [connection.fileno()])


@server
def pass_listener(port):
    """Made here, after the other process had begun, which gets it in a message and accepts from it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work():
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
        each(socket.socket(fileno=fd))

    spawn(work)
    with listen(port) as listener:
        socket.send_fds(ours, [b"x"], [listener.fileno()])
    wait_children()


@server
def dup(port):
    """Accepted from a duplicate of the listener, served by a duplicate of the connection."""
    original = listen(port)
    listener = original.dup()
    original.close()
    while True:
        connection = accept(listener)
        copy = connection.dup()
        connection.close()
        guarded(echo, copy)


@server
def many_listeners(port):
    """Twenty listeners in one process, one of them on this port."""
    listeners = [listen(0) for _ in range(19)] + [listen(port)]
    while True:
        for listener in select.select(listeners, [], [])[0]:
            guarded(serve_one, listener)
