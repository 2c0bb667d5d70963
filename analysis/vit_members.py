"""Vision transformers that differ only in regularization, trained as one batched model.

Every weight has a leading dimension of members, so that one batched product serves all of them.
Members see the same images, start from the same weights and use the same draws of stochastic depth;
only the rate of stochastic depth and the weight decay differ. A member is an ordinary
``ViTForImageClassification``. Stochastic depth lives here: it has no weights, is off in evaluation,
and transformers' ViT does not have it.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10's channels
_LAYERS = "vit.layers."
_NOT_DECAYED = ("bias", "layernorm", "cls_token", "position_embeddings")  # as in DeiT


@dataclasses.dataclass(frozen=True)
class Member:
    """Regularization of one model of the family."""

    stochastic_depth: float
    weight_decay: float

    @property
    def name(self) -> str:
        """Name of the member's folder."""
        return f"depth-{self.stochastic_depth:g}-decay-{self.weight_decay:g}"


def fresh_model(
    width: int, depth: int, heads: int, patch: int, side: int, classes: list[str], seed: int
):
    """Return the ViT that every member starts from."""
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


class Members:
    """Several members as one model.

    ``weights`` has the names of a ViT's parameters, without the number of the block. Shapes are
    [layer, member, …] for blocks and [member, …] elsewhere; float32 on ``device``.
    """

    def __init__(
        self, model: ViTForImageClassification, members: list[Member], device: torch.device
    ) -> None:
        self.config, self.members, self.device = model.config, members, device
        layers, count = self.config.num_hidden_layers, len(members)
        own = {name: p.detach() for name, p in model.named_parameters()}
        weights: dict[str, Tensor] = {}
        for name, weight in own.items():
            role = name.removeprefix(f"{_LAYERS}0.")
            if role != name:
                stacked = torch.stack([own[f"{_LAYERS}{layer}.{role}"] for layer in range(layers)])
                weights[role] = stacked[:, None].repeat(1, count, *[1] * weight.dim())
            elif not name.startswith(_LAYERS):
                weights[name] = weight[None].repeat(count, *[1] * weight.dim())
        self.weights = {name: w.to(device).requires_grad_(True) for name, w in weights.items()}
        rates = torch.tensor([member.stochastic_depth for member in members])
        self.rates = (torch.linspace(0, 1, layers)[:, None] * rates).to(device)
        self.decay = torch.tensor([member.weight_decay for member in members], device=device)

    def decayed(self) -> list[str]:
        """Return the names of the weights that decay."""
        return [name for name in self.weights if not any(part in name for part in _NOT_DECAYED)]

    def logits(
        self,
        images: Float[Tensor, "image channel side side"],
        dtype: torch.dtype,
        draws: torch.Generator | None = None,
    ) -> Float[Tensor, "member image label"]:
        """Return every member's logits of the same images, with stochastic depth if ``draws``."""
        w = {name: weight.to(dtype) for name, weight in self.weights.items()}
        x = self._embed(images.to(dtype), w)
        kept = self._branch_factors(len(images), dtype, draws)
        blocks = {
            name: w[name].unbind(0) for name in w if not name.startswith(("vit.", "classifier"))
        }
        for layer in range(self.config.num_hidden_layers):
            x = self._block(x, {name: parts[layer] for name, parts in blocks.items()}, kept[layer])
        return _linear(
            _normalize_layer(x[:, :, 0]), *_fold_norm(w, "vit.layernorm", "classifier")
        ).float()

    def _embed(self, images: Tensor, w: dict[str, Tensor]) -> Tensor:
        size, name = self.config.patch_size, "vit.embeddings.patch_embeddings.projection"
        patches = rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=size, q=size)
        x = _linear(
            patches.expand(len(self.members), -1, -1),
            w[f"{name}.weight"].flatten(2),
            w[f"{name}.bias"],
        )
        x = rearrange(x, "m (b t) d -> m b t d", b=len(images))
        classes = w["vit.embeddings.cls_token"].expand(-1, len(images), -1, -1)
        return torch.cat([classes, x], 2) + w["vit.embeddings.position_embeddings"]

    def _branch_factors(
        self, images: int, dtype: torch.dtype, draws: torch.Generator | None
    ) -> Tensor:
        """Return each branch's factor, 0 or 1 / (1 − rate): [layer 2 member image 1 1]."""
        shape = (len(self.rates), 2, len(self.members), images)
        if draws is None:
            return torch.ones(shape, dtype=dtype, device=self.device)[..., None, None]
        drawn = torch.rand(len(self.rates), 2, 1, images, generator=draws, device=self.device)
        rates = self.rates[:, None, :, None]
        return ((drawn >= rates) / (1 - rates)).to(dtype)[..., None, None]

    def _block(self, x: Tensor, w: dict[str, Tensor], kept: Tensor) -> Tensor:
        x = torch.addcmul(x, kept[0], self._attention(_normalize_layer(x), w))
        hidden = F.gelu(_linear(_normalize_layer(x), *_fold_norm(w, "layernorm_after", "mlp.fc1")))
        return torch.addcmul(x, kept[1], _linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"]))

    def _attention(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        joint = _fold_norm(w, "layernorm_before", *(f"attention.{part}_proj" for part in "qkv"))
        heads = rearrange(
            _linear(x, *joint),
            "m b t (three h d) -> three (m b) h t d",
            three=3,
            h=self.config.num_attention_heads,
        )
        mixed = rearrange(
            F.scaled_dot_product_attention(*heads), "(m b) h t d -> m b t (h d)", m=len(x)
        )
        return _linear(mixed, w["attention.o_proj.weight"], w["attention.o_proj.bias"])

    def model_of(self, index: int) -> ViTForImageClassification:
        """Return one member as a model of its own."""
        model = ViTForImageClassification(self.config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                layer, _, role = name.removeprefix(_LAYERS).partition(".")
                is_block = name.startswith(_LAYERS)
                parameter.copy_(
                    self.weights[role][int(layer), index] if is_block else self.weights[name][index]
                )
        return model


class Optimizer:
    """AdamW with each member's own weight decay and gradient clipping."""

    def __init__(self, members: Members, clip: float = 1.0) -> None:
        self.members, self.clip = members, clip
        weights = [*members.weights.values()]
        self.adam = torch.optim.AdamW(
            weights,
            lr=0.0,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            fused=members.device.type != "mps",
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Make one step at this learning rate from the current gradients."""
        members = self.members
        gradients = {
            name: self._by_member(name, weight.grad) for name, weight in members.weights.items()
        }
        squares = sum(
            g.float().square().sum(dim=[i for i in range(g.dim()) if i != 0])
            for g in gradients.values()
        )
        factor = (self.clip / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)
        for gradient in gradients.values():
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
        for name in members.decayed():
            weight = self._by_member(name, members.weights[name])
            weight.mul_((1 - rate * members.decay).view(-1, *[1] * (weight.dim() - 1)))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def _by_member(self, name: str, tensor: Tensor) -> Tensor:
        """Return a view of the tensor with members as the first dimension."""
        return tensor if name.startswith(("vit.", "classifier")) else tensor.transpose(0, 1)


def normalize(
    images: UInt8[Tensor, "image channel side side"],
) -> Float[Tensor, "image channel side side"]:
    """Scale channels to mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(
    images: UInt8[Tensor, "image channel side side"], pad: int, draws: torch.Generator
) -> Tensor:
    """Normalize, shift each image by up to ``pad`` pixels each way, and mirror half of them."""
    count, side, device = len(images), images.shape[-1], images.device
    padded = F.pad(normalize(images), [pad] * 4)
    top, left = torch.randint(2 * pad + 1, (2, count, 1), generator=draws, device=device)
    along = torch.arange(side, device=device)
    mirrored = torch.rand(count, 1, generator=draws, device=device) < 0.5
    columns = left + torch.where(mirrored, side - 1 - along, along)
    rows, image, channel = (
        top + along,
        torch.arange(count, device=device),
        torch.arange(3, device=device),
    )
    return padded[
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    ]


def cut_mix(images: Tensor, targets: Tensor, draws: random.Random) -> tuple[Tensor, Tensor]:
    """Paste a box of the previous image into each one (CutMix), and mix targets in proportion."""
    side = images.shape[-1]
    length = round(side * draws.random() ** 0.5)
    top, left = (draws.randrange(side - length + 1) for _ in "yx")
    box = (..., slice(top, top + length), slice(left, left + length))
    images, previous, share = images.clone(), images.roll(1, 0), (length / side) ** 2
    images[box] = previous[box]
    return images, (1 - share) * targets + share * targets.roll(1, 0)


def _normalize_layer(x: Tensor) -> Tensor:
    """Apply layer norm without scale and shift, which :func:`_fold_norm` adds to the next layer."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _fold_norm(w: dict[str, Tensor], norm: str, *linear: str) -> tuple[Tensor, Tensor]:
    """Fold a norm's scale and shift into the linear layers after it; join these side by side.

    Returns weight [member, out, in] and bias [member, out].
    """
    weight = torch.cat([w[f"{name}.weight"] for name in linear], 1)
    bias = torch.cat([w[f"{name}.bias"] for name in linear], 1)
    shift = torch.baddbmm(bias[..., None], weight, w[f"{norm}.bias"][..., None])[..., 0]
    return weight * w[f"{norm}.weight"][:, None], shift


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply each member's linear layer: [member, …, in] → [member, …, out]."""
    flat = torch.baddbmm(
        bias[:, None], x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2)
    )
    return flat.view(*x.shape[:-1], -1)
