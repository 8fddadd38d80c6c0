"""What the cost model of this code says of a validation's measurements.

    python -m experiments.gpu_validation.rescore validation/h100_DATE [--unchecked] [--first N]
    python -m experiments.gpu_validation.rescore validation/h100_DATE --by validation/h100_LATER

For a model that was changed after the suite was measured. Nothing is measured anew and the attempt
that was made stays as it is: the result, ``rescored.json``, says that the measurements were known.
``--unchecked``: by the profile as it is, as if nobody had checked the machine (``unchecked.json``).
``--first N``: of the N steps that were measured first only. ``as_recorded`` has what the same steps
were off by the predictions that were made before they were measured.

``--by FOLDER``: steps only, by another profile of the same kind of device (``by_NAME.json``), so
that a model is judged on suites whose own profile tells less. The machines' own speeds, which
differ by some percent, are taken out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from muxtune.cost.schema import load_profile
from muxtune.report.run_folder import provenance
from muxtune.validation import single_ops
from muxtune.validation.attempts import PROFILE, Attempt
from muxtune.validation.dynamic import with_prediction
from muxtune.validation.models import Models
from muxtune.validation.scoring import relative_error, summarise, usable, with_second_ends
from muxtune.validation.steps import again


def rescore(folder: Path, checked: bool = True, first: int | None = None) -> dict[str, Any]:
    """What ``summarise`` says of it, plain JSON. ``first``: of so many steps; None: of all."""
    attempt = Attempt(folder, folder / PROFILE)
    ops, dynamic = attempt.records["ops"].rows, attempt.records["dynamic"].rows
    steps = usable(attempt.steps[:first])
    profile, models = attempt.here, attempt.models_here
    if not checked:
        profile, models = attempt.profile, attempt.models
    rows = again(steps, models)
    of_ops = single_ops.again(usable(ops), profile, lambda of: Models(of)(of.model_shape))
    runs = [with_prediction(row, profile) for row in dynamic]
    runs = with_second_ends(runs, attempt.records["runs_again"].rows)
    found = summarise(rows, of_ops, runs)
    kept = ("step", "memory", "op", "completion", "step_by", "op_by_kind", "rankings", "dynamic")
    note = "predicted by later code, when the measurements were known"
    then = summarise(steps, (), ())
    return {
        "note": note,
        "provenance": provenance(),
        "as_recorded": {key: then[key] for key in ("step", "memory")},
        **{key: found[key] for key in kept},
    }


def rescore_by(folder: Path, source: Path) -> dict[str, Any]:
    """Of the steps in ``folder`` by the profile in ``source``, as ``summarise`` says of them;
    ``speed``: of all predictions over the measurements, in the median, which is taken out."""
    attempt, models = Attempt(folder, folder / PROFILE), Models(load_profile(source / PROFILE))
    rows = again(usable(attempt.steps), models)
    speed = 1.0 + float(np.median([relative_error(row) for row in rows]))
    keys = ("predicted_s", "low_s", "high_s")
    found = summarise([{**row, **{key: row[key] / speed for key in keys}} for row in rows], (), ())
    kept = {key: found[key] for key in ("step", "step_by", "rankings")}
    return {"by": models.profile.content_hash, "speed": speed, **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--first", type=int, metavar="N", help="steps, in the order measured")
    parser.add_argument("--by", type=Path, metavar="FOLDER", help="with another profile")
    args = parser.parse_args()
    if args.by is not None:
        found = rescore_by(args.folder, args.by)
        path = args.folder / f"by_{args.by.name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({key: found[key] for key in ("speed", "step", "rankings")}, indent=1))
        return
    folder, found = args.folder, rescore(args.folder, not args.unchecked, args.first)
    name = "unchecked.json" if args.unchecked else "rescored.json"
    (folder / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {
                key: found[key]
                for key in ("as_recorded", "step", "memory", "op", "completion", "rankings")
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
