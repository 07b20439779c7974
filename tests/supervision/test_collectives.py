"""The wrappers: same values and signatures as torch's functions, and what they note. A world of one in this process."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_antisd.supervision import collectives


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    collectives.install()
    yield
    collectives.uninstall()
    dist.destroy_process_group()


def test_signature_name_and_values_are_torchs(world: None) -> None:
    wrapped = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_object", "broadcast", "barrier")}
    collectives.uninstall()
    for name, wrapper in wrapped.items():
        original = getattr(dist, name)
        assert wrapper is not original and wrapper.__wrapped__ is original
        assert wrapper.__name__ == name and wrapper.__doc__ == original.__doc__
        assert inspect.signature(wrapper) == inspect.signature(original)
    collectives.install()
    tensor = torch.tensor([1.0, 2.0])
    assert dist.all_reduce(tensor) is None and tensor.tolist() == [1.0, 2.0]
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
    work.wait()


def test_both_modules_have_the_same_wrapper_and_get_torchs_function_back(world: None) -> None:
    collectives.install()  # nothing the second time
    wrapper = dist.all_reduce
    original = wrapper.__wrapped__
    assert distributed_c10d.all_reduce is wrapper and original.__module__ == "torch.distributed.distributed_c10d"
    collectives.uninstall()
    collectives.uninstall()
    assert dist.all_reduce is original and distributed_c10d.all_reduce is original


def test_name_caller_and_number(world: None) -> None:
    dist.barrier()
    first = collectives.last()
    dist.all_reduce(torch.ones(1)); line = inspect.currentframe().f_lineno  # noqa: E702
    last = collectives.last()
    assert (last.name, last.caller, last.inside) == ("all_reduce", f"supervision/test_collectives.py:{line}", False)
    assert last.number == first.number + 1
    assert 0 <= last.seconds < 60


def test_an_object_collective_is_one_and_has_its_own_name(world: None) -> None:
    dist.barrier()
    before = collectives.last().number
    found: list[object] = [None]
    dist.all_gather_object(found, {"a": 1})
    assert found == [{"a": 1}]
    assert (collectives.last().name, collectives.last().number) == ("all_gather_object", before + 1)


def test_an_error_inside_ends_it(world: None) -> None:
    with pytest.raises(TypeError):
        dist.all_reduce("no tensor")
    assert (collectives.last().name, collectives.last().inside) == ("all_reduce", False)


def test_a_rank_that_waits_is_inside(world: None) -> None:
    seen: list[collectives.Collective] = []

    class Slow:
        def __reduce__(self) -> tuple[type, tuple[()]]:  # called while all_gather_object pickles it
            thread = threading.Thread(target=lambda: seen.append(collectives.last()))
            thread.start()
            thread.join()
            return (list, ())

    dist.all_gather_object([None], Slow())
    assert (seen[0].name, seen[0].inside) == ("all_gather_object", True)


def test_other_threads_are_not_noted(world: None) -> None:
    dist.barrier()
    before = collectives.last().number
    thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)))
    thread.start()
    thread.join()
    assert collectives.last().number == before


@pytest.mark.slow
def test_a_compiler_sees_torchs_function(world: None) -> None:
    def double(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor * 2

    compiled = torch.compile(double, backend="eager", fullgraph=True)  # fullgraph: an error where the compiler stumbles
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
