"""A plugin of launcher: names of what it adds."""

from launcher.plugins import Plugin

plugin = Plugin(
    name="example",
    options={
        "model": {"gated_conv": "launcher_example.options:GatedConv"},
        "optimizer": {"lion": "launcher_example.options:Lion"},
        "data": {"counting": "launcher_example.options:Counting"},
        "schedule": {"inverse_sqrt": "launcher_example.options:InverseSqrtSchedule"},
        "job": {"count_parameters": "launcher_example.options:CountParameters"},
        "tracker": {"csv": "launcher_example.options:CsvTracker"},
    },
    executors={
        "model": {"gated_conv": "launcher_example.model:GatedConvSource"},
        "optimizer": {"lion": "launcher_example.training:make_lion"},
        "data": {"counting": "launcher_example.data:read_counting"},
        "job": {"count_parameters": "launcher_example.jobs:count_parameters"},
        "tracker": {"csv": "launcher_example.jobs:CsvRun"},
        "callback": {"weight_norm": "launcher_example.training:WeightNorm"},
        "loss": {"smoothed": "launcher_example.training:smoothed_loss"},
        "metric": {"accuracy": "launcher_example.training:accuracy"},
        "transform": {
            "rms_norm": "launcher_example.training:use_rms_norm",
            "freeze_embedding": "launcher_example.training:freeze_embedding",
        },
    },
    callback_metrics={"weight_norm": ("weight_norm", "weight_norm_change", "evaluations", "files", "steps_here")},
    conf="conf",
)
