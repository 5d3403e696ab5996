"""One MLflow run: find or create it, send lines in batches, end it.

Imports mlflow: sidecar only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowEntity
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from launcher.config.run import Run
from launcher.config.tracker import MLFLOW_URI
from launcher.errors.secrets import hide_secrets, redact
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.trackers.base import NotSent, TrackedRun, TrackerFailed
from launcher.trackers.records import config_of, flatten
from launcher.utils.files import read_json, write_json
from launcher.utils.schema import to_tree

_METRICS, _PARAMS = 1000, 100
"""Most entries of one request."""
_KEY_CHARS, _VALUE_CHARS, _TAG_CHARS = 250, 6000, 5000
"""Longest key, value of a parameter, and value of a tag."""
_NOT_IN_KEYS = re.compile(r"[^\w\-. :/]", re.ASCII)
_KILLED = frozenset({75, 129, 130, 143})
"""Exit codes of a run that was preempted or cancelled."""
_RUN_ID_TAG = "launcher.run_id"
_SAMPLES = "samples.json"


class MlflowRun(TrackedRun):
    """An MLflow run, opened at the first ``flush``; until its server answers, lines are kept.

    Args:
        run_dir: of the run; its MLflow id is kept in ``mlflow/`` below it.
        run: the resolved configuration.
        plan: the plan.
    """

    keeps_lines = True

    def __init__(self, run_dir: RunDir, run: Run, plan: Plan) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)  # of the tables that it makes
        os.environ.update({name: os.environ.get(name) or value for name, value in SETTINGS.items()})
        self._run_dir, self._run, self._plan = run_dir, run, plan
        self._uri = getattr(run.tracker, "tracking_uri", None) or os.environ.get(MLFLOW_URI) or plan.tracker.place
        self._record = run_dir.tracker("mlflow") / "run.json"
        self._metrics: list[Metric] = []
        self._samples: Sequence[Mapping[str, Any]] = ()
        self._client: MlflowClient | None = None
        self._id = ""
        self._has_reported_artifacts = False
        if _recorded_id(self._record, self._uri) is None:
            (self._record.parent / "sent.json").unlink(missing_ok=True)  # of another server

    def log(self, line: Mapping[str, Any]) -> None:
        """Queue the numbers of a line; null becomes NaN."""
        step, at = int(line["train/step"]), round(1000 * line["time"])
        self._metrics += [
            Metric(_key(name), float("nan") if value is None else float(value), at, step)
            for name, value in line.items()
            if name not in ("train/step", "time")
        ]

    def log_samples(self, samples: Sequence[Mapping[str, Any]], *, everything: Sequence[Mapping[str, Any]]) -> None:
        """Queue the table of all generated texts."""
        self._samples = everything

    def flush(self) -> None:
        """Send what is queued, in requests of at most 1000 numbers.

        Raises:
            NotSent: the server does not answer, or refuses.
        """
        self._call(self._send)

    def finish(self, exit_code: int) -> None:
        """Add the run's files and end the MLflow run as finished, failed or killed.

        Raises:
            TrackerFailed: the server does not answer.
        """
        status = "FINISHED" if exit_code == 0 else "KILLED" if exit_code in _KILLED else "FAILED"
        files = (self._run_dir.sample, self._run_dir.curve, *map(self._run_dir.benchmark, ("json", "md", "png")))

        def end() -> None:
            client = self._open()
            for file in filter(Path.is_file, files):
                self._artifact(client, partial(self._copy, file))
            client.set_tag(self._id, "launcher.exit_code", str(exit_code))
            client.set_terminated(self._id, status)

        try:
            self._call(end)
        except NotSent as error:
            raise TrackerFailed(error) from error

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (MlflowException, OSError) as error:
            raise NotSent(hide_secrets(str(error)) or type(error).__name__) from error

    def _send(self) -> None:
        client = self._open()
        while self._metrics:
            client.log_batch(self._id, metrics=self._metrics[:_METRICS])
            del self._metrics[:_METRICS]
        if self._samples:
            table = {name: [line[key] for line in self._samples] for name, key in _COLUMNS.items()}
            rows = list(zip(*table.values(), strict=True))
            text = json.dumps(redact({"columns": list(table), "data": rows}, os.environ), ensure_ascii=False)
            self._artifact(client, lambda folder: (folder / _SAMPLES).write_text(text, encoding="utf-8"))
            client.set_tag(self._id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": _SAMPLES, "type": "table"}]))
            self._samples = ()

    def _open(self) -> MlflowClient:
        """Return the client, once the run is there."""
        if self._client is None:
            client = MlflowClient(tracking_uri=self._uri)
            found = self._find(client)
            if found is None:
                found = self._create(client)
            self._id = str(found.info.run_id)
            self._record.parent.mkdir(exist_ok=True)
            write_json(self._record, {"uri": hide_secrets(self._uri), "mlflow_run_id": self._id})
            self._log_config(client, found)
            self._client = client
            print(f"MLflow: {hide_secrets(self._place(found))}", flush=True)
        return self._client

    def _find(self, client: MlflowClient) -> MlflowEntity | None:
        """Return the run of an earlier life, running again; ``None`` without one."""
        known = _recorded_id(self._record, self._uri)
        if known is None:
            return None
        try:
            found = client.get_run(known)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if found.info.lifecycle_stage != "active":
            client.restore_run(known)
        client.update_run(known, status="RUNNING")
        return found

    def _create(self, client: MlflowClient) -> MlflowEntity:
        name = str(self._plan.tracker.project)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            found = client.create_experiment(name, artifact_location=self._artifact_location())
        else:
            if experiment.lifecycle_stage != "active":
                client.restore_experiment(experiment.experiment_id)
            found = experiment.experiment_id
        tags = {
            _RUN_ID_TAG: self._plan.run_id,
            "launcher.job": self._plan.job,
            "launcher.group": str(self._plan.tracker.group),
            **getattr(self._run.tracker, "tags", {}),
        }
        return client.create_run(found, run_name=self._plan.run_id, tags=redact(tags, os.environ))

    def _artifact_location(self) -> str | None:
        """Return the folder of artifacts beside a database file; a server has its own."""
        database = self._uri.partition("sqlite:///")[2].partition("?")[0]
        return str(Path(database).with_name("mlartifacts")) if database else None

    def _log_config(self, client: MlflowClient, found: MlflowEntity) -> None:
        """Log the configuration as parameters; what a later life changes becomes a tag."""
        config = config_of(self._run, self._plan)
        options = {_key(name): str(value) for name, value in flatten(config)}
        known = found.data.params
        new = [Param(key, value[:_VALUE_CHARS]) for key, value in options.items() if key not in known]
        for first in range(0, len(new), _PARAMS):
            client.log_batch(self._id, params=new[first : first + _PARAMS])
        changed = [
            RunTag(f"launcher.changed.{key}"[:_KEY_CHARS], value[:_TAG_CHARS])
            for key, value in options.items()
            if key in known and known[key] != value[:_VALUE_CHARS]
        ]
        for first in range(0, len(changed), _PARAMS):
            client.log_batch(self._id, tags=changed[first : first + _PARAMS])
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self._artifact(client, lambda folder: (folder / "run.yaml").write_text(text, encoding="utf-8"))
        plan = json.dumps(redact(to_tree(self._plan), os.environ), ensure_ascii=False, indent=2)
        self._artifact(client, lambda folder: (folder / "plan.json").write_text(plan, encoding="utf-8"))

    @staticmethod
    def _copy(file: Path, folder: Path) -> None:
        """Copy a file of the run without secrets."""
        if file.suffix == ".png":
            (folder / file.name).write_bytes(file.read_bytes())
        else:
            text = redact(file.read_text(encoding="utf-8"), os.environ)
            (folder / file.name).write_text(text, encoding="utf-8")

    def _artifact(self, client: MlflowClient, write: Callable[[Path], Any]) -> None:
        """Store the file that ``write`` makes; metrics go on where a server stores none."""
        try:
            with tempfile.TemporaryDirectory() as name:
                write(Path(name))
                client.log_artifacts(self._id, name)
        except (MlflowException, OSError, ImportError) as error:  # ImportError: the package of its storage
            if not self._has_reported_artifacts:
                self._has_reported_artifacts = True
                print(f"MLflow: files are not stored ({hide_secrets(str(NotSent(error)))})", flush=True)

    def _place(self, found: MlflowEntity) -> str:
        """Return where a person finds the run."""
        if self._uri.startswith("http"):
            return f"{self._uri.rstrip('/')}/#/experiments/{found.info.experiment_id}/runs/{self._id}"
        return f"run {self._id} in {self._uri}"


SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's settings unless the user sets them; what is not sent is tried again later anyway."""
_COLUMNS = {"step": "train/step", "prompt": "prompt", "text": "text"}


def _key(name: str) -> str:
    """Return a name that MLflow takes: its characters, and not too long."""
    return _NOT_IN_KEYS.sub("_", name)[:_KEY_CHARS]


def _recorded_id(record: Path, uri: str) -> str | None:
    """Return the MLflow id of an earlier life of this run at this address."""
    if not record.is_file():
        return None
    known = read_json(record)
    return str(known["mlflow_run_id"]) if known.get("uri") == hide_secrets(uri) else None
