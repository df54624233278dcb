"""`HOST PORT THREADS`: connects, sends a line and waits for its echo, on a new connection each time, until SIGTERM. Says each failure at
once, how many there were ever so often, and at last `over CONNECTIONS FAILURES`."""

import signal
import socket
import sys
import threading
import time

ends = threading.Event()
lock = threading.Lock()
count = failures = 0


def knock(host, port):
    global count, failures
    while not ends.is_set():
        error = None
        try:
            with socket.create_connection((host, port), timeout=10) as connection:
                connection.sendall(b"is anybody there?\n")
                back = b""
                while len(back) < 18:
                    part = connection.recv(100)
                    if not part:
                        raise OSError("the end came")
                    back += part
        except OSError as caught:
            error = caught
        with lock:
            count += 1
            if error:
                failures += 1
                print("failed", time.time(), error, flush=True)
        if error:
            time.sleep(0.01)


signal.signal(signal.SIGTERM, lambda *_: ends.set())
host, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
workers = [threading.Thread(target=knock, args=(host, port)) for _ in range(threads)]
for worker in workers:
    worker.start()
while not ends.wait(0.1):
    print("so far", count, failures, flush=True)
for worker in workers:
    worker.join()
print("over", count, failures, flush=True)
