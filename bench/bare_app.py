# SPDX-License-Identifier: Apache-2.0
"""FastAPI with nothing behind it: answers the bytes of the file in `REPLY`. The floor of overhead.py."""

import os
from pathlib import Path

from fastapi import FastAPI, Request, Response

REPLY = Path(os.environ["REPLY"]).read_bytes()

app = FastAPI()


@app.post("/embed")
async def embed(request: Request) -> Response:
    await request.body()
    return Response(REPLY, media_type="application/json")
