"""What the plan reads of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from launcher.config.model.folder import tensor_shapes

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TENSOR = json.dumps({"a": ENTRY})[1:-1]


@pytest.mark.parametrize(
    "header",
    [
        f'{{"__metadata__": 5, {TENSOR}}}',
        f'{{"__metadata__": [], {TENSOR}}}',
        f'{{"__metadata__": {{"format": 1}}, {TENSOR}}}',
        f'{{"__metadata__": {{"format": null}}, {TENSOR}}}',
        f'{{"__metadata__": "pt", {TENSOR}}}',
        f"{{{TENSOR}}}".encode("utf-16"),
        f"{{{TENSOR}}}".encode("utf-8-sig"),
        f"{{{TENSOR}}} x",
        '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}',
    ],
)
def test_a_header_that_safetensors_refuses_is_refused_by_the_plan(header: str | bytes, tmp_path: Path) -> None:
    raw = header if isinstance(header, bytes) else header.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(SafetensorError):
        safe_open(file, framework="numpy").__enter__()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tensor_shapes(tmp_path)


def test_a_header_with_metadata_is_read(tmp_path: Path) -> None:
    raw = f'{{"__metadata__": {{"format": "pt"}}, {TENSOR}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    assert tensor_shapes(tmp_path) == {"a": (2,)}
