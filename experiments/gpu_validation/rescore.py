"""What the cost model of this code says of a validation's measurements.

    python -m experiments.gpu_validation.rescore validation/h100_DATE [--unchecked] [--first N]

For a model that was changed after the suite was measured. Nothing is measured anew and the attempt
that was made stays as it is: the result, ``rescored.json``, says that the measurements were known.
``--unchecked``: by the profile as it is, as if nobody had checked the machine (``unchecked.json``).
``--first N``: of the N steps that were measured first only. ``as_recorded`` has what the same steps
were off by the predictions that were made before they were measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from muxtune.report.run_folder import provenance
from muxtune.validation import single_ops
from muxtune.validation.attempts import PROFILE, Attempt
from muxtune.validation.dynamic import with_prediction
from muxtune.validation.models import Models
from muxtune.validation.scoring import summarise, usable
from muxtune.validation.steps import again


def rescore(folder: Path, checked: bool = True, first: int | None = None) -> dict[str, Any]:
    """What ``summarise`` says of it, plain JSON. ``first``: of so many steps; None: of all."""
    attempt = Attempt(folder, folder / PROFILE)
    steps, ops, dynamic = (attempt.records[name].rows for name in ("steps", "ops", "dynamic"))
    steps = usable(steps[:first])
    profile, models = attempt.here, attempt.models_here
    if not checked:
        profile, models = attempt.profile, attempt.models
    rows = again(steps, models)
    of_ops = single_ops.again(usable(ops), profile, lambda of: Models(of)(of.model_shape))
    found = summarise(rows, of_ops, [with_prediction(row, profile) for row in dynamic])
    kept = ("step", "memory", "op", "completion", "step_by", "op_by_kind", "rankings", "dynamic")
    note = "predicted by later code, when the measurements were known"
    then = summarise(steps, (), ())
    return {
        "note": note,
        "provenance": provenance(),
        "as_recorded": {key: then[key] for key in ("step", "memory")},
        **{key: found[key] for key in kept},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--first", type=int, metavar="N", help="steps, in the order measured")
    args = parser.parse_args()
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
