"""Support by the installed Transformers, read from its source text.

Importing Transformers would take seconds and torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_ROOTS = frozenset({"PreTrainedModel", "GenerationMixin"})
"""Classes without marks that those of families inherit from."""
_NO = ast.Constant(value=False)


@dataclass(frozen=True, kw_only=True)
class ParallelPlans:
    """How Transformers says a family can be spread over ranks."""

    tensor_styles: frozenset[str]
    """Ways in which matrices are sliced; empty where there is no plan."""
    has_stages: bool
    """Whether there is a plan for pipeline stages of a form that is carried out here."""


@dataclass(frozen=True, kw_only=True)
class AttentionSupport:
    """Attention of a causal language model's class, in Transformers' names."""

    sdpa: bool
    flex_attn: bool
    attention_backend: bool
    """Whether layers take any registered attention function, not only code of their own."""
    is_stateful: bool
    """Whether some layers carry a state from token to token instead of attending."""


@functools.cache
def causal_lm_types() -> frozenset[str] | None:
    """Return every ``model_type`` that has a causal language model."""
    classes = _causal_lm_classes()
    return None if classes is None else frozenset(classes)


@functools.cache
def image_text_types() -> frozenset[str] | None:
    """Return every ``model_type`` that has a model which writes text about images and text."""
    classes = _image_text_classes()
    return None if classes is None else frozenset(classes)


@functools.cache
def attention_support(model_type: str) -> AttentionSupport | None:
    """Return the attention support of a family's class that writes text."""
    name = {**(_image_text_classes() or {}), **(_causal_lm_classes() or {})}.get(model_type)
    for folder in {file.parent for file in _configuration_files(model_type)}:
        for file in folder.glob("modeling_*.py"):
            text = file.read_text(encoding="utf-8")
            if f"class {name}(" in text:
                classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
                return _support_of(str(name), classes)
    return None


def _support_of(name: str, classes: Mapping[str, ast.ClassDef]) -> AttentionSupport | None:
    """Return the marks of a class by those of its bases, as far as these are in the same file."""
    found: dict[str, ast.expr] = {}
    pending = [name]
    while pending:
        node = classes.get(name := pending.pop())
        if node is not None:
            found = _assigned(node.body) | found
            pending += [base.id for base in reversed(node.bases) if isinstance(base, ast.Name)]
        elif name not in _ROOTS:
            return None  # it may inherit marks
    marks = {"sdpa": "_supports_sdpa", "flex_attn": "_supports_flex_attn"}
    marks |= {"attention_backend": "_supports_attention_backend", "is_stateful": "_is_stateful"}
    values = {field: found.get(mark, _NO) for field, mark in marks.items()}
    if not all(isinstance(value, ast.Constant) for value in values.values()):
        return None
    return AttentionSupport(**{field: bool(ast.literal_eval(value)) for field, value in values.items()})


@functools.cache
def _causal_lm_classes() -> Mapping[str, str] | None:
    """Return the name of the class by ``model_type``."""
    return _classes_of("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@functools.cache
def _image_text_classes() -> Mapping[str, str] | None:
    return _classes_of("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


def _classes_of(table_name: str) -> Mapping[str, str] | None:
    table = _assigned(_module("models/auto/modeling_auto.py")).get(table_name)
    return dict(ast.literal_eval(table.args[0])) if isinstance(table, ast.Call) else None


@functools.cache
def rope_types() -> frozenset[str] | None:
    """Return every kind of scaled rotary positions."""
    table = _assigned(_module("modeling_rope_utils.py")).get("ROPE_INIT_FUNCTIONS")
    if not isinstance(table, ast.Dict):
        return None
    return frozenset(str(key.value) for key in table.keys if isinstance(key, ast.Constant))


@functools.cache
def parallel_plans(model_type: str) -> ParallelPlans | None:
    """Return the parallel plans of a family's configuration class."""
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
            stages = values.get("base_model_pp_plan")
            has_stages = isinstance(stages, ast.Dict) and stage_names(ast.literal_eval(stages)) is not None
            return ParallelPlans(tensor_styles=frozenset(plan.values()), has_stages=has_stages)
    return None


class StageNames(NamedTuple):
    """Names of a base model's children, in the order in which a pipeline runs them."""

    embedding: str
    dropout: str | None
    blocks: str
    norm: str


def stage_names(plan: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> StageNames | None:
    """Return the parts of a pipeline plan (``base_model_pp_plan``), or ``None`` for other parts.

    They are embedding, an optional dropout, blocks and norm.

    ``None`` where its parts are others.
    """
    names, outputs = list(plan), [list(output) for _, output in plan.values()]
    dropout = names.pop(1) if len(names) == 4 and outputs.pop(1) else None
    if outputs != [["inputs_embeds"], ["hidden_states"], ["hidden_states"]]:
        return None
    return StageNames(names[0], dropout, names[1], names[2])


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
    """Return the assigned values by name."""
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
