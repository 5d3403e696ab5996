# The types of the Python API, which __init__.py loads when it is used.
from launcher.api.functions import compose as compose
from launcher.api.functions import load as load
from launcher.api.functions import plan as plan
from launcher.api.functions import render as render
from launcher.api.functions import run as run
from launcher.api.functions import sweep as sweep
from launcher.api.handle import RunHandle as RunHandle
from launcher.api.result import Result as Result
from launcher.api.sweep import Sweep as Sweep
from launcher.config.run import Run as Run
from launcher.errors import ConfigError as ConfigError
from launcher.errors import ConfigErrors as ConfigErrors
from launcher.errors import LauncherError as LauncherError
from launcher.protocol.plan import Plan as Plan

__version__: str
