"""The engine protocol on the training model itself: no second copy of the weights, every layout that trains can sample.

A replica is the tensor- and pipeline-parallel ranks of one data- and context-parallel rank; it decodes its part of the requests with a key/value
cache, one row of the pipeline schedule at a time: a row of prompts while slots are free, else one token of every running sequence.
With expert parallelism the replicas meet inside every forward pass, so all replicas run the same number of rows: one that is done runs
rows of padding until the last one is.

Slower than a real engine (no paged cache, no CUDA graphs, one pipeline flush a token), and the reference for it: log-probs come
from the same layers and weights as the trainer's.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_antisd.models.attention import KeyValueCache, PackedSequences
from megatron_antisd.parallel.rows import lone_filler
from megatron_antisd.parallel.trainer import Trainer
from megatron_antisd.rollout.engine import EngineError, EngineFailure, Finished, Generation, Quota, Request, Sampling, check_requests
from megatron_antisd.rollout.spreading import GroupCount, Part, spread

_DONE, _RUNNING, _FAILED = 0, 1, 2
_log = logging.getLogger(__name__)


class MegatronEngine:
    """Generation with `trainer`'s model. The cache exists during `generate` only.

    Raises EngineError for a `max_context` beyond the model's.
    """

    policy_version: int
    replicas: int

    def __init__(self, trainer: Trainer, *, max_context: int | None, max_sequences: int, prefill_tokens: int | None = None,
                 policy_version: int = 0, stall_seconds: float = 300.0) -> None:
        """`max_context` None takes the model's. `stall_seconds`: how long a rank that failed waits for the others to fail, too. `max_sequences`:
        decoded at once by a replica. `prefill_tokens`: prompt tokens of one row (a longer prompt is a row of its own); None takes
        `trainer.score_micro_batch_tokens`."""
        longest = int(trainer.description.hf["max_position_embeddings"])
        if max_context is not None and max_context > longest:
            raise EngineError(f"rollout.max_context={max_context} exceeds the model's max_position_embeddings of {longest}; lower it")
        if max_sequences < 1:
            raise EngineError(f"rollout.max_sequences={max_sequences}, expected at least 1")
        self.policy_version, self.replicas = policy_version, trainer.layout.replica_size
        self.max_context = max_context or longest
        self._max_sequences = max_sequences
        self._prefill_tokens = prefill_tokens or trainer.config.trainer.score_micro_batch_tokens
        self._trainer, self._layout = trainer, trainer.layout
        self._vocab_size = trainer.description.geometry.vocab_size
        self._closed = False
        # A group of its own on the host: what failed on an accelerator must not be needed to say so.
        one = self._layout.world_size == 1
        self._reports = None if one else dist.new_group(backend="gloo", timeout=timedelta(seconds=stall_seconds))

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None,
                 quota: Quota | None = None) -> list[Generation | None]:
        """See Engine.generate. With a quota a replica stops at its share (`spread`). Raises EngineError on all ranks for logits that are not finite,
        EngineFailure where all ranks raised something, out of memory say. Where only some did, the others wait for them in the model's collectives:
        those that raised say so in the log, wait `stall_seconds`, and raise what it was, which ends the job."""
        if self._closed:
            raise EngineError("generate: the engine is closed")
        self._require_agreement(requests, sampling, quota)
        check_requests(requests, sampling, max_context=self.max_context, vocab_size=self._vocab_size)
        replicas, mine = self._layout.replica_size, self._layout.replica_rank
        parts = spread(requests, replicas, quota)
        size = 1 if quota is None else quota.group_size
        part = self._agreed(lambda: self._generate(requests, parts[mine], size, sampling, finished))
        done: list[list[Generation | None]] = [part] * replicas
        if replicas > 1:
            dist.all_gather_object(done, part, group=self._layout.replicas)
        results: list[Generation | None] = [None] * len(requests)
        for each, generations in zip(parts, done, strict=True):
            for index, generation in zip(each.indices, generations, strict=True):
                results[index] = generation
        return results

    def _agreed(self, action: Callable[[], list[Generation | None]]) -> list[Generation | None]:
        part, error = [], None
        try:
            part = action()
        except EngineError:  # raised on all ranks
            raise
        except Exception as exception:
            error = exception
            _log.error("generate failed on rank %d: %s: %s", self._layout.rank, type(error).__name__, error)
        mine = "" if error is None else f"{type(error).__name__}: {error}"
        reports = [mine] * self._layout.world_size
        if self._reports is not None:
            try:
                dist.all_gather_object(reports, mine, group=self._reports)
            except RuntimeError:
                raise error or EngineError("generate: other ranks failed, their log says how") from None
        failed = {rank: text for rank, text in enumerate(reports) if text}
        if failed:
            raise EngineFailure("generate failed on " + "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())) from error
        return part

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int, check: Sequence[str] = ()) -> list[dict[str, int]] | None:
        """Take note of the trainer's update: the model is the trainer's own and changed already, nothing is cached between calls.

        `stream` is read to its end, since producing it is collective, and not looked at; it may be empty. This engine cannot sample
        from any other weights.
        """
        for _ in stream:
            pass
        self.policy_version = version
        return None

    def sleep(self) -> None:
        """See Engine.sleep. Between calls nothing is held."""

    def wake(self) -> None:
        """See Engine.wake."""

    def take_figures(self) -> dict[str, int]:
        """See Engine.take_figures."""
        return {}

    def close(self) -> None:
        """See Engine.close. The trainer keeps its model."""
        self._closed = True
        if self._reports is not None:
            dist.destroy_process_group(self._reports)
            self._reports = None

    # -- rows -----------------------------------------------------------------------------------------------------------

    def _generate(self, requests: Sequence[Request], part: Part, group_size: int, sampling: Sampling,
                  finished: Finished | None) -> list[Generation | None]:
        """This replica's part of the requests. Its ranks all see each response; they report them in turns."""
        ranks = self._layout.tensor_size * self._layout.pipeline_size
        turn = self._layout.tensor_rank + self._layout.tensor_size * self._layout.pipeline_rank
        count = GroupCount(len(part.indices), group_size=group_size, quota=part.quota)
        batch = _Batch([requests[i] for i in part.indices], sampling, slots=self._max_sequences, prefill_tokens=self._prefill_tokens,
                       multiple=self._layout.tensor_size, device=self._layout.device)
        failed = False
        while True:
            row = None if failed or count.met else batch.next_row()
            state = self._agree(_FAILED if failed else _DONE if row is None else _RUNNING)
            if state == _FAILED:
                raise EngineError("generate: the model gave logits that are not finite; its weights are broken (a diverged update?)")
            if state == _DONE:
                return [generation if count.keeps(place) else None for place, generation in enumerate(batch.generations())]
            if row is None:
                self._idle()
                continue
            ids, log_probs = self._draw_next(row, sampling)
            failed = not bool(log_probs.isfinite().all())
            if failed:
                continue
            done = batch.record(row, ids.tolist(), log_probs.tolist())
            count.add(place for place, _ in done)
            if finished is not None:
                finished([(part.indices[place], response) for place, response in done if place % ranks == turn])

    def _idle(self) -> None:
        """A row of padding alone, to keep the other replicas company."""
        row = lone_filler(self._layout)
        self._trainer.hidden_states(row.input_ids, row.packed)

    def _agree(self, state: int) -> int:
        """The largest state of all replicas. Ranks of one replica hold the same state, so without other replicas nobody is asked."""
        if self._layout.replica_size == 1:
            return state
        shared = torch.tensor([state], device=self._layout.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._layout.replicas)
        return int(shared)

    @torch.no_grad()
    def _draw_next(self, row: _Row, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """([n] int64, [n] float64) next token of the row's sequences and its log-prob, on every rank of the replica, on the host."""
        layout = self._layout
        hidden = self._trainer.hidden_states(row.input_ids, row.packed)  # [T, H], last stage only
        uniform = torch.tensor([s.uniform.random() for s in row.sequences], dtype=torch.float64, device=layout.device)
        drawn = torch.empty(2, len(row.sequences), dtype=torch.float64, device=layout.device)
        if hidden is not None:
            logits = self._logits(hidden[row.last.to(layout.device)])
            ids, log_probs = draw(logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p)
            drawn = torch.stack([ids.double(), log_probs])  # ids are exact in a double
            if layout.tensor_size > 1:
                # Equal logits give equal draws, except that CUDA's prefix sum is not reproducible: one rank decides.
                dist.broadcast(drawn, src=dist.get_global_rank(layout.tensor, 0), group=layout.tensor)
        if layout.pipeline_size > 1:
            dist.broadcast(drawn, src=layout.last_stage_global_rank(), group=layout.pipeline)
        drawn = drawn.cpu()
        return drawn[0].long(), drawn[1]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, vocabulary] fp32, whole on every tensor-parallel rank of the last stage."""
        weight = self._trainer.output_weight()  # [V_padded/tp, H]
        if weight.is_cuda and weight.dtype == torch.bfloat16:
            shard = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            shard = hidden.float() @ weight.float().t()
        if self._layout.tensor_size == 1:
            return shard[:, : self._vocab_size]
        shards = shard.new_empty(self._layout.tensor_size * shard.shape[0], shard.shape[1])
        dist.all_gather_into_tensor(shards, shard.contiguous(), group=self._layout.tensor)
        whole = torch.cat(shards.chunk(self._layout.tensor_size), dim=1)  # [n, V_padded], the padding last
        return whole[:, : self._vocab_size]

    def _require_agreement(self, requests: Sequence[Request], sampling: Sampling, quota: Quota | None) -> None:
        """Ranks with different requests would wait for each other in different rows; refuse before the first."""
        if self._layout.world_size == 1:
            return
        digest = zlib.crc32(repr((sampling, quota, [(r.seed, r.prompt_ids, r.expected_tokens) for r in requests])).encode())
        digests = torch.zeros(self._layout.world_size, dtype=torch.int64, device=self._layout.device)
        dist.all_gather_into_tensor(digests, torch.tensor([digest], device=self._layout.device))
        different = [rank for rank, other in enumerate(digests.tolist()) if other != int(digests[0])]
        if different:
            raise EngineError(f"ranks {different} passed other requests or sampling than rank 0; generate is collective and needs "
                              "the same full list on every rank")


def draw(logits: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverse CDF. `logits` [n, V]; `uniform` [n] float64 in [0, 1).

    Returns [n] int64 ids and [n] float64 log-probs under the distribution drawn from, nats: softmax(logits / temperature), where
    `top_p` < 1 over the nucleus (the fewest likeliest tokens that hold at least `top_p`). In float64, tokens in the order of their ids:
    rounding in the logits moves a draw only when `uniform` lies within that rounding of a boundary. NaN logits give NaN log-probs.
    """
    log_p = (logits.double() / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of all likelier tokens; 0 for the first, which always stays
        p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before >= top_p), 0.0)
    cumulative = p.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding of `uniform * total` could reach the total: then the last token that has any probability.
    last = (cumulative < total).sum(dim=-1, keepdim=True)
    ids = torch.minimum(torch.searchsorted(cumulative, uniform[:, None] * total, right=True), last)
    log_probs = log_p.gather(-1, ids) - total.log()
    return ids[:, 0], log_probs[:, 0].clamp(max=0.0)


@dataclass(kw_only=True, eq=False)
class _Sequence:
    """A request on its way."""

    request: Request
    place: int
    """Among the replica's requests."""
    uniform: np.random.Generator
    """The request's own stream, one number a token. Philox takes all 63 bits of the seed (torch's CPU generator takes 32)."""
    slot: int = -1
    response: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One forward pass and the sequences that get a token from it."""

    input_ids: torch.Tensor
    """[T] int64, T a multiple of the tensor-parallel size."""
    packed: PackedSequences
    sequences: tuple[_Sequence, ...]
    last: torch.Tensor
    """[n] position in the row of each sequence's newest token."""


class _Batch:
    """Which sequence runs when. Pure bookkeeping: every rank of a replica keeps the same."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, *, slots: int, prefill_tokens: int, multiple: int,
                 device: torch.device) -> None:
        self._all = [_Sequence(request=r, place=i, uniform=np.random.Generator(np.random.Philox(key=r.seed))) for i, r in enumerate(requests)]
        self._waiting, self._running = deque(self._all), []
        self._sampling, self._prefill_tokens, self._multiple, self._device = sampling, prefill_tokens, multiple, device
        slots = min(slots, len(requests))
        self._free = list(range(slots))
        longest = max((len(r.prompt_ids) for r in requests), default=0)
        # The last token sampled is never read again.
        self._cache = KeyValueCache(slots=slots, capacity=longest + sampling.max_new_tokens - 1)

    def next_row(self) -> _Row | None:
        """Prompts while there are slots for them, else the running sequences, else None: all are done."""
        if self._waiting and self._free:
            return self._prefill()
        return self._decode() if self._running else None

    def record(self, row: _Row, ids: list[int], log_probs: list[float]) -> list[tuple[int, tuple[int, ...]]]:
        """Append the row's draws; finished sequences free their slot: (place among the requests, response) of those."""
        done = []
        stops = () if self._sampling.ignore_eos else self._sampling.stop_token_ids
        for sequence, token, log_prob in zip(row.sequences, ids, log_probs, strict=True):
            sequence.response.append(token)
            sequence.log_probs.append(log_prob)
            stopped = token in stops
            if stopped or len(sequence.response) == self._sampling.max_new_tokens:
                sequence.truncated = not stopped
                self._running.remove(sequence)
                self._free.append(sequence.slot)
                done.append((sequence.place, tuple(sequence.response)))
        return done

    def generations(self) -> list[Generation]:
        return [Generation(response_ids=tuple(s.response), log_probs=tuple(s.log_probs), truncated=s.truncated) for s in self._all]

    def _prefill(self) -> _Row:
        chosen: list[_Sequence] = []
        tokens: list[int] = []
        while self._waiting and self._free:
            prompt = self._waiting[0].request.prompt_ids
            if chosen and len(tokens) + len(prompt) > self._prefill_tokens:
                break
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            chosen.append(sequence)
            tokens.extend(prompt)
        self._running += chosen
        lengths = [len(s.request.prompt_ids) for s in chosen]
        slots = [s.slot for s, n in zip(chosen, lengths, strict=True) for _ in range(n)]
        last = torch.tensor(lengths).cumsum(0) - 1
        padding = -len(tokens) % self._multiple
        if padding:  # a sequence of its own, remembered nowhere
            lengths.append(padding)
        packed = PackedSequences.of(lengths, self._device)
        packed.cache, packed.slot = self._cache, torch.tensor(slots + [-1] * padding, device=self._device)
        return _Row(input_ids=torch.tensor(tokens + [0] * padding), packed=packed, sequences=tuple(chosen), last=last)

    def _decode(self) -> _Row:
        running = tuple(self._running)
        padding = -len(running) % self._multiple
        positions = [len(s.request.prompt_ids) + len(s.response) - 1 for s in running]
        packed = PackedSequences.decoding(positions + [0] * padding, [s.slot for s in running] + [-1] * padding, self._cache, self._device)
        tokens = torch.tensor([s.response[-1] for s in running] + [0] * padding)
        return _Row(input_ids=tokens, packed=packed, sequences=running, last=torch.arange(len(running)))
