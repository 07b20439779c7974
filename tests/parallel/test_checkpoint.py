"""Resume is exact: the interrupted run and the uninterrupted one agree bitwise on the layout that saved, and up to rounding on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from tiny import make_checkpoint

from megatron_antisd.convert.to_huggingface import convert_to_huggingface
from megatron_antisd.models.weight_map import Geometry, Layout, merge, split

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
STEPS, SAVED = 7, 2
CROSS_LOSS = 1e-5  # another order of sums in fp32

LAYOUTS = {
    "one": (1, []),
    "tp2-ep2": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2"]),
    "tp2-etp2": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_tensor_parallel_size=2", "parallel.distributed_optimizer=false"]),
    "pp2-plain": (2, ["parallel.pipeline_parallel_size=2", "parallel.distributed_optimizer=false"]),
    "pp2": (2, ["parallel.pipeline_parallel_size=2"]),
    "pp2-vpp2": (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"]),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "ep2": (2, ["parallel.expert_parallel_size=2"]),
    "dp2": (2, []),
    "dp2-offload": (2, ["optimizer.offload=true"]),
}


class Runs:
    """Uninterrupted runs, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = {
            "moe": make_checkpoint(root / "moe", moe=True),
            "dense": make_checkpoint(root / "dense", moe=False, tied=True),
            "other": make_checkpoint(root / "other", moe=True, moe_intermediate_size=32, rope_theta=5000.0),
        }
        self._whole: dict[tuple[str, ...], tuple[Path, dict]] = {}

    def whole(self, layout: str, kind: str = "moe", dtype: str = "float32") -> tuple[Path, dict]:
        """(directory of checkpoints, what rank 0 got) of all steps."""
        key = (layout, kind, dtype)
        if key not in self._whole:
            directory = self.root / "-".join(key)
            self._whole[key] = directory, self._run(layout, kind, dtype, directory, 0, "-")
        return self._whole[key]

    def resumed(self, layout: str, directory: Path, kind: str = "moe", dtype: str = "float32", other: str = "-") -> dict:
        return self._run(layout, kind, dtype, directory, SAVED, other)

    def _run(self, layout: str, kind: str, dtype: str, directory: Path, first: int, other: str) -> dict:
        ranks, overrides = LAYOUTS[layout]
        output = self.root / "result.pt"
        run_ranks(SCRIPT, ranks, str(self.models[kind]), str(directory), str(output), str(first), str(STEPS),
                  str(self.models.get(other, other)), f"model.dtype={dtype}", *overrides)
        return torch.load(output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


def assert_exact(whole: dict, resumed: dict) -> None:
    assert resumed["state"] == {"step": SAVED, "gate": {"open": None, "entropy": 0.1 + 0.2}}
    assert resumed["steps"] == whole["steps"][SAVED:]
    # Both generators of every rank go on where they were; the resumed run was seeded otherwise.
    assert [drawn[0] for _, drawn in resumed["everyone"]] == [drawn[SAVED] for _, drawn in whole["everyone"]]
    for name, tensor in whole["final"].items():
        assert torch.equal(resumed["loaded"][name], whole[f"weights-{SAVED}"][name]), name
        assert torch.equal(resumed["final"][name], tensor), name
        assert not torch.equal(resumed["loaded"][name], tensor), f"{name} did not move"


def test_resume_is_bitwise_exact_and_other_models_are_refused(runs: Runs) -> None:
    directory, whole = runs.whole("tp2-ep2")
    resumed = runs.resumed("tp2-ep2", directory, other="other")
    assert_exact(whole, resumed)


def test_only_the_newest_are_kept_and_only_whole_ones_are_found(runs: Runs, tmp_path: Path) -> None:
    from megatron_antisd.checkpoint import latest_checkpoint

    directory = tmp_path / "copy"
    shutil.copytree(runs.whole("tp2-ep2")[0], directory)
    assert sorted(path.name for path in directory.iterdir()) == ["step_000002", "step_000004", "step_000005", "step_000006", "step_000007"]
    assert latest_checkpoint(directory) == directory / "step_000007"
    data = next((directory / "step_000007" / "tensors").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert latest_checkpoint(directory) == directory / "step_000006"
    (directory / "step_000006" / "manifest.json").unlink()
    assert latest_checkpoint(directory) == directory / "step_000005"
    for step in (2, 4, 5):
        (directory / f"step_{step:06d}" / "state.json").unlink()
    assert latest_checkpoint(directory) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_manifest_says_what_wrote_it(runs: Runs) -> None:
    directory, _ = runs.whole("tp2-ep2")
    manifest = json.loads((directory / "step_000004" / "manifest.json").read_text())
    assert (manifest["step"], manifest["optimizer_step"], manifest["method"]) == (4, 4, "antisd")
    assert manifest["layout"]["tensor_parallel_size"] == manifest["layout"]["world_size"] == 2
    assert (manifest["model"]["experts"], manifest["dtype"]) == (4, "float32")


def test_a_checkpoint_is_a_model_directory(runs: Runs) -> None:
    directory, _ = runs.whole("tp2-ep2")
    for name in ("config.json", "generation_config.json"):
        assert (directory / "step_000004" / name).read_bytes() == (runs.models["moe"] / name).read_bytes()
    assert not list((directory / "step_000004").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kind", "dtype"), [
    ("pp2-plain", "moe", "float32"), ("pp2", "dense", "float32"), ("dp2", "moe", "bfloat16"), ("tp2-etp2", "moe", "bfloat16"),
    ("pp2-vpp2", "moe", "float32"), ("cp2", "moe", "bfloat16")])
def test_resume_is_bitwise_exact_elsewhere(runs: Runs, layout: str, kind: str, dtype: str) -> None:
    directory, whole = runs.whole(layout, kind, dtype)
    assert_exact(whole, runs.resumed(layout, directory, kind, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "resumed_by"), [("dp2", "dp2-offload"), ("dp2-offload", "dp2")])
def test_where_the_moments_lie_does_not_show(runs: Runs, saved_by: str, resumed_by: str) -> None:
    """In host memory or beside the model: the same run, whichever part of it."""
    directory, whole = runs.whole(saved_by, "moe", "bfloat16")
    assert_exact(whole, runs.resumed(resumed_by, directory, "moe", "bfloat16"))
    assert whole["steps"] == runs.whole(resumed_by, "moe", "bfloat16")[1]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kind"), [("tp2-etp2", "moe"), ("dp2", "moe"), ("pp2", "dense")])
def test_a_bf16_runs_checkpoint_becomes_what_the_trainer_exports(runs: Runs, tmp_path: Path, layout: str, kind: str) -> None:
    """Stored are the fp32 main weights; the model's are their rounding."""
    directory, whole = runs.whole(layout, kind, "bfloat16")
    convert_to_huggingface(directory / f"step_{STEPS:06d}", tmp_path / "hf", runs.models[kind])
    found = {name: tensor for file in (tmp_path / "hf").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == whole["final"].keys()
    for name, tensor in whole["final"].items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16 and torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("saved_on", "loaded_on", "kind"), [
    ("tp2-ep2", "one", "moe"), ("one", "ep2", "moe"), ("tp2-ep2", "pp2-plain", "moe"), ("dp2", "tp2-etp2", "moe"), ("pp2", "dp2", "dense"),
    ("pp2-vpp2", "cp2", "moe"), ("cp2", "pp2-vpp2", "dense"), ("tp2-etp2", "tp2-ep2", "moe"), ("ep2", "one", "moe")])
def test_resume_on_another_layout(runs: Runs, saved_on: str, loaded_on: str, kind: str) -> None:
    from megatron_antisd.checkpoint.generators import derived_seed

    directory, whole = runs.whole(saved_on, kind)
    resumed = runs.resumed(loaded_on, directory, kind)
    for name, tensor in whole[f"weights-{SAVED}"].items():
        assert torch.equal(resumed["loaded"][name], tensor), name
    torch.manual_seed(derived_seed(0, SAVED))
    assert {drawn[0][0] for _, drawn in resumed["everyone"]} == {float(torch.rand(()))}, "the generators of another layout's ranks"
    assert len(resumed["steps"]) == 5
    for mine, theirs in zip(resumed["steps"], whole["steps"][SAVED:], strict=True):
        assert mine == pytest.approx(theirs, abs=CROSS_LOSS, rel=1e-4)
    for name, tensor in whole["final"].items():
        # One Adam step moves a weight by about 4e-3 here; lost moments or a wrong step would show as such a difference.
        assert (resumed["final"][name] - tensor).abs().max() < 5e-5, name


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("ranges", [1, 2, 7, 50])
def test_pieces_rebuild_the_global_tensor(layout: Layout, ranges: int) -> None:
    """Each shard cut into flat ranges as the distributed optimizer does; the pieces must tile what `merge` makes of the shards."""
    from megatron_antisd.parallel.global_tensors import place_shard

    size, geometry = 2, Geometry(groups=2, head_dim=3, vocab_size=11, padded_vocab_size=12)
    rows = {Layout.VOCAB: 11, Layout.QKV: 6, Layout.GATED: 6}.get(layout, 8)
    generator = torch.Generator().manual_seed(ranges)
    full = [torch.randn(rows * (2 if layout is Layout.QKV and i == 0 else 1), 10, generator=generator)
            for i in range({Layout.QKV: 3, Layout.GATED: 2}.get(layout, 1))]
    shards = [split(layout, full, rank, size, geometry) for rank in range(size)]
    expected = torch.cat(shards) if layout is Layout.QKV else torch.cat(merge(layout, shards, geometry))
    rebuilt = torch.full_like(expected, torch.nan)
    writes = torch.zeros_like(expected)
    for rank, shard in enumerate(shards[:1] if layout is Layout.REPLICATED else shards):
        cuts = sorted(torch.randint(0, shard.numel() + 1, (ranges - 1,), generator=generator).tolist())
        for start, stop in zip([0, *cuts], [*cuts, shard.numel()], strict=True):
            placed = place_shard(shard.view(-1)[start:stop], start, tuple(shard.shape), layout, rank, size, geometry.vocab_size)
            assert placed.size() == expected.shape
            for (row, column), piece in placed.pieces.items():
                rebuilt[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
                writes[row : row + piece.shape[0], column : column + piece.shape[1]] += 1
    assert torch.equal(rebuilt, expected) and bool((writes == 1).all())


def test_pieces_of_a_vector() -> None:
    from megatron_antisd.parallel.global_tensors import place_shard

    vector = torch.arange(9.0)
    placed = place_shard(vector[2:7], 2, (9,), Layout.REPLICATED, 1, 2, 11)
    assert placed.size() == (9,)
    assert {tuple(k): v.tolist() for k, v in placed.pieces.items()} == {(2,): [2.0, 3.0, 4.0, 5.0, 6.0]}


def test_pieces_of_a_divided_vector() -> None:
    """OLMo-3's query and key norms: each tensor-parallel rank has its part of one global vector."""
    from megatron_antisd.parallel.global_tensors import place_shard

    rebuilt = torch.full((8,), torch.nan)
    for rank, shard in enumerate(torch.arange(8.0).chunk(2)):
        for start, stop in ((0, 1), (1, 4)):
            placed = place_shard(shard[start:stop], start, (4,), Layout.COLUMN, rank, 2, 11)
            assert placed.size() == (8,)
            for (offset,), piece in placed.pieces.items():
                rebuilt[offset : offset + len(piece)] = piece
    assert rebuilt.tolist() == list(range(8))
