"""Refuse what makes the tree hard to read: a class name used twice, a module beside the packages.

    python scripts/check_tree.py [PACKAGE]     the folder of a package; launcher otherwise

Exit code 1 and a line for each find.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TOP_LEVEL = {"__init__.py", "__main__.py", "errors.py"}
"""Modules that may stand beside the packages; any other belongs into one of them."""


def check(package: Path) -> Iterator[str]:
    """Yield a line for every public class name defined twice and every module at the top that is not expected."""
    classes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(f"{path.relative_to(package.parent)}:{node.lineno}")
    for name, places in sorted(classes.items()):
        if len(places) > 1:
            yield f"class {name} is defined more than once, rename all but one: {', '.join(places)}"
    for path in sorted(package.glob("*.py")):
        if path.name not in TOP_LEVEL:
            yield f"{path.relative_to(package.parent)}: move it into a package of {package.name}"


def main() -> int:
    """Print the finds; return the exit code."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "launcher"
    finds = list(check(package))
    for line in finds:
        print(line)
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
