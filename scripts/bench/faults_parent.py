"""Our launcher's parent process, with ranks that cost little: ``faults_parent.py PLAN.json [SSH_CONFIG]``.

Everything from the submission on is the real thing; what comes before (Hydra, the doctor) is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from faults_processes import MARK

from launcher.backends.local import LocalExecutor
from launcher.backends.ssh import SshExecutor
from launcher.config.backend.local import LocalBackend
from launcher.config.backend.ssh import SshBackend
from launcher.execution.executor import AnyExecutor
from launcher.protocol.plan import plan_from_json
from launcher.protocol.rundir import RunDir
from launcher.supervision.finalize import finalize_run


def main() -> None:
    """Submit the plan, say how it ended, and end like it."""
    plan = plan_from_json(json.loads(Path(sys.argv[1]).read_text()))
    executor: AnyExecutor = LocalExecutor(LocalBackend())
    if len(sys.argv) > 2:
        executor = SshExecutor(SshBackend(ssh_config=sys.argv[2], ssh_options=("-o", f"SendEnv={MARK}")))
    outcome = executor.submit(plan)
    finalize_run(outcome, RunDir(Path(plan.run_dir)), run_id=plan.run_id)
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
