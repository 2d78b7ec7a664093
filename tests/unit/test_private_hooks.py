"""What we use of other libraries without their promise: a renamed piece would switch a guard off without a word.

transformers, trl and peft are pinned exactly; whoever moves a pin sees here what to look at.
"""

import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["transformers", "trl", "peft"])
def test_the_pins_are_exact_and_the_same_in_both_files(name):
    asked = re.search(rf'"{name}==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    locked = re.search(rf"^{name}==([\d.]+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M)
    assert asked is not None
    assert locked is not None
    assert asked[1] == locked[1]


def test_the_fused_loss_of_trl():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, add_fused_lm_head

    assert list(inspect.signature(ChunkedLogProbFunction.forward).parameters) == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip
    assert _CHUNKED_LOGPROB_CHUNK_SIZE > 0
    source = inspect.getsource(add_fused_lm_head)
    for name in ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        assert name in source, "tasks/llm_sft/head.py reads these as TRL does"


def test_what_the_loss_that_adds_gradients_in_place_hands_to_trl():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    source = inspect.getsource(ChunkedLogProbFunction)
    for piece in (
        "ctx.save_for_backward(hidden, weight, bias, targets, log_z, log_z if entropy is None else entropy)",
        "hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors",
        "needs_hidden_grad, needs_weight_grad, needs_bias_grad = ctx.needs_input_grad[:3]",
        "ctx.compute_dtype", "ctx.chunk_size", "**ctx.kernel_args", "grad_weight.to(weight.dtype)",
        "grad_hidden.to(hidden.dtype)",
    ):  # fmt: skip
        assert piece in source
    names = set(re.findall(r"\bctx\.(\w+)", source.partition("def backward")[2]))
    assert names == {"saved_tensors", "compute_dtype", "chunk_size", "needs_input_grad", "kernel_args"}


def test_what_the_stock_path_watches():
    from transformers import Trainer
    from trl import SFTTrainer

    assert "grad_norm" in inspect.signature(Trainer._get_grad_norm).parameters
    assert "_tr_loss" in inspect.getsource(Trainer)
    assert "self._get_grad_norm(" in inspect.getsource(Trainer), "the NaN guard hangs on it"
    assert "_total_train_tokens" in inspect.getsource(SFTTrainer)


def test_four_bit_layers_decide_by_their_attribute():
    import bitsandbytes

    source = inspect.getsource(bitsandbytes.nn.Linear4bit.forward)
    assert "self.support_avx512bf16_for_cpu" in source
    assert "_convert_weight_packed_for_cpu" in source


def test_the_order_of_rows_is_that_of_accelerate():
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(10), data_seed=1)
    sampler.set_epoch(1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first
    assert sorted(first) == list(range(10))
    other = SeedableRandomSampler(range(10), data_seed=2)
    other.set_epoch(1)
    assert list(other) != first


def test_what_frees_the_workspaces_of_cublas():
    import torch

    if torch.version.cuda:
        assert callable(torch._C._cuda_clearCublasWorkspaces)
    assert hasattr(torch.cuda, "MemPool")
    assert hasattr(torch.cuda, "use_mem_pool")


def test_generation_fills_what_is_open_from_the_models_own_config():
    from transformers import GenerationMixin

    source = inspect.getsource(GenerationMixin._prepare_generation_config)
    assert "self.generation_config" in source, "tasks/llm_sft/decoding.py replaces it"


def test_what_the_watch_over_ray_asks():
    from ray._private import auto_init_hook, worker
    from ray._private.node import Node

    assert isinstance(auto_init_hook.enable_auto_connect, bool)
    assert "enable_auto_connect" in inspect.getsource(auto_init_hook.auto_init_ray)
    assert hasattr(worker, "_global_node")
    for name in ("is_head", "dead_processes", "kill_all_processes"):
        assert callable(getattr(Node, name))
    assert "all_processes" in inspect.getsource(Node.dead_processes)


def test_the_cores_that_a_local_ray_counts():
    from ray._private.utils import get_num_cpus

    from ray_peft.schedule.cluster import cores_here

    assert "override_docker_cpu_warning" in inspect.signature(get_num_cpus).parameters
    assert cores_here() == int(get_num_cpus()) >= 1


def test_what_a_cache_of_lanes_stands_on():
    import torch
    from transformers import LlamaForCausalLM, MambaForCausalLM
    from transformers.cache_utils import Cache, StaticLayer

    assert LlamaForCausalLM._can_compile_fullgraph, "tasks/llm_sft/decodable.py asks it"
    assert not MambaForCausalLM._can_compile_fullgraph
    assert "self.layers[layer_idx].update(key_states, value_states" in inspect.getsource(Cache.update)
    assert list(inspect.signature(StaticLayer.update).parameters)[:3] == ["self", "key_states", "value_states"]
    for name in ("clone_state", "graphsafe_set_state"):
        assert hasattr(torch.Generator, name), "engine/replays.py ends a failed recording with it"
    if torch.version.cuda:
        assert callable(torch._C._cuda_endAllocateToPool)
        assert callable(torch._C._cuda_releasePool)


def test_how_ray_prints_what_raylets_say():
    from ray._private import worker

    source = inspect.getsource(worker.listen_error_messages)
    assert "print_to_stdstream(" in source
    assert '"pid": "raylet"' in source
    assert list(inspect.signature(worker.print_to_stdstream).parameters) == ["data", "ignore_prefix"]
