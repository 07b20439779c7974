"""Train every configuration given, one after the other, in one process. Usage: variants.py CONFIG.yaml ..."""

from __future__ import annotations

import sys


def main() -> None:
    from megatron.core import parallel_state

    from megatron_antisd.config import load_config
    from megatron_antisd.metrics import MetricsWriter
    from megatron_antisd.resume import restore
    from megatron_antisd.run import build_run, set_up_logging
    from megatron_antisd.train import train

    set_up_logging()
    for path in sys.argv[1:]:
        config = load_config(path)
        print(f"--- {config.run.name}", flush=True)
        run = restore(build_run(config))
        with MetricsWriter(config.directory, config=config.logging, total_steps=config.run.steps, resume_step=None,
                           run_name=config.run.name, is_writer=run.is_main) as metrics:
            train(run, metrics)
        run.save_huggingface(config.directory / "hf")
        run.close()
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
