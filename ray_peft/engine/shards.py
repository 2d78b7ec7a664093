"""A model whose weights are spread over the workers of a trial with torch's FSDP2, and its numbers brought together.

Each worker holds a part of every frozen weight, or of every trained one with its gradient and moments. A unit, which is
a block or all that is outside of the blocks, is gathered before it computes and given back after that. Adapters stay
whole on every worker: they are small, so that PEFT, the optimizers and checkpoints see plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ray_peft.errors import ModelError
from ray_peft.reach.blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.distributed.tensor import DTensor
    from torch.optim import Optimizer


def shard(model: nn.Module, device: str, *, of: str) -> None:
    """Spread a model over all workers, and bring what each of them holds to its device, unit by unit.

    So a device never holds more than its parts and one unit. Gradients are added up over the workers, not averaged:
    each worker's loss is its share of the step's.

    Args:
        model: on the CPU, the same on every worker, with a stage attached or none. Trained parameters beside frozen
            ones stay whole.
        device: this worker's, "cpu" or "cuda:N".
        of: the model as an error names it.

    Raises:
        ModelError: it has no blocks, or adapters beside fused experts, which cannot be spread.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    base = _base(model)
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ModelError(
            f"method.targets: resources.strategy: fsdp cannot spread {of}, of which adapters stand beside fused "
            "experts; name targets without them, or use resources.strategy: data"
        )
    parameters = list(model.parameters())
    trained = {parameter for parameter in parameters if parameter.requires_grad}
    whole = trained if len(trained) < len(parameters) else set()
    mesh = init_device_mesh(device.partition(":")[0], (get_world_size(),))
    for unit in (*blocks(base, of=of), base):
        # The base's own weights are given back, too: else a model that has only scored rows would show them whole.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        spread = cast(FSDPModule, unit)
        spread.set_gradient_divide_factor(1.0)
        spread.set_force_sum_reduction_for_comms(True)
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def _base(model: Any) -> nn.Module:
    """The model inside PEFT's wrapper, through whose forward pass all goes."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is spread over workers, all of which must then run the same passes."""
    return bool(getattr(_base(model), "_is_fsdp_managed_module", False))


def is_spread(tensor: Tensor) -> bool:
    """Whether this worker holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(value: Any, *, keep: bool = True) -> Any:
    """JSON-like data with tensors in it, those that are spread brought together on the CPU; all workers must call it.

    Args:
        value: dicts, lists and tuples of tensors and other values.
        keep: whether this worker wants them; the others take part, and get None for each.
    """
    if isinstance(value, dict):
        return {key: whole(entry, keep=keep) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(entry, keep=keep) for entry in value)
    if not hasattr(value, "full_tensor"):
        return value
    full: Tensor = value.detach().full_tensor()  # one at a time, so that the device never holds two
    return full.cpu() if keep else None


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This worker's part of a tensor that it has whole, spread as `like` is; without communication."""
    from torch.distributed.tensor import distribute_tensor

    spread = cast("DTensor", like)
    part = full.to(device=spread.device, dtype=spread.dtype)
    return distribute_tensor(part, spread.device_mesh, spread.placements, src_data_rank=None)


def spread_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's `state_dict` with whole tensors, spread as the parameters that they belong to."""
    parameters: Iterable[Tensor] = (parameter for group in optimizer.param_groups for parameter in group["params"])
    of_parameters = dict(state["state"])
    for place, parameter in enumerate(parameters):
        if not is_spread(parameter) or place not in of_parameters:
            continue
        of_parameters[place] = {
            name: part_of(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in of_parameters[place].items()
        }
    return {**state, "state": of_parameters}
