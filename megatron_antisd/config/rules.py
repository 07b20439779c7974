"""The rules between a run's configuration, its model and the number of ranks, checked before anything starts.

`check_layout` is arithmetic alone (no files, no packages, no hardware): a plan for 64 GPUs is checked on a laptop.
`check_files` looks at the machine: paths, and the optional packages the configuration asks for. `check` is both. Each
collects every broken rule first, so that one run shows them all; each line names the keys, the rule and the numbers.

The rules on heads, layers and experts are Megatron-Core 0.16.1's (TransformerConfig.__post_init__, SelfAttention) and
vLLM 0.32's (models/qwen3.py, qwen3_moe.py), but for those marked "this version".
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_antisd.config import ConfigError, ParallelConfig, RunConfig
from megatron_antisd.config.benchmarks import BENCHMARKS
from megatron_antisd.config.memory_rules import expert_form_problems, lever_problems
from megatron_antisd.config.rollout_rules import rollout_problems, vllm_problems

SUPPORTED_MODEL_TYPES = ("qwen3", "qwen3_moe", "olmo3")

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Those that do not depend on how long a sequence is."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Those that hold a vocabulary; the first one found is read."""

MODEL_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "max_position_embeddings", "vocab_size")
MOE_KEYS = ("num_experts", "moe_intermediate_size")


def check(config: RunConfig, model: Mapping[str, Any], world_size: int, *, training: bool = True) -> None:
    """Hold `config` against the model, the ranks and this machine. `training` asks for training data.

    `model` is the parsed config.json of a Hugging Face checkpoint, `world_size` the number of ranks. Raises ConfigError
    with one line per broken rule.
    """
    cpu = not _cuda_available()
    _raise([*_file_problems(config, training), *_layout_problems(config, model, world_size, cpu=cpu, training=training)])


def check_layout(config: RunConfig, model: Mapping[str, Any], world_size: int, *, cpu: bool = False) -> None:
    """The rules that are arithmetic. `cpu` adds those of vLLM's CPU build. Raises ConfigError with one line per broken rule."""
    _raise(list(_layout_problems(config, model, world_size, cpu=cpu)))


def check_model(parallel: ParallelConfig, model: Mapping[str, Any]) -> None:
    """The rules between a model and its division over ranks, without a run. Raises ConfigError with one line per broken rule."""
    _raise([*_virtual_problems(parallel), *_model_problems(parallel, model)])


def check_server(config: RunConfig, model: Mapping[str, Any], *, cpu: bool) -> None:
    """What an engine server needs, which neither trains nor grades. Raises ConfigError with one line per broken rule."""
    model, problems = _complete(model), [*_model_file_problems(config)]
    if config.rollout.mode != "servers":
        problems.append(f"rollout.mode={config.rollout.mode}: engine servers need rollout.mode=servers, in the trainer's configuration too")
    if model.get("model_type") not in SUPPORTED_MODEL_TYPES or _missing(model):
        problems.append(f"model.path: model_type {model.get('model_type')!r} is not one of {', '.join(SUPPORTED_MODEL_TYPES)}, or config.json lacks "
                        f"sizes: {', '.join(_missing(model)) or 'none'}")
    else:
        problems += [*_length_problems(config, model), *vllm_problems(config, model, moe=model["model_type"] == "qwen3_moe", cpu=cpu)]
    _raise(problems)


def check_files(config: RunConfig) -> None:
    """The rules on this machine's files and packages. Raises ConfigError with one line per broken rule."""
    _raise(list(_file_problems(config, training=True)))


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Replicas of the trainer: world / (TP * PP * CP). Raises ConfigError where that is no whole number of at least 1."""
    problem = _world_problem(config, world_size)
    _raise([problem] if problem else [])
    return world_size // _model_ranks(config)


def max_context(config: RunConfig, model: Mapping[str, Any]) -> int:
    """Prompt plus response bound in tokens: `rollout.max_context`, or the model's own."""
    return config.rollout.max_context or int(model["max_position_embeddings"])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("the configuration cannot run:\n  " + "\n  ".join(problems))


# --- arithmetic ---


def _layout_problems(config: RunConfig, model: Mapping[str, Any], world_size: int, *, cpu: bool, training: bool = True) -> Iterator[str]:
    yield from _world_problems(config, world_size)
    if training:
        yield from _batch_problems(config, world_size)
        yield from _profile_problems(config)
    yield from lever_problems(config, model.get("model_type"))
    yield from rollout_problems(config, moe=model.get("model_type") == "qwen3_moe")
    yield from _model_problems(config.parallel, model)
    model = _complete(model)
    if model.get("model_type") not in SUPPORTED_MODEL_TYPES or _missing(model):
        return  # reported
    yield from expert_form_problems(config, model)
    yield from _length_problems(config, model)
    if config.rollout.engine == "vllm":
        yield from vllm_problems(config, model, moe=model["model_type"] == "qwen3_moe", cpu=cpu)


def _model_problems(parallel: ParallelConfig, model: Mapping[str, Any]) -> Iterator[str]:
    model, moe = _complete(model), model.get("model_type") == "qwen3_moe"
    if model.get("model_type") not in SUPPORTED_MODEL_TYPES:
        yield f"model.path: model_type {model.get('model_type')!r} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        return
    yield from _architecture_problems(model, moe=moe)
    missing = _missing(model)
    if missing:
        yield f"model.path: config.json lacks {', '.join(missing)} (whole numbers of at least 1); they are needed to check the layout"
        return
    yield from _trainer_problems(parallel, model)
    yield from _expert_problems(parallel, model, moe=moe)


def _complete(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json with what its spelling leaves out."""
    # transformers 5 writes the number of experts of Qwen3-MoE as num_local_experts; earlier releases as num_experts.
    model = {**model, "num_experts": model.get("num_experts", model.get("num_local_experts"))}
    heads, hidden = model.get("num_attention_heads"), model.get("hidden_size")
    if model.get("model_type") == "olmo3" and _is_size(heads) and _is_size(hidden):  # its published configs leave out what equals the default
        model = {**model, "num_key_value_heads": model.get("num_key_value_heads") or heads, "head_dim": model.get("head_dim") or hidden // heads}
    return model


def _missing(model: Mapping[str, Any]) -> list[str]:
    return [key for key in (*MODEL_KEYS, *(MOE_KEYS if model.get("model_type") == "qwen3_moe" else ())) if not _is_size(model.get(key))]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _architecture_problems(model: Mapping[str, Any], *, moe: bool) -> Iterator[str]:
    """What a config.json of a supported family can ask for and this version does not build."""
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    kinds = [part.get("rope_type") or part.get("type") or "default" for part in parts]
    unsupported = {"attention_bias=true": model.get("attention_bias"), "use_sliding_window=true": model.get("use_sliding_window")}
    unsupported |= {f"rope type {kind!r} (one of {', '.join(ROPE_TYPES)} is)": kind not in ROPE_TYPES for kind in kinds}
    if moe:
        unsupported |= {"norm_topk_prob=false": not model.get("norm_topk_prob", False), "mlp_only_layers": model.get("mlp_only_layers"),
                        "decoder_sparse_step other than 1": model.get("decoder_sparse_step", 1) != 1}
    for what, present in unsupported.items():
        if present:
            yield f"model.path: {what} is not supported for {model['model_type']} by this version"


def _model_ranks(config: RunConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size


def _world_problem(config: RunConfig, world_size: int) -> str | None:
    p = config.parallel
    if world_size % _model_ranks(config) == 0:
        return None
    return (f"world size {world_size} must be divisible by parallel.tensor_parallel_size={p.tensor_parallel_size} * "
            f"pipeline_parallel_size={p.pipeline_parallel_size} * context_parallel_size={p.context_parallel_size} "
            f"= {_model_ranks(config)}; start that many ranks or a multiple")


def _world_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    p = config.parallel
    problem = _world_problem(config, world_size)
    if problem:
        yield problem
    expert_ranks = p.expert_tensor_parallel_size * p.expert_parallel_size * p.pipeline_parallel_size
    if world_size % expert_ranks:
        yield (f"world size {world_size} must be divisible by parallel.expert_tensor_parallel_size={p.expert_tensor_parallel_size} * "
               f"expert_parallel_size={p.expert_parallel_size} * pipeline_parallel_size={p.pipeline_parallel_size} = {expert_ranks}")
    yield from _virtual_problems(p)
    if config.sync.transport == "cuda_ipc" and world_size > 1:
        yield (f"sync.transport=cuda_ipc needs trainer and engine on one GPU, and there are {world_size} ranks, which send from several; "
               "set process_group")
    engine = config.rollout.tensor_parallel_size
    if config.rollout.engine == "vllm" and config.rollout.mode == "colocated" and world_size % engine:
        yield (f"world size {world_size} must be divisible by rollout.tensor_parallel_size={engine}: "
               "the engine's replicas share out all ranks")


def _virtual_problems(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.virtual_pipeline_size > 1 and parallel.pipeline_parallel_size == 1:
        yield f"parallel.virtual_pipeline_size={parallel.virtual_pipeline_size} needs parallel.pipeline_parallel_size above 1; set it to 1"


def _batch_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    if _world_problem(config, world_size):
        return  # reported; without it there is no data-parallel size
    replicas = world_size // _model_ranks(config)
    rollout, updates = config.rollout, config.algorithm.updates_per_batch
    per_update = rollout.problems_per_step * rollout.group_size // updates  # config.py: problems_per_step % updates == 0
    if per_update % replicas:
        yield (f"rollout.problems_per_step={rollout.problems_per_step} * group_size={rollout.group_size} / "
               f"algorithm.updates_per_batch={updates} = {per_update} rollouts an update must be divisible by the "
               f"data-parallel size {replicas} (world size {world_size} / {_model_ranks(config)})")


def _profile_problems(config: RunConfig) -> Iterator[str]:
    outside = [step for step in config.profile.steps if not 1 <= step <= config.run.steps]
    if outside:
        yield f"profile.steps={list(config.profile.steps)}: {', '.join(map(str, outside))} must lie from 1 to run.steps={config.run.steps}"


def _trainer_problems(parallel: ParallelConfig, model: Mapping[str, Any]) -> Iterator[str]:
    tp = parallel.tensor_parallel_size
    # Megatron also takes a TP size that is a multiple of the key/value heads, and replicates them: not in this version.
    for key, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "key/value heads"),
                      ("hidden_size", "hidden size"), ("intermediate_size", "feed-forward width")):
        if model[key] % tp:
            yield f"the model's {what}, {key}={model[key]}, must be divisible by parallel.tensor_parallel_size={tp}"
    heads, groups = model["num_attention_heads"], model["num_key_value_heads"]
    if heads % groups:
        yield f"the model's num_attention_heads={heads} must be divisible by num_key_value_heads={groups}"
    yield from _stage_problems(parallel, model["num_hidden_layers"])


def _stage_problems(parallel: ParallelConfig, layers: int) -> Iterator[str]:
    pp, vpp, given = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size, parallel.pipeline_layers
    if given is None:
        if layers < pp * vpp:
            yield (f"the model's layers, num_hidden_layers={layers}, are fewer than parallel.pipeline_parallel_size={pp} * "
                   f"virtual_pipeline_size={vpp} = {pp * vpp}; each chunk needs at least one")
    elif len(given) != pp * vpp or sum(given) != layers or min(given) < 1:
        yield (f"parallel.pipeline_layers={list(given)} must name {pp * vpp} numbers of at least 1 (pipeline_parallel_size={pp} * "
               f"virtual_pipeline_size={vpp}) that sum to the model's num_hidden_layers={layers}; it names {len(given)} with the sum {sum(given)}")


def _expert_problems(parallel: ParallelConfig, model: Mapping[str, Any], *, moe: bool) -> Iterator[str]:
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    if not moe:
        for key, size in (("expert_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
            if size > 1:
                yield f"parallel.{key}={size} needs a mixture-of-experts model, but model_type is {model['model_type']!r}; set it to 1"
        return
    if model["num_experts"] % ep:
        yield f"the model's experts, num_experts={model['num_experts']}, must be divisible by parallel.expert_parallel_size={ep}"
    if model["moe_intermediate_size"] % etp:
        yield (f"the model's expert width, moe_intermediate_size={model['moe_intermediate_size']}, must be divisible by "
               f"parallel.expert_tensor_parallel_size={etp}")


def _length_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[str]:
    token = 4 * -(-model["vocab_size"] // config.parallel.tensor_parallel_size)
    if config.trainer.vocab_chunk_bytes < token:
        yield (f"trainer.vocab_chunk_bytes={config.trainer.vocab_chunk_bytes} is too small for one token: its fp32 logits take 4 x vocab_size="
               f"{model['vocab_size']} / parallel.tensor_parallel_size={config.parallel.tensor_parallel_size} = {token} bytes")
    # trainer.micro_batch_tokens may be smaller than the context: a longer sequence is its own micro-batch.
    context, positions = max_context(config, model), model["max_position_embeddings"]
    where = "rollout.max_context" if config.rollout.max_context else "the model's max_position_embeddings"
    if context > positions:
        yield f"rollout.max_context={context} must not exceed the model's max_position_embeddings={positions}"
    for key, tokens in (("rollout.max_new_tokens", config.rollout.max_new_tokens),
                        ("evaluation.max_new_tokens", config.evaluation.max_new_tokens)):
        if tokens is not None and tokens >= context:
            yield f"{key}={tokens} must be less than {where}={context}: the prompt needs room too"


# --- files and packages ---


def _file_problems(config: RunConfig, training: bool) -> Iterator[str]:
    yield from _model_file_problems(config)
    if training and not config.data.train:
        yield "data.train is empty: list at least one JSON-lines or Parquet file of problems"
    for i, path in enumerate(config.data.train if training else ()):
        if not Path(path).is_file():
            yield f"data.train[{i}]: no file at {path} (taken from {Path.cwd()})"
    for i, benchmark in enumerate(config.evaluation.benchmarks):
        if not Path(benchmark.path).is_file():
            fetch = f"; fetch it: tools/prepare_data.py {benchmark.name}" if benchmark.name in BENCHMARKS else ""
            yield f"evaluation.benchmarks[{i}].path ({benchmark.name}): no file at {benchmark.path} (taken from {Path.cwd()}){fetch}"
    for key, folder in (("checkpoint.continual_from", config.checkpoint.continual_from),
                        ("debug.load_rollouts", config.debug.load_rollouts)):
        if training and folder is not None and not Path(folder).is_dir():
            yield f"{key}: no directory at {folder}"
    yield from _package_problems(config)


def _model_file_problems(config: RunConfig) -> Iterator[str]:
    folder = Path(config.model.path)
    if not folder.is_dir():
        yield f"model.path: no directory at {folder} (taken from {Path.cwd()}); it must be a local Hugging Face checkpoint"
        return
    if not (folder / "config.json").is_file():
        yield f"model.path: no config.json in {folder}"
    else:
        try:
            json.loads((folder / "config.json").read_text())
        except json.JSONDecodeError as error:
            yield f"model.path: {folder / 'config.json'} is not valid JSON: {error}"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield f"model.path: no tokenizer in {folder} (looked for {', '.join(TOKENIZER_FILES)})"
    if not any(folder.glob("*.safetensors")) and not (folder / "manifest.json").is_file():
        yield f"model.path: no weights in {folder} (looked for *.safetensors, and for a checkpoint's manifest.json)"


def _package_problems(config: RunConfig) -> Iterator[str]:
    if config.rollout.engine == "vllm" and not _has("vllm"):
        yield "rollout.engine=vllm: vLLM is not installed; run tools/setup_env.sh, or set rollout.engine=megatron"
    if config.optimizer.backend == "te" and not _has("transformer_engine"):
        yield "optimizer.backend=te: transformer-engine is not installed; pip install 'megatron_antisd[te]', or set optimizer.backend=torch"
    if config.model.spec == "te" and not _has("transformer_engine"):
        yield "model.spec=te: transformer-engine is not installed; pip install 'megatron_antisd[te]', or set model.spec=local"
    if config.optimizer.backend == "apex" and not _has("apex", inside="optimizers"):
        yield ("optimizer.backend=apex: NVIDIA's apex is not installed (the package index's `apex` is another project of "
               "that name); build it from source or set optimizer.backend=torch")
    if config.trainer.vocab_kernels == "triton" and not (_has("triton") and _cuda_available()):
        yield "trainer.vocab_kernels=triton: needs a CUDA GPU and the package triton; set trainer.vocab_kernels=torch"
    if config.logging.wandb_project is not None and not _has("wandb"):
        yield "logging.wandb_project: wandb is not installed; pip install wandb, or leave the key out"
    for key, function in (("grading.function", config.grading.function), ("logging.token_kinds", config.logging.token_kinds)):
        if function is not None:
            yield from _function_problems(key, function)


def _function_problems(key: str, function: str) -> Iterator[str]:
    module, separator, name = function.partition(":")
    if not (separator and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        yield f"{key}={function!r} is not of the form package.module:function"
    elif not _has(module.split(".")[0]):
        yield f"{key}={function!r}: there is no package {module.split('.')[0]!r} to import"


def _has(package: str, *, inside: str | None = None) -> bool:
    """Whether a top-level package (with a module `inside`) can be found. Nothing is imported: a broken one may do anything."""
    spec = importlib.util.find_spec(package)
    if spec is None or inside is None:
        return spec is not None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / inside).is_dir() or (folder / f"{inside}.py").is_file() for folder in folders)


def _cuda_available() -> bool:
    import torch  # here, not above: planning a layout does without torch

    return torch.cuda.is_available()
