"""Adam's state as each implementation keeps it: read, restored, handed from one to another, and refused where a part would be lost.

transformer-engine and apex need CUDA, so stand-ins keep their state: key by key and type by type what the `step` of transformer-engine 2 and of
NVIDIA's apex leave behind, with the update written in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import ConfigError
from megatron_antisd.parallel.offload import OffloadedAdamW
from megatron_antisd.parallel.optimizer_state import OptimizerSlice, adam_format, optimizer_slices

megatron_cpu.install()  # Megatron's optimizer makes a tensor on the GPU

OPTIONS: dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SHAPES = ((3, 4), (5,))
BEFORE, AFTER = 3, 2


class _Fused(torch.optim.Optimizer):
    """What both have in common: the step with the group."""

    def __init__(self, params: Iterable[torch.Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                 capturable: bool = False) -> None:
        super().__init__(params, dict(lr=torch.tensor(lr) if capturable else lr, bias_correction=True, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
        self.capturable, self.adam_w_mode = capturable, 1
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int) if self.capturable else 1
            else:
                group["step"] = torch.tensor([1], dtype=torch.int) if self.capturable else 1
            assert not self.capturable or (group["step"].dtype, group["step"].shape) == (torch.int32, (1,)), "the kernel reads one int32"
            for parameter in group["params"]:
                self._initialize(parameter)
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _initialize(self, parameter: torch.Tensor) -> None:
        raise NotImplementedError

    def _update(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        state, step, (beta1, beta2) = self.state[parameter], int(group["step"]), group["betas"]
        first = state["exp_avg"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])
        parameter.sub_(group["lr"] * (update + group["weight_decay"] * parameter))


class TransformerEngineAdam(_Fused):
    """Every parameter gets its state at the first step, and with master_weights a third tensor; other types than fp32 have a scale each."""

    def __init__(self, params: Iterable[torch.Tensor], *, master_weights: bool = False, exp_avg_dtype: torch.dtype = torch.float32,
                 exp_avg_sq_dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(params, **options)
        self.master_weights, self.exp_avg_dtype, self.exp_avg_sq_dtype = master_weights, exp_avg_dtype, exp_avg_sq_dtype
        self.name_to_dtype_map = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.float32}
        self._scales: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    def _initialize(self, parameter: torch.Tensor) -> None:
        if not self.state[parameter]:
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[parameter][name] = torch.zeros_like(parameter, dtype=self.name_to_dtype_map[name])
                if self.name_to_dtype_map[name] != torch.float32:
                    self._scales.setdefault(parameter, {})[name] = torch.ones(1)
            if self.master_weights:
                self.state[parameter]["master_param"] = parameter.detach().clone()


class ApexAdam(_Fused):
    """A parameter without a gradient gets no state. Master weights are kept beside it."""

    def __init__(self, params: Iterable[torch.Tensor], *, master_weights: bool = False, **options: Any) -> None:
        super().__init__(params, **options)
        self.master_weights = master_weights

    def _initialize(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and not self.state[parameter]:
            self.state[parameter] |= {name: torch.zeros_like(parameter).float() for name in ("exp_avg", "exp_avg_sq")}


TransformerEngineAdam.__name__ = ApexAdam.__name__ = "FusedAdam"
TransformerEngineAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
ApexAdam.__module__ = "apex.optimizers.fused_adam"

Build = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
KINDS: dict[str, Build] = {
    "torch": lambda weights: torch.optim.AdamW(weights, **OPTIONS),
    "torch, moments on the host": lambda weights: OffloadedAdamW(weights, **OPTIONS),
    "te": lambda weights: TransformerEngineAdam(weights, **OPTIONS),
    "te, capturable": lambda weights: TransformerEngineAdam(weights, capturable=True, **OPTIONS),
    "apex": lambda weights: ApexAdam(weights, **OPTIONS),
    "apex, capturable": lambda weights: ApexAdam(weights, capturable=True, **OPTIONS),
}


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(inner: torch.optim.Optimizer, first: int, steps: int) -> None:
    """Steps `first`, ... of a run whose gradients are given."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in inner.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        inner.step()


def reference(steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights and moments after `steps`: the update of Loshchilov and Hutter's Algorithm 2 in fp64, formula by formula."""
    found = [weight.detach().double() for weight in weights()]
    first, second = ([torch.zeros_like(weight) for weight in found] for _ in range(2))
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(100 + step - 1)
        for i, weight in enumerate(found):
            gradient = torch.randn(SHAPES[i], generator=generator).double()
            first[i] = beta1 * first[i] + (1 - beta1) * gradient
            second[i] = beta2 * second[i] + (1 - beta2) * gradient**2
            denominator = (second[i] / (1 - beta2**step)).sqrt() + OPTIONS["eps"]
            found[i] = weight - lr * (first[i] / (1 - beta1**step) / denominator + OPTIONS["weight_decay"] * weight)
    return found, first, second


def slices(inner: torch.optim.Optimizer) -> list[OptimizerSlice]:
    """As a checkpoint finds them."""
    return list(optimizer_slices(FP32Optimizer(inner, OptimizerConfig(), None)).values())


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach().double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_step_and_moments_are_read(kind: str) -> None:
    inner = KINDS[kind](weights())
    assert [part.step() for part in slices(inner)] == [0, 0]
    with pytest.raises(KeyError):
        slices(inner)[0].moments()
    train(inner, 0, BEFORE)
    _, first, second = reference(BEFORE)
    for part, m, v in zip(slices(inner), first, second, strict=True):
        assert part.step() == BEFORE and part.format.backend == kind.split(",")[0]
        assert part.moments().keys() == {"exp_avg", "exp_avg_sq"}
        near(part.moments()["exp_avg"], m)
        near(part.moments()["exp_avg_sq"], v)


@pytest.mark.parametrize(("saved", "resumed"), product(KINDS, KINDS))
def test_a_run_goes_on_in_any_implementation(saved: str, resumed: str) -> None:
    """The next updates are those of the uninterrupted run: a moment or a step that came over wrong changes them by far more than rounding."""
    inner = KINDS[saved](weights())
    train(inner, 0, BEFORE)
    kept = [(part.main.detach().clone(), {key: moment.clone() for key, moment in part.moments().items()}, part.step()) for part in slices(inner)]
    other = KINDS[resumed]([torch.nn.Parameter(weight) for weight, _, _ in kept])
    for part, (_, moments, step) in zip(slices(other), kept, strict=True):
        part.restore(moments, step)
    assert [part.step() for part in slices(other)] == [BEFORE] * 2
    train(other, BEFORE, AFTER)
    assert [part.step() for part in slices(other)] == [BEFORE + AFTER] * 2, "counted once for each update"
    for weight, expected in zip(other.param_groups[0]["params"], reference(BEFORE + AFTER)[0], strict=True):
        near(weight, expected)
    if saved == resumed:
        train(inner, BEFORE, AFTER)
        assert all(map(torch.equal, inner.param_groups[0]["params"], other.param_groups[0]["params"])), "bitwise"


def test_a_step_or_a_moment_left_out_would_be_seen() -> None:
    """What the tolerance above can tell apart."""
    expected = reference(BEFORE + AFTER)[0]
    inner = KINDS["te"](weights())
    train(inner, 0, BEFORE)
    for change in ({"step": 0}, {"exp_avg": 0}, {"exp_avg_sq": 0}):
        other = KINDS["te"]([torch.nn.Parameter(part.main.detach().clone()) for part in slices(inner)])
        for part, source in zip(slices(other), slices(inner), strict=True):
            moments = {key: moment * change.get(key, 1) for key, moment in source.moments().items()}
            part.restore(moments, change.get("step", BEFORE))
        train(other, BEFORE, AFTER)
        assert (other.param_groups[0]["params"][0].detach() - expected[0]).abs().max() > 1e-4, change


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_from_before_the_first_step_takes_the_state_back(kind: str) -> None:
    inner = KINDS[kind](weights())
    train(inner, 5, 2)
    for part, fresh in zip(slices(inner), weights(), strict=True):
        part.restore({}, 0)
        part.main.data.copy_(fresh.detach())
    assert [part.step() for part in slices(inner)] == [0, 0]
    train(inner, 0, 1)
    for weight, expected in zip(inner.param_groups[0]["params"], reference(1)[0], strict=True):
        near(weight, expected)


def test_steps_of_torch_are_a_tensor_for_each_parameter() -> None:
    inner = KINDS["torch"](weights())
    for part in slices(inner):
        part.restore({key: torch.zeros_like(part.main) for key in ("exp_avg", "exp_avg_sq")}, 7)
    steps = [inner.state[part.main]["step"] for part in slices(inner)]
    assert steps[0] is not steps[1] and all((step.dtype, step.shape) == (torch.float32, ()) for step in steps)


def test_a_parameter_without_a_gradient_has_moments_of_zero() -> None:
    """apex keeps nothing for it, transformer-engine zeros; the group's step goes on for both."""
    for kind in ("te", "apex"):
        inner = KINDS[kind](weights())
        inner.param_groups[0]["params"][0].grad = torch.ones(SHAPES[0])
        inner.step()
        part = slices(inner)[1]
        assert part.step() == 1 and not any(moment.any() for moment in part.moments().values())
        assert all(moment.shape == SHAPES[1] for moment in part.moments().values())


REFUSED: dict[str, tuple[Build, list[str]]] = {
    "te, fp8 moment": (lambda w: TransformerEngineAdam(w, exp_avg_dtype=torch.uint8, **OPTIONS),
                       ["optimizer.backend=te", "exp_avg_dtype=torch.uint8", "exp_avg_dtype=torch.float32", "optimizer.backend=torch"]),
    "te, fp16 moment": (lambda w: TransformerEngineAdam(w, exp_avg_sq_dtype=torch.float16, **OPTIONS),
                        ["optimizer.backend=te", "exp_avg_sq_dtype=torch.float16"]),
    "te, bf16 moment": (lambda w: TransformerEngineAdam(w, exp_avg_dtype=torch.bfloat16, **OPTIONS),
                        ["optimizer.backend=te", "exp_avg_dtype=torch.bfloat16"]),
    "te, its own main weights": (lambda w: TransformerEngineAdam(w, master_weights=True, **OPTIONS), ["optimizer.backend=te", "master_weights=True"]),
    "apex, its own main weights": (lambda w: ApexAdam(w, master_weights=True, **OPTIONS), ["optimizer.backend=apex", "master_weights=True"]),
    "torch, a third moment": (lambda w: torch.optim.AdamW(w, amsgrad=True, **OPTIONS), ["optimizer.backend=torch", "amsgrad=True"]),
    "another optimizer": (lambda w: torch.optim.SGD(w, lr=0.1), ["torch.optim.sgd.SGD is not known", "torch, te or apex"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_state_of_which_a_part_would_be_lost_is_refused(name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(ConfigError) as raised:
        adam_format(build(weights()))
    assert all(word in str(raised.value) for word in words), raised.value
    with pytest.raises(ConfigError):
        slices(build(weights()))


@pytest.mark.parametrize(("change", "words"), [
    ({"exp_avg": torch.zeros(SHAPES[0], dtype=torch.bfloat16)}, "exp_avg in torch.bfloat16"),
    ({"exp_avg_sq": torch.zeros(3)}, r"exp_avg_sq in torch.float32, \(3,\)"),
    ({"master_param": torch.zeros(SHAPES[0])}, "master_param"),
])
def test_state_of_a_kind_that_no_option_told_is_refused(change: dict[str, torch.Tensor], words: str) -> None:
    inner = KINDS["te"](weights())
    train(inner, 0, 1)
    part = slices(inner)[0]
    inner.state[part.main] |= change
    with pytest.raises(ConfigError, match=rf"optimizer.backend=te: .* keeps .*{words}.*set optimizer.backend=torch"):
        part.moments()
