"""An evaluation as one self-contained page and one JSON file.

The page needs no network: styles, charts and pictures are inside. It follows the reader's light or dark setting.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onestill.checkpoint import written_whole
from onestill.errors import OutputError
from onestill.evaluate.report.html import render
from onestill.evaluate.report.model import Report


def write_report(report: Report, folder: Path | str) -> Path:
    """Write `index.html` and `report.json` into `folder`, each atomically.

    Returns:
        The page.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    created = datetime.now(UTC).replace(microsecond=0).isoformat()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "report.json", json.dumps(_facts(report, created), indent=1, ensure_ascii=False) + "\n")
        return _replace(folder / "index.html", render(report, created))
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror or error}); choose another folder") from error


def _replace(path: Path, text: str) -> Path:
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def _facts(report: Report, created: str) -> dict[str, Any]:
    evaluation = report.evaluation
    return {
        "format": "onestill.evaluation",
        "version": 2,  # 1 had the short names fid, kid and floor_fid
        "created": created,
        "about": asdict(report.about),
        "network": evaluation.network,
        "num_prompts": len(evaluation.protocol.prompts),
        "retrieval_among": evaluation.retrieval_among,
        "floor_frechet_distance": evaluation.floor,
        "real": asdict(evaluation.real),
        "results": [asdict(result) for result in evaluation.results],
        "targets": [asdict(target) for target in report.targets],
        "tried": [asdict(tried) for tried in report.tried],
    }
