"""``launch diff``: the options in which two configurations differ."""

from __future__ import annotations

import os

from launcher.cli.arguments import Arguments
from launcher.config.option_text import flatten_options
from launcher.errors import ConfigError, ConfigErrors
from launcher.errors.secrets import redact
from launcher.runs.config_source import resolved_config, split_source
from launcher.utils.text import format_table, json_text

_ABSENT = "-"


def run(arguments: Arguments) -> int:
    """Print the differing options of two configurations."""
    one, other = _both(arguments)
    groups = list(dict.fromkeys(key.partition(".")[0] for key in (*one, *other)))
    keys = [key for key in dict.fromkeys((*one, *other)) if one.get(key, _ABSENT) != other.get(key, _ABSENT)]
    keys.sort(key=lambda key: groups.index(key.partition(".")[0]))
    if arguments.json:
        print(json_text({key: [one.get(key), other.get(key)] for key in keys}))
    elif keys:
        rows = [(key, one.get(key, _ABSENT), other.get(key, _ABSENT)) for key in keys]
        print("\n".join(format_table([("option", arguments.a, arguments.b), *rows])))
    else:
        print("no difference")
    return 0


def _both(arguments: Arguments) -> list[dict[str, str]]:
    """Return the options of each side; the errors of both are raised together."""
    sides: list[dict[str, str]] = []
    mistakes: list[ConfigError] = []
    for word in (arguments.a, arguments.b):
        try:
            tree = resolved_config(split_source(word), config_dir=arguments.config_dir, root=arguments.root)
            sides.append(dict(flatten_options(redact(tree, os.environ))))
        except ConfigErrors as several:
            mistakes += several.errors
        except ConfigError as error:
            mistakes.append(error)
    if mistakes:
        raise ConfigErrors(mistakes)
    return sides
