# SPDX-License-Identifier: Apache-2.0
"""Embed real texts over the API and check the vectors: `helm test`. Usage: URL SECONDS [FILE_OF_KEYS]."""

import json
import math
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

CAT, KITTEN, TAX = TEXTS = (
    "A cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "Income tax is due in April.",
)
BUSY = (429, 503)
"""Statuses of a service that is full, or still boots: it will be better."""
LONGEST_BODY = 500


def read_key(path: str) -> str:
    """Return the first key of a file of keys; `#` begins a comment."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return next(filter(None, lines), "")


def embed(url: str, key: str) -> list[list[float]]:
    """Return the vectors of TEXTS."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = Request(f"{url}/v1/embeddings", json.dumps({"input": TEXTS}).encode(), headers)
    with build_opener(ProxyHandler({})).open(request, timeout=30) as reply:
        return [row["embedding"] for row in json.load(reply)["data"]]


def cosine(a: list[float], b: list[float]) -> float:
    """Return how alike two vectors are."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def check(rows: list[list[float]]) -> str:
    """Return what is wrong with the vectors, or nothing."""
    if len(rows) != len(TEXTS) or len({len(row) for row in rows}) != 1:
        return (
            f"{len(TEXTS)} texts gave {len(rows)} vectors of {sorted({len(row) for row in rows})} dimensions"
        )
    if not all(math.isfinite(x) for row in rows for x in row) or not all(any(row) for row in rows):
        return "a vector is not finite, or zero"
    cat, kitten, tax = rows
    if cosine(cat, kitten) <= cosine(cat, tax):
        return f"{CAT!r} is no closer to {KITTEN!r} than to {TAX!r}: this is no embedding of English text"
    return ""


def main(url: str, seconds: str, keys: str = "") -> int:
    """Try until it works, the answer is wrong, or the time is up."""
    deadline = time.monotonic() + float(seconds)
    key = read_key(keys) if keys else ""
    while True:
        try:
            rows = embed(url, key)
            break
        except (HTTPException, OSError) as error:  # no connection, or a status other than success
            last = str(error)
            if isinstance(error, HTTPError):
                last = f"{error.code} {error.read(LONGEST_BODY).decode(errors='replace').strip()}"
                if error.code not in BUSY:
                    print(f"{url} answers {last}")
                    return 1
        except (KeyError, TypeError, ValueError) as error:
            print(f"{url} answers with no embeddings: {error!r}")
            return 1
        if time.monotonic() > deadline:
            print(f"no embedding from {url} within {seconds} s: {last}")
            return 1
        time.sleep(1)
    wrong = check(rows)
    print(wrong or f"{len(rows)} vectors of {len(rows[0])} dimensions, as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
