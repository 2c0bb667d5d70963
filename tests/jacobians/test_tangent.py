"""Structured tangents against the matrices that they stand for."""

import pytest
import torch

from lm_eval_coupling.jacobians.tangent import (
    Dense,
    NearIdentity,
    Origin,
    added,
    common_origin,
    dense,
    lifted,
)

BATCH, WIDTH = 2, 5


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def near(origin, seed=0, parts=("low", "rest")):
    left, right = (
        (random(BATCH, WIDTH, 2, seed=seed + i) if "low" in parts else None) for i in (1, 2)
    )
    rest = random(BATCH, WIDTH, WIDTH, seed=seed + 3) if "rest" in parts else None
    return NearIdentity(origin, random(BATCH, WIDTH, seed=seed), left, right, rest)


def matrix_of(tangent, shape):
    """[batch, entries, width] of the root, multiplied out."""
    root = tangent.origin.ancestors[-1]
    return dense(lifted(tangent, shape, root), shape).rows(shape)


def test_the_identity_is_the_identity():
    root = Origin(BATCH, WIDTH)
    identity = NearIdentity.identity(root, torch.zeros(1, dtype=torch.float64))
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(BATCH, -1, -1)
    assert torch.equal(identity.matrix(), eye) and identity.as_origin is root
    assert not identity.matrix(1.0).any()


def test_a_vector_is_one_origin_for_all_that_is_applied_to_it():
    tangent = near(Origin(BATCH, WIDTH))
    assert tangent.as_origin is tangent.as_origin
    weight = random(3, WIDTH)
    applied = Dense(tangent.as_origin, weight)
    shape = torch.Size([BATCH, 3])
    assert torch.allclose(matrix_of(applied, shape), weight @ tangent.matrix())


def test_dense_tangents_are_scaled_and_rearranged_with_their_scale():
    root, shape = Origin(BATCH, WIDTH), torch.Size([BATCH, 4])
    factor = random(BATCH, 4)
    tangent = Dense(root, random(4, WIDTH)).scaled(factor, shape)
    expected = random(4, WIDTH) * factor[..., None]
    assert torch.allclose(tangent.rows(shape), expected)
    split = tangent.mapped(lambda m: m.reshape(BATCH, 2, 2, m.shape[-1]), shape)
    assert torch.allclose(split.values(), expected.reshape(BATCH, 2, 2, WIDTH))
    twice = tangent.scaled(torch.tensor(2.0, dtype=torch.float64), shape)
    assert torch.allclose(twice.rows(shape), 2 * expected)


@pytest.mark.parametrize("parts", [(), ("low",), ("rest",), ("low", "rest")])
def test_chains_of_origins_are_products_of_their_matrices(parts):
    root = Origin(BATCH, WIDTH)
    first = near(root, parts=parts)
    second = near(first.as_origin, seed=7, parts=parts)
    weight = random(3, WIDTH, seed=9)
    shape = torch.Size([BATCH, WIDTH])
    assert torch.allclose(matrix_of(second, shape), second.matrix() @ first.matrix())
    applied = Dense(second.as_origin, weight)
    expected = weight @ second.matrix() @ first.matrix()
    assert torch.allclose(matrix_of(applied, torch.Size([BATCH, 3])), expected)
    assert common_origin([applied, first]) is root


def test_sums_over_different_origins_meet_at_their_nearest():
    root = Origin(BATCH, WIDTH)
    stream = near(root)
    shape = torch.Size([BATCH, WIDTH])
    branch = Dense(stream.as_origin, random(WIDTH, WIDTH, seed=4))
    total = added(stream, branch, shape, shape, shape)
    expected = stream.matrix() + branch.matrix @ stream.matrix()
    assert torch.allclose(matrix_of(total, shape), expected)
    assert isinstance(total, NearIdentity) and total.exact  # a residual starts a new origin


@pytest.mark.parametrize("scales", [(False, False), (True, False), (False, True), (True, True)])
def test_dense_tangents_add_up(scales):
    root, shape = Origin(BATCH, WIDTH), torch.Size([BATCH, 3])
    tangents = []
    for i, is_scaled in enumerate(scales):
        tangent = Dense(root, random(3, WIDTH, seed=i))
        tangents.append(tangent.scaled(random(BATCH, 3, seed=i), shape) if is_scaled else tangent)
    total = added(*tangents, shape, shape, shape)
    expected = sum(tangent.rows(shape) for tangent in tangents)
    assert torch.allclose(dense(total, shape).rows(shape), expected)


def test_a_vector_times_one_number_a_row_is_of_rank_one():
    root, shape = Origin(BATCH, WIDTH), torch.Size([BATCH, WIDTH])
    row, column = random(BATCH, 1, WIDTH), random(BATCH, WIDTH)
    tangent = Dense(root, row).scaled(column, shape)
    left, right = tangent.outer(shape)
    assert torch.allclose(left @ right.mT, tangent.rows(shape))
    assert Dense(root, random(BATCH, WIDTH, WIDTH)).outer(shape) is None
    total = added(near(root), tangent, shape, shape, shape)
    assert torch.allclose(dense(total, shape).rows(shape), near(root).matrix() + left @ right.mT)
