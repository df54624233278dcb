"""One connection that lives: `serve PORT` echoes lines, `call HOST PORT` sends a line, waits for its echo and says so, again and again.
`take PORT` reads slowly to the end and says how much came; `leave HOST PORT` writes without waiting until nothing more is taken, and
closes or shuts down at once. `fill HOST PORT BYTES` sends and receives until its connection ends, and then so many bytes on another.
`hold HOST PORT` sends from memory that does not come, so that its socket's lock is held, and shuts down. `race HOST PORT MARKER` connects while other threads write on the socket and read from it."""

import ctypes
import fcntl
import platform
import socket
import struct
import sys
import threading
import time


def serve(port):
    listener = socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=echo, args=(connection,), daemon=True).start()


def echo(connection):
    try:
        while data := connection.recv(4096):
            connection.sendall(data)
    except OSError as error:
        print("lost", error, flush=True)
    connection.close()


def call(host, port):
    with socket.create_connection((host, int(port))) as connection:
        count = 0
        while True:
            line = b"%d\n" % count
            try:
                connection.sendall(line)
                back = b""
                while len(back) < len(line):
                    part = connection.recv(100)
                    if not part:
                        raise OSError("the end came")
                    back += part
            except OSError as error:
                print("ended", count, error, flush=True)
                return
            if back != line:
                print("WRONG", back, flush=True)
                return
            count += 1
            print("echoes", count, flush=True)
            time.sleep(0.01)


def take(port):
    listener = socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        connection, _ = listener.accept()
        time.sleep(0.02)
        total = 0
        try:
            while data := connection.recv(1 << 16):
                total += len(data)
        except OSError as error:
            total = error
        connection.close()
        print("took", total, flush=True)


def leave(host, port):
    for count in range(24):
        connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if size := (0, 1 << 16, 8192)[count % 3]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        connection.connect((host, int(port)))
        connection.setblocking(False)
        accepted = connection.send(b"x" * (1 + 1000 * count))
        try:
            while True:
                accepted += connection.send(b"y" * (1 << 20))
        except BlockingIOError:
            pass
        if count % 2:
            connection.shutdown(socket.SHUT_WR)
            connection.setblocking(True)
            connection.recv(1)
        connection.close()
        print("left", accepted, flush=True)


def fill(host, port, size):
    block = bytes(range(256)) * 16

    def rounds(connection, until):
        """How many blocks went there and came back before the end."""
        done = 0
        try:
            while done * len(block) < until:
                connection.sendall(block)
                back = b""
                while len(back) < len(block):
                    part = connection.recv(len(block))
                    if not part:
                        return done, "the end came"
                    back += part
                if back != block:
                    return done, "WRONG"
                done += 1
                time.sleep(0.002)
        except OSError as error:
            return done, type(error).__name__
        return done, "enough"

    for until in (1 << 40, int(size)):
        with socket.create_connection((host, int(port))) as connection:
            print("rounds", *rounds(connection, until), flush=True)


def hold(host, port):
    connection = socket.create_connection((host, int(port)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    page = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
    # userfaultfd(2): whoever touches the page waits for a page that this program never gives.
    faults = libc.syscall(323 if platform.machine() == "x86_64" else 282, 0)
    assert faults >= 0, ctypes.get_errno()
    fcntl.ioctl(faults, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
    fcntl.ioctl(faults, 0xC020AA00, struct.pack("QQQQ", page, 4096, 1, 0))
    send = threading.Thread(target=libc.send, args=(connection.fileno(), ctypes.c_void_p(page), ctypes.c_size_t(4096), 0))
    send.start()
    time.sleep(0.5)
    print("holding", flush=True)
    connection.shutdown(socket.SHUT_WR)
    print("SHUT DOWN", flush=True)


def race(host, port, marker):
    """Says what came of connecting again and again with writers and readers on the socket."""
    outcomes = {}
    # One whose bytes are read away stands still until the agent has waited long enough.
    for count in range(4):
        connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        over = threading.Event()

        def write():
            while not over.is_set():
                try:
                    connection.send(marker.encode() * 20, socket.MSG_DONTWAIT)
                except OSError:
                    pass

        def read():
            while not over.is_set():
                try:
                    connection.recv(100, socket.MSG_DONTWAIT)
                except OSError:
                    pass

        threads = [threading.Thread(target=what) for what in ((write, write, read) if count == 3 else (write, write))]
        for thread in threads:
            thread.start()
        try:
            connection.connect((host, int(port)))
            outcome = "connected"
        except OSError as error:
            outcome = error.strerror
        over.set()
        for thread in threads:
            thread.join()
        connection.close()
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print("outcomes", outcomes, flush=True)


if __name__ == "__main__":
    {"serve": serve, "call": call, "take": take, "leave": leave, "fill": fill, "hold": hold, "race": race}[sys.argv[1]](*sys.argv[2:])
