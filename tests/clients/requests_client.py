"""Python `requests` as a client of the lab: `requests_client.py URL [HOST]`.

Prints one JSON object: for each step by its name, the status, the size of the answer, and the answer where it is JSON.
The URL is that of the HTTP app, without a path; HOST is sent as the Host header. One session makes all steps, as
an app would: connections are kept and used again.
"""

import json
import sys

import requests

LIMIT = 20


def pieces():
    """A body whose size nobody knows beforehand: it is sent chunked."""
    for _ in range(50):
        yield b"y" * 1000


def told(response):
    answer = {"status": response.status_code, "bytes": len(response.content), "pod": response.headers.get("x-lab-pod")}
    if response.headers.get("content-type") == "application/json" and response.content:
        answer["echo"] = response.json()
    return answer


def main():
    url = sys.argv[1]
    session = requests.Session()
    session.trust_env = False
    if len(sys.argv) > 2:
        session.headers["Host"] = sys.argv[2]

    def step(method, path, **options):
        return told(session.request(method, url + path, timeout=LIMIT, allow_redirects=False, **options))

    steps = {
        "get": step("GET", "/get?a=1&b=%20", headers={"x-lab-id": "requests"}),
        "again": step("GET", "/again"),
        "post": step("POST", "/post", data=b"x" * 100_000),
        "json": step("PUT", "/json", json={"some": "thing"}),
        "chunked": step("POST", "/chunked", data=pieces()),
        "head": step("HEAD", "/head"),
        "empty": step("DELETE", "/status/204"),
        "missing": step("GET", "/status/404"),
        "download": step("GET", "/bytes/1000000"),
        "last": step("GET", "/last"),
    }
    print(json.dumps(steps))


main()
