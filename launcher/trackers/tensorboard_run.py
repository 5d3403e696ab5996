"""One run as TensorBoard event files.

Imports tensorboard, without TensorFlow or torch: sidecar only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_plugin
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from launcher.config.run import Run
from launcher.errors.secrets import redact
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.trackers.base import NotSent, TrackedRun, TrackerFailed
from launcher.trackers.records import config_of, flatten


class TensorBoardRun(TrackedRun):
    """Event files that are open until ``finish``; a later life of the run adds another file.

    Args:
        run_dir: of the run; the files are in ``tensorboard/`` below it.
        run: the resolved configuration.
        plan: the plan.

    Raises:
        TrackerFailed: the folder is not writable.
    """

    keeps_lines = True

    def __init__(self, run_dir: RunDir, run: Run, plan: Plan) -> None:
        self._run_dir, folder = run_dir, run_dir.tracker("tensorboard")
        try:
            self._writer = EventFileWriter(str(folder), max_queue_size=10_000, flush_secs=3600)
        except OSError as error:
            raise TrackerFailed(error) from error
        config = config_of(run, plan)
        self._write(0, time.time(), summary_v2.hparams_pb(dict(flatten(config)), trial_id=plan.run_id).value)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self._write(0, time.time(), [_text("config", f"```yaml\n{text}```")])
        print(f"TensorBoard: {folder}", flush=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write one point for each number of a line; null becomes NaN."""
        values = {name: float("nan") if value is None else value for name, value in line.items()}
        step, written = int(values.pop("train/step")), values.pop("time")
        points = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, written, points)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], *, everything: Sequence[Mapping[str, Any]]) -> None:
        """Write generated texts; each prompt has a series of its own."""
        prompts = list(dict.fromkeys(line["prompt"] for line in everything))
        for line in samples:
            shown = redact(f"**{line['prompt']}**\n\n{line['text']}", os.environ)
            self._write(line["train/step"], line["time"], [_text(f"samples/{prompts.index(line['prompt'])}", shown)])

    def rewind(self, step: int) -> None:
        """Have readers drop the points of steps after ``step``."""
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(step=step + 1, wall_time=time.time(), session_log=start))

    def flush(self) -> None:
        """Write what is queued to the file.

        Raises:
            NotSent: the disk is full, or gone.
        """
        try:
            self._writer.flush()
        except OSError as error:
            raise NotSent(error) from error

    def finish(self, exit_code: int) -> None:
        """Record whether the run has succeeded, add its sample and close the file."""
        status = api_pb2.STATUS_SUCCESS if exit_code == 0 else api_pb2.STATUS_FAILURE
        self._write(0, time.time(), [_session_end(status, at=time.time())])
        if self._run_dir.sample.exists():
            text = redact(self._run_dir.sample.read_text(encoding="utf-8"), os.environ)
            self._write(0, time.time(), [_text("sample", text)])
        try:
            self._writer.close()
        except OSError as error:
            raise TrackerFailed(error) from error

    def _write(self, step: int, written: float, values: Sequence[Any]) -> None:
        self._add(event_pb2.Event(step=step, wall_time=written, summary=summary_pb2.Summary(value=values)))

    def _add(self, event: Any) -> None:
        try:
            self._writer.add_event(event)
        except OSError as error:
            raise TrackerFailed(error) from error


def _session_end(status: int, *, at: float) -> Any:
    """Return the value that tells the HParams page how the run has ended."""
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=at)
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    metadata = hparams_plugin.create_summary_metadata(content)
    return summary_pb2.Summary.Value(
        tag=hparams_plugin.SESSION_END_INFO_TAG, metadata=metadata, tensor=hparams_plugin.NULL_TENSOR
    )


def _text(tag: str, text: str) -> Any:
    """Return a value that TensorBoard shows as Markdown."""
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    metadata = text_plugin.create_summary_metadata(display_name=tag, description="")
    return summary_pb2.Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
