"""The transfer matrix's programs: bytes that differ at every place go both ways in one row's manner, and end in its manner.

    transfer.py serve PATIENCE ROWS            says `PORT FAMILY ok`, or `PORT FAMILY WRONG: ...`, for each connection; before
                                               that `PORT FAMILY sent N` or `got N` where this is not what the row tells
    transfer.py call PATIENCE ROWS HOST ...    the same

ROWS is a JSON list; each row has a port of its own, and both programs know all of it, so that nothing but the row's bytes is sent:

    port, families               the families that it is called over
    up, down                     bytes from the client and from the server
    write, read                  [how, bytes at once, a pause after so many or 0]
    ending                       see ENDINGS
    greeted                      whether the server says a byte first: then both ends have been taken by their programs before it begins
    blocking                     whether the sockets block
    send_buffer, receive_buffer  in bytes, or null
"""

import faulthandler
import json
import select
import socket
import sys
import threading

from common import Wrong, check, say
from transfer_ends import ENDINGS
from transfer_moves import pattern, retry


class End:
    """One end of a row's connection: what it sends, what it wants, and how."""

    def __init__(self, row, is_client, family):
        self.name = f"{row['port']} {family}"
        self.is_client, self.write, self.read = is_client, row["write"], row["read"]
        up, down = pattern(3, row["up"]), pattern(5, row["down"])
        self.sent, self.wanted = (up, down) if is_client else (down, up)

    def tell(self, *words):
        say(self.name, *words)


def prepare(sock, row):
    for option, name in ((socket.SO_SNDBUF, "send_buffer"), (socket.SO_RCVBUF, "receive_buffer")):
        if row[name]:
            sock.setsockopt(socket.SOL_SOCKET, option, row[name])


def run(sock, row, is_client, family):
    try:
        with sock:
            sock.setblocking(row["blocking"])
            if row["greeted"] and is_client:
                check(retry(sock, False, lambda: sock.recv(1)) == b"!", "the greeting")
            elif row["greeted"]:
                check(sock.send(b"!") == 1, "the greeting")
            ENDINGS[row["ending"]](sock, End(row, is_client, family))
        say(row["port"], family, "ok")
        return True
    except (Wrong, OSError) as error:
        say(row["port"], family, f"WRONG: {error!r}")
        return False


def call(rows, hosts):
    good = True
    for row in rows:
        for family in row["families"]:
            kind = socket.AF_INET if family == 4 else socket.AF_INET6
            sock = socket.socket(kind, socket.SOCK_STREAM)
            prepare(sock, row)
            faulthandler.dump_traceback_later(patience, exit=True)
            sock.connect((hosts[0 if family == 4 else 1], row["port"]))
            good = run(sock, row, True, family) and good
    faulthandler.cancel_dump_traceback_later()
    return 0 if good else 1


def serve(rows):
    listeners = {}
    for row in rows:
        listener = socket.create_server(("", row["port"]), family=socket.AF_INET6, backlog=8, dualstack_ipv6=True)
        listeners[listener] = row
    say("listening")
    while True:
        for listener in select.select(list(listeners), [], [])[0]:
            sock, (address, *_) = listener.accept()
            # What hangs is said by the client, which ends, and by this end's stacks.
            faulthandler.dump_traceback_later(patience)
            prepare(sock, listeners[listener])
            family = 4 if address.startswith("::ffff:") else 6
            threading.Thread(target=run, args=(sock, listeners[listener], False, family)).start()


what, patience, plan, *rest = sys.argv[1:]
patience, plan = int(patience), json.loads(plan)
if what == "serve":
    serve(plan)
else:
    sys.exit(call(plan, rest))
