"""The policy on this rank's shards: score views, take a step, stream the weights out. Layout-blind to its callers.

Both `score` and `step` run Megatron's pipeline schedule over packed micro-batches. The loss of a micro-batch is already
divided by the global token count, so gradients are plain sums over micro-batches, data- and context-parallel ranks (invariant 3).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_antisd.algorithm import clipped_surrogate, importance_weights, token_advantage, token_weights
from megatron_antisd.config import RunConfig
from megatron_antisd.models.attention import PackedSequences
from megatron_antisd.models.build import ModelDescription, build_model
from megatron_antisd.parallel import update_figures
from megatron_antisd.parallel.data_parallel import data_parallel_chunks
from megatron_antisd.parallel.engine_weights import EngineWeights
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.optimizer import build_optimizer, guarded_update, set_learning_rate
from megatron_antisd.parallel.reshard import WeightStream
from megatron_antisd.parallel.routing import BatchRouting
from megatron_antisd.parallel.rows import Row, RowPlan, cost_model, lone_filler, lone_row, plan_rows
from megatron_antisd.parallel.statistics import lower_median
from megatron_antisd.parallel.stored_weights import load_model_weights
from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, select_kernels
from megatron_antisd.parallel.vocab_loss import linear_policy_loss
from megatron_antisd.parallel.vocab_shard import NonFiniteHiddenError
from megatron_antisd.records import NonFiniteScores, ScoringView, StepStats, TokenScores, TrainingBatch, UpdateFigures

_log = logging.getLogger(__name__)


class Trainer:
    """One policy, sharded as `config.parallel` says."""

    def __init__(self, config: RunConfig, layout: ProcessLayout, description: ModelDescription, *, training: bool = True) -> None:
        """Without `training` there are no gradients and no optimizer, hence no `step`."""
        self.config, self.layout, self.description = config, layout, description
        self.chunks = build_model(description, config.model, config.parallel)
        """This rank's parts of the model: one, or several virtual pipeline stages."""
        load_model_weights(self.chunks, description, layout, config.model.path)
        self.ddp = self.chunks
        if training:
            model_config = self.chunks[0].config
            self.ddp = data_parallel_chunks(self.chunks, config.parallel)
            dtype = getattr(torch, config.model.dtype)
            self.optimizer = build_optimizer(config.optimizer, self.ddp, dtype, config.parallel.distributed_optimizer)
            model_config.finalize_model_grads_func = _sum_gradients
            model_config.grad_scale_func = self.optimizer.scale_loss
        self.routing = BatchRouting(self.chunks, description, layout)
        self._schedule = get_forward_backward_func()
        self._cost = cost_model(description)
        self._kernels = select_kernels(config.trainer.vocab_kernels)
        self._stream = WeightStream(self.chunks, description, layout, config.rollout.sync_bucket_bytes)
        self.engine_weights = EngineWeights(config, self.chunks, description, layout)
        """For `rollout.probe.synchronise`."""

    def score(self, views: Sequence[ScoringView], *, gather_entropy: bool = False, record_routes: bool = False) -> TokenScores:
        """Log-prob of every response token and the exact median of their entropies, without gradient; each token's entropy only where asked
        for: nothing in training needs it beyond the rank that computed it. Views' `routes` are followed; with `record_routes` the scores hold what
        the routers would choose. Collective; the same on every rank. Raises, on every rank, NonFiniteScores where a log-prob is not finite,
        RoutesError where routes do not fit, RuntimeError where a router did not ask for its experts."""
        self.routing.check(views)
        record = self.routing.require() if record_routes else None
        # Every data-parallel rank must take part: where there are fewer views, fill up with some of one token.
        short = ScoringView(prompt_ids=views[0].prompt_ids[:1], response_ids=views[0].response_ids[:1])
        missing = max(0, self.layout.data_size - len(views))
        filled = [*views, *[short] * missing]
        plan = plan_rows(filled, self.layout, self.config.trainer.score_micro_batch_tokens, model=self._cost,
                         record=record and (record.layers, record.top_k))
        self._set_training(False)
        with torch.no_grad():
            results = self._run(plan.rows, self._scores, forward_only=True)
        if record_routes or any(view.routes is not None for view in views):
            self.routing.require_asked(plan.rows)
        lengths = plan.lengths[: len(views)]
        tokens = sum(lengths)
        log_prob = self._assemble(plan, results, 0)[:tokens]
        broken = torch.nonzero(~log_prob.isfinite())
        if len(broken):
            first = int(broken[0])
            raise NonFiniteScores(
                f"the log-probs of {len(broken)} of {tokens} scored response tokens are not finite, first that of token {first}, "
                f"{float(log_prob[first])}: the weights are not finite, or hidden states are (their rank logged it)", token=first, lengths=lengths)
        return TokenScores(log_prob=log_prob, entropy_median=self._median_entropy(plan, results, tokens),
                           entropy=self._assemble(plan, results, 1)[:tokens] if gather_entropy else None, lengths=lengths,
                           routes=self.routing.recorded(filled, plan.rows)[: len(views)] if record_routes else None)

    def step(self, batch: TrainingBatch, learning_rate: float, *, accept: Callable[[UpdateFigures], bool] = lambda figures: True) -> StepStats:
        """One policy update. `accept` is asked once, when the gradient is there and before anything is clipped or changed; where it returns
        False, or where the figures are not finite whatever it returns, weights, moments and step counts stay as they are. Collective; every
        rank asks with the same figures, and all must answer alike."""
        self.routing.check(batch.views)
        plan = plan_rows(batch.views, self.layout, self.config.trainer.micro_batch_tokens, model=self._cost)
        weights = token_weights(batch.lengths, batch.sequence_mask, self.config.algorithm.loss)
        sequence_advantage = batch.sequence_advantage.repeat_interleave(torch.tensor(batch.lengths))
        self._set_training(True)
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(plan.rows, partial(self._policy_loss, batch, sequence_advantage, weights), forward_only=False)
        log_prob = self._assemble(plan, results, 0)
        loss, clipped, entropy = self._sum_over_batch(
            [r[2] for r in results], [r[3] for r in results], [r[1].double().sum() for r in results])
        # Between trainer and engine at the weights that sampled; what earlier updates of this batch moved is no mismatch.
        difference = (log_prob if batch.old_log_prob is None else batch.old_log_prob) - batch.engine_log_prob
        before_gradient = UpdateFigures(
            loss=loss, grad_norm=0.0, clip_fraction=clipped / batch.tokens, student_entropy_mean=entropy / sum(plan.lengths),
            mismatch_kl=float((torch.expm1(difference.double()) - difference.double()).mean()),
            mismatch_mean=float(difference.abs().double().mean()), mismatch_max=float(difference.abs().max()),
            broken_tokens=int((~log_prob.isfinite()).sum()), **update_figures.correction(self.config, batch, difference, weights),
            **update_figures.noise_floor(batch, log_prob))
        routes_equal = self.routing.equal_shares(batch.views, plan.rows)  # it may raise: before anything has changed
        set_learning_rate(self.optimizer, learning_rate)
        norm, applied = guarded_update(
            self.optimizer, self.config.optimizer.clip_grad, finite_loss=before_gradient.finite,
            accept=lambda norm: accept(dataclasses.replace(before_gradient, grad_norm=norm)))
        return StepStats(
            **{**vars(before_gradient), "grad_norm": norm}, skipped=not applied, padding_share=plan.padding_share,
            student=TokenScores(log_prob=log_prob, entropy_median=None, lengths=plan.lengths),
            routes_equal=routes_equal)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) of the whole policy, bucketed, for files and comparisons; engines get `engine_weights`. Collective:
        drain it on every rank."""
        return self._stream.stream()

    def hidden_states(self, input_ids: torch.Tensor, packed: PackedSequences) -> torch.Tensor | None:
        """[T] token ids -> [T, H] final hidden states on the last pipeline stage, None elsewhere; no gradient. For the in-process sampler, which
        gives every context-parallel rank a row of its own. T is a multiple of the tensor-parallel size; with experts every rank of the world
        must call it equally often."""
        others = self.layout.pipeline_size - 1 if self.layout.virtual_size > 1 else 0
        rows = [lone_row(input_ids, packed, self.layout), *[lone_filler(self.layout)] * others]
        self._set_training(False)
        with torch.no_grad():
            results = self._run(rows, lambda _, hidden: (self._whole_row(hidden),), forward_only=True)
        return results[0][0] if results else None

    def output_weight(self) -> torch.Tensor:
        """[V_padded/tp, H] of the last pipeline stage."""
        return self.chunks[-1].output_weight()

    # -- one batch through the schedule ---------------------------------------------------------------------------------

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)

    def _run(self, rows: Sequence[Row], consume: Callable[[Row, torch.Tensor], tuple[Any, ...]], forward_only: bool) -> list[tuple[Any, ...]]:
        """Results of `consume(row, hidden)` for each row, on the last stage (empty elsewhere). With gradient, its first item is the loss."""

        def forward(iterator: Iterator[Row], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            row = next(iterator)
            hidden = model(row.input_ids[None], None, None, packed_seq_params=row.packed)
            return hidden, partial(after, row)

        def after(row: Row, hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
            result = consume(row, hidden)
            # Without gradient the schedule stores what it gets; with gradient it wants (loss, tokens, anything) and scales by no token count here.
            return result if non_loss_data else (result[0], torch.ones((), dtype=torch.int), result[1:])

        iterators = [iter(rows) for _ in self.ddp]
        single = len(self.ddp) == 1
        return self._schedule(
            forward_step_func=forward, data_iterator=iterators[0] if single else iterators, model=self.ddp[0] if single else self.ddp,
            num_microbatches=len(rows), seq_length=1, micro_batch_size=1, forward_only=forward_only, collect_non_loss_data=forward_only)

    def _whole_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T/tp, 1, H] -> [T, H]. The scoring function's hidden gradient is already summed over ranks, so the gather's
        backward only takes this rank's part."""
        if self.chunks[0].config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden[:, 0]

    def _predicting(self, row: Row, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] that predict response tokens."""
        return self._whole_row(hidden)[row.predicting]

    def _scores(self, row: Row, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([R], [R]) float32 log-prob and entropy of the row's response tokens."""
        predicting = self._predicting(row, hidden)
        try:
            return linear_log_prob_and_entropy(
                predicting, self.output_weight(), row.targets, self.layout.tensor, self.description.geometry.vocab_size,
                entropy_grad=False, temperature=self.config.rollout.temperature, kernels=self._kernels)
        except NonFiniteHiddenError as error:
            # Ranks with other rows are on their way to the next collective: this rank goes there too, and `score` raises on all of them.
            _log.error("%s; the row predicts response token %d of the scored batch", error, int(row.where[error.row]))
            marked = torch.zeros(len(row.targets), device=self.layout.device).masked_fill(~predicting.isfinite().all(dim=1), torch.nan)
            return marked, marked

    def _policy_loss(self, batch: TrainingBatch, sequence_advantage: torch.Tensor, weights: torch.Tensor, row: Row,
                     hidden: torch.Tensor) -> tuple[Any, ...]:
        """(loss with gradient, log-prob, entropy, loss, clipped tokens) of one row. `sequence_advantage`, `weights`: of every token of the batch."""
        settings = self.config.algorithm
        a_seq, weight, teacher, mask, engine = (tensor[row.where].to(self.layout.device) for tensor in (
            sequence_advantage, weights, batch.teacher_log_prob, batch.teacher_mask, batch.engine_log_prob))
        old, given = (None if tensor is None else tensor[row.where].to(self.layout.device) for tensor in (
            batch.old_log_prob, batch.correction_log_ratio))
        correction, mode = self.config.correction, self.config.correction_mode
        clipped = torch.zeros((), dtype=torch.int64, device=self.layout.device)

        def token_loss(rows: slice, log_prob: torch.Tensor) -> torch.Tensor:
            # Off-policy, u stays that of the policy that sampled: the teacher was scored with its weights too.
            sampling = log_prob.detach() if old is None else old[rows]
            advantage = token_advantage(a_seq[rows], sampling, teacher[rows], mask[rows],
                                        method=settings.method, lambda_=batch.lambda_, compose=settings.compose)
            token_weight = weight[rows]
            if mode != "off":  # the denominator inside `weight` stays: a token that is masked is still one of the batch
                log_ratio = sampling - engine[rows] if given is None else given[rows]
                token_weight = token_weight * importance_weights(log_ratio, mode=mode, lower=correction.lower, upper=correction.upper).weight
            loss, count = clipped_surrogate(log_prob, None if old is None else old[rows], advantage, token_weight, settings.clip)
            clipped.add_(count)
            return loss

        loss, log_prob, entropy = linear_policy_loss(
            self._predicting(row, hidden), self.output_weight(), row.targets, self.layout.tensor, self.description.geometry.vocab_size,
            token_loss, chunk_bytes=self.config.trainer.vocab_chunk_bytes, temperature=self.config.rollout.temperature,
            kernels=self._kernels)
        # The schedule may rescale the loss in place: report a copy.
        return loss, log_prob, entropy, loss.detach().clone(), clipped

    # -- local results -> global values, the same on every rank -----------------------------------------------------------

    def _assemble(self, plan: RowPlan, results: list[tuple[Any, ...]], column: int) -> torch.Tensor:
        """[T] of all response tokens, on the CPU, from the rows' `column` of results: 0 log-probs, 1 entropies."""
        values = torch.zeros(sum(plan.lengths), dtype=torch.float32, device=self.layout.device)
        if self.layout.is_last_stage:
            for row, result in zip(plan.rows, results, strict=True):
                values[row.where.to(self.layout.device)] = result[column].float()
        return self._share(values).cpu()

    def _median_entropy(self, plan: RowPlan, results: list[tuple[Any, ...]], tokens: int) -> float:
        """Of the first `tokens` response tokens: those behind them only fill up. Each rank keeps its own entropies."""
        median = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        if self.layout.is_last_stage:
            mine = [result[1].float()[(row.where < tokens).to(self.layout.device)] for row, result in zip(plan.rows, results, strict=True)]
            found = lower_median(torch.cat(mine), self.layout.replicas if self.layout.replica_size > 1 else None)
            assert found is not None, "there is a view, and a response has a token"
            median.fill_(found)
        return float(self._from_last_stage(median))

    def _sum_over_batch(self, *columns: list[Any]) -> tuple[float, ...]:
        sums = torch.zeros(len(columns), dtype=torch.float64, device=self.layout.device)
        for i, column in enumerate(columns):
            for value in column:
                sums[i] += float(value)
        return tuple(self._share(sums).tolist())

    def _share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over data- and context-parallel ranks of the last stage, then hand to the other stages. A token's score has one contributor, so
        it is exact."""
        if self.layout.is_last_stage and self.layout.replica_size > 1:
            dist.all_reduce(tensor, group=self.layout.replicas)
        return self._from_last_stage(tensor)

    def _from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.layout.pipeline_size > 1:
            dist.broadcast(tensor, src=self.layout.last_stage_global_rank(), group=self.layout.pipeline)
        return tensor


def _sum_gradients(chunks: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's reductions without its division by a token count: the loss is divided by the global count already."""
    finalize_model_grads(chunks, None, **kwargs)
