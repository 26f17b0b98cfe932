"""summary.json and summary.md from what the stages of gpu_check.sh left in a folder; status 1 if a stage failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def summarise(folder: Path) -> dict[str, Any]:
    stages = [line.split("\t") for line in (folder / "stages.tsv").read_text().splitlines()]
    parity = _read(folder / "parity.json") or []
    return {
        "stages": [{"name": name, "outcome": outcome, "seconds": int(time)} for name, outcome, time in stages],
        "parity": {
            "cases": len(parity),
            "passed": sum(result["outcome"] == "passed" for result in parity),
            "not passed": [result for result in parity if result["outcome"] != "passed"],
        },
        "benchmarks": _read(folder / "benchmarks.json"),
    }


def markdown(summary: dict[str, Any], folder: Path) -> str:
    lines = ["# GPU check", "", "| stage | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {stage['name']} | {stage['outcome']} | {stage['seconds']} |" for stage in summary["stages"]]
    parity = summary["parity"]
    lines += ["", f"Parity with float64: {parity['passed']} of {parity['cases']} cases passed.", ""]
    lines += [f"- {result['outcome']}: {result['case']}: {result['message']}" for result in parity["not passed"]]
    page = folder / "benchmarks.md"
    return "\n".join(lines) + ("\n\n" + page.read_text() if page.exists() else "\n")


def main(folder: Path) -> int:
    summary = summarise(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "summary.md").write_text(markdown(summary, folder))
    failed = [stage["name"] for stage in summary["stages"] if stage["outcome"].startswith("failed")]
    print(f"failed: {', '.join(failed)}" if failed else "every stage passed or was skipped", f"({folder}/summary.md)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
