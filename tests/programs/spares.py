"""A server that speaks first, and a client that calls it again and again.

serve PORT               greets each connection with its number and who called, then echoes a line
call ADDRESS PORT COUNT  opens COUNT connections one after the other, and says what the greetings were; of two one speaks at once, and one
                         after it was greeted
"""

import socket
import sys


def serve(port):
    listener = socket.create_server(("0.0.0.0", port), backlog=64)
    print("serving", flush=True)
    number = 0
    while True:
        connection, peer = listener.accept()
        number += 1
        with connection, connection.makefile("rwb", buffering=0) as lines:
            try:
                lines.write(f"{number} {peer[0]}\n".encode())
                lines.write(lines.readline())
            except OSError:
                pass


def call(address, port, count):
    for index in range(count):
        with socket.create_connection((address, port), timeout=20) as connection:
            with connection.makefile("rwb", buffering=0) as lines:
                if index % 2 == 0:
                    lines.write(b"anybody?\n")
                greeting = lines.readline()
                if index % 2 == 1:
                    lines.write(b"anybody?\n")
                if lines.readline() != b"anybody?\n":
                    sys.exit("another answer, or none")
                print("greeted", greeting.decode().strip(), flush=True)


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    call(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
