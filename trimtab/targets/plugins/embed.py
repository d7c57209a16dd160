"""How kernels lie in a graph: each text once, in the model's metadata, and their names in the nodes that launch them.

A layer's kernels are ten times its codes where layers are small, and layers of one shape have the same. A parser shows
a plugin nothing but its node, so the texts are put into the nodes when the graph is handed to one.
"""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from trimtab.errors import BundleError
from trimtab.targets.plugins.aot import Kernel, read_kernels, write_kernels
from trimtab.targets.plugins.qdp import NAMESPACE

ATTRIBUTE = "kernels"
"""Of a plugin's node: names, with a space between two; in front of a parser, the kernels themselves."""

_PREFIX = "trimtab.kernel."


def embed(model: ir.Model, kernels: tuple[Kernel, ...]) -> str:
    """Stores kernels in a model, those that it does not have yet, and gives their names as a node's attribute.

    A name is the SHA-256 of the text: who hashes the nodes of a graph has hashed its kernels.
    """
    names = []
    for kernel in kernels:
        text = kernel.text()
        names.append(hashlib.sha256(text.encode()).hexdigest())
        model.metadata_props[_PREFIX + names[-1]] = text
    return " ".join(names)


def embedded(model: ir.Model, node: ir.Node) -> tuple[Kernel, ...]:
    """The kernels of a plugin's node.

    Raises:
        BundleError: The model does not have them, or they are not what they are named after.
    """
    kernels: list[Kernel] = []
    for name in node.attributes.get_string(ATTRIBUTE, "").split(" "):
        text = model.metadata_props.get(_PREFIX + name)
        if text is None or hashlib.sha256(text.encode()).hexdigest() != name:
            raise BundleError(
                f"the packed layer {node.name} names a kernel {name[:60]!r} that its graph does not have: "
                "compile the bundle again"
            )
        kernels += read_kernels(text)
    return tuple(kernels)


def spell_out(model: ir.Model) -> None:
    """Puts the kernels of a model into the nodes that name them, in place: what a parser reads.

    Raises:
        BundleError: As `embedded`.
    """
    for node in model.graph:
        if ATTRIBUTE in node.attributes and node.domain == NAMESPACE:
            node.attributes.add(ir.AttrString(ATTRIBUTE, write_kernels(embedded(model, node))))
    for key in [key for key in model.metadata_props if key.startswith(_PREFIX)]:
        del model.metadata_props[key]
