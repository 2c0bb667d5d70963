r"""Exact Jacobians of the blocks of a residual stream.

**Estimand.** J^l_{t2 t1} = ∂f^l_{t2} / ∂x^{l-1}_{t1} (paper, eq. 8) for one block l, one input
token t1 and one output token t2. F^l maps the stream before the block (``hook_resid_pre``) to the
stream after it (``hook_resid_post``), f^l = F^l − identity: the skip connection is left out, and so
is the final norm. Row = output coordinate, column = input coordinate.

**No approximation.** Nothing is averaged or summed over positions. Attention patterns, norms and
routing are differentiated with everything else. In comparison, TransformerLens' ``JacobianLens`` is
averaged and reaches to the final layer. The paper's release differentiates norm∘block in its last
layer.

**Levels.** ``closed`` needs matrix products only, where every step of the block has a rule
(:mod:`.rules`). ``token-local`` needs one-token passes and a softmax attention. ``autodiff`` runs
the whole sequence and works for any model. ``auto`` takes the first level that is certified.

**Certificate.** The relative error of uᵀJ against the block's own derivative by one backward pass,
u being a fixed random direction (:mod:`.certify`). It must be at most 1e-4 in float32 and 1e-10 in
float64. A level that fails it falls to the next; a result that fails at every level is recorded as
failed, with its error.

**Differences of outputs.** A part of a block that runs without gradients, in NumPy or through
``.item()`` is seen by no level and no backward pass. So J v is compared with differences of outputs
(:mod:`.differences`): for every block once, along two directions, and each time for the levels that
rest on autograd. A block that does not move as its gradients say is refused.

A model is asked for nothing beyond :mod:`.protocol`.
"""
