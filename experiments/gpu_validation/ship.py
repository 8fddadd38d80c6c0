"""Copies a validated profile to the profiles that are shipped, named by its device and model."""

from __future__ import annotations

import argparse
from pathlib import Path

from muxtune.cost.schema import load_profile
from muxtune.cost.shipped import profile_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a validation")
    source = parser.parse_args().folder / "profile.json"
    profile = load_profile(source)
    name = f"{profile.device_name}_{profile.model_name}".lower()
    target = profile_path(name, shipped_only=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    print(f"wrote {target}; use it with cost=profile cost.path={name}")


if __name__ == "__main__":
    main()
