"""What an ONNX graph refers to outside itself, read from its bytes without the onnx package.

A verified graph is still a program for ONNX Runtime. Before it gets there, the protobuf is walked (wire format only, no
tensor is decoded or copied) and everything that leads out of the bundle is refused:

1. ORT format (`ORTM` at byte 4, which ONNX Runtime tries before protobuf and which a protobuf can imitate), more fields or
   deeper nesting than the limits, fields unknown to ONNX IR 13, and a singular field given twice, which readers merge each
   in its own way.
2. Training graphs, model-local functions and device configurations: an export for inference has none once it is inlined.
3. Nodes of any operator domain but `ai.onnx`, `ai.onnx.ml` and `com.microsoft`, in any subgraph, since another one needs a
   library of native code; and EPContext, which carries or names a compiled blob.
4. External data anywhere but in an initializer of the main graph, with a location that is not a plain path to a file of the
   bundle, or a range beyond that file's end. A location may also be an address in memory (`*/_ORT_MEM_ADDR_/*`): those that
   come from a file would let it read the process.

Field numbers are those of onnx.proto3 (onnx 1.19 to 1.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from appliance.errors import VerificationRefused
from appliance.trust.manifest import plain_path

DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
LARGEST_GRAPH: Final = (2 << 30) - 1    # bytes; protobuf's own limit
MOST_FIELDS: Final = 2_000_000          # an SD 1.5 UNet has some 60,000
DEEPEST_MESSAGE: Final = 40             # protobuf messages inside one another

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1   # TensorProto.DataLocation

# What a field may be: a wire type, or the message inside; a star marks repeated ones (numbers may then be packed).
# Types, value infos and quantization annotations hold no tensors and no nodes, so they stay opaque bytes.
_FIELDS: Final[Mapping[str, Mapping[int, str]]] = {
    "Model": {1: "varint", 2: "bytes", 3: "bytes", 4: "bytes", 5: "varint", 6: "bytes", 7: "Graph", 8: "bytes*", 14: "bytes*"},
    "Graph": {1: "Node*", 2: "bytes", 5: "Tensor*", 10: "bytes", 11: "bytes*", 12: "bytes*", 13: "bytes*", 14: "bytes*",
              15: "Sparse*", 16: "bytes*"},
    "Node": {1: "bytes*", 2: "bytes*", 3: "bytes", 4: "bytes", 5: "Attribute*", 6: "bytes", 7: "bytes", 8: "bytes",
             9: "bytes*"},
    "Attribute": {1: "bytes", 2: "fixed32", 3: "varint", 4: "bytes", 5: "Tensor", 6: "Graph", 7: "fixed32*", 8: "varint*",
                  9: "bytes*", 10: "Tensor*", 11: "Graph*", 13: "bytes", 14: "bytes", 15: "bytes*", 20: "varint",
                  21: "bytes", 22: "Sparse", 23: "Sparse*"},
    "Tensor": {1: "varint*", 2: "varint", 3: "bytes", 4: "fixed32*", 5: "varint*", 6: "bytes*", 7: "varint*", 8: "bytes",
               9: "bytes", 10: "fixed64*", 11: "varint*", 12: "bytes", 13: "Entry*", 14: "varint", 16: "bytes*"},
    "Sparse": {1: "Tensor", 2: "Tensor", 3: "varint*"},
    "Entry": {1: "bytes", 2: "bytes"},
}
_FORBIDDEN: Final[Mapping[tuple[str, int], str]] = {
    ("Model", 20): "training graphs", ("Model", 25): "model-local functions",
    ("Model", 26): "device configurations", ("Node", 10): "device configurations",
}
_WIRE: Final[Mapping[str, int]] = {"varint": _VARINT, "fixed64": _FIXED64, "bytes": _BYTES, "fixed32": _FIXED32}


@dataclass(frozen=True)
class ExternalTensor:
    """Where one initializer's bytes lie: `location` is as the graph says it, `path` is the bundle's; both in bytes."""

    name: str
    location: str
    path: str
    offset: int
    length: int


def external_tensors(graph_path: str, graph: bytes, sizes: Mapping[str, int]) -> tuple[ExternalTensor, ...]:
    """Return the initializers that the graph keeps in other files of the bundle, in its own order.

    `sizes` are the bundle's files and their lengths in bytes. Raises `VerificationRefused` for everything that leads out of
    the bundle. ONNX Runtime takes the files from memory by their `location`:
    `SessionOptions.add_external_initializers_from_files_in_memory(locations, buffers, lengths)`.
    """
    if len(graph) > LARGEST_GRAPH:
        _refuse("onnx_size", graph_path, "too large", expected=f"at most {LARGEST_GRAPH} bytes", got=str(len(graph)))
    if graph[4:8] == b"ORTM":
        _refuse("onnx_format", graph_path, "in ORT format", expected="an ONNX model")
    return _Walk(graph_path, graph, sizes).model()


def _refuse(
    reason: str, place: str, fact: str, *, expected: str | None = None, got: str | None = None
) -> NoReturn:
    raise VerificationRefused(reason, place, fact, expected=expected, got=got,
                              hint="export the model again with darkroom-provision export")


Span = tuple[int, int]


class _Walk:
    """One walk over one graph's bytes; `budget` is how many fields it may still read."""

    def __init__(self, path: str, graph: bytes, sizes: Mapping[str, int]) -> None:
        self.path = path
        self.graph = graph
        self.sizes = sizes
        self.folder = path.rpartition("/")[0]
        self.budget = MOST_FIELDS
        self.found: list[ExternalTensor] = []

    def model(self) -> tuple[ExternalTensor, ...]:
        fields = self.message("Model", (0, len(self.graph)), 0)
        if 7 not in fields:
            self.malformed("no graph in it")
        self.inside_graph(fields[7][0], 1, main=True)
        return tuple(self.found)

    def inside_graph(self, span: Span, depth: int, *, main: bool = False) -> None:
        fields = self.message("Graph", span, depth)
        for tensor in fields.get(5, []):
            self.inside_tensor(tensor, depth + 1, may_be_external=main)
        for sparse in fields.get(15, []):
            self.inside_sparse(sparse, depth + 1)
        for node in fields.get(1, []):
            self.inside_node(node, depth + 1)

    def inside_node(self, span: Span, depth: int) -> None:
        fields = self.message("Node", span, depth)
        operator, domain = self.text(fields, 4), self.text(fields, 7)
        if domain not in DOMAINS:
            _refuse("custom_operator", self.path, f"operator {ascii(operator)[:60]} is of a domain that is not built in",
                    expected="ai.onnx, ai.onnx.ml or com.microsoft", got=ascii(domain)[:60])
        if operator == "EPContext":
            _refuse("ep_context", self.path, "holds a compiled blob (EPContext)", expected="operators only")
        for attribute in fields.get(5, []):
            inner = self.message("Attribute", attribute, depth + 1)
            for tensor in inner.get(5, []) + inner.get(10, []):
                self.inside_tensor(tensor, depth + 2)
            for graph in inner.get(6, []) + inner.get(11, []):
                self.inside_graph(graph, depth + 2)
            for sparse in inner.get(22, []) + inner.get(23, []):
                self.inside_sparse(sparse, depth + 2)

    def inside_sparse(self, span: Span, depth: int) -> None:
        fields = self.message("Sparse", span, depth)
        for tensor in fields.get(1, []) + fields.get(2, []):
            self.inside_tensor(tensor, depth + 1)

    def inside_tensor(self, span: Span, depth: int, *, may_be_external: bool = False) -> None:
        fields = self.message("Tensor", span, depth)
        location = fields.get(14, [(0, 0)])[0][0]
        if location not in (0, _EXTERNAL):   # readers cut such a number to 32 bits, and it may be 1 to them
            self.malformed(f"a data location {location}")
        if 13 not in fields and location != _EXTERNAL:
            return
        name = self.text(fields, 8)
        place = f"{self.path} initializer {ascii(name)[:120]}"
        if 13 not in fields or location != _EXTERNAL:
            _refuse("external_data", place, "says at once that its data is inside and outside")
        if not may_be_external:
            _refuse("external_data", place, "external data outside the main graph's initializers")
        entries: dict[str, str] = {}
        for entry in fields[13]:
            inner = self.message("Entry", entry, depth + 1)
            key = self.text(inner, 1)
            if key in entries or key not in ("location", "offset", "length"):
                _refuse("external_data", place, "unknown or double entry", got=ascii(key)[:60])
            entries[key] = self.text(inner, 2)
        self.found.append(self.external(place, name, entries))

    def external(self, place: str, name: str, entries: Mapping[str, str]) -> ExternalTensor:
        location = entries.get("location", "")
        if location.startswith("*/"):
            _refuse("external_data_address", place, "external data at an address in memory", got=ascii(location)[:60])
        path = f"{self.folder}/{location}".lstrip("/") if not location.startswith("/") else location
        if not plain_path(location) or not plain_path(path):
            _refuse("external_data_path", place, "external data outside the bundle",
                    expected="a plain path below the graph's own folder", got=ascii(location)[:120])
        if path not in self.sizes:
            _refuse("external_data_unlisted", place, "external data in a file that is not listed", got=path)
        offset, length = self.number(place, entries.get("offset", "0")), self.number(place, entries.get("length", ""))
        if offset + length > self.sizes[path]:
            _refuse("external_data_range", place, "external data beyond the end of its file",
                    expected=f"at most {self.sizes[path]}", got=str(offset + length))
        return ExternalTensor(name, location, path, offset, length)

    def number(self, place: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            _refuse("external_data", place, "offset or length is not a number", got=ascii(text)[:40])
        return int(text)

    def text(self, fields: Mapping[int, list[Span]], number: int) -> str:
        if number not in fields:
            return ""
        start, end = fields[number][0]
        try:
            return self.graph[start:end].decode("utf-8")
        except UnicodeDecodeError:
            self.malformed("a name that is no UTF-8")

    def message(self, kind: str, span: Span, depth: int) -> dict[int, list[Span]]:
        """Return a message's fields by number: the span of each one's bytes, or (value, value) of a varint."""
        if depth > DEEPEST_MESSAGE:
            self.malformed(f"messages nested more than {DEEPEST_MESSAGE} deep")
        known = _FIELDS[kind]
        fields: dict[int, list[Span]] = {}
        at, end = span
        while at < end:
            self.budget -= 1
            if self.budget < 0:
                self.malformed(f"more than {MOST_FIELDS} fields")
            tag, at = self.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if (kind, number) in _FORBIDDEN:
                _refuse("onnx_field", self.path, f"holds {_FORBIDDEN[kind, number]}", expected="an inlined inference graph")
            if number not in known:
                _refuse("onnx_field", self.path, f"unknown field {number} in {kind}Proto")
            want, many = known[number].removesuffix("*"), known[number].endswith("*")
            expected = _WIRE.get(want, _BYTES)
            if wire != expected and not (many and wire == _BYTES):   # packed numbers
                self.malformed(f"field {number} of {kind}Proto has wire type {wire}")
            value, at = self.value(wire, at, end)
            if not many and number in fields:
                self.malformed(f"field {number} of {kind}Proto is there twice")
            fields.setdefault(number, []).append(value)
        return fields

    def value(self, wire: int, at: int, end: int) -> tuple[Span, int]:
        if wire == _VARINT:
            number, at = self.varint(at, end)
            return (number, number), at
        if wire == _BYTES:
            length, at = self.varint(at, end)
        else:
            length = 8 if wire == _FIXED64 else 4
        if length > end - at:
            self.malformed("a field runs past its message")
        return (at, at + length), at + length

    def varint(self, at: int, end: int) -> tuple[int, int]:
        result = shift = 0
        while True:
            if at >= end or shift > 63:
                self.malformed("a number runs past its message, or is padded beyond ten bytes")
            byte = self.graph[at]
            at += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if result >> 64:
                self.malformed("a number of more than 64 bits")
            if byte < 0x80:
                return result, at

    def malformed(self, fact: str) -> NoReturn:
        _refuse("onnx_malformed", self.path, f"not an ONNX model: {fact}")
