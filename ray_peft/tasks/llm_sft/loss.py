"""What a training pass of text computes: its share of the mean loss of a step's tokens, as in TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Computation
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.evaluate import padded
from ray_peft.tasks.llm_sft.steps import TextPart

if TYPE_CHECKING:
    from torch import Tensor

    from ray_peft.engine.row_dropout import RowDropout


class TextLoss(Computation[TextPart]):
    """The negative log-likelihood of the tokens with loss, divided by their number in the whole step.

    A mixture of experts adds its balancing loss, weighted by its config and averaged over the passes of the step.
    """

    def __init__(self, spec: LlmTrialSpec, model: Any, pad: int, dropout: RowDropout | None = None) -> None:
        """Set up the loss.

        Args:
            spec: decides the precision of matrix products.
            model: with TRL's fused head (model.py), adapted or not.
            pad: the padding token.
            dropout: draws the dropout of each row; None if the model has none, or if torch draws it.
        """
        from ray_peft.tasks.llm_sft.head import head_settings

        self._dropout = dropout
        self._model, self._pad = model, pad
        self._autocasts = spec.train.precision == "bf16"
        config = model.config.get_text_config()
        self._head = head_settings(config)
        balance = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
        self._balance = float(balance) if hasattr(config, "output_router_logits") else 0.0

    @property
    def balances(self) -> bool:
        """True for a mixture of experts with a balancing loss."""
        return self._balance > 0

    def inputs(self, part: TextPart) -> Sequence[Tensor]:
        """ids, attention mask and labels (row, longest) int64; tokens with loss and passes of the step () float32.

        If dropout is drawn by the row, also the keys of tokens (row, longest) int64.
        """
        import torch

        from ray_peft.engine.keyed_dropout import placed

        keys = []
        if self._dropout is not None:
            keys = [placed(torch.tensor(part.keys)[:, None], torch.arange(max(map(len, part.ids)))[None])]
        return [
            padded(part.ids, self._pad, "right"),
            padded([[1] * len(row) for row in part.ids], 0, "right"),
            padded(part.labels, IGNORED, "right"),
            torch.tensor(float(max(part.loss_tokens, 1))),
            torch.tensor(float(part.passes)),
            *keys,
        ]

    def loss(self, *inputs: Tensor) -> Tensor:
        """The pass's share of the step's mean loss [nats]."""
        log_probs, _, balance = self.log_probs(*inputs)
        loss = -log_probs.float().sum() / inputs[3]
        return loss if balance is None else loss + balance

    def log_probs(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of the tokens with loss, from what `inputs` returned.

        Returns:
            They (row, longest - 1), 0 elsewhere; where they stand, of the same shape; and the pass's share of the
            balancing loss (), None without one. If the output layer's gradient is accumulated in place, they are
            (tokens with loss,) in row order, and None stands for where they stand.
        """
        import torch

        from ray_peft.tasks.llm_sft.head import adds_in_place

        ids, mask, labels, _, passes, *keys = inputs
        if self._dropout is not None:
            self._dropout.begin(keys[0])
        if not self._balance and adds_in_place(self._model):
            return self._log_probs_in_place(ids, mask, labels), None, None
        router_settings: dict[str, Any] = {"output_router_logits": True} if self._balance else {}
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._autocasts):
            output = self._model(
                input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **router_settings
            )
        balance = self._balance * output.aux_loss.float() / passes if self._balance else None
        return output.log_probs, output.label_mask, balance

    def _log_probs_in_place(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities of the tokens with loss; the gradient of the output layer is accumulated in place."""
        import torch

        from ray_peft.tasks.llm_sft.head import log_probs

        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._autocasts):
            body = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            following = labels[:, 1:]
            hidden = body.last_hidden_state[:, :-1][following != IGNORED]
            head = self._model.get_output_embeddings()
            return log_probs(head, hidden, following[following != IGNORED], *self._head)
