# SPDX-License-Identifier: Apache-2.0
"""For the tests of the chart: golden files, one for each scenario."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


class YamlFile(SingleFileSnapshotExtension):
    """A file for each scenario's objects."""

    file_extension = "yaml"
    _write_mode = WriteMode.TEXT


class TextFile(SingleFileSnapshotExtension):
    """A file for each scenario's notes."""

    file_extension = "txt"
    _write_mode = WriteMode.TEXT


@pytest.fixture
def yaml_file(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(YamlFile)


@pytest.fixture
def text_file(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(TextFile)
