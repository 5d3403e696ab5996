"""The launcher's contract of plugins, kept by this one."""

from launcher.plugins.contract import PluginContract


class TestExample(PluginContract):
    """Every test is inherited."""

    module = "launcher_example"
    experiments = ("example",)
