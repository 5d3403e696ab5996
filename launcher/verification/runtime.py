"""One process in which a format's own runtime runs an exported file.

``python -m launcher.verification.runtime`` reads a request as JSON and prints the answer as one line of JSON. It
imports no torch, so its peak of memory is the runtime's.

Request: ``format``, ``path``, ``prompts`` (tokens of each), ``text`` (to be cut into tokens), ``num_tokens`` to
generate, ``num_probs`` whose log probabilities are wanted, ``threads``.

Answer: ``runtime`` (name and version), ``text_ids``, ``answers`` (``tokens`` and ``logprobs`` of each prompt),
``load_s``, ``prefill_tokens_per_s``, ``tokens_per_s``, ``peak_bytes``, and ``cpu_s``: processor time after loading.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Request = Mapping[str, Any]


def main() -> int:
    """Answer the request."""
    request = json.load(sys.stdin)
    answer_to = os.dup(1)
    os.dup2(2, 1)  # runtimes print on both
    answer = _RUNTIMES[request["format"]](request)
    answer.setdefault("peak_bytes", _peak_bytes())
    answer["cpu_s"] = time.process_time() - answer.pop("loaded_at_cpu_s")
    with os.fdopen(answer_to, "w") as out:
        out.write(json.dumps(answer) + "\n")
    sys.stderr.flush()
    os._exit(0)  # threads of a runtime need not end first


def _llama_cpp(request: Request) -> dict[str, Any]:
    """Answer by llama.cpp's own server, with keys and values in fp32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx = max(len(prompt) for prompt in request["prompts"]) + request["num_tokens"] + 8
    params.n_parallel, params.n_gpu_layers, params.warmup, params.port = 1, 0, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to fp16
    params.verbosity = -1
    begin = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = (time.perf_counter() - begin, time.process_time())

    def ask(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        encoded = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{server.listening_address}/{path}", encoded, headers)  # noqa: S310  (own server)
        with urllib.request.urlopen(asked, timeout=600) as response:  # noqa: S310
            found: dict[str, Any] = json.load(response)
            return found

    def tokens_of(text: str) -> list[int]:
        found: list[int] = ask("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        return found

    text_ids, forced = tokens_of(request["text"]), tokens_of("a")[0]
    greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1}
    answers: list[dict[str, Any]] = []
    prefill, decode = [0, 0.0], [0, 0.0]
    for prompt in request["prompts"]:
        wanted = {"n_predict": request["num_tokens"], "return_tokens": True, "cache_prompt": False}
        found = ask("completion", {"prompt": prompt, **wanted, **greedy})
        for measured, kind in ((prefill, "prompt"), (decode, "predicted")):
            _add(measured, found["timings"][f"{kind}_n"], found["timings"][f"{kind}_ms"] / 1000)
        answers.append({"tokens": found["tokens"], "logprobs": []})
        if not request["num_probs"]:
            continue
        for at in range(len(found["tokens"])):
            # The server leaves out the probabilities of tokens that end within a character, so it is made to choose
            # another one. Those that it returns are of the logits before that.
            one = {"n_predict": 1, "n_probs": request["num_probs"], "logit_bias": [[forced, 1e4]], "cache_prompt": True}
            body = {"prompt": [*prompt, *found["tokens"][:at]], **one, **greedy}
            (chosen,) = ask("completion", body)["completion_probabilities"]
            pairs = [(entry["id"], entry["logprob"]) for entry in chosen["top_logprobs"]]
            answers[-1]["logprobs"].append(pairs)
    version = importlib.metadata.version("xllamacpp")
    return _answer(f"llama.cpp (xllamacpp {version})", text_ids, answers, load_s, prefill, decode)


def _onnx_genai(request: Request) -> dict[str, Any]:
    """Answer by ONNX Runtime GenAI."""
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    begin = time.perf_counter()
    config = onnxruntime_genai.Config(request["path"])
    session = {"session_options": {"intra_op_num_threads": request["threads"]}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = onnxruntime_genai.Model(config)
    load_s = (time.perf_counter() - begin, time.process_time())
    tokenizer = onnxruntime_genai.Tokenizer(model)
    text_ids = [int(number) for number in tokenizer.encode(request["text"])]
    answers: list[dict[str, Any]] = []
    prefill, decode = [0, 0.0], [0, 0.0]
    for prompt in request["prompts"]:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + request["num_tokens"] + 1, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        tokens: list[int] = []
        logprobs = []
        begin = time.perf_counter()
        generator.append_tokens(prompt)
        _count(prefill, len(prompt), begin)
        begin = time.perf_counter()
        while len(tokens) < request["num_tokens"] and not generator.is_done():
            if request["num_probs"]:
                logprobs.append(_likeliest(generator.get_logits().reshape(-1), request["num_probs"]))
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        _count(decode, len(tokens), begin)
        answers.append({"tokens": tokens, "logprobs": logprobs})
    version = importlib.metadata.version("onnxruntime-genai")
    return _answer(f"ONNX Runtime GenAI {version}", text_ids, answers, load_s, prefill, decode)


def _openvino_genai(request: Request) -> dict[str, Any]:
    """Answer by OpenVINO GenAI; OpenVINO runs the file once more for log probabilities."""
    import numpy as np
    import openvino
    import openvino_genai

    options = {"INFERENCE_NUM_THREADS": request["threads"], "INFERENCE_PRECISION_HINT": "f32"}
    begin = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(request["path"], "CPU", options)
    load_s = (time.perf_counter() - begin, time.process_time())
    encoded = pipeline.get_tokenizer().encode(request["text"], add_special_tokens=False)
    text_ids = [int(number) for number in encoded.input_ids.data.reshape(-1)]
    answers: list[dict[str, Any]] = []
    prefill, decode = [0, 0.0], [0, 0.0]
    for prompt in request["prompts"]:
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        found = pipeline.generate(ids, max_new_tokens=request["num_tokens"], do_sample=False)
        tokens = [int(token) for token in found.tokens[0]]
        answers.append({"tokens": tokens, "logprobs": []})
        first_s = found.perf_metrics.get_ttft().mean / 1000
        _add(prefill, len(prompt), first_s)
        _add(decode, len(tokens) - 1, found.perf_metrics.get_tpot().mean / 1000 * (len(tokens) - 1))
    version = importlib.metadata.version("openvino-genai")
    answer = _answer(f"OpenVINO GenAI {version}", text_ids, answers, load_s, prefill, decode)
    answer["peak_bytes"] = _peak_bytes()
    if request["num_probs"]:
        model = openvino.Core().compile_model(f"{request['path']}/openvino_model.xml", "CPU", options)
        for prompt, each in zip(request["prompts"], answers, strict=True):
            ids = np.array([[*prompt, *each["tokens"]]], dtype=np.int64)
            inputs = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(ids.shape[1])[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            logits = model.create_infer_request().infer(inputs)["logits"][0]
            each["logprobs"] = [_likeliest(row, request["num_probs"]) for row in logits[len(prompt) - 1 : -1]]
    return answer


def _likeliest(logits: Any, count: int) -> list[tuple[int, float]]:
    """Return the tokens of the greatest logits, with their log probabilities."""
    import numpy as np

    values = logits.astype(np.float64)
    values = values - values.max()
    values = values - np.log(np.exp(values).sum())
    chosen = np.argsort(-values)[:count]
    return [(int(token), float(values[token])) for token in chosen]


def _count(measured: list[Any], tokens: int, begin: float) -> None:
    _add(measured, tokens, time.perf_counter() - begin)


def _add(measured: list[Any], tokens: int, seconds: float) -> None:
    measured[0] += tokens
    measured[1] += seconds


def _answer(
    runtime: str,
    text_ids: Sequence[int],
    answers: Sequence[Mapping[str, Any]],
    load_s: tuple[float, float],
    prefill: Sequence[float],
    decode: Sequence[float],
) -> dict[str, Any]:
    return {
        "runtime": runtime,
        "text_ids": list(text_ids),
        "answers": list(answers),
        "load_s": load_s[0],
        "loaded_at_cpu_s": load_s[1],
        "prefill_tokens_per_s": prefill[0] / prefill[1] if prefill[1] else 0.0,
        "tokens_per_s": decode[0] / decode[1] if decode[1] else 0.0,
    }


def _peak_bytes() -> int:
    """Return the most memory of this process so far.

    ``ru_maxrss`` would have that of the process that forked it, too.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


_RUNTIMES: dict[str, Callable[[Request], dict[str, Any]]] = {
    "gguf": _llama_cpp,
    "onnx": _onnx_genai,
    "openvino": _openvino_genai,
}
"""What answers, by the format's name."""

if __name__ == "__main__":
    sys.exit(main())
