# SPDX-License-Identifier: Apache-2.0
"""For the tests on real torch models: one thread, no network, an environment without settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from service.settings import PREFIX, Settings, variables

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True, scope="session")
def _no_settings() -> Iterator[None]:
    """Take every setting, under any of its names, out of the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {variable for field in Settings.model_fields for variable in variables(field)}:
            patch.delenv(name, raising=False)
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            patch.delenv(name)
        yield
