"""The notebook in examples/ runs from its first cell to its last, and shows the curve."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.conftest import REPOSITORY, Launch

EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300).execute()
nbformat.write(notebook, "executed.ipynb")
"""


def test_the_notebook_trains_and_shows_table_and_curve(launch: Launch, tmp_path: Path) -> None:
    env = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(REPOSITORY)}
    launch(str(REPOSITORY / "examples" / "train.ipynb"), command=(sys.executable, "-c", EXECUTE), env=env).expect(0)
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    printed = "".join("".join(output.get("text", ())) for output in outputs)
    shown = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
    assert "step 20/20" in printed
    assert "'completed'" in "".join(shown[2]["text/plain"])
    assert "'running'" in "".join(shown[1]["text/plain"])
    assert "text/html" in shown[3]
    assert len(shown[4]["image/png"]) > 10_000
