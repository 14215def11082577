"""Python `httpx` as a client of the lab: `httpx_client.py URL 1|2 [HOST]`, over HTTP/1.1 or HTTP/2 with prior knowledge.

Prints one JSON object: for each step by its name, the status, the version, the size of the answer, and the answer where
it is JSON. The step `at_once` is thirty requests at the same time.
"""

import asyncio
import json
import sys

import httpx

LIMIT = 20
AT_ONCE = 30


async def pieces():
    for _ in range(50):
        yield b"y" * 1000


def told(response):
    answer = {
        "status": response.status_code,
        "version": response.http_version,
        "bytes": len(response.content),
        "pod": response.headers.get("x-lab-pod"),
    }
    if response.headers.get("content-type") == "application/json" and response.content:
        answer["echo"] = response.json()
    return answer


async def main():
    url, version = sys.argv[1], sys.argv[2]
    headers = {"Host": sys.argv[3]} if len(sys.argv) > 3 else {}
    client = httpx.AsyncClient(
        http1=version == "1", http2=version == "2", headers=headers, timeout=LIMIT, trust_env=False
    )

    async def step(method, path, **options):
        return told(await client.request(method, url + path, **options))

    async with client:
        steps = {
            "get": await step("GET", "/get?a=1&b=%20", headers={"x-lab-id": "httpx"}),
            "post": await step("POST", "/post", content=b"x" * 300_000),
            "streamed": await step("POST", "/streamed", content=pieces()),
            "head": await step("HEAD", "/head"),
            "empty": await step("DELETE", "/status/204"),
            "missing": await step("GET", "/status/404"),
            "download": await step("GET", "/bytes/1000000"),
        }
        steps["at_once"] = await asyncio.gather(*(step("GET", f"/at-once/{n}") for n in range(AT_ONCE)))
    print(json.dumps(steps))


asyncio.run(main())
