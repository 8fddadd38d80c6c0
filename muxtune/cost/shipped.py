"""Measured profiles that come with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "data" / "profiles"


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def profile_path(path: str, shipped_only: bool = False) -> Path:
    """A file, or the name of a profile that is shipped: ``h100-sxm_llama-2-7b``."""
    shipped = _FOLDER / f"{path}.json"
    if shipped_only or (not Path(path).exists() and shipped.exists()):
        return shipped
    return Path(path)
