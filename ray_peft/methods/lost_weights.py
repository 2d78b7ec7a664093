"""What quantising took of a model's weights, as the start of the adapters beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_peft.errors import SpecError, first_line

REVISION = "hub_revision"
"""The attribute of a base that holds the revision under which its files are in the local copy of the hub."""


def start_from_loss(adapted: Any, iterations: int | None) -> None:
    """Let B A, scaled, be the best approximation of its rank of what a 4-bit layer lost.

    Args:
        adapted: PEFT's model, with LoRA beside 4-bit layers; the plain weights are read from its base's files.
        iterations: of a fast approximation; None is exact.

    Raises:
        SpecError: the files are no safetensors.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from huggingface_hub import snapshot_download
    from peft.tuners.lora import Linear4bit
    from peft.utils.loftq_utils import _SafetensorLoader

    base = adapted.get_base_model()
    path = base.config._name_or_path  # noqa: SLF001 - transformers' own name for where it came from
    try:
        if not Path(path).is_dir():
            path = snapshot_download(path, revision=getattr(base, REVISION, None), local_files_only=True)
        files = _SafetensorLoader(adapted, path)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise SpecError(
            f"method loftq reads the plain weights of {path} from model.safetensors, which is not there "
            f"({first_line(error)}); save the model with save_pretrained, or use method qlora"
        ) from None
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            if not isinstance(layer, Linear4bit):
                continue
            weight: Any = layer.get_base_layer().weight
            plain: Any = files.get_tensor(f"{name.removeprefix('base_model.model.')}.weight").to(weight.device).float()  # type: ignore[no-untyped-call]
            lost = plain - dequantize_4bit(weight.data, weight.quant_state).float()
            for adapter in layer.active_adapters:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                left, sizes, right = _leading(lost, down.shape[0], iterations)
                roots = (sizes / layer.scaling[adapter]).sqrt()
                up.copy_(left * roots)
                down.copy_(roots[:, None] * right)


def _leading(matrix: Any, rank: int, iterations: int | None) -> tuple[Any, Any, Any]:
    """Singular vectors (m, rank), values (rank,) and vectors (rank, n) of a matrix (m, n), the largest values first."""
    import torch

    if iterations is None:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]
    left, sizes, right = torch.svd_lowrank(matrix, q=rank, niter=iterations)
    return left, sizes, right.mT
