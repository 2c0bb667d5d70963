"""Vision transformers that differ in nothing but how they are regularised, trained side by side as one batched model.

Every weight has a leading dimension of members, so that a product is one batched product for all of them. They see the same
images, start from the same weights and are offered the same draws of stochastic depth: what tells them apart is the rate
of stochastic depth and the weight decay alone. A member is an ordinary ``ViTForImageClassification``: transformers'
configuration of it has no stochastic depth, which has no weights and is off in evaluation, so it lives here.
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

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10's colours
_LAYERS = "vit.layers."
_NOT_DECAYED = ("bias", "layernorm", "cls_token", "position_embeddings")  # as in DeiT


@dataclasses.dataclass(frozen=True)
class Member:
    """How one model of the family is regularised."""

    stochastic_depth: float
    weight_decay: float

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"depth-{self.stochastic_depth:g}-decay-{self.weight_decay:g}"


def fresh_model(
    width: int, depth: int, heads: int, patch: int, side: int, classes: list[str], seed: int
):
    """The ViT that every member starts from."""
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
    """Several members as one model; ``weights`` has the names of a ViT's parameters, those of blocks without a number.

    Shapes: [layer, member, …] in blocks, [member, …] elsewhere; float32 on ``device``.
    """

    def __init__(
        self, model: ViTForImageClassification, members: list[Member], device: torch.device
    ) -> None:
        self.config, self.members, self.device = model.config, members, device
        self.weights: dict[str, Tensor] = {}
        own = {name: p.detach() for name, p in model.named_parameters()}
        for name in own:
            if name.startswith(f"{_LAYERS}0."):
                role = name.removeprefix(f"{_LAYERS}0.")
                stacked = torch.stack(
                    [
                        own[f"{_LAYERS}{layer}.{role}"]
                        for layer in range(self.config.num_hidden_layers)
                    ]
                )
                self.weights[role] = stacked[:, None].repeat(
                    1, len(members), *[1] * own[name].dim()
                )
            elif not name.startswith(_LAYERS):
                self.weights[name] = own[name][None].repeat(len(members), *[1] * own[name].dim())
        self.weights = {name: w.to(device).requires_grad_(True) for name, w in self.weights.items()}
        rates = torch.tensor([member.stochastic_depth for member in members])
        self.rates = (torch.linspace(0, 1, self.config.num_hidden_layers)[:, None] * rates).to(
            device
        )
        self.decay = torch.tensor([member.weight_decay for member in members], device=device)

    def decayed(self) -> list[str]:
        """Names of the weights that decay."""
        return [name for name in self.weights if not any(part in name for part in _NOT_DECAYED)]

    def logits(
        self,
        images: Float[Tensor, "image channel side side"],
        dtype: torch.dtype,
        draws: torch.Generator | None = None,
    ) -> Float[Tensor, "member image label"]:
        """What every member says of the same images, with stochastic depth where ``draws`` are given."""
        w = {name: weight.to(dtype) for name, weight in self.weights.items()}
        x = self._embedded(images.to(dtype), w)
        kept = self._kept(len(images), dtype, draws)
        blocks = {
            name: w[name].unbind(0) for name in w if not name.startswith(("vit.", "classifier"))
        }
        for layer in range(self.config.num_hidden_layers):
            x = self._block(x, {name: parts[layer] for name, parts in blocks.items()}, kept[layer])
        return _linear(_normed(x[:, :, 0]), *_after_norm(w, "vit.layernorm", "classifier")).float()

    def _embedded(self, images: Tensor, w: dict[str, Tensor]) -> Tensor:
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

    def _kept(self, images: int, dtype: torch.dtype, draws: torch.Generator | None) -> Tensor:
        """Factor of each branch, [layer, 2, member, image, 1, 1]: 0 or 1 / (1 − rate); all 1 in evaluation."""
        shape = (len(self.rates), 2, len(self.members), images)
        if draws is None:
            return torch.ones(shape, dtype=dtype, device=self.device)[..., None, None]
        drawn = torch.rand(len(self.rates), 2, 1, images, generator=draws, device=self.device)
        rates = self.rates[:, None, :, None]
        return ((drawn >= rates) / (1 - rates)).to(dtype)[..., None, None]

    def _block(self, x: Tensor, w: dict[str, Tensor], kept: Tensor) -> Tensor:
        x = torch.addcmul(x, kept[0], self._attention(_normed(x), w))
        hidden = F.gelu(_linear(_normed(x), *_after_norm(w, "layernorm_after", "mlp.fc1")))
        return torch.addcmul(x, kept[1], _linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"]))

    def _attention(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        joint = _after_norm(w, "layernorm_before", *(f"attention.{part}_proj" for part in "qkv"))
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
        """One member by itself."""
        model = ViTForImageClassification(self.config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                layer, _, role = name.removeprefix(_LAYERS).partition(".")
                of_block = name.startswith(_LAYERS)
                parameter.copy_(
                    self.weights[role][int(layer), index] if of_block else self.weights[name][index]
                )
        return model


class Optimiser:
    """AdamW with a weight decay of its own for every member, and gradients clipped member by member."""

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
        """One step with this learning rate, from the gradients that are there."""
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
        """The tensor with the members first."""
        return tensor if name.startswith(("vit.", "classifier")) else tensor.transpose(0, 1)


def normalised(
    images: UInt8[Tensor, "image channel side side"],
) -> Float[Tensor, "image channel side side"]:
    """Colours with mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(
    images: UInt8[Tensor, "image channel side side"], pad: int, draws: torch.Generator
) -> Tensor:
    """Every image moved by up to ``pad`` pixels each way (zeros come in), and mirrored or not; normalised."""
    count, side, device = len(images), images.shape[-1], images.device
    padded = F.pad(normalised(images), [pad] * 4)
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


def mixed(images: Tensor, targets: Tensor, draws: random.Random) -> tuple[Tensor, Tensor]:
    """A box of the previous image in every one (CutMix), its area drawn evenly, and targets in proportion."""
    side = images.shape[-1]
    length = round(side * draws.random() ** 0.5)
    top, left = (draws.randrange(side - length + 1) for _ in "yx")
    box = (..., slice(top, top + length), slice(left, left + length))
    images, previous, share = images.clone(), images.roll(1, 0), (length / side) ** 2
    images[box] = previous[box]
    return images, (1 - share) * targets + share * targets.roll(1, 0)


def _normed(x: Tensor) -> Tensor:
    """Layer norm without its scale and shift, which :func:`_after_norm` puts into the next product."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _after_norm(w: dict[str, Tensor], norm: str, *linear: str) -> tuple[Tensor, Tensor]:
    """Weight [member, out, in] and bias of several linear layers side by side, with the scale and shift of a norm before."""
    weight = torch.cat([w[f"{name}.weight"] for name in linear], 1)
    bias = torch.cat([w[f"{name}.bias"] for name in linear], 1)
    shift = torch.baddbmm(bias[..., None], weight, w[f"{norm}.bias"][..., None])[..., 0]
    return weight * w[f"{norm}.weight"][:, None], shift


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[member, …, in] → [member, …, out]."""
    flat = torch.baddbmm(
        bias[:, None], x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2)
    )
    return flat.view(*x.shape[:-1], -1)
