"""The cost models of a validation's base models, each made once: a profile's fit takes a while."""

from __future__ import annotations

from muxtune.cost.book import profiled_model
from muxtune.cost.profiled import ProfiledCostModel
from muxtune.cost.schema import Profile
from muxtune.cost.shapes import ModelShape


class Models:
    """The profile's cost model of each base model."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._known: dict[ModelShape, ProfiledCostModel] = {}

    def __call__(self, shape: ModelShape) -> ProfiledCostModel:
        if shape not in self._known:
            self._known[shape] = profiled_model(shape, self.profile)
        return self._known[shape]
