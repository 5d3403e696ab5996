"""Compare an exported file, run by its own runtime, with the model that it was made from."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.models.tokenizer import load_tokenizer
from launcher.utils.system import child_environment
from launcher.utils.text import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config.export import ExportOptions
    from launcher.models.export import ModelExport

PROMPTS = ("The capital of France is", "Once upon a time, in a small house by the sea,")
"""Texts that both continue."""
TEXT = "It's 2026: naïve café, 12345 + 67,890 = …\n\n\tTabs  and   spaces.\r\n你好 🙂 don't WE'LL _x_ <|im_end|>"
"""What both tokenizers cut; it has what rules for words differ in."""
NUM_TOKENS, NUM_PROBS = 24, 64

RUNTIMES = {"gguf": "xllamacpp", "onnx": "onnxruntime_genai", "openvino": "openvino_genai"}
"""Module of each format's runtime, which the extra of the format's name installs."""

_ROUNDING = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-1}
"""Differences of logits, in formats of floats, that rounding of weights and sums explains."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a runtime's answers differ from the model's."""

    num_equal: int
    """Tokens that are the same up to the first difference of each prompt."""
    num_tokens: int
    gap: float
    """How far the model's logit of its own token is above the runtime's, where they part."""
    kl: float
    """KL divergence of the runtime's distribution from the model's, the mean over tokens.
    It is over the runtime's 64 likeliest tokens, and all others as one."""


def check_export(path: Path, export: ModelExport, options: ExportOptions) -> str:
    """Run a file by its own runtime, and return the line that says how it compares.

    Args:
        path: of what was written.
        export: what it was made from.
        options: of the export.

    Raises:
        JobError: the runtime cannot load it, cuts text into other tokens, or chooses others in a float format.
    """
    module = RUNTIMES[options.format]
    if importlib.util.find_spec(module) is None:
        return f"not checked: {module.replace('_', '-')} is missing; pip install 'launcher[{options.format}]'"
    tokenizer = load_tokenizer(export.source, option="run")
    most = export.config.max_position_embeddings
    prompts = [tokenizer.encode(prompt)[: most // 2] for prompt in PROMPTS]
    request = {
        "format": options.format,
        "path": str(path),
        "prompts": prompts,
        "text": TEXT,
        "num_tokens": max(1, min(NUM_TOKENS, most // 2 - 2)),
        "num_probs": NUM_PROBS,
        "threads": 1,
    }
    found = run_runtime(request)
    if found["text_ids"] != tokenizer.encode(TEXT):
        why = f"{found['runtime']} cuts text into other tokens than the model's tokenizer"
        raise JobError(f"{why}: {found['text_ids']} instead of {tokenizer.encode(TEXT)}", exit_code=EXIT_BAD_INPUT)
    compared = compare(export.build(), prompts, found["answers"])
    is_exact = options.chosen_dtype in options.about.exact
    if is_exact and compared.gap > _ROUNDING[options.chosen_dtype]:
        why = f"{found['runtime']} chooses other tokens than the model: {compared.num_equal} of {compared.num_tokens}"
        why += f" are equal, and the model's logit of its own is {compared.gap:.3g} above"
        raise JobError(why, exit_code=EXIT_BAD_INPUT)
    speed = f"{found['tokens_per_s']:.1f} tokens/s on one thread, peak {bytes_text(found['peak_bytes'])}"
    same = f"{compared.num_equal} of {compared.num_tokens} greedy tokens are the model's"
    return f"checked by {found['runtime']}: {same}, KL divergence {compared.kl:.2g}; {speed}"


def run_runtime(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a runtime answers in a process of its own.

    Args:
        request: of ``launcher.verification.runtime``.

    Raises:
        JobError: it ended otherwise; the message has its last words.
    """
    command = [sys.executable, "-m", "launcher.verification.runtime"]
    ended = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=child_environment()
    )
    if ended.returncode != 0 or not ended.stdout.strip():
        said = [line for line in ended.stderr.splitlines() if line.strip()][-3:]
        why = f"its runtime does not run {request['path']} (exit code {ended.returncode}): {' / '.join(said)}"
        raise JobError(why, exit_code=EXIT_BAD_INPUT)
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def compare(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Mapping[str, Any]]
) -> Comparison:
    """Return how answers differ from what a model says.

    Args:
        model: in fp32, in evaluation mode.
        prompts: tokens of each.
        answers: to each: ``tokens``, and ``logprobs``: for each of them pairs of a token and its log probability.
    """
    equal = total = 0
    gap, divergences = 0.0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen = answer["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *chosen]])).logits[0, len(prompt) - 1 : -1].double()
        best = logits.argmax(-1).tolist()
        same = next((at for at, token in enumerate(chosen) if token != best[at]), len(chosen))
        equal, total = equal + same, total + len(chosen)
        if same < len(chosen):
            gap = max(gap, float(logits[same, best[same]] - logits[same, chosen[same]]))
        divergences += [
            _divergence(row, pairs) for row, pairs in zip(logits.log_softmax(-1), answer["logprobs"], strict=True)
        ]
    return Comparison(num_equal=equal, num_tokens=total, gap=gap, kl=sum(divergences) / max(1, len(divergences)))


def _divergence(model: torch.Tensor, pairs: Sequence[tuple[int, float]]) -> float:
    """Return KL(model, runtime) over some tokens and the rest, which is never above the whole."""
    tokens = [token for token, _ in pairs]
    own = model[tokens]
    other = torch.tensor([value for _, value in pairs], dtype=torch.float64)
    rest, other_rest = (max(1e-12, 1 - float(each.exp().sum())) for each in (own, other))
    return float((own.exp() * (own - other)).sum()) + rest * (math.log(rest) - math.log(other_rest))
