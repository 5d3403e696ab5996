"""Call a function once for each set of arguments, each in a process of its own, as benchmarks do; print the answers.

    python isolated_calls.py FUNCTION EXACT_PEAKS ARGUMENTS...

Arguments are JSON objects. A fork of a process that has imported torch forks these processes too.
"""

from __future__ import annotations

import json
import sys

from launcher.benchmarks.isolated import run_isolated

function, exact_peaks, *calls = sys.argv[1:]
answers = [
    run_isolated(function, json.loads(arguments), heartbeat=lambda: None, exact_peaks=exact_peaks == "true")
    for arguments in calls
]
print(json.dumps(answers))
