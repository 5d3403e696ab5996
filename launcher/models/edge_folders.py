"""Write a model as a folder of ONNX Runtime or OpenVINO, by their own converters.

They run in this process, which ends after the export: ONNX Runtime's is a script that imports the modules beside it by
bare names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import EXIT_BAD_INPUT, JobError

if TYPE_CHECKING:
    from launcher.models.export import ModelExport

_GGUF_OF_OPENVINO = {"fp16": "fp16", "int8": "q8_0", "int4": "q4_0"}
"""Weights of llama.cpp that OpenVINO reads, by the ``dtype`` of the export."""


def fill_onnx(export: ModelExport, folder: Path, *, dtype: str, written: Callable[[int], None]) -> None:
    """Write ``model.onnx``, its data, ``genai_config.json`` and the tokenizer.

    Args:
        export: the model in fp32.
        folder: an empty one.
        dtype: ``fp32``, ``int8`` or ``int4``, the latter two in blocks of 32.
        written: called with the bytes of the copy that the converter reads.

    Raises:
        JobError: the converter failed.
    """
    package = importlib.util.find_spec("onnxruntime_genai")
    assert package is not None, "checked before"
    assert package.origin is not None, "a package with files"
    builder = Path(package.origin).parent / "models" / "builder.py"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".onnx.") as work:
        source = Path(work) / "model"
        source.mkdir()
        export.fill(source, written=written)
        words = ("-i", str(source), "-o", str(folder), "-p", dtype, "-e", "cpu", "-c", str(Path(work) / "cache"))
        _run_script(builder, [*words, "--extra_options", "hf_token=false"])


def fill_openvino(export: ModelExport, folder: Path, *, dtype: str, written: Callable[[int], None]) -> None:
    """Write ``openvino_model.xml``, its data, tokenizer and detokenizer.

    OpenVINO GenAI makes the model of a GGUF file. The tokenizers that it makes of one cut some texts differently, so
    they are made of ``tokenizer.json``.

    Args:
        export: the model in fp32.
        folder: an empty one.
        dtype: ``fp16``, ``int8`` or ``int4``, the latter two in blocks of 32.
        written: called with the bytes of the file that OpenVINO reads.

    Raises:
        JobError: the converter failed, or it has no such tokenizer.
    """
    from transformers import AutoTokenizer

    from launcher.models.gguf_export import GgufExport
    from launcher.models.tokenizer import copy_tokenizer

    file = folder / "openvino_model.gguf"
    GgufExport(export, dtype=_GGUF_OF_OPENVINO[dtype]).write(file, written=written)
    with _as_job_error("OpenVINO"):
        import openvino
        import openvino_genai
        from openvino_tokenizers import convert_tokenizer

        openvino_genai.LLMPipeline(str(file), "CPU", {"enable_save_ov_model": True})
        tokenizer = AutoTokenizer.from_pretrained(export.source)
        for name, model in zip(
            ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
        ):
            openvino.save_model(model, folder / f"openvino_{name}.xml")
    file.unlink()
    if not (folder / "openvino_model.xml").is_file():
        raise JobError("OpenVINO wrote no model", exit_code=EXIT_BAD_INPUT)
    export.config.save_pretrained(folder)
    copy_tokenizer(export.source, folder)


def _run_script(script: Path, words: Sequence[str]) -> None:
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *words], [str(script.parent), *path]
    try:
        with _as_job_error("ONNX Runtime GenAI"):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path


@contextlib.contextmanager
def _as_job_error(name: str) -> Iterator[None]:
    """Keep what a converter prints for the error that it ends with.

    Raises:
        JobError: it failed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except (Exception, SystemExit) as error:  # whatever a converter and its libraries raise
        last = [line for line in said.getvalue().splitlines() if line.strip()][-1:]
        why = f"the converter of {name} failed: {type(error).__name__}: {error}"
        raise JobError(" / ".join([why, *last]), exit_code=EXIT_BAD_INPUT) from error
