# SPDX-License-Identifier: Apache-2.0
"""mosec as its own embedding example writes it: merges up to 32 requests, waits 5 ms for them.

A request is {"input": text or texts}. Run by `python mosec_server.py --address 127.0.0.1 --port PORT`;
`PEER_MODEL` is the model's folder, `PEER_WORKERS` the number of its processes. mosec's options are its own.
"""

from __future__ import annotations

import os
from itertools import accumulate, pairwise
from typing import Any

import torch
from mosec import Server, Worker
from sentence_transformers import SentenceTransformer


class Embedding(Worker):
    """One model; mosec makes one of these in each of its worker processes."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = SentenceTransformer(os.environ["PEER_MODEL"], device="cpu")

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, list[list[float]]]]:
        """Embed the texts of all requests in one go, and cut the result by request."""
        batch = [[texts] if isinstance(texts := request["input"], str) else texts for request in data]
        vectors = self.model.encode([text for texts in batch for text in texts], show_progress_bar=False)
        ends = accumulate(map(len, batch), initial=0)
        return [{"embeddings": vectors[start:end].tolist()} for start, end in pairwise(ends)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Embedding, num=int(os.environ["PEER_WORKERS"]), max_batch_size=32, max_wait_time=5, timeout=120
    )
    server.run()
