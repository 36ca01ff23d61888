"""The device mesh, and which axis of which parameter lies on which mesh axis: rules as data.

Mesh axes: ``data`` splits the batch; ``fsdp`` splits the batch and the parameters; ``tensor`` splits heads, MLP width and
vocabulary. Masks and optimiser moments are laid out like their parameters.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.fields import LARGEST, Range, check_fields
from spdf_jax.tree import along_state, map_named

#: Leaf name -> logical axes, first match wins; leaves matched by nothing are replicated.
PARAMETER_AXES: Sequence[tuple[str, tuple[str, ...]]] = (
    (r"^blocks/(attn_[qkv]|mlp_up|mlp_gate)/kernel$", ("layers", "embed", "wide")),
    (r"^blocks/(attn_o|mlp_down)/kernel$", ("layers", "wide", "embed")),
    # As live blocks, [layers, output block, which of its blocks, row, column] (`spdf_jax.sparsity.blocks`).
    (r"^blocks/(attn|mlp)_.*/kernel$", ("layers", "wide", "block", "embed", "block")),
    (r"^wte/embedding$", ("wide", "embed")),
    (r"^head/kernel$", ("embed", "wide")),
)
#: Logical axis -> mesh axis.
LOGICAL_TO_MESH = {"layers": None, "block": None, "embed": "fsdp", "wide": "tensor"}
#: Mesh axes that split a batch, and the one that splits heads and other wide axes of activations.
BATCH_AXES, WIDE_AXIS = ("data", "fsdp"), "tensor"


Devices = Annotated[int, Range(least=1, most=LARGEST, special=-1)]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left.

    Attributes:
      data: splits the batch.
      fsdp: splits the batch, and the parameters' d_model axis.
      tensor: splits heads, MLP width and vocabulary.
    """

    data: Devices = -1
    fsdp: Devices = 1
    tensor: Devices = 1

    def __post_init__(self) -> None:
        check_fields(self, "mesh")
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise InputError(f"mesh: at most one of its sizes may be -1, all devices that are left, got {self}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first of `devices`, by default those of this machine.

    Raises:
      InputError: sizes that do not fit the devices at hand.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        fixed = -int(np.prod(sizes))
        if len(devices) % fixed:
            raise InputError(f"mesh: {len(devices)} devices are not divisible by {fixed}, got {config}")
        sizes[sizes.index(-1)] = len(devices) // fixed
    count = int(np.prod(sizes))
    if count > len(devices):
        raise InputError(f"mesh: {config} asks for {count} devices, {len(devices)} are there")
    # Linen's modules expect automatic axes; make_mesh would default to explicit ones.
    automatic = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), (*BATCH_AXES, WIDE_AXIS), axis_types=automatic, devices=devices[:count])
    except NotImplementedError as error:
        # JAX's own exception, and the only sign it gives that sizes are no products of a TPU torus's axes: not a gap of ours.
        found = re.search(r"\[[\d, ]+\]", str(error))
        axes = f" ({found[0]} are left of it)" if found else ""
        raise InputError(
            f"mesh: {config} does not lie along the axes of the pod{axes}: each size must be a product of some of them"
        ) from None


def batch_devices(mesh: Mesh) -> int:
    """How many devices share a batch.

    >>> batch_devices(jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor")))
    1
    """
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, rank: int, axis: int | None = None) -> NamedSharding:
    """Splits the batch axis, by default the last but one (``[B, T]``, ``[A, B, T]``); an array without it lies whole."""
    axis = rank - 2 if axis is None else axis
    return NamedSharding(mesh, PartitionSpec(*(BATCH_AXES if i == axis else None for i in range(rank))))


def split_wide(x: jax.Array) -> jax.Array:
    """`x` with its last axis split over ``tensor`` of the mesh that ``jax.set_mesh`` set, evenly or not; unchanged without.

    Logits need it: their vocabulary need not divide, so that nothing in the embedding's layout says how to split them.
    """
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free, LOGICAL_TO_MESH["wide"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """A `NamedSharding` for every leaf of `params` (arrays or shapes). An axis that its mesh axis does not
    divide stays whole.
    """

    def spec(name: str, leaf: Any) -> NamedSharding:
        rank = len(leaf.shape)
        axes = next((axes for pattern, axes in PARAMETER_AXES if len(axes) == rank and re.search(pattern, name)), None)
        if axes is None:  # norms, biases, and the 0-d mask of a dense leaf
            return replicated(mesh)
        mesh_axes = (LOGICAL_TO_MESH[a] for a in axes)
        fits = (m if m and n % mesh.shape[m] == 0 else None for m, n in zip(mesh_axes, leaf.shape, strict=True))
        return NamedSharding(mesh, PartitionSpec(*fits))

    return map_named(spec, params)


def optimizer_shardings(mesh: Mesh, tx: optax.GradientTransformation, opt_state: Any, params: Any) -> Any:
    """Per-weight state like its weight; everything else (counts, factored moments) replicated."""
    whole = replicated(mesh)
    like_weights = along_state(tx, opt_state, parameter_shardings(mesh, params), whole)
    return jax.tree.map(lambda leaf, s: s if len(s.spec) == len(leaf.shape) else whole, opt_state, like_weights)


def target_platform() -> str:
    """Where code traced now will run: the platform of the mesh set by ``jax.set_mesh``, else JAX's default backend.

    The two differ when a program for a TPU is compiled on a machine that has none.

    Returns:
      ``cpu``, ``gpu`` or ``tpu``.

    >>> with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])):
    ...     target_platform()
    'cpu'
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def split_over_mesh(mesh: Any, batch: int, heads: int) -> tuple[tuple[str, ...], str | None]:
    """Mesh axes that split the batch and the heads, where they divide them."""
    batch_axes: tuple[str, ...] = ()
    for axis in BATCH_AXES:
        if batch % mesh.shape.get(axis, batch + 1) == 0:
            batch_axes, batch = (*batch_axes, axis), batch // mesh.shape[axis]
    return batch_axes, WIDE_AXIS if heads % mesh.shape.get(WIDE_AXIS, heads + 1) == 0 else None
