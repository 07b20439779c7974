"""Ways in which a checkpoint gets damaged. Each takes the directory of checkpoints, whose newest is step 4, and does its harm there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

NEWEST = "step_000004"
WHOLE, REFUSED = "whole", "refused"
Damage = Callable[[Path], None]
CASES: dict[str, tuple[Damage, str, str]] = {}
"""Name -> (what is done, what the message must name, the outcome: the step that is fallen back to, `whole` for the newest, or `refused`)."""


def case(names: str, outcome: str = "step_000003") -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        CASES[damage.__name__] = damage, names, outcome
        return damage

    return register


def flip(path: Path, where: float = 0.5, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1 << bit
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1))


@case("tensors/__0_0.distcp")
def bit_flip_in_the_tensors_of_rank_0(root: Path) -> None:
    flip(root / NEWEST / "tensors" / "__0_0.distcp")


@case("tensors/__1_0.distcp")
def bit_flip_at_the_end_of_the_tensors_of_rank_1(root: Path) -> None:
    flip(root / NEWEST / "tensors" / "__1_0.distcp", where=0.999)


@case("tensors/__1_0.distcp")
def tensors_cut_by_a_byte(root: Path) -> None:
    path = root / NEWEST / "tensors" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


@case("tensors/__0_0.distcp")
def tensors_cut_to_nothing(root: Path) -> None:
    (root / NEWEST / "tensors" / "__0_0.distcp").write_bytes(b"")


@case("tensors/__0_0.distcp")
def tensors_grown(root: Path) -> None:
    with (root / NEWEST / "tensors" / "__0_0.distcp").open("ab") as file:
        file.write(b"more")


@case("tensors/__1_0.distcp")
def tensors_missing(root: Path) -> None:
    (root / NEWEST / "tensors" / "__1_0.distcp").unlink()


@case("tensors/__0_0.distcp")
def tensors_of_another_step(root: Path) -> None:
    """The same size, and a whole file: only its digest tells."""
    shutil.copy(root / "step_000003" / "tensors" / "__0_0.distcp", root / NEWEST / "tensors" / "__0_0.distcp")


@case("tensors/__0_0.distcp")
def tensors_are_a_folder(root: Path) -> None:
    (root / NEWEST / "tensors" / "__0_0.distcp").unlink()
    (root / NEWEST / "tensors" / "__0_0.distcp").mkdir()


@case("tensors/.metadata")
def index_missing(root: Path) -> None:
    (root / NEWEST / "tensors" / ".metadata").unlink()


@case("tensors/.metadata")
def index_flipped(root: Path) -> None:
    flip(root / NEWEST / "tensors" / ".metadata")


@case("state.json")
def state_missing(root: Path) -> None:
    (root / NEWEST / "state.json").unlink()


@case("state.json")
def state_with_another_digit(root: Path) -> None:
    path = root / NEWEST / "state.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 9'))


@case("run_config.yaml")
def configuration_missing(root: Path) -> None:
    (root / NEWEST / "run_config.yaml").unlink()


@case("config.json")
def model_configuration_edited(root: Path) -> None:
    path = root / NEWEST / "config.json"
    path.write_text(path.read_text().replace("10000.0", "10000.5"))


@case("manifest.json")
def manifest_missing(root: Path) -> None:
    (root / NEWEST / "manifest.json").unlink()


@case("manifest.json")
def manifest_cut(root: Path) -> None:
    path = root / NEWEST / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])


@case("manifest.json")
def manifest_with_another_digit(root: Path) -> None:
    edit(root / NEWEST / "manifest.json", lambda manifest: manifest.update(optimizer_step=3))


@case("manifest.json")
def manifest_without_a_file(root: Path) -> None:
    edit(root / NEWEST / "manifest.json", lambda manifest: manifest["files"].pop("state.json"))


@case("manifest.json")
def manifest_without_its_digest(root: Path) -> None:
    edit(root / NEWEST / "manifest.json", lambda manifest: manifest.pop("digest"))


@case("manifest.json")
def manifest_is_a_list(root: Path) -> None:
    (root / NEWEST / "manifest.json").write_text("[]")


@case("step_000005")
def empty_folder_with_a_newer_name(root: Path) -> None:
    (root / "step_000005").mkdir()


CASES["empty_folder_with_a_newer_name"] = empty_folder_with_a_newer_name, "step_000005", NEWEST


@case("", WHOLE)
def stale_temporary_folder(root: Path) -> None:
    shutil.copytree(root / NEWEST, root / "step_000005.tmp")
    (root / "step_000005.tmp" / "manifest.json").unlink()


@case("", WHOLE)
def half_deleted_folder(root: Path) -> None:
    shutil.copytree(root / "step_000003", root / "step_000002.deleted.tmp")


@case("format 3", REFUSED)
def newer_format(root: Path) -> None:
    edit(root / NEWEST / "manifest.json", lambda manifest: manifest.update(format=3))


@case("moe_intermediate_size", REFUSED)
def another_model(root: Path) -> None:
    """Whole, but of another run."""
    shutil.rmtree(root / NEWEST)
    shutil.copytree(root / "of_another_model", root / NEWEST)


@case("model.path", REFUSED)
def converted_weights_without_a_state(root: Path) -> None:
    shutil.rmtree(root / NEWEST)
    shutil.copytree(root / "converted", root / NEWEST)


@case("none of the 3 checkpoints", REFUSED)
def all_of_them_damaged(root: Path) -> None:
    for path in root.glob("step_*"):
        flip(path / "tensors" / "__0_0.distcp")
