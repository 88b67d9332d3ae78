"""What several test files share."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that training needs, made by the steps themselves out of 24 ShapesWorld pictures.

    `data/` (pictures, train.json, text.json), `quantizer/` (untrained), `grids/`, `vocabulary.json`, `llm/` (tied) and
    `llm-untied/`, and their expansions `tied/` and `untied/`.
    """
    from being_vl.demo import shapesworld
    from being_vl.model.expand import expand
    from being_vl.model.options import ExpandOptions
    from being_vl.quantizer.job import quantize
    from being_vl.quantizer.options import QuantizeOptions
    from being_vl.tokenizer.options import VocabularyOptions
    from being_vl.tokenizer.train import train_vocabulary
    from helpers import tiny

    folder = tmp_path_factory.mktemp("chain")
    shapesworld.generate(folder / "data", 24, seed=1)
    shapesworld.generate_text(folder / "data", 24, seed=1)
    tiny.quantizer(folder / "quantizer", codebook_size=64)
    quantizer = str(folder / "quantizer")
    quantize(QuantizeOptions(images=folder / "data" / "images", out=folder / "grids", quantizer=quantizer))
    train_vocabulary(VocabularyOptions([folder / "grids"], folder / "vocabulary.json", num_merges=40))
    for name, tied in {"tied": True, "untied": False}.items():
        llm = tiny.llm(folder / ("llm" if tied else "llm-untied"), tied=tied)
        expand(ExpandOptions(str(llm), folder / "vocabulary.json", folder / name, quantizer))
    return folder


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs. Its handler of SIGTERM would stay, and a child that is forked later could outlive it."""
    ray = pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that processes that share the files end at about the same time."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu"))
    slow_counts = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow_counts[item.path])


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all tests but those of `-m gpu`.

    And Ctrl-C reaches the processes that tests start, also where a shell has put the tests into the background.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
