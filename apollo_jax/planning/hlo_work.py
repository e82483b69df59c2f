# SPDX-License-Identifier: Apache-2.0
"""What one instruction of a compiled program costs: FLOPs of products and kernels, memory traffic.

The compiler's own cost analysis counts a Pallas kernel as nothing. Here an attention kernel counts
by the shapes of its operands, any other by the estimate that its author gave to `pallas_call`; one
without is named, not guessed. Traffic is what an instruction reads and writes in the chip's main
memory: operands and results that the compiler did not put into vector memory, of a stack of layers
only the slice that is used.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from apollo_jax.planning.hlo_module import Instruction, Module, main_memory_size, shapes, size

# Products of an attention kernel: two forward; backward it makes the scores again.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_FUSED_BACKWARD = 5  # a dkv kernel that also makes dq
_FREE = (  # name or move nothing
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "partition-id", "replica-id", "after-all", "opt-barrier", "iota", "add-dependency"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "get-tuple-element")


class Work(NamedTuple):
    """FLOPs, those of them in Pallas kernels, bytes of main memory, kernels of unknown FLOPs."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    unknown: tuple[str, ...] = ()


def work(module: Module, computation: dict[str, Instruction], i: Instruction) -> Work:
    """What one run of an instruction costs, fused computations included."""
    flops = kernels = 0.0
    unknown: list[str] = []
    places = [(computation, i)]
    if i.opcode == "fusion":
        places = [
            (module.computations[name], inner)
            for name in _computations(module, i)
            for inner in module.computations[name].values()
        ]
    for around, inner in places:
        if inner.opcode in ("convolution", "dot"):
            flops += _product(inner, around)
        elif is_kernel(inner):
            counted = _kernel(inner)
            if counted is None:
                unknown.append(inner.name.partition(".")[0])
            kernels += counted or 0.0
    return Work(flops + kernels, kernels, traffic(module, computation, i), tuple(unknown))


def is_kernel(i: Instruction) -> bool:
    return i.opcode == "custom-call" and 'target="tpu_custom_call"' in i.attributes


def _computations(module: Module, i: Instruction) -> list[str]:
    """The fused computation of a fusion, and those fused into it."""
    found = [name for name, _ in module.callees(i)]
    for name in found:
        for inner in module.computations[name].values():
            if inner.opcode == "fusion":
                found += [n for n, _ in module.callees(inner)]
    return found


# ------------------------------------------------------------------------------------ main memory
def traffic(module: Module, computation: dict[str, Instruction], i: Instruction) -> float:
    """Bytes that an instruction reads and writes in main memory."""
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0.0
    if i.opcode == "copy-start":  # (destination, source, flag): one of them is in main memory
        return main_memory_size(i.type)
    if i.opcode == "fusion":
        (name, _), *_ = [*module.callees(i), ("", 0)]
        if name:
            return _fusion(module, computation, i, module.computations[name])
    types = [computation[o].type for o in i.operands if o in computation]
    if i.opcode in _SLICES:
        return main_memory_size(i.type) + min(main_memory_size(types[0]), size(i.type))
    if i.opcode == "dynamic-update-slice":
        return main_memory_size(types[1]) + min(main_memory_size(i.type), size(types[1]))
    return main_memory_size(i.type) + sum(map(main_memory_size, types))


def _fusion(
    module: Module,
    computation: dict[str, Instruction],
    i: Instruction,
    fused: dict[str, Instruction],
) -> float:
    parameters = {
        int(p.operands[0]): p for p in fused.values() if p.opcode == "parameter" and p.operands
    }
    read = 0.0
    for number, operand in enumerate(i.operands):
        whole = main_memory_size(computation[operand].type) if operand in computation else 0.0
        if whole and number in parameters:
            read += min(whole, _read(module, fused, parameters[number]))
    *_, root = fused.values()
    made = [fused[o] for o in root.operands if o in fused] if root.opcode == "tuple" else [root]
    return read + min(main_memory_size(i.type), sum(_written(fused, m) for m in made))


def _read(module: Module, fused: dict[str, Instruction], value: Instruction) -> float:
    """Bytes of a fused computation's value that are looked at."""
    total = 0.0
    for user in fused.values():
        for place, operand in enumerate(user.operands):
            if operand != value.name:
                continue
            if user.opcode in _SLICES and place == 0:
                total += size(user.type)
            elif user.opcode in _VIEWS:
                total += _read(module, fused, user)
            elif user.opcode == "fusion" and (inner := next(module.callees(user), None)):
                inside = module.computations[inner[0]]
                total += sum(
                    _read(module, inside, p)
                    for p in inside.values()
                    if p.opcode == "parameter" and p.operands == (str(place),)
                )
            elif user.opcode != "dynamic-update-slice" or place:  # it is updated in place
                total += size(value.type)
    return min(total, size(value.type))


def _written(fused: dict[str, Instruction], value: Instruction) -> float:
    """Bytes that a fusion writes for one of its results: of an update in place only the update."""
    while value.opcode in _VIEWS and value.operands and value.operands[0] in fused:
        value = fused[value.operands[0]]
    if value.opcode == "dynamic-update-slice" and value.operands[1] in fused:
        return size(fused[value.operands[1]].type)
    return 0.0 if value.opcode == "parameter" else size(value.type)


# ------------------------------------------------------------------------------------------ FLOPs
def _product(i: Instruction, computation: dict[str, Instruction]) -> float:
    """2 x multiplications; a convolution's by the window positions that lie inside its input."""
    (_, out), *_ = shapes(i.type)
    left, right = (shapes(computation[o].type)[0][1] for o in i.operands[:2])
    if i.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        contracted = [int(n) for n in axes[1].split(",") if n] if axes else []
        return 2.0 * math.prod(out) * math.prod(left[n] for n in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    of_left, of_right, of_out = labels.groups()
    pairs = 1.0
    spatial = [c for c in of_left if c.isdigit()]
    for n, label in enumerate(spatial):
        sizes = (left[of_left.index(label)], right[of_right.index(label)])
        pairs *= _positions(*sizes, out[of_out.index(label)], _window(i.attributes, n))
    features = right[of_right.index("i")]
    return 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * features * pairs


def _window(attributes: str, n: int) -> tuple[int, int, int, int]:
    """(stride, low padding, input dilation, window dilation) of spatial dimension n."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(p.split("=") for p in found[1].split(" ")) if found else {}
    stride, into, window = (
        int(parts[k].split("x")[n]) if k in parts else 1
        for k in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(parts["pad"].split("x")[n].split("_")[0]) if "pad" in parts else 0
    return stride, low, into, window


def _positions(size: int, kernel: int, out: int, window: tuple[int, int, int, int]) -> int:
    """Pairs of a kernel's and an output's place that meet an element of the input."""
    stride, low, into, dilation = window
    length = (size - 1) * into + 1
    at = np.arange(kernel) * dilation - low
    first, last = np.maximum(0, -(at // stride)), np.minimum(out - 1, (length - 1 - at) // stride)
    # elements lie `into` apart: stride * output = -at modulo `into`, an output in every `period`
    common = math.gcd(stride, into)
    period = into // common
    rest = -at // common * pow(stride // common, -1, period) % period
    inside = (last - rest) // period - (first - 1 - rest) // period
    return int(inside[(at % common == 0) & (last >= first)].sum())


def _kernel(i: Instruction) -> float | None:
    """FLOPs of a kernel: an attention kernel's by its shapes, else what its author estimates."""
    products = next((n for k, n in _KERNEL_PRODUCTS.items() if i.name.startswith(k)), None)
    found = re.search(r"operand_layout_constraints=\{(.*?\})\}", i.attributes)
    if products is None or found is None:
        estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.attributes)
        return float(estimate[1]) if estimate else None
    if products == 4 and re.search(r'use_fused_bwd_kernel\\*": true', i.attributes):
        products = _FUSED_BACKWARD
    operands = shapes(found[1])
    blocks = operands[0][1]
    floats = [dims for dtype, dims in operands if dtype in ("bf16", "f32") and len(dims) >= 3]
    integers = sum(dtype == "s32" for dtype, _ in operands)
    *outer, length, width = floats[0]
    keys = floats[1][-2]
    flops = 2.0 * products * math.prod(outer) * length * keys * width
    if integers > 2:  # beside two segment ids the queries' places: a causal mask
        rows, columns = blocks[-2:]
        flops *= (rows * columns + max(rows, columns)) / (2 * rows * columns)
    return flops
