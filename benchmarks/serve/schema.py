"""schemathesis with all its checks over the OpenAPI schema: `python -m benchmarks.serve.schema --examples 600`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.serve.server import running
from onestill.serve.access.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="icons")
    options = parser.parse_args()
    with ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        url = f"sqlite:///{folder}/serve.db"
        ledger = Ledger(url)
        key = ledger.add_key("schemathesis", None)[1]
        ledger.close()
        process = opened.enter_context(running(["--model", options.model, "--gallery", "--database", url]))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{process.url}/openapi.json", "--checks", "all"),
                *("--max-examples", str(options.examples), "--phases", "examples,coverage,fuzzing,stateful"),
                *("--seed", str(options.seed), "--no-color", "--header", f"Authorization: Bearer {key}"),
            ],
            cwd=folder,
            env=os.environ
            | {
                "SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
