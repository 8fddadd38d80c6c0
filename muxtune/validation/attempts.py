"""A validation's folder: a frozen profile, records that grow, and a list of every attempt.

    profile.json   the profile that is scored
    steps.jsonl, ops.jsonl, dynamic.jsonl   one record a line
    again.jsonl    steps of the rankings, run once more when all the others were over
    runs_again.jsonl   the dynamic runs, once more at the very end
    report.json, predicted_measured.png, errors.png   of the last attempt
    attempts.jsonl one line an attempt, appended, never rewritten
    machine.json   how the machine that measured differs from the profiled one; may be missing
    attempt-N/     the records and the profile of earlier attempts

Another profile in the same folder is another attempt; the same one goes on where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from muxtune.cost.machine import carried
from muxtune.cost.schema import Profile, load_profile
from muxtune.cost.sharing import worst
from muxtune.errors import ProfileError
from muxtune.report.run_folder import write_whole
from muxtune.validation.models import Models
from muxtune.validation.records import Records, append_line, read_lines
from muxtune.validation.scoring import with_second_runs

PROFILE, ATTEMPTS, REPORT = "profile.json", "attempts.jsonl", "report.json"
MACHINE = "machine.json"
RECORDS = ("steps", "again", "ops", "dynamic", "runs_again")


class Attempt:
    """Raises ProfileError for a profile that cannot be used."""

    def __init__(self, folder: Path, profile_path: Path) -> None:
        self.folder = folder
        self.profile: Profile = load_profile(profile_path)
        folder.mkdir(parents=True, exist_ok=True)
        here = folder / PROFILE
        if not self._are_of_this_profile(here):
            self._put_away()
        if here.resolve() != profile_path.resolve():
            here.write_bytes(profile_path.read_bytes())
        stamp = {"profile": self.profile.content_hash}
        self.models = Models(self.profile)  # by which the suite is drawn
        self.here, self.models_here = self.profile, self.models  # by which it is predicted
        if (folder / MACHINE).exists():
            self.carry_to(json.loads((folder / MACHINE).read_text(encoding="utf-8")))
        self.records = {name: Records(folder / f"{name}.jsonl", stamp) for name in RECORDS}

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of steps, with what was measured of some of them once more."""
        return with_second_runs(self.records["steps"].rows, self.records["again"].rows)

    @property
    def is_checked(self) -> bool:
        return self.here is not self.profile

    def carry_to(self, check: Mapping[str, Any]) -> None:
        """Predictions are for the machine of the check from now on, which is kept. Raises
        ProfileError for one of another profile."""
        self.here = carried(self.profile, check)
        self.models_here = Models(self.here)
        write_whole(self.folder / MACHINE, json.dumps(check, indent=1) + "\n")

    def _are_of_this_profile(self, here: Path) -> bool:
        """The profile and the records of the folder: the profile may have been replaced."""
        if here.exists():
            try:
                if load_profile(here).content_hash != self.profile.content_hash:
                    return False
            except ProfileError:
                return False
        return all(
            row.get("profile") == self.profile.content_hash
            for name in RECORDS
            for suffix in ("jsonl", "running")
            for row in read_lines(self.folder / f"{name}.{suffix}")
        )

    def predicted_runs(self) -> dict[str, Any]:
        """What the last report of this profile said of its dynamic runs, by name."""
        try:
            told = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none yet, or cut off while it was written
            return {}
        of_this = told.get("profile") == self.profile.content_hash
        return told.get("predicted_runs", {}) if of_this else {}

    def _put_away(self) -> None:
        for name in RECORDS:  # what ran when a process ended belongs to that attempt
            Records(self.folder / f"{name}.jsonl")
        self._tell_of_cut_off()
        numbers = [
            int(found[1])
            for path in self.folder.iterdir()
            if (found := re.fullmatch(r"attempt-(\d+)", path.name))
        ]
        kept = self.folder / f"attempt-{max(numbers, default=0) + 1}"
        kept.mkdir()
        for name in (PROFILE, MACHINE, REPORT, *(f"{name}.jsonl" for name in RECORDS)):
            if (self.folder / name).exists():
                (self.folder / name).rename(kept / name)

    def _tell_of_cut_off(self) -> None:
        """Of records that no line of the list speaks of: their process was ended."""
        told = {row.get("profile") for row in self.concluded()}
        counts: dict[str, dict[str, int]] = {}
        for name in RECORDS:
            for row in read_lines(self.folder / f"{name}.jsonl"):
                count = counts.setdefault(str(row.get("profile")), dict.fromkeys(RECORDS, 0))
                count[name] += 1
        for profile, records in counts.items():
            if profile not in told:
                row = {"attempt": len(self.concluded()) + 1, "profile": profile}
                append_line(self.folder / ATTEMPTS, row | {"cut_off": records})

    def concluded(self) -> list[dict[str, Any]]:
        """One row an attempt, the last one last."""
        return read_lines(self.folder / ATTEMPTS)

    def signs(self) -> dict[str, float]:
        """The strongest that the GPU was shared while this profile was scored."""
        return worst(row.get("signs", {}) for row in self._of_this_profile())

    def warnings(self) -> list[str]:
        """What was said while this profile was scored, once each."""
        lines = [line for row in self._of_this_profile() for line in row.get("warnings", ())]
        return list(dict.fromkeys(lines))

    def left(self) -> dict[str, int]:
        """How many of each kind the last attempt on this profile left."""
        rows = self._of_this_profile()
        return dict(rows[-1].get("left", {})) if rows else {}

    def _of_this_profile(self) -> list[dict[str, Any]]:
        mine = self.profile.content_hash
        return [row for row in self.concluded() if row.get("profile") == mine]

    def conclude(
        self,
        summary: Mapping[str, Any],
        left: Mapping[str, int],
        signs: Mapping[str, float] = MappingProxyType({}),
        warnings: Sequence[str] = (),
        measured_by: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Appends the attempt to the list, with its number. ``signs``: that the GPU was shared.
        ``measured_by``: the options and the code."""
        row = {
            "attempt": len(self.concluded()) + 1,
            "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "profile": self.profile.content_hash,
            "left": dict(left),
            **measured_by,
            **({"signs": dict(signs)} if signs else {}),
            **({"warnings": list(warnings)} if warnings else {}),
            **{
                name: {key: summary[name][key] for key in ("count", "mean", "p95", "coverage")}
                for name in ("step", "memory", "op", "completion")
                if summary.get(name)
            },
        }
        return append_line(self.folder / ATTEMPTS, row)
