"""What the installed Transformers supports, read from its source text: importing it takes seconds and torch.

Each function returns ``None`` where the text cannot be read that way: then only a rank can say.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ParallelPlans:
    """How Transformers says a family can be spread over ranks."""

    tensor_styles: frozenset[str]
    """Ways in which matrices are sliced; empty where there is no plan."""
    has_stages: bool
    """Whether there is a plan for pipeline stages."""


@functools.cache
def causal_lm_types() -> frozenset[str] | None:
    """Return every ``model_type`` that has a causal language model."""
    table = _assigned(_module("models/auto/modeling_auto.py")).get("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    if not isinstance(table, ast.Call):
        return None
    return frozenset(name for name, _ in ast.literal_eval(table.args[0]))


@functools.cache
def rope_types() -> frozenset[str] | None:
    """Return every kind of scaled rotary positions."""
    table = _assigned(_module("modeling_rope_utils.py")).get("ROPE_INIT_FUNCTIONS")
    if not isinstance(table, ast.Dict):
        return None
    return frozenset(str(key.value) for key in table.keys if isinstance(key, ast.Constant))


@functools.cache
def parallel_plans(model_type: str) -> ParallelPlans | None:
    """Return what the configuration class of a family plans."""
    for file in _configuration_files(model_type):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            values = _assigned(node.body)
            kind = values.get("model_type")
            if not isinstance(kind, ast.Constant) or kind.value != model_type:
                continue
            if [base.id for base in node.bases if isinstance(base, ast.Name)] != ["PreTrainedConfig"]:
                return None  # it may inherit a plan
            tensor = values.get("base_model_tp_plan")
            plan: Mapping[str, str] = ast.literal_eval(tensor) if isinstance(tensor, ast.Dict) else {}
            return ParallelPlans(tensor_styles=frozenset(plan.values()), has_stages="base_model_pp_plan" in values)
    return None


def _configuration_files(model_type: str) -> list[Path]:
    root = _root()
    if root is None:
        return []
    own = root / "models" / model_type.replace("-", "_")
    named = f'model_type = "{model_type}"'
    if own.is_dir():
        return sorted(own.glob("configuration_*.py"))
    files = sorted(root.glob("models/*/configuration_*.py"))
    return [file for file in files if named in file.read_text(encoding="utf-8")]


def _module(path: str) -> list[ast.stmt]:
    root = _root()
    try:
        return [] if root is None else ast.parse((root / path).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):  # of a version that is laid out otherwise
        return []


def _assigned(statements: Iterable[ast.stmt]) -> dict[str, ast.expr]:
    """Return what statements assign, by name."""
    found = {}
    for node in statements:
        if isinstance(node, ast.AnnAssign | ast.Assign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                found[target.id] = node.value
    return found


@functools.cache
def _root() -> Path | None:
    found = importlib.util.find_spec("transformers")
    return Path(found.origin).parent if found is not None and found.origin else None
