"""One connection that lives: `serve PORT` echoes lines, `call HOST PORT` sends a line, waits for its echo and says so, again and again.
`take PORT` reads slowly to the end and says how much came; `leave HOST PORT` writes without waiting until nothing more is taken, and
closes or shuts down at once. `race HOST PORT MARKER` connects while other threads write on the socket and read from it."""

import socket
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
    {"serve": serve, "call": call, "take": take, "leave": leave, "race": race}[sys.argv[1]](*sys.argv[2:])
