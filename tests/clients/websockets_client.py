"""Python `websockets` as a client of the lab: `websockets_client.py URL`, with a `ws://` URL that sends messages back.

Prints one JSON object: what came back of a text, a large binary message, a message in fragments and a ping, and the code
of the close.
"""

import asyncio
import json
import sys

import websockets

LIMIT = 20


async def talk(url):
    async with websockets.connect(url, open_timeout=LIMIT, close_timeout=LIMIT, max_size=None) as socket:
        await socket.send("grüße")
        text = await socket.recv()
        await socket.send(b"\0" * 1_000_000)
        binary = await socket.recv()
        await socket.send(["in ", "three ", "pieces"])
        pieces = await socket.recv()
        await (await socket.ping())
        await socket.close()
    return {
        "text": text,
        "binary_bytes": len(binary),
        "pieces": pieces,
        "pod": socket.response_headers.get("x-lab-pod"),
        "close": socket.close_code,
    }


async def main():
    print(json.dumps(await asyncio.wait_for(talk(sys.argv[1]), LIMIT)))


asyncio.run(main())
