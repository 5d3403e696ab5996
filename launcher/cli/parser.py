"""The command line: find the verb, parse its arguments with argparse, and run it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import launcher
from launcher.cli.arguments import Arguments, Option, is_override, truth_value
from launcher.cli.verbs import LAUNCH, LAUNCH_EPILOG, VERBS, Verb, launch_description
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean, shell_command, terminal_width

_MAX_WIDTH = 120
_START_NOTHING = {
    "plan": "launch without plan",
    "show": "launch +exp=NAME",
    "doctor": "launch without doctor",
    "data": "launch without data preview",
}
"""Verbs that take the overrides of a run and start none, each with the command that does."""
_HYDRA_COMPLETION = ("-sc", "--shell-completion")


def run_command(words: Sequence[str]) -> int:
    """Run one command and return its exit code.

    Args:
        words: everything behind ``launch``.

    Raises:
        LauncherError: what the user reads; its exit code is the command's.
    """
    name, rest = _split_verb(words)
    try:
        arguments = parse(name, rest)
    except _Answer as answer:
        print(answer.text())
        return 0
    code: int = importlib.import_module(f"launcher.cli.{name or 'run'}").run(arguments)
    return code


def parse(name: str, words: Sequence[str]) -> Arguments:
    """Return the arguments of a verb.

    Args:
        name: the verb; empty for a run.
        words: everything behind the verb. Overrides are passed on as they are.

    Raises:
        ConfigError: an unknown flag, a value that is missing or invalid, or too many or too few words.
    """
    verb = VERBS[name] if name else LAUNCH
    arguments = Arguments()
    if verb.takes_overrides:
        words = list(_take_dry_run(name, words, arguments))
    parser = _build_parser(name, verb)
    try:
        parsed, left = parser.parse_known_intermixed_args(words, arguments)
    except argparse.ArgumentError as error:
        raise _value_error(error, verb) from None
    values = [getattr(parsed, one.name) for one in verb.positionals]
    words = [word for value in values if value for word in ([value] if isinstance(value, str) else value)]
    for word in (*left, *words):
        if word.startswith("-"):
            raise _unknown_flag(word, verb)
    if left:
        raise ConfigError(parser.prog, why=f"unexpected argument {left[0]}", fix=f"write {synopsis(name, verb)}")
    return parsed


def help_text(name: str) -> str:
    """Return the text of ``launch VERB --help``; of ``launch --help`` for an empty name."""
    verb = VERBS[name] if name else LAUNCH
    parser = _build_parser(name, verb)
    parser.description = _escape(_description(verb))  # that of a run lists groups, which parsing does not need
    parser.epilog = _escape(verb.notes if name else LAUNCH_EPILOG)
    return parser.format_help().rstrip()


def _split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb, empty if the command begins with an override or option, and the rest."""
    first, *rest = words or [""]
    if first == "help":
        return _split_verb([*rest[:1], "--help"])
    if first == "version":
        return "", ["--version"]
    if not first or first[0] == "-" or is_override(first):
        before = zip(words, rest, strict=False)
        if later := next((word for flag, word in before if word in VERBS and flag != "--config-dir"), ""):
            others = [word for word in words if word != later]
            meant = shell_command(["launch", later, *others])
            raise ConfigError(later, why="is a verb, and must come first", fix=f"write {meant}")
        return "", list(words)
    if first not in VERBS:
        raise ConfigError(first, why="is neither a verb nor option=value", fix=_suggest_word(first))
    return first, rest


def _suggest_word(word: str) -> str:
    """Return the correction of a first word that is neither a verb nor an override."""
    from launcher.config.folders import groups
    from launcher.config.overrides import suggest_overrides

    suggested = suggest_overrides(word, groups())
    return f"write {' or '.join(suggested)}" if suggested else did_you_mean(word, VERBS)


def _take_dry_run(name: str, words: Sequence[str], arguments: Arguments) -> list[str]:
    """Return the words without ``dry_run``, which is set in ``arguments``.

    Raises:
        ConfigError: its value is neither true nor false, contradicts the verb, or is given twice.
    """
    kept, values = [], set()
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") == "dry_run":
            arguments.dry_run = truth_value("dry_run", value)
            values.add(arguments.dry_run)
        else:
            kept.append(word)
    if len(values) > 1:
        raise ConfigError("dry_run", why="is given as true and as false", fix="leave one of the two out")
    if values == {False} and name in _START_NOTHING:
        fix = f"leave it out; {_START_NOTHING[name]} starts a run"
        raise ConfigError("dry_run", "false", why=f"launch {name} starts nothing", fix=fix)
    return kept


def _build_parser(name: str, verb: Verb) -> _Parser:
    """Return the argparse parser of a verb, built from its declaration."""
    parser = _Parser(
        prog=f"launch {name}".rstrip(),
        usage=_escape(synopsis(name, verb)),
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    positionals, options = parser.add_argument_group("arguments"), parser.add_argument_group("options")
    for word in verb.positionals:
        keywords: dict[str, Any] = {"metavar": word.metavar, "help": _escape(word.help), "type": word.convert}
        if word.nargs:
            keywords |= {"nargs": word.nargs, "default": () if word.nargs == "*" else None}
        positionals.add_argument(word.name, **keywords)
    for option in verb.options:
        shown = argparse.SUPPRESS if option.is_hidden else _escape(option.help)
        keywords = {"action": "store_true"}
        if option.metavar:
            keywords = {"metavar": option.metavar, "type": _non_empty(option)}
        options.add_argument(*option.names, dest=option.destination, help=shown, **keywords)
    if verb.takes_version:
        version = f"launch {launcher.__version__}"
        options.add_argument("-V", "--version", action=_AnswerAction, const=lambda: version, help="print the version")
    if verb.takes_raw_words:
        options.add_argument("--words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options.add_argument("-h", "--help", action=_AnswerAction, const=lambda: help_text(name), help="print this text")
    return parser


def synopsis(name: str, verb: Verb) -> str:
    """Return the synopsis of a verb."""
    words = [one.usage for one in verb.positionals] if name else ["[VERB]", "[OVERRIDE…]"]
    options = [one.usage for one in verb.options if not one.is_hidden]
    return " ".join(filter(None, ("launch", name, *words, *options)))


def _description(verb: Verb) -> str:
    if verb is LAUNCH:
        return launch_description()
    return f"{verb.summary[0].upper()}{verb.summary[1:]}.\n\nexamples:\n{verb.examples.rstrip()}"


def _escape(text: str) -> str:
    """Return ``text`` for argparse, which formats it with ``%``."""
    return text.replace("%", "%%")


def _non_empty(option: Option) -> Callable[[str], object]:
    """Return the conversion of an option's value that rejects an empty one (``--root=``)."""

    def convert(text: str) -> object:
        if not text:
            raise _missing_value(option)
        return option.convert(text)

    return convert


def _missing_value(option: Option) -> ConfigError:
    name = option.names[-1]
    return ConfigError(name, why="needs a value", fix=f"write {name} {option.metavar}")


def _value_error(error: argparse.ArgumentError, verb: Verb) -> ConfigError:
    """Return argparse's error about an option as a ConfigError."""
    name = (error.argument_name or "").split("/")[-1]
    option = next((option for option in verb.options if name in option.names), None)
    if option is None or not option.metavar:
        return ConfigError(name, why="takes no value", fix=f"write {name}")
    return _missing_value(option)


def _unknown_flag(word: str, verb: Verb) -> ConfigError:
    """Return the error for an unknown flag; options of a run have no dashes."""
    name, _, value = word.partition("=")
    if name in _HYDRA_COMPLETION:
        return ConfigError(
            name, why="is an option of Hydra, which does not support verbs", fix="see launch completion --help"
        )
    options: list[str] = []
    if verb.takes_overrides and len(name) > 2:
        from launcher.config.build import options_named

        options = options_named(name.lstrip("-").replace("-", "_"), {})
    if options:
        written = " or ".join(f"{option}={value or 'VALUE'}" for option in options[:3])
        return ConfigError(word, why="no such flag", fix=f"options have no dashes: write {written}")
    return ConfigError(word, why="no such flag", fix=did_you_mean(name, verb.flags))


class _Answer(Exception):
    """The command line asks for a text instead of a command."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text
        super().__init__()


class _AnswerAction(argparse.Action):
    """``--help`` and ``--version``: they take precedence, and nothing else is checked."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(nargs=0, **keywords)

    def __call__(self, *_: object) -> NoReturn:
        """Ask for the text of this option."""
        raise _Answer(self.const)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=min(terminal_width(), _MAX_WIDTH))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return ``-n, --lines LINES`` instead of argparse's ``-n LINES, --lines LINES``."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print: an argument is missing."""
        missing = message.rpartition(": ")[2]
        raise ConfigError(self.prog, why=f"lacks {missing}", fix=f"write {(self.usage or '').replace('%%', '%')}")
