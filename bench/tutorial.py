# SPDX-License-Identifier: Apache-2.0
"""The server that every tutorial writes: FastAPI, one model, `encode()` in the route.

What warmfleet replaces; no better and no worse than usual. Run by `uvicorn tutorial:app --app-dir bench`.
"""

import os

from fastapi import FastAPI
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(os.environ["TUTORIAL_MODEL"], device="cpu")


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/embed")
async def embed(texts: list[str]) -> dict[str, list[list[float]]]:
    return {"embeddings": model.encode(texts).tolist()}
