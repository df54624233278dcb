"""Connections of which every byte is known. `serve PORT` does what each caller asks; `call HOST PORT COUNT` makes so many, some of which end by
a reset, and says how much went each way; `hold HOST PORT COUNT` makes so many and keeps them. A caller first sends how much it will send,
itself included, how much it wants, and the way to end: c closes, r is reset by the client, s by the server. Nobody resets before
both ends have all: what is counted has to be exact."""

import queue
import socket
import struct
import sys
import threading
import time

HEADER = struct.Struct("!QQc")
NOW = struct.pack("ii", 1, 0)


def take(connection, count):
    while count:
        data = connection.recv(min(count, 65536))
        if not data:
            raise OSError(f"the end came {count} bytes too early")
        count -= len(data)


def serve(port):
    listener = socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection):
    with connection:
        try:
            head = b""
            while len(head) < HEADER.size:
                part = connection.recv(HEADER.size - len(head))
                if not part:
                    return
                head += part
            up, down, end = HEADER.unpack(head)
            # The last byte says that all has come.
            take(connection, up - HEADER.size - 1)
            connection.sendall(b"d" * down)
            take(connection, 1)
            if end == b"r":
                connection.sendall(b"k")
            if end == b"s":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
                return
            while connection.recv(4096):
                pass
        except OSError:
            pass


def exchange(host, port, number, end):
    """One connection, up to the point where both ends have all that there is."""
    up = HEADER.size + 1 + (number * 7919) % 5000 + (300_000 if number % 100 == 7 else 0)
    down = (number * 104_729) % 7000 + (500_000 if number % 100 == 11 else 0)
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(HEADER.pack(up, down, end) + b"u" * (up - HEADER.size - 1))
    take(connection, down)
    connection.sendall(b"!")
    return connection, up, down


def finish(connection, end):
    if end == b"r":
        # Only then has all that was sent come: a reset must not overtake it.
        take(connection, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
    elif end == b"s":
        take_end(connection)
    else:
        connection.shutdown(socket.SHUT_WR)
        take_end(connection)
    connection.close()


def take_end(connection):
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


def call(host, port, count):
    numbers, sums, failures = queue.Queue(), [0, 0], []
    for number in range(int(count)):
        numbers.put(number)
    lock = threading.Lock()

    def work():
        while True:
            try:
                number = numbers.get_nowait()
            except queue.Empty:
                return
            end = (b"c", b"c", b"r", b"s")[number % 4]
            try:
                connection, up, down = exchange(host, port, number, end)
                finish(connection, end)
            except OSError as error:
                failures.append(f"{number} {end}: {error}")
                return
            with lock:
                sums[0] += up
                sums[1] += down + (end == b"r")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        sys.exit("\n".join(failures))
    print("moved", sums[0], sums[1], flush=True)


def hold(host, port, count):
    kept, sums = [], [0, 0]
    for number in range(int(count)):
        connection, up, down = exchange(host, port, number, b"c")
        kept.append(connection)
        sums[0] += up
        sums[1] += down
    print("moved", sums[0], sums[1], flush=True)
    while True:
        time.sleep(1000)


{"serve": serve, "call": call, "hold": hold}[sys.argv[1]](*sys.argv[2:])
