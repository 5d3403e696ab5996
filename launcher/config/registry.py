"""The registry of config classes: one line for each kind of each group."""

from __future__ import annotations

import importlib
from typing import Any

from launcher.config.component import Component
from launcher.config.quantization import METHODS
from launcher.config.sparsity import PRUNING_METHODS

KINDS: dict[str, dict[str, str]] = {
    "job": {
        "train": "launcher.config.job.train:Train",
        "benchmark": "launcher.config.job.benchmark:BenchmarkJob",
        "evaluate": "launcher.config.job.train:Evaluate",
        "quantize": "launcher.config.job.quantize:Quantize",
        "sparsify": "launcher.config.job.sparsify:Sparsify",
        "generate": "launcher.config.job.generate:Generate",
        "serve": "launcher.config.job.serve:Serve",
        "verify": "launcher.config.job.verify:Verify",
    },
    "model": {
        "gpt2": "launcher.config.model.gpt2:Gpt2",
        "llama": "launcher.config.model.llama:Llama",
        "smollm2": "launcher.config.model.llama:SmolLm2",
        "hf": "launcher.config.model.hf:Hf",
    },
    "data": {
        "auto": "launcher.config.data.auto:AutoData",
        "text": "launcher.config.data.text:Text",
        "hf": "launcher.config.data.hf:HfData",
        "synthetic": "launcher.config.data.base:Synthetic",
    },
    "parallel": {
        "single": "launcher.config.parallel.data_parallel:Single",
        "ddp": "launcher.config.parallel.data_parallel:Ddp",
        "deepspeed_pipeline": "launcher.config.parallel.deepspeed_pipeline:DeepSpeedPipeline",
        "fsdp": "launcher.config.parallel.data_parallel:Fsdp",
        "pipeline": "launcher.config.parallel.pipeline:Pipeline",
        "zero": "launcher.config.parallel.zero:Zero",
    },
    "optimizer": {
        "adamw": "launcher.config.optimizer:AdamW",
        "adamw_8bit": "launcher.config.optimizer:AdamW8bit",
        "adafactor": "launcher.config.optimizer:Adafactor",
        "muon": "launcher.config.optimizer:Muon",
        "sgd": "launcher.config.optimizer:Sgd",
    },
    "schedule": {
        "constant": "launcher.config.schedule:ConstantSchedule",
        "linear": "launcher.config.schedule:LinearSchedule",
        "cosine": "launcher.config.schedule:CosineSchedule",
        "wsd": "launcher.config.schedule:WsdSchedule",
    },
    "quantization": {
        "none": "launcher.config.quantization:NoQuantization",
        **{method.kind: f"launcher.config.quantization:{method.__name__}" for method in METHODS.values()},
    },
    "sparsity": {
        "none": "launcher.config.sparsity:NoSparsity",
        **{method.kind: f"launcher.config.sparsity:{method.__name__}" for method in PRUNING_METHODS.values()},
    },
    "adapter": {
        "none": "launcher.config.adapter:NoAdapter",
        "lora": "launcher.config.adapter:Lora",
        "rslora": "launcher.config.adapter:RsLora",
        "dora": "launcher.config.adapter:Dora",
        "qlora": "launcher.config.adapter:Qlora",
    },
    "precision": {
        "fp32": "launcher.config.precision:Fp32Precision",
        "tf32": "launcher.config.precision:Tf32Precision",
        "bf16": "launcher.config.precision:Bf16Precision",
        "fp16": "launcher.config.precision:Fp16Precision",
        "fp8": "launcher.config.precision:Fp8Precision",
    },
    "activation": {
        "none": "launcher.config.activation:NoCheckpointing",
        "full": "launcher.config.activation:FullCheckpointing",
        "every_k": "launcher.config.activation:SelectiveCheckpointing",
        "offload": "launcher.config.activation:OffloadCheckpointing",
    },
    "attention": {
        "sdpa": "launcher.config.attention:SdpaAttention",
        "eager": "launcher.config.attention:EagerAttention",
        "flash": "launcher.config.attention:FlashAttention",
        "flex": "launcher.config.attention:FlexAttention",
    },
    "compile": {"false": "launcher.config.compile:NoCompile", "true": "launcher.config.compile:RegionalCompile"},
    "checkpoint": {"policy": "launcher.config.checkpoint:Checkpoint"},
    "benchmark": {
        "none": "launcher.config.run:NoBenchmark",
        "activation": "launcher.config.benchmark.memory:ActivationBenchmark",
        "attention": "launcher.config.benchmark.attention:AttentionBenchmark",
        "quantization": "launcher.config.benchmark.inference:QuantizationBenchmark",
        "cache": "launcher.config.benchmark.inference:ResultCacheBenchmark",
        "batching": "launcher.config.benchmark.inference:BatchingBenchmark",
        "collectives": "launcher.config.benchmark.distributed:CollectivesBenchmark",
        "data": "launcher.config.benchmark.io:DataBenchmark",
        "checkpoint": "launcher.config.benchmark.io:CheckpointBenchmark",
        "lm_eval": "launcher.config.benchmark.lm_eval:LmEvalBenchmark",
        "memory": "launcher.config.benchmark.memory:MemoryBenchmark",
        "pipeline": "launcher.config.benchmark.distributed:PipelineBenchmark",
        "serving": "launcher.config.benchmark.serving:ServingBenchmark",
    },
    "profile": {"false": "launcher.config.profile:Profile", "true": "launcher.config.profile:TorchProfile"},
    "tracker": {
        "wandb": "launcher.config.tracker:Wandb",
        "mlflow": "launcher.config.tracker:Mlflow",
        "tensorboard": "launcher.config.tracker:TensorBoard",
        "prometheus": "launcher.config.tracker:PrometheusTracker",
        "several": "launcher.config.tracker:SeveralTrackers",
        "local": "launcher.config.tracker:LocalTracker",
    },
    "backend": {
        "deepspeed": "launcher.config.backend.deepspeed:DeepspeedBackend",
        "kubernetes": "launcher.config.backend.kubernetes:KubernetesBackend",
        "local": "launcher.config.backend.local:LocalBackend",
        "slurm": "launcher.config.backend.slurm:SlurmBackend",
        "ssh": "launcher.config.backend.ssh:SshBackend",
    },
    "deploy": {
        "none": "launcher.config.run:NoDeploy",
        "kubernetes": "launcher.config.deploy.kubernetes:KubernetesDeploy",
        "compose": "launcher.config.deploy.compose:ComposeDeploy",
        "docker": "launcher.config.deploy.docker:DockerDeploy",
        "helm": "launcher.config.deploy.helm:HelmDeploy",
        "nginx": "launcher.config.deploy.nginx:NginxDeploy",
        "haproxy": "launcher.config.deploy.haproxy:HaproxyDeploy",
        "monitoring": "launcher.config.deploy.monitoring:MonitoringDeploy",
    },
}
"""Every component, by group and kind: a new one is its file, its YAML and a line here."""

GROUPS_ADDED_LATER: dict[str, dict[str, Any]] = {
    "quantization": {"kind": "none"},
    "sparsity": {"kind": "none"},
    "profile": {"kind": "false"},
    "adapter": {"kind": "none"},
    "deploy": {"kind": "none"},
}
"""Groups that runs on disk may lack because they were not there yet, and what such runs did."""


def component_class(group: str, kind: str) -> type[Component]:
    """Import and return the class that a ``kind`` names."""
    module, _, name = KINDS[group][kind].partition(":")
    found: type[Component] = getattr(importlib.import_module(module), name)
    return found
