"""Folders of YAML: the shipped ``conf/``, those of plugins, and the user's own."""

from __future__ import annotations

from pathlib import Path

from launcher.plugins.loading import conf_folders


def conf_folder() -> Path:
    """Return the shipped ``conf/``: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def option_folders(extra: Path | None = None) -> tuple[Path, ...]:
    """Return the folders of options: shipped, of loaded plugins, and the user's own."""
    return (conf_folder(), *conf_folders(), *([] if extra is None else [extra]))


def groups(extra: Path | None = None) -> dict[str, list[str]]:
    """Return the options of every config group, shipped, of loaded plugins, and the user's."""
    return options_in(*option_folders(extra))


def options_in(*folders: Path) -> dict[str, list[str]]:
    """Return the options in these folders, by group."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}
