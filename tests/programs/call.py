"""Clients that connect in every way there is; each wants back what it sent, and looks closely at what it is shown.

    call.py --from IPV4 IPV6 --to IPV4 IPV6 HOW=PORT[/FAMILY] ...   says `PORT FAMILY local ADDRESS PORT` for each connection, then
                                                           `PORT FAMILY ok`, or `PORT FAMILY WRONG: ...`
    call.py --inherited FD                                 exchanges bytes over a socket that came over exec
"""

import socket
import sys

import call_connect  # noqa: F401: fills the table
import call_data  # noqa: F401
from common import Wrong, exchange, say
from calling import CLIENTS, Target


def main():
    words = sys.argv[1:]
    if words[0] == "--inherited":
        exchange(socket.socket(fileno=int(words[1])))
        return 0
    (_, own4, own6, _, to4, to6), rows, wrong = words[:6], words[6:], 0
    for row in rows:
        how, port = row.split("=")
        port, _, only = port.partition("/")
        for family, own, to in ((4, own4, to4), (6, own6, to6)):
            if only and only != str(family):
                continue
            try:
                CLIENTS[how](Target(family, own, to, int(port)))
                say(port, family, "ok")
            except (Wrong, OSError) as error:
                wrong += 1
                say(port, family, f"WRONG: {how}: {error!r}")
    return min(wrong, 1)


sys.exit(main())
