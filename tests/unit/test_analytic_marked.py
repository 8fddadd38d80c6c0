"""What was measured of one program says nothing of another, and what was not measured says so."""

from __future__ import annotations

import pytest

from muxtune import build
from muxtune.alone import hf_peft_alone
from muxtune.config import ClusterConfig, CommonConfig, CostConfig, ModelConfig
from muxtune.cost.book import ANALYTIC, EXTRAPOLATED, MEASURED
from muxtune.cost.captured import CapturedCostModel
from muxtune.types import AdapterSlot, DataSpec, PassLoad, ReplicaShape, ShapeKey, TaskSpec
from muxtune.workload.synthetic import SyntheticLibrary

PROFILE = "h100-sxm_llama-2-7b"


def config(style: str, model: str = "llama-2-7b") -> CommonConfig:
    return CommonConfig(
        model=ModelConfig(name=model),
        cluster=ClusterConfig(device="H100"),
        cost=CostConfig(kind="profile", path=PROFILE, style=style),
    )


@pytest.mark.parametrize(
    ("style", "model", "origin"),
    [
        ("graph", "llama-2-7b", MEASURED),
        ("eager", "llama-2-7b", ANALYTIC),
        ("graph", "llama-3.1-8b", EXTRAPOLATED),
        ("eager", "llama-3.1-8b", ANALYTIC),
        ("graph", "smollm2-135m", ANALYTIC),  # seven times narrower
        ("graph", "opt-6.7b", ANALYTIC),  # other operations
    ],
)
def test_a_captured_profile_is_of_captured_steps(style: str, model: str, origin: str) -> None:
    """It made HF PEFT, which launches every kernel, six times as fast as it is."""
    book = build.published_costs(config(style, model))
    assert book.origin(model, "H100-SXM") == origin
    assert ("analytic" in book.note(model, "H100-SXM")) is (origin == ANALYTIC)
    if origin == EXTRAPOLATED:
        assert "from the profile of llama-2-7b" in book.note(model, "H100-SXM")
    if origin == ANALYTIC and style == "graph":
        assert "is of llama-2-7b on H100-SXM, and is not used" in book.note(model, "H100-SXM")


def test_a_similar_base_model_is_predicted_as_validations_score_it() -> None:
    """By the profile of another one, which 130 steps of a suite were 1.9% off with."""
    book = build.cost_book(config("graph", "llama-3.1-8b"))
    model = book("llama-3.1-8b", "H100-SXM")
    assert isinstance(model, CapturedCostModel) and model.model.name == "llama-3.1-8b"
    load = PassLoad(ShapeKey(64, 16, (AdapterSlot("lora", 16, ("all-linear",)),)), 32 * 1024, 1000)
    seconds = model.pass_times_s([load], ReplicaShape())
    assert 0.03 < seconds.value[0] < 0.2 and seconds.extrapolated[0]


def test_a_profile_of_another_device_says_so() -> None:
    book = build.cost_book(config("graph"))
    assert book.origin("llama-2-7b", "A100-80GB-SXM") == ANALYTIC
    assert "is not used here" in book.note("llama-2-7b", "A100-80GB-SXM")


def test_memory_of_a_similar_model_is_its_own() -> None:
    """Of the profile it takes what the fit says, and neither dtype nor sizes."""
    book = build.cost_book(config("graph", "llama-3.1-8b"))
    own, other = book("llama-3.1-8b", "H100-SXM"), book("llama-2-7b", "H100-SXM")
    fields = ("pass_factor", "fixed_bytes", "relative_error")
    values = [[getattr(model.memory.options, name) for name in fields] for model in (own, other)]
    assert values[0] == values[1]
    assert own.memory.resident_bytes([]) > other.memory.resident_bytes([]) + 2e9


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_similar_model_on_several_gpus_is_analytic(tp: int, pp: int) -> None:
    """The profile of another model seldom holds what ranks exchange."""
    several = config("graph", "llama-2-13b")
    several.cluster = ClusterConfig(device="H100", num_gpus=2, tp=tp, pp=pp)
    assert build.cost_book(several).origin("llama-2-13b", "H100-SXM") == ANALYTIC


def test_alone_tells_tasks_of_other_tokenizers_apart() -> None:
    """Whichever is asked first: their sequences are of other lengths."""
    costs = build.cost_book(config("graph"))
    data = [
        DataSpec(histogram="gsm8k", max_length_tokens=256, tokenizer=name)
        for name in ("llama2-32k", "gpt2-bpe-50k")
    ]
    tasks = [TaskSpec(f"t{i}", "llama-2-7b", data=each, num_steps=5) for i, each in enumerate(data)]

    def rates(order: list[TaskSpec]) -> dict[str, float]:
        alone = hf_peft_alone(costs, SyntheticLibrary(0), "llama-2-7b", "H100-SXM")
        return {task.task_id: alone.tokens_per_s(task) for task in order}

    found = rates(tasks)
    assert rates(tasks[::-1]) == found
    assert found["t0"] != found["t1"]
