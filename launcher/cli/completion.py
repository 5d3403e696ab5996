"""``launch completion``: completion scripts for bash, zsh and fish, and their candidates."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from launcher.cli.arguments import Arguments, Completion, Option
from launcher.cli.verbs import CONFIG_DIR, LAUNCH, ROOT, SHELLS, VERBS, Verb
from launcher.config.folders import groups
from launcher.config.paths import expand_home
from launcher.config.registry import KINDS, component_class
from launcher.config.run import RunOptions
from launcher.errors import ConfigError
from launcher.runs.index import is_below, list_runs
from launcher.utils.files import exists
from launcher.utils.schema import field_types

_TYPEABLE = re.compile(r"[\w./@+-]+")
"""A shell inserts candidates unquoted, and a folder may be called ``$(…)``."""

_BASH = r"""
_launch() {
  local line=${COMP_LINE:0:COMP_POINT} found
  local -a words
  read -r -a words <<< "$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  local word=${words[${#words[@]}-1]}
  mapfile -t found < <(launch completion --words "${words[@]:1}" 2> /dev/null)
  local before=""
  [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && before=${word%"${word##*=}"}
  COMPREPLY=("${found[@]#"$before"}")
  [[ ${#found[@]} -gt 0 && ${found[0]} == *[=/] ]] && compopt -o nospace
}
complete -o default -F _launch launch
"""
_ZSH = r"""
#compdef launch
_launch() {
  local -a found
  found=("${(@f)$(launch completion --words "${(@)words[2,CURRENT]}" 2> /dev/null)}")
  if [[ -z ${found[1]} ]]; then
    compset -P '*='
    _files
    return
  fi
  compadd -S '' -- ${(M)found:#*[=/]}
  compadd -- ${found:#*[=/]}
}
compdef _launch launch
"""
_FISH = r"""
function __launch_words
  set -l typed (commandline -opc)
  set -l word (commandline -ct)
  set -l found (launch completion --words $typed[2..] $word 2> /dev/null)
  if set -q found[1]
    printf '%s\n' $found
  else if string match -q '*=*' -- $word
    set -l parts (string split -m 1 = -- $word)
    printf '%s\n' "$parts[1]="(__fish_complete_path $parts[2])
  else
    __fish_complete_path $word
  end
end
complete -c launch -f -a '(__launch_words)'
"""
SCRIPTS = dict(zip(SHELLS, (_BASH, _ZSH, _FISH), strict=True))


def run(arguments: Arguments) -> int:
    """Print the script of a shell, or the candidates that this script asks for."""
    if arguments.words is not None:
        for candidate in candidates(arguments.words):
            print(candidate)
    elif arguments.shell is not None:
        print(SCRIPTS[arguments.shell].strip())
    else:
        raise ConfigError("completion", why="needs the name of a shell", fix=f"choose from: {', '.join(SHELLS)}")
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """Return the completions of the last of ``words``.

    Args:
        words: what was typed after ``launch``, the last one perhaps empty or half a word.
    """
    *before, word = words or [""]
    name = before[0] if before and before[0] in VERBS else ""
    verb = VERBS[name] if name else LAUNCH
    for option in verb.options:
        if option.metavar and before and before[-1] in option.names:
            return []  # the value of an option: the shell completes files
    return sorted({found for found in _offered(name, verb, word, before) if found.startswith(word)})


def _offered(name: str, verb: Verb, word: str, before: Sequence[str]) -> Iterator[str]:
    """Yield the candidates for a word of a verb, after the words ``before`` it."""
    place, own = len(before), groups(_folder_of(CONFIG_DIR, before))
    if word.startswith("-"):
        yield from verb.flags
        return
    if place == 0:
        yield from VERBS
    if place == 1 and name in ("benchmark", "data"):
        yield {"benchmark": "compare", "data": "preview"}[name]
        return
    for source in verb.completions():
        if source is Completion.RUN and "=" not in word:
            yield from _run_ids(_folder_of(ROOT, before) or Arguments.root)
        elif source is Completion.EXPERIMENT:
            yield from own.get("exp", [])
        elif source is Completion.GROUP:
            yield from _listed(word, own)
        elif source is Completion.OVERRIDE:
            yield from _overrides(word, own)
        elif isinstance(source, str):
            yield source


def _folder_of(option: Option, words: Sequence[str]) -> Path | None:
    """Return the folder that an option among the words names; ``None`` without one."""
    found = None
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag in option.names:
            found = value if equals else following
    folder = Path(expand_home(found.strip("'\""))) if found else None
    return folder if folder is not None and exists(folder) else None


def _listed(word: str, own: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield groups, and the options of the group before a slash."""
    group, slash, _ = word.partition("/")
    yield from (f"{group}/{option}" for option in own.get(group, [])) if slash else own


def _run_ids(folder: Path) -> Iterator[str]:
    """Yield ids of runs, and of those in sweeps, below a folder."""
    root = folder.absolute()
    for run_dir in list_runs(folder):
        if is_below(run_dir, root):
            run_id = run_dir.path.relative_to(root).as_posix().partition("/")[2]
            if _TYPEABLE.fullmatch(run_id):
                yield run_id


def _overrides(word: str, own: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield groups and keys, or the values of the one before the equals sign.

    Args:
        word: what was typed of it.
        own: the options of every group, those of the user included.
    """
    plus = word[: len(word) - len(word.lstrip("+"))]
    key, equals, _ = word.removeprefix(plus).partition("=")
    if equals:
        values = own.get(key) or _values(key)
        yield from (f"{plus}{key}={value}" for value in values)
        return
    yield from (f"{plus}{group}=" for group in own)
    if "." in key:
        group = key.partition(".")[0]
        yield from (f"{plus}{group}.{name}=" for name in _keys(group))
    elif len(key) > 1:
        yield from (
            f"{plus}{group}.{name}=" for group in (*KINDS, "run") if group.startswith(key) for name in _keys(group)
        )
    yield f"{plus}dry_run="


def _keys(group: str) -> dict[str, Any]:
    """Return the type of each key of a group, over all of its kinds."""
    if group == "run":
        return field_types(RunOptions)
    found: dict[str, Any] = {}
    for kind in KINDS.get(group, {}):
        cls: type = component_class(group, kind)
        found.update(field_types(cls))
    return found


def _values(key: str) -> list[str]:
    """Return the values of a key that has a few choices."""
    group, _, name = key.partition(".")
    wanted: Any = bool if key == "dry_run" else _keys(group).get(name)
    return list(_choices(wanted))


def _choices(wanted: Any) -> Iterator[str]:
    origin = typing.get_origin(wanted)
    if wanted is bool:
        yield from ("true", "false")
    elif origin is Literal:
        yield from map(str, typing.get_args(wanted))
    elif origin in (Union, types.UnionType):
        for choice in typing.get_args(wanted):
            yield from _choices(choice)
