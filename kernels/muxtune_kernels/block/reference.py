"""The block operators in plain torch. Shape suffixes as in `ops`."""

import torch
from torch import Tensor


def add_rms_norm(
    x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    sum_TD = x_TD if added_TD is None else (x_TD.float() + added_TD.float()).to(x_TD.dtype)
    wide_TD = sum_TD.float()
    rstd_T = torch.rsqrt(wide_TD.square().mean(1) + eps)
    normed_TD = wide_TD * rstd_T[:, None] * weight_D.float()
    return sum_TD, normed_TD.to(x_TD.dtype), rstd_T


def rms_norm_backward(
    dnormed_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, dresidual_TD: Tensor | None
) -> Tensor:
    scaled_TD = x_TD.float() * rstd_T[:, None]
    g_TD = dnormed_TD.float() * weight_D.float()
    dx_TD = (g_TD - scaled_TD * (g_TD * scaled_TD).mean(1, keepdim=True)) * rstd_T[:, None]
    if dresidual_TD is not None:
        dx_TD = dx_TD + dresidual_TD.float()
    return dx_TD.to(x_TD.dtype)


def rotated(x_THE: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    left, right = x_THE.float().chunk(2, dim=-1)
    turned = (left * cos_T1P - right * sin_T1P, right * cos_T1P + left * sin_T1P)
    return torch.cat(turned, dim=-1).to(x_THE.dtype)


def _angles(cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
    index_T = position_T.long()
    return cos_LP[index_T][:, None], sin_LP[index_T][:, None]


def rotate_(qkv_TC: Tensor, cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor, heads) -> None:
    turned = heads.num_heads + heads.num_kv_heads
    part_THE = qkv_TC[:, : turned * heads.head_dim].unflatten(1, (turned, heads.head_dim))
    part_THE.copy_(rotated(part_THE, *_angles(cos_LP, sin_LP, position_T)))


def rotate_backward(
    dq_THE: Tensor, dk_TKE: Tensor, dv_TKE: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    position_T: Tensor, heads,
) -> Tensor:  # fmt: skip
    cos_T1P, sin_T1P = _angles(cos_LP, sin_LP, position_T)
    turned = (rotated(d, cos_T1P, -sin_T1P) for d in (dq_THE, dk_TKE))
    return torch.cat([d.flatten(1) for d in (*turned, dv_TKE)], dim=1)


def swiglu(gate_up_TC: Tensor) -> Tensor:
    gate, up = gate_up_TC.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_TC.dtype)


def swiglu_backward_(dout_TF: Tensor, gate_up_TC: Tensor) -> Tensor:
    gate, up = gate_up_TC.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    dout = dout_TF.float()
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_up_TC.copy_(torch.cat((dgate, dout * gate * sigmoid), dim=1))
    return gate_up_TC
