"""The launcher's contracts, kept by this plugin and its parts."""

from launcher.testing.data import CorpusContract
from launcher.testing.model import ModelContract, TransformContract
from launcher.testing.optimizer import OptimizerContract, ScheduleContract
from launcher.testing.plugin import PluginContract
from launcher.testing.tracker import TrackerContract
from launcher.testing.training import CallbackContract, LossContract, MetricContract

PLUGIN = "plugins=[launcher_example]"


class TestPlugin(PluginContract):
    module = "launcher_example"
    experiments = ("example",)


class TestGatedConv(ModelContract):
    overrides = (PLUGIN, "model=gated_conv")


class TestRmsNorm(TransformContract):
    overrides = (PLUGIN, "model=gated_conv")
    name = "rms_norm"


class TestFreezeEmbedding(TransformContract):
    overrides = (PLUGIN, "model=gated_conv")
    name = "freeze_embedding"


class TestCounting(CorpusContract):
    overrides = (PLUGIN, "data=counting", "data.up_to=2000", "data.vocab_size=280", "model=gated_conv")
    changes = ("data.up_to=1000",)


class TestLion(OptimizerContract):
    overrides = (PLUGIN, "optimizer=lion")


class TestInverseSqrt(ScheduleContract):
    overrides = (PLUGIN, "schedule=inverse_sqrt")


class TestSmoothed(LossContract):
    overrides = (PLUGIN,)
    name = "smoothed"


class TestAccuracy(MetricContract):
    overrides = (PLUGIN,)
    name = "accuracy"


class TestWeightNorm(CallbackContract):
    overrides = (PLUGIN,)
    name = "weight_norm"


class TestCsv(TrackerContract):
    overrides = (PLUGIN, "tracker=csv")
