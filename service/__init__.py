# SPDX-License-Identifier: Apache-2.0
"""warmfleet: serve a sentence-transformers model from N warm Gunicorn workers."""

__version__ = "0.1.0"
