"""Group tracker: where a run is reported, to one place or to several."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from launcher.config.component import Component
from launcher.config.listening import http_address, validate_address, validate_port
from launcher.config.registry import KINDS, component_class
from launcher.errors import ConfigError, ConfigErrors
from launcher.errors.secrets import hide_secrets
from launcher.protocol.plan import TrackerPlan
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import build
from launcher.utils.system import is_loopback
from launcher.utils.text import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Tracker(Component):
    """A place that a run is reported to."""

    group: ClassVar[str] = "tracker"

    packages: ClassVar[tuple[str, ...]] = ()
    """Optional modules that it needs; the extra of its name installs them."""

    @property
    def members(self) -> tuple[Tracker, ...]:
        """The trackers that this one consists of: itself, unless it is several."""
        return (self,)

    @abstractmethod
    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Decide where metrics go, from what the machine that plans knows.

        Args:
            run_id: minted by the launcher; a resumed run keeps it.
            environ: the environment the tracker will inherit.
            home: the user's home, where credentials are kept.
            run_name: ``run.name``.

        Raises:
            ConfigError: the tracker cannot work with these options.
        """

    def locate(self, planned: TrackerPlan, *, run_dir: str, root: str) -> TrackerPlan:
        """Return ``planned`` with the place of files that it keeps on the host of rank 0.

        Args:
            planned: what ``plan`` returned.
            run_dir: the run directory on that host.
            root: the folder of all runs there.
        """
        return planned

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield the packages that are not installed here."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            why = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
            yield ConfigError(self.group, self.kind, why=why, fix=f"pip install 'launcher[{self.kind}]'")


@dataclass(frozen=True, kw_only=True)
class LocalTracker(Tracker):
    """Nothing besides the run directory."""

    kind: ClassVar[str] = "local"

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return a plan without a tracker process."""
        return TrackerPlan(kind=self.kind, mode="offline", reason="metrics.jsonl only", run_id=run_id)


_WANDB_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of W&B's WANDB_MODE, and the tracker's mode for each."""

SYNC_HINT = "`wandb sync` uploads it later"


@dataclass(frozen=True, kw_only=True)
class Wandb(Tracker):
    """One W&B run per run, written by a separate process next to rank 0."""

    kind: ClassVar[str] = "wandb"

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online with a key (WANDB_API_KEY or netrc), else offline.
    The plan shows the mode and its reason."""

    project: str = "launcher"
    """W&B project; a W&B sweep has its own."""

    entity: str | None = None
    """W&B user or team; by default the key's own."""

    group_name: str | None = None
    """W&B group; by default ``run.name``."""

    tags: tuple[str, ...] = ()
    """W&B tags."""

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return the mode: the configured one, else WANDB_MODE, else online if there is a key.

        In a W&B sweep the run is the one the sweep's agent asked for (WANDB_RUN_ID), in the sweep's project.

        Raises:
            ConfigError: online is wanted without a usable key, or WANDB_MODE is no mode.
        """
        mode, reason = self._mode(environ, home)
        in_sweep = bool(environ.get("WANDB_SWEEP_ID"))
        return TrackerPlan(
            kind=self.kind,
            mode=mode,
            reason=f"{reason}; part of W&B sweep {environ['WANDB_SWEEP_ID']}" if in_sweep else reason,
            run_id=environ.get("WANDB_RUN_ID") or run_id,
            project=(environ.get("WANDB_PROJECT") if in_sweep else None) or self.project,
            group=self.group_name or run_name,
        )

    def _mode(self, environ: Mapping[str, str], home: Path) -> tuple[str, str]:
        wanted, who = self._wanted(environ, home)
        if wanted == "disabled":
            return "disabled", who
        if wanted == "offline":
            return "offline", f"{who}; {SYNC_HINT}"
        credentials = find_wandb_credentials(environ, home)
        if credentials.found:
            return "online", f"{credentials.text}, server {credentials.server}"
        if wanted == "online":
            option, _, value = who.partition("=")
            fix = "run `wandb login`, export WANDB_API_KEY, or set tracker.mode=offline"
            raise ConfigError(option, value, why=f"needs a key: {credentials.text}", fix=fix)
        return "offline", f"{credentials.text}; {SYNC_HINT}"

    def _wanted(self, environ: Mapping[str, str], home: Path) -> tuple[str, str]:
        """Return auto or a mode, and who asked for it."""
        if self.mode != "auto":
            return self.mode, f"tracker.mode={self.mode}"
        given = environ.get("WANDB_MODE")
        if given:
            if given not in _WANDB_MODES:
                raise ConfigError(
                    "WANDB_MODE", given, why="is not a mode of W&B", fix=did_you_mean(given, _WANDB_MODES)
                )
            return _WANDB_MODES[given], f"WANDB_MODE={given}"
        kept = _WANDB_MODES.get(read_wandb_settings(environ, home).get("mode", ""))
        return (kept, "the W&B settings file") if kept in ("offline", "disabled") else ("auto", "tracker.mode=auto")


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Tracker):
    """Event files in the run directory; ``tensorboard --logdir runs`` shows all runs."""

    kind: ClassVar[str] = "tensorboard"
    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return a plan that writes files only."""
        return TrackerPlan(kind=self.kind, mode="offline", reason="event files", run_id=run_id)

    def locate(self, planned: TrackerPlan, *, run_dir: str, root: str) -> TrackerPlan:
        """Put the event files in the run directory."""
        folder = RunDir(Path(run_dir)).tracker(self.kind)
        return replace(planned, place=str(folder), reason=f"event files; `tensorboard --logdir {root}` shows them")


_MLFLOW_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_MLFLOW_SERVERS = ("http", "https", "databricks")
MLFLOW_URI = "MLFLOW_TRACKING_URI"
"""MLflow's own variable; it may hold a password, so it reaches neither plan nor snapshot."""


@dataclass(frozen=True, kw_only=True)
class Mlflow(Tracker):
    """One MLflow run per run, written by a separate process next to rank 0."""

    kind: ClassVar[str] = "mlflow"
    packages: ClassVar[tuple[str, ...]] = ("mlflow",)

    tracking_uri: str | None = None
    """MLflow server (``https://host:5000``) or database (``sqlite:////folder/mlflow.db``).
    By default MLFLOW_TRACKING_URI, else the database ``mlflow.db`` in ``run.root``. It may hold no
    password: MLflow takes credentials from MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""

    experiment: str = "launcher"
    """MLflow experiment; created if there is none."""

    tags: dict[str, str] = field(default_factory=dict)
    """MLflow tags."""

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return where the run is stored: the configured address, else MLFLOW_TRACKING_URI.

        Raises:
            ConfigError: the address is none of MLflow's.
        """
        if not self.experiment.strip():
            raise ConfigError("tracker.experiment", "''", why="is empty", fix="name an experiment of MLflow")
        option, uri = "tracker.tracking_uri", self.tracking_uri
        if uri is None:
            option, uri = MLFLOW_URI, environ.get(MLFLOW_URI) or None
        planned = TrackerPlan(
            kind=self.kind, mode="offline", reason="", run_id=run_id, project=self.experiment, group=run_name
        )
        if uri is None:
            return planned
        scheme = urlsplit(uri).scheme.partition("+")[0].lower()
        if scheme not in _MLFLOW_SCHEMES and uri != "databricks":
            fix = "give a server (http://host:5000) or a database (sqlite:////folder/mlflow.db)"
            raise ConfigError(option, hide_secrets(uri), why="is no address that MLflow keeps runs at", fix=fix)
        database = uri.partition("sqlite:///")[2].partition("?")[0]
        if scheme == "sqlite" and not database.startswith("/"):
            fix = f"give the whole path: {option}=sqlite:////folder/{database or 'mlflow.db'}"
            raise ConfigError(option, uri, why="names a file relative to a folder that the host chooses", fix=fix)
        is_server = scheme in _MLFLOW_SERVERS or uri == "databricks"
        what = "server" if is_server else "database"
        mode = "online" if is_server else "offline"
        return replace(planned, mode=mode, place=hide_secrets(uri), reason=f"{what} of {option}")

    def locate(self, planned: TrackerPlan, *, run_dir: str, root: str) -> TrackerPlan:
        """Put the database in the folder of all runs, where no address is given."""
        if planned.place:
            return planned
        uri = f"sqlite:///{root}/mlflow.db"
        reason = f"no {MLFLOW_URI}: a database; `mlflow ui --backend-store-uri {uri}` shows it"
        return replace(planned, place=uri, reason=reason)

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield missing packages; databases need sqlalchemy and alembic besides."""
        yield from super().validate_machine()
        is_database = urlsplit(self.tracking_uri or os.environ.get(MLFLOW_URI) or "sqlite:").scheme.startswith("sqlite")
        if is_database and importlib.util.find_spec("mlflow") is not None:
            missing = [name for name in ("sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
            if missing:
                why = f"a database needs {' and '.join(missing)}, which this environment lacks"
                fix = "pip install 'launcher[mlflow]', or set tracker.tracking_uri to a server"
                yield ConfigError(self.group, self.kind, why=why, fix=fix)


@dataclass(frozen=True, kw_only=True)
class PrometheusTracker(Tracker):
    """``/metrics`` for Prometheus, served by a process next to rank 0 while the run lasts."""

    kind: ClassVar[str] = "prometheus"
    packages: ClassVar[tuple[str, ...]] = ("prometheus_client",)

    host: str = "127.0.0.1"
    """Address to listen on, on the host of rank 0; ``0.0.0.0`` is all interfaces. There is no
    authentication: anyone who can connect can read the metrics."""

    port: int = 9464
    """Port to listen on; runs side by side on one host need one each."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a number that is no port."""
        yield from validate_port(self, default=9464)

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return a plan with the address that Prometheus scrapes."""
        reaches = "this host alone" if is_loopback(self.host) else "anyone who can connect: no authentication"
        place = f"{http_address(self.host, self.port)}/metrics"
        reason = f"scraped by {reaches}"
        return TrackerPlan(kind=self.kind, mode="online", reason=reason, run_id=run_id, group=run_name, place=place)

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a missing package, and an address that cannot be listened on."""
        yield from super().validate_machine()
        yield from validate_address(self)


@dataclass(frozen=True, kw_only=True)
class SeveralTrackers(Tracker):
    """Several trackers at once, each in a process of its own next to rank 0.

    ``tracker.report_to=[wandb,mlflow]`` chooses it without ``tracker=several``.
    """

    kind: ClassVar[str] = "several"

    report_to: tuple[str, ...]
    """The trackers: ``wandb``, ``mlflow``, ``tensorboard``, ``prometheus``, and plugins'."""

    wandb: Wandb = field(default_factory=Wandb)
    """Options of W&B, as ``tracker=wandb`` has them: ``tracker.wandb.project``."""

    mlflow: Mlflow = field(default_factory=Mlflow)
    """Options of MLflow: ``tracker.mlflow.tracking_uri``."""

    prometheus: PrometheusTracker = field(default_factory=PrometheusTracker)
    """Options of ``/metrics``: ``tracker.prometheus.port``."""

    plugin_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of trackers of plugins, by tracker: ``tracker.plugin_options={csv: {path: a}}``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject names of no tracker, and options of a tracker that is not used."""
        known = [kind for kind in KINDS["tracker"] if kind not in (self.kind, LocalTracker.kind)]
        shown = f"[{','.join(self.report_to)}]"
        if not self.report_to:
            yield ConfigError("tracker.report_to", "[]", why="names no tracker", fix="set tracker=local for none")
        for kind in dict.fromkeys(self.report_to):
            if kind not in known:
                fix = f"{did_you_mean(kind, known)}, or name the module that has it: plugins=[MODULE]"
                fix = "leave it out: metrics.jsonl is always written" if kind == LocalTracker.kind else fix
                yield ConfigError("tracker.report_to", kind, why="is no tracker to report to", fix=fix)
            elif self.report_to.count(kind) > 1:
                yield ConfigError("tracker.report_to", shown, why=f"names {kind} twice", fix="name it once")
        unused = [kind for kind, own in self._own.items() if own != type(own)()]
        unused += [f"plugin_options.{kind}" for kind in self.plugin_options]
        for name in unused:
            kind = name.rpartition(".")[2]
            if kind not in self.report_to:
                why = f"has no effect: tracker.report_to={shown} does not name {kind}"
                yield ConfigError(f"tracker.{name}", why=why, fix=f"add {kind} to tracker.report_to, or leave it out")
            elif name != kind and kind in known:
                yield from self._built(kind)[1]

    @property
    def members(self) -> tuple[Tracker, ...]:
        """The trackers that ``report_to`` names, in its order."""
        found = [self._own.get(kind) or self._built(kind)[0] for kind in self.report_to]
        return tuple(each for each in found if each is not None)

    @property
    def _own(self) -> dict[str, Tracker]:
        """The trackers whose options are fields."""
        return {each.kind: each for each in (self.wandb, self.mlflow, self.prometheus)}

    def _built(self, kind: str) -> tuple[Tracker | None, list[ConfigError]]:
        """Return a tracker with its options, and what is wrong with these."""
        errors: list[ConfigError] = []
        options = self.plugin_options.get(kind, {})
        cls = component_class(self.group, kind)
        built = build(cls, options, path=f"tracker.plugin_options.{kind}", report=errors.append)
        assert built is None or isinstance(built, Tracker), "the registry holds trackers in this group"
        return built, errors

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return the plan of each tracker; an error names its option below the tracker's name.

        Raises:
            ConfigErrors: of every tracker that cannot work with its options.
        """
        plans: list[TrackerPlan] = []
        errors: list[ConfigError] = []
        for each in self.members:
            try:
                planned = each.plan(run_id, environ=environ, home=home, run_name=run_name)
            except ConfigError as error:
                found = error.errors if isinstance(error, ConfigErrors) else (error,)
                errors += [self._of_member(one, each.kind) for one in found]
            else:
                plans.append(replace(planned, reason=self._below(planned.reason, each.kind)))
        if errors:
            raise ConfigErrors(errors)
        first = next((each.run_id for each in plans if each.kind == Wandb.kind), run_id)
        mode = "online" if any(each.mode == "online" for each in plans) else "offline"
        kinds = ", ".join(self.report_to)
        return TrackerPlan(kind=self.kind, mode=mode, reason=kinds, run_id=first, members=tuple(plans))

    def locate(self, planned: TrackerPlan, *, run_dir: str, root: str) -> TrackerPlan:
        """Place the files of each tracker."""
        pairs = zip(self.members, planned.members, strict=True)
        placed = tuple(each.locate(found, run_dir=run_dir, root=root) for each, found in pairs)
        return replace(planned, members=placed)

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield what each tracker lacks."""
        for each in self.members:
            for error in each.validate_machine():
                yield ConfigError("tracker.report_to", each.kind, why=error.why, fix=self._below(error.fix, each.kind))

    def _of_member(self, error: ConfigError, kind: str) -> ConfigError:
        option, why, fix = (self._below(text, kind) for text in (error.option, error.why, error.fix))
        return ConfigError(option, error.value, why=why, fix=fix, source=error.source)

    @staticmethod
    def _below(text: str, kind: str) -> str:
        """Return ``text`` with each option of a tracker below the tracker's name."""
        is_field = kind in (Wandb.kind, Mlflow.kind, PrometheusTracker.kind)
        own = kind if is_field else f"plugin_options.{kind}"
        return re.sub(r"\btracker\.(?=[a-z])", f"tracker.{own}.", text)


WANDB_SERVER = "https://api.wandb.ai"
_MIN_KEY_LENGTH = 40
"""Characters of a key, after an optional prefix and dash; the client refuses shorter ones."""


@dataclass(frozen=True, kw_only=True)
class WandbCredentials:
    """Whether there is a W&B key, as text. Never the key itself."""

    server: str
    found: bool
    text: str
    """Where the key was found, or why there is none."""


def find_wandb_credentials(environ: Mapping[str, str], home: Path) -> WandbCredentials:
    """Look where the client looks, in its order: environment, netrc, its settings file."""
    settings = read_wandb_settings(environ, home)
    server = (environ.get("WANDB_BASE_URL") or settings.get("base_url") or WANDB_SERVER).rstrip("/")
    host = urlsplit(server).netloc
    netrc_file = _netrc_file(environ, home)
    places = {
        "WANDB_API_KEY": environ.get("WANDB_API_KEY"),
        str(netrc_file): _netrc_key(netrc_file, host),
        "the W&B settings file": settings.get("api_key"),
    }
    if not places["WANDB_API_KEY"] and environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return WandbCredentials(server=server, found=True, text="identity token of WANDB_IDENTITY_TOKEN_FILE")
    for place, key in places.items():
        if key:
            wrong = _invalid_key(key)
            text = f"the key in {place} {wrong}" if wrong else f"key from {place}"
            return WandbCredentials(server=server, found=not wrong, text=text)
    return WandbCredentials(server=server, found=False, text=f"no WANDB_API_KEY and no netrc entry for {host}")


def read_wandb_settings(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the settings that ``wandb login`` and ``wandb offline`` store for the user."""
    folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
    except (configparser.Error, UnicodeDecodeError):
        return {}  # the client, too, takes a broken file for an empty one
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_file(environ: Mapping[str, str], home: Path) -> Path:
    if environ.get("NETRC"):
        return Path(os.path.expanduser(environ["NETRC"]))  # noqa: PTH111 (Path raises for an unknown user)
    usual = home / ".netrc"
    return usual if usual.exists() or not (home / "_netrc").exists() else home / "_netrc"


def _netrc_key(file: Path, host: str) -> str | None:
    try:
        entry = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    return entry[2] if entry else None


def _invalid_key(key: str) -> str | None:
    """Return why the client would reject ``key``; JSON web tokens (two dots) are not checked."""
    if key.count(".") == 2:
        return None
    secret = key.partition("-")[2] or key
    if not re.fullmatch(r"[\w-]+", secret):
        return "contains characters that no W&B key has"
    return (
        None
        if len(secret) >= _MIN_KEY_LENGTH
        else f"has {len(secret)} characters, W&B's have {_MIN_KEY_LENGTH} or more"
    )
