"""A torch network as an ONNX file: the graph from a trace, the weights attached to it here.

Rules, in order:

1. The trace yields the graph without weights; every parameter is then attached under its own name. So protobuf's limit of
   2 GiB is never met halfway, no weight is copied more than once, and folding is left to whoever runs the graph.
2. A weight whose values are all 16-bit floats (the source was fp16) is stored as such, behind a Cast to float32, which ONNX
   Runtime folds away when it loads the graph: half the bytes, and bit for bit the numbers that torch computes with.
3. Graphs larger than `LARGEST_INLINE` keep their weights in one file beside them, `model.onnx.data`, each at a multiple of
   `ALIGNMENT`, so that it could be mapped.
4. One network gives one sequence of bytes: no producer version, path, comment or time is in them.
5. Nothing but operators of the standard domain, at `OPSET`; a weight that is not finite is refused.

    write_graph(UNet(unet), ports=(Port("latents", …), …), output=Port("prediction", …), path=out / "unet/model.onnx")
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from appliance.errors import BadRequest

OPSET: Final = 17               # the first with LayerNormalization as one operator
IR_VERSION: Final = 8           # the one that belongs to it
LARGEST_INLINE: Final = 1_900_000_000   # bytes of weights; protobuf reads no message of 2 GiB
ALIGNMENT: Final = 4096         # bytes; a page
SMALLEST_HALVED: Final = 1024   # elements; below, a Cast costs more than it saves

Dim = str | int
_TYPES: Final = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: a name, a dimension each as a number or the name of what varies, and an example."""

    name: str
    dims: tuple[Dim, ...]
    example: torch.Tensor | None = None     # None for an output, which is float32


def write_graph(
    network: torch.nn.Module, ports: tuple[Port, ...], output: Port, path: Path, *, largest_inline: int = LARGEST_INLINE
) -> None:
    """Write `network` as an ONNX graph to `path`, and its weights into it or, beyond `largest_inline` bytes, beside it.

    The network's parameters are float32. Raises `BadRequest` where a weight is not finite, `OSError` where nothing can be
    written; the folder must exist.
    """
    model = _traced(network.eval(), ports, output)
    graph = model.graph
    weights = {**dict(network.named_buffers()), **network.state_dict()}     # buffers: also those that no state holds
    inputs = {port.name for port in ports}
    stored = {entry.name: _stored(entry.name, weights[entry.name]) for entry in graph.input if entry.name not in inputs}
    for values, declared in ((graph.input, [_declared(port) for port in ports]), (graph.output, [_declared(output)])):
        del values[:]
        values.extend(declared)
    casts = []
    for name, values in stored.items():
        if values.dtype == np.float16:
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    tensors = {f"{name}.half" if values.dtype == np.float16 else name: values for name, values in stored.items()}
    if sum(values.nbytes for values in tensors.values()) > largest_inline:
        graph.initializer.extend(_beside(path.with_name(path.name + ".data"), tensors))
    else:
        graph.initializer.extend(
            helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, values.tobytes(), raw=True)
            for name, values in tensors.items()
        )
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)


def _traced(network: torch.nn.Module, ports: tuple[Port, ...], output: Port) -> Any:
    """Return the graph of `network` with every parameter as an input, and nothing in it that says where it was made."""
    axes = {port.name: {i: dim for i, dim in enumerate(port.dims) if isinstance(dim, str)} for port in ports}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        # The trace warns of every size that it bakes in and of its own age. What it must not bake in is held to by tests,
        # which run the graphs at other sizes than these examples; why it is this exporter is in ADR 0004.
        warnings.simplefilter("ignore")
        file = Path(folder) / "graph.onnx"
        torch.onnx.export(
            network,
            tuple(port.example for port in ports),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=[port.name for port in ports],
            output_names=[output.name],
            dynamic_axes=axes,
            export_params=False,
            do_constant_folding=False,
        )
        model = onnx.load(file)
    foreign = sorted({node.domain for node in model.graph.node} - {""})
    if foreign:
        raise AssertionError(f"operators of {foreign}")     # the networks are known: this is a defect of ours
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "darkroom", "", ""
    del model.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    return model


def _declared(port: Port) -> Any:
    kind = TensorProto.FLOAT if port.example is None else _TYPES[port.example.dtype]
    return helper.make_tensor_value_info(port.name, kind, list(port.dims))


def _stored(name: str, weight: torch.Tensor) -> NDArray[Any]:
    """Return a weight's values, as float16 where they all are."""
    values = weight.detach().contiguous().numpy()
    if values.dtype != np.float32:
        return values
    if not np.isfinite(values).all():
        raise BadRequest(
            "weights_not_finite", f"the weight {name} holds values that are not finite numbers",
            hint="the file is damaged, or the training that made it diverged",
        )
    if values.size >= SMALLEST_HALVED:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            return half
    return values


def _beside(data: Path, tensors: Mapping[str, NDArray[Any]]) -> list[Any]:
    """Write the weights to the file `data` and return what refers to them there."""
    references = []
    with data.open("wb") as file:
        for name, values in tensors.items():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            entry = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
            entry.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", str(file.tell())), ("length", str(values.nbytes))):
                entry.external_data.add(key=key, value=value)
            file.write(np.ascontiguousarray(values).data)
            references.append(entry)
    return references
