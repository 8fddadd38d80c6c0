"""One device's profile, carried over, on another device's measured suite.

    python -m experiments.gpu_validation.transfer validation/h100_DATE validation/h200_DATE

Predicts the steps that were measured in the second folder from the profile in the first, corrected
by the ratio of the devices' figures, and writes ``transfer_from_NAME.json`` into the second.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from muxtune.cost.devices import device_figures
from muxtune.cost.schema import load_profile
from muxtune.cost.transfer import carried_over, carried_over_model
from muxtune.validation.models import Models
from muxtune.validation.records import read_lines
from muxtune.validation.scoring import errors_of, rankings, usable, with_second_runs
from muxtune.validation.steps import again


def transfer(source: Path, target: Path) -> dict[str, Any]:
    profile = load_profile(source / "profile.json")
    here = load_profile(target / "profile.json")
    figures = [device_figures(item.device_name) for item in (profile, here)]
    carried = carried_over(profile, *figures)
    models = Models(profile)
    runs = (read_lines(target / name) for name in ("steps.jsonl", "again.jsonl"))
    measured = usable(with_second_runs(*runs))
    rows = again(measured, lambda shape: carried_over_model(models(shape), carried))
    errors = errors_of(rows)
    return {
        "from": profile.device_name,
        "to": here.device_name,
        "profiles": [profile.content_hash, here.content_hash],
        "step": None if errors is None else errors._asdict(),
        "rankings": [item._asdict() for item in rankings(rows)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    found = transfer(args.source, args.target)
    path = args.target / f"transfer_from_{found['from'].lower()}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
