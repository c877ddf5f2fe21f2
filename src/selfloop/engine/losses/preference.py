"""Direct preference optimisation: rows come in pairs, the chosen answer and then the rejected one."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.losses.inputs import LossInputs


def dpo(batch: LossInputs) -> Float[Tensor, " G"]:
    """Per-pair loss (G,): -(1 - s) * logsigmoid(delta) - s * logsigmoid(-delta), s = ``label_smoothing``.

    delta = beta * (sum_chosen w (lp - ref) - sum_rejected w (lp - ref)), over the targets that are not masked, with
    ``ref`` the reference policy's logprobs. A pair without a trained token has no loss.
    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7; the smoothing is conservative DPO, Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf.
    """
    delta_G, smoothing = _delta_G(batch), batch.config["label_smoothing"]
    loss_G = -(1 - smoothing) * F.logsigmoid(delta_G) - smoothing * F.logsigmoid(-delta_G)
    return torch.where(trained_pairs_G(batch), loss_G, 0.0)


def dpo_metrics(batch: LossInputs) -> dict[str, Shaped[Tensor, ""]]:
    """Sums over the trained pairs, to be reported as means: ``accuracy`` (delta > 0) and ``margin`` (delta)."""
    delta_G, trained_G = _delta_G(batch).detach().double(), trained_pairs_G(batch)
    return {"accuracy": ((delta_G > 0) & trained_G).sum(), "margin": (delta_G * trained_G).sum()}


def trained_pairs_G(batch: LossInputs) -> Bool[Tensor, " G"]:
    """True where either row has a target that is not masked and whose weight is not zero."""
    trained_T = batch.active & (batch.inputs["weights"] != 0)
    return torch.stack([rows.any() for rows in trained_T.split(_pair_lengths(batch))])


def _delta_G(batch: LossInputs) -> Float[Tensor, " G"]:
    weights_T = batch.inputs["weights"]
    counted_T = batch.active & (weights_T != 0)
    drift_T = torch.where(counted_T, batch.logprobs - batch.inputs["ref_logprobs"], 0.0)
    sums_B = torch.stack([row.sum() for row in (torch.where(counted_T, weights_T, 0.0) * drift_T).split(batch.lengths)])
    return batch.config["beta"] * (sums_B[::2] - sums_B[1::2])


def _pair_lengths(batch: LossInputs) -> list[int]:
    assert len(batch.lengths) % 2 == 0, "a pair is never divided"
    return [a + b for a, b in zip(batch.lengths[::2], batch.lengths[1::2], strict=True)]
