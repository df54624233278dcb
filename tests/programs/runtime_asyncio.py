"""An echo server and its client by asyncio.

    runtime_asyncio.py serve PORT
    runtime_asyncio.py call HOST PORT CONNECTIONS SIZE
"""

import asyncio
import random
import sys


async def serve(port):
    async def echo(reader, writer):
        print("peer", *writer.get_extra_info("peername")[:2], flush=True)
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    # One listener for each family, as asyncio does it.
    server = await asyncio.start_server(echo, None, port)
    await server.serve_forever()


async def exchange(host, port, size, seed):
    sent = random.Random(seed).randbytes(size)
    reader, writer = await asyncio.open_connection(host, port)
    print("local", *writer.get_extra_info("sockname")[:2])

    async def send():
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    _, got = await asyncio.gather(send(), reader.read())
    writer.close()
    await writer.wait_closed()
    if got != sent:
        raise SystemExit(f"WRONG: {len(got)} bytes came back for {len(sent)}, or others")


async def call(host, port, connections, size):
    await asyncio.gather(*(exchange(host, port, size, seed) for seed in range(connections)))
    print("exact:", connections, "connections")


if sys.argv[1] == "serve":
    asyncio.run(serve(int(sys.argv[2])))
else:
    asyncio.run(call(sys.argv[2], *map(int, sys.argv[3:])))
