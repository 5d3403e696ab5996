"""A user's package that adds options and what executes them; it names them in a ``Plugin``."""

from launcher.plugins.base import Plugin as Plugin
