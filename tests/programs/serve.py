"""Servers that accept in every way there is; each gives back what it gets and looks closely at what it is shown.

    serve.py HOW=PORT ...    a process for each; says `HOW peer ADDRESS PORT` for every connection, and `WRONG HOW: ...` if anything is off
    serve.py --inherited FD  accepts from a listener that came over exec

What the words for HOW mean is told where they are defined: `serve_accept.py`, `serve_processes.py`, `serve_data.py`.
"""

import socket
import sys

import serve_accept  # noqa: F401: fills the table
import serve_data  # noqa: F401
import serve_processes  # noqa: F401
from serving import SERVERS, begin, each, guarded, spawn, wait_children


def main():
    if sys.argv[1] == "--inherited":
        begin("exec")
        each(socket.socket(fileno=int(sys.argv[2])))
    for word in sys.argv[1:]:
        name, port = word.split("=")
        begin(name)
        spawn(SERVERS[name], int(port))
    wait_children()


main()
