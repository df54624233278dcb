"""An HTTP server with a thread for each connection, and its client with as many, by Python's standard library.

    runtime_threads.py serve PORT
    runtime_threads.py call HOST PORT CONNECTIONS SIZE     four requests on each connection
"""

import http.client
import http.server
import random
import socket
import sys
import threading


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        print("peer", *self.client_address[:2], flush=True)
        super().setup()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 64

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def call(host, port, connections, size):
    failures = []

    def work(seed):
        try:
            connection = http.client.HTTPConnection(host, port, timeout=60)
            for turn in range(4):
                sent = random.Random(seed * 4 + turn).randbytes(size)
                connection.request("POST", "/", sent)
                got = connection.getresponse().read()
                if got != sent:
                    raise OSError(f"{len(got)} bytes came back for {len(sent)}, or others")
            connection.close()
        except OSError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise SystemExit(f"WRONG: {len(failures)} failed, the first: {failures[0]!r}")
    print("exact:", connections, "connections")


if sys.argv[1] == "serve":
    Server(("::", int(sys.argv[2])), Echo).serve_forever()
else:
    call(sys.argv[2], *map(int, sys.argv[3:]))
