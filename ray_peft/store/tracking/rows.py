"""A trial's row as MLflow shows it: metrics, and tags by which runs are searched."""

from __future__ import annotations

import json
import re

from ray_peft.errors import first_line
from ray_peft.trial.result import TrialResult

_REFUSED = re.compile(r"[^\w./ :-]")
"""Characters that MLflow refuses in the name of a metric, such as that of pass@1."""
TOKENIZERS = ("bleu_tokenizer", "rouge_tokenizer")
"""Fields of `Scores` that say how text was cut."""
_MAIN_VERSIONS = ("python", "torch", "transformers", "trl", "peft", "bitsandbytes", "ray", "mlflow")


def final_metrics(result: TrialResult) -> dict[str, float]:
    """The numbers of a result that were measured, by the names of their metrics."""
    plain = result.plain()
    for name in TOKENIZERS:  # words, which are tags
        plain["scores"].pop(name)
    benchmarks = ("benchmarks", "benchmark_stderr", "benchmark_rows", "own")
    numbers = {
        f"scores.{part}.{_REFUSED.sub('_', name)}": value
        for part in benchmarks
        for name, value in plain["scores"].pop(part).items()
    }
    numbers |= {f"{part}.{name}": value for part in ("scores", "usage") for name, value in plain[part].items()}
    numbers |= {f"storage.{_REFUSED.sub('_', kind)}": size for kind, size in plain["storage"].items()}
    numbers |= {f"predicted.{name}": gib for name, gib in plain["predicted"].items()}
    numbers |= {f"predicted.{name}": seconds for name, seconds in plain["predicted_s"].items()}
    names = ["train_loss_final", "eval_loss_best", "steps", "resumed_from_step"]
    names += ["trainable_parameters", "total_parameters", "adapter_bytes"]
    numbers |= {name: plain[name] for name in names}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def final_tags(result: TrialResult) -> dict[str, str]:
    """How a trial ended, and the parts of its provenance by which runs are searched."""
    provenance = result.provenance
    tags = {"status": result.status, "error": first_line(result.error) if result.status != "finished" else ""}
    tags |= {"device": provenance.device, "hostname": provenance.hostname, "num_workers": str(provenance.num_workers)}
    tags |= {"gpus_per_worker": str(provenance.gpus_per_worker), "git_commit": provenance.git_commit or ""}
    tags |= {"model_fingerprint": provenance.model_fingerprint or "", "data_key": provenance.data_key or ""}
    tags |= {"started_at": provenance.started_at}
    for name, settings in (("chosen", result.chosen), ("lowered_out_of_memory", result.lowered)):
        if settings:
            tags[name] = json.dumps(settings)
    tags |= {"pack_size": str(result.pack_size)} if result.pack_size > 1 else {}
    tags |= {name: used for name in TOKENIZERS if (used := getattr(result.scores, name)) is not None}
    tags |= {f"version.{name}": provenance.versions.get(name, "") for name in _MAIN_VERSIONS}
    # Where MLflow's list shows it beside the source.
    source = {"mlflow.source.git.commit": provenance.git_commit.removesuffix("+dirty")} if provenance.git_commit else {}
    return {f"ray_peft.{name}": value for name, value in tags.items()} | source
