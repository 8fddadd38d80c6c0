"""The experiments' input: a stranger's folder is checked, and its lack explained."""

from pathlib import Path

import numpy as np
import pytest

from experiments.lobra_layer_times.run import errors, layers_only_s, report
from experiments.lobra_reproduction.lengths import draw_step, fit_lengths
from experiments.lobra_reproduction.published import COLUMNS, Dataset, arguments, read
from muxtune.errors import ConfigError, DataError

PROFILE = {1: 1.0, 2: 0.6}  # made up: ms per 100 tokens
FILES = {
    "profile_time_llama2_7b.csv": "tp,seq_len,mbs,time\n"
    + "".join(
        f"{tp},{s},{b},{1 + b * s * PROFILE[tp] / 100}\n"
        for tp in PROFILE
        for s in (256, 512, 1024, 2048)
        for b in (1, 2, 4)
    ),
    "max_tokens_llama2_7b.csv": "tp,pp,sp,max_tokens\n1,1,1,2048\n2,1,1,4096\n",
    "datasets.csv": "dataset,mean_len,skewness,excess_kurtosis,batch_size,max_len_7b_experiment,"
    "in_7b_experiment\na,300,4.0,40.0,32,4096,1\nb,200,2.0,9.0,16,,0\n",
    "homogeneous_iteration_times.csv": "num_gpus,tp,pp,replicas,max_seq_len,num_microbatches,"
    "lobra_s,nemo_s\n16,1,1,16,2048,4,2.8,2.5\n16,1,4,4,2048,16,3.5,3.0\n16,2,2,4,2048,16,3.8,3\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_whole_folder_is_read(folder):
    published = read(str(folder))
    assert [dataset.name for dataset in published.datasets] == ["a"]
    assert len(published.configurations) == 2
    assert published.steps[1].micro_batch == (1, 2048)
    alone = layers_only_s(published)
    assert alone[1] == pytest.approx((1 + 20.48) / 1e3 * 32 / 4 * 19)
    found = report(published)
    assert len(found["lobra"]["transfer"]["leave_one_out"]["by_row"]) == 3
    assert errors([1.1], [1.0]).worst == pytest.approx(0.1)


@pytest.mark.parametrize("given", ["", "/no/such/folder"])
def test_without_the_folder_the_public_repository_is_named(given):
    with pytest.raises(ConfigError, match="ccchengff/LobRA"):
        read(given)


@pytest.mark.parametrize("name", COLUMNS)
def test_missing_files_and_columns_are_named(folder, name):
    column = COLUMNS[name][0]
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace(column, "other", 1))
    with pytest.raises(DataError, match=f"{name}.*no column {column}"):
        read(str(folder))
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        read(str(folder))


def test_a_wrong_number_is_named_with_its_line(folder):
    path = folder / "max_tokens_llama2_7b.csv"
    path.write_text("tp,pp,max_tokens\n1,1,2048\n2,1,many\n")
    with pytest.raises(DataError, match=r"csv:3: max_tokens"):
        read(str(folder))


def test_unknown_arguments_are_refused():
    assert arguments(["steps=3"], {"steps": "1"}) == {"steps": "3"}
    with pytest.raises(ConfigError, match="choose of steps"):
        arguments(["step=3"], {"steps": "1"})


@pytest.mark.parametrize("family", ["lognormal", "lognormal_skewness", "gamma"])
def test_drawn_lengths_have_the_fitted_moments(family):
    dataset = Dataset("a", 500.0, 3.0, 15.0, 200_000, 10**9)
    fit = fit_lengths(dataset, family)
    drawn = draw_step((fit,), seed=1, step=0)[0].astype(float)
    assert drawn.mean() == pytest.approx(500.5, rel=0.02)
    skewness = ((drawn - drawn.mean()) ** 3).mean() / drawn.std() ** 3
    assert skewness == pytest.approx(fit.skewness, rel=0.2)
    if family == "lognormal_skewness":
        assert fit.skewness == pytest.approx(3.0, rel=1e-4)


def test_draws_are_capped_and_repeat():
    fit = fit_lengths(Dataset("a", 900.0, 5.0, 60.0, 4000, 2048))
    first, again = (draw_step((fit,), 4, 7)[0] for _ in range(2))
    other = draw_step((fit,), 4, 8)[0]
    assert first.max() == 2048
    assert first.min() >= 1
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
