"""Graphs that lead out of the bundle are refused; each is one mutation from a good one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import VerificationRefused
from appliance.trust import onnx_graph
from appliance.trust.onnx_graph import ExternalTensor, external_tensors
from appliance.trust.verify import verify
from tests.bundles import EXTERNAL, field, graph, model, node, sign_files_as_they_are, signed_bundle, tensor, varint, write

SIZES = {"unet/model.onnx": 1000, "unet/weights.bin": 8, "weights.bin": 8, "model.json": 10}


def attribute(*content: bytes) -> bytes:
    return field(1, "a") + b"".join(content)


def outside(**changes: str) -> bytes:
    return model(graph(initializers=[tensor("w", external={**EXTERNAL, **changes})]))


def without(entry: str) -> bytes:
    return model(graph(initializers=[tensor("w", external={k: v for k, v in EXTERNAL.items() if k != entry})]))


EVIL_TENSOR = tensor("w", external={"location": "../../etc/passwd", "offset": "0", "length": "1"})
FINE_TENSOR = tensor("w", external=EXTERNAL)

LEADING_OUT = {
    "a path upwards": (outside(location="../weights.bin"), "external_data_path"),
    "an absolute path": (outside(location="/etc/passwd"), "external_data_path"),
    "a path upwards inside": (outside(location="a/../weights.bin"), "external_data_path"),
    "a dot": (outside(location="./weights.bin"), "external_data_path"),
    "a backslash": (outside(location="..\\weights.bin"), "external_data_path"),
    "an empty location": (outside(location=""), "external_data_path"),
    "a NUL": (outside(location="weights.bin\0"), "external_data_path"),
    "an address": (outside(location="*/_ORT_MEM_ADDR_/*"), "external_data_address"),
    "a native address": (outside(location="*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*"), "external_data_address"),
    "a file that is not listed": (outside(location="other.bin"), "external_data_unlisted"),
    "a file of another folder": (outside(location="model.json"), "external_data_unlisted"),
    "beyond the end": (outside(offset="5"), "external_data_range"),
    "longer than the file": (outside(length="9"), "external_data_range"),
    "a negative offset": (outside(offset="-1"), "external_data"),
    "an enormous offset": (outside(offset="9" * 40), "external_data"),
    "an offset in other digits": (outside(offset="\u0661"), "external_data"),
    "no location": (without("location"), "external_data_path"),
    "no length": (without("length"), "external_data"),
    "an unknown entry": (outside(prepacked="1"), "external_data"),
    "a double entry": (
        model(graph(initializers=[
            tensor("w", external=EXTERNAL) + field(13, field(1, "location") + field(2, "weights.bin"))
        ])), "external_data",
    ),
    "outside, and said to be inside": (
        model(graph(initializers=[tensor("w", external=EXTERNAL, location=0)])), "external_data",
    ),
    "inside, and said to be outside": (model(graph(initializers=[tensor("w", location=1)])), "external_data"),
    "a location cut to 32 bits": (
        model(graph(initializers=[tensor("w", external=EXTERNAL, location=(1 << 32) + 1)])), "onnx_malformed",
    ),
    "external data of an attribute": (
        model(graph([node("Constant", "", attribute(field(5, FINE_TENSOR)))])), "external_data",
    ),
    "external data in a list of an attribute": (
        model(graph([node("Constant", "", attribute(field(10, FINE_TENSOR)))])), "external_data",
    ),
    "external data in a subgraph": (
        model(graph([node("If", "", attribute(field(6, graph(initializers=[FINE_TENSOR]))))])), "external_data",
    ),
    "external data in a list of subgraphs": (
        model(graph([node("If", "", attribute(field(11, graph(initializers=[FINE_TENSOR]))))])), "external_data",
    ),
    "external data of a sparse initializer": (model(graph(more=field(15, field(1, FINE_TENSOR)))), "external_data"),
    "external indices of a sparse attribute": (
        model(graph([node("Constant", "", attribute(field(22, field(2, FINE_TENSOR))))])), "external_data",
    ),
    "an operator of another domain": (model(graph([node("Evil", "com.example")])), "custom_operator"),
    "such an operator in a subgraph": (
        model(graph([node("If", "", attribute(field(6, graph([node("Evil", "com.example")]))))])), "custom_operator",
    ),
    "an operator of a look-alike domain": (model(graph([node("Evil", "COM.microsoft")])), "custom_operator"),
    "a compiled blob": (model(graph([node("EPContext", "com.microsoft")])), "ep_context"),
    "a training graph": (model(more=field(20, b"")), "onnx_field"),
    "a model-local function": (model(more=field(25, b"")), "onnx_field"),
    "a device configuration": (model(more=field(26, b"")), "onnx_field"),
    "an unknown field": (model(more=field(99, b"")), "onnx_field"),
    "a second graph, which readers merge": (model(more=field(7, graph(initializers=[EVIL_TENSOR]))), "onnx_malformed"),
    "a second domain": (model(graph([field(7, "com.example") + node("Relu", "ai.onnx")])), "onnx_malformed"),
    "a group": (model(more=varint(8 << 3 | 3)), "onnx_malformed"),
    "a wrong wire type": (model(more=field(7 << 0, 5)), "onnx_malformed"),
    "a field that runs on": (model() + varint(14 << 3 | 2) + varint(100), "onnx_malformed"),
    "an endless number": (model() + b"\xff" * 11, "onnx_malformed"),
    "a number of 65 bits": (model() + b"\x08" + b"\xff" * 9 + b"\x02", "onnx_malformed"),
    "a name that is no UTF-8": (model(graph([field(7, b"\xff")])), "onnx_malformed"),
    "no graph": (field(1, 10), "onnx_malformed"),
    "nothing": (b"", "onnx_malformed"),
    "text": (b"import os\n", "onnx_field"),
    "ORT format": (b"\x20\0\0\0ORTM" + bytes(64), "onnx_format"),
    "ORT format in a good protobuf": (field(1, 10) + field(2, "ORTM") + field(7, graph()), "onnx_format"),
}


@pytest.mark.parametrize("case", LEADING_OUT)
def test_a_graph_that_leads_out_of_the_bundle_is_refused(case: str) -> None:
    content, reason = LEADING_OUT[case]
    with pytest.raises(VerificationRefused) as caught:
        external_tensors("unet/model.onnx", content, SIZES)
    assert caught.value.reason == reason
    assert caught.value.place.startswith("unet/model.onnx")
    assert str(caught.value).isprintable()


def test_external_data_below_the_graphs_folder_is_listed() -> None:
    found = external_tensors("unet/model.onnx", outside(), SIZES)
    assert found == (ExternalTensor("w", "weights.bin", "unet/weights.bin", 4, 4),)
    at_the_top = external_tensors("model.onnx", outside(), SIZES)
    assert at_the_top[0].path == "weights.bin"
    assert external_tensors("unet/model.onnx", without("offset"), SIZES)[0].offset == 0


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
def test_operators_that_are_built_in_pass(domain: str) -> None:
    inner = graph([node("Relu", domain)], [tensor("w", raw=bytes(4))])
    assert external_tensors("m.onnx", model(graph([node("If", domain, attribute(field(6, inner)))])), {}) == ()


def test_graphs_nested_without_end_are_refused() -> None:
    inner = graph()
    for _ in range(200):
        inner = graph([node("If", "", attribute(field(6, inner)))])
    with pytest.raises(VerificationRefused) as caught:
        external_tensors("m.onnx", model(inner), {})
    assert caught.value.reason == "onnx_malformed"


def test_a_graph_beyond_its_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_GRAPH", len(model()) - 1)   # the real one is 2 GiB
    with pytest.raises(VerificationRefused) as caught:
        external_tensors("m.onnx", model(), {})
    assert caught.value.reason == "onnx_size"


def test_a_graph_of_endless_fields_is_refused() -> None:
    with pytest.raises(VerificationRefused) as caught:
        external_tensors("m.onnx", model(graph(more=field(11, b"") * 2_000_001)), {})
    assert caught.value.reason == "onnx_malformed"


def test_a_signed_bundle_whose_graph_leads_out_is_refused(tmp_path: Path) -> None:
    bundle = signed_bundle(tmp_path)
    for name in ("unet/model.onnx", "unet/variant.onnx"):   # the second is one that model.json does not name
        good = (bundle.folder / "unet/model.onnx").read_bytes()
        write(bundle.folder, {name: outside(location="../../secret")})
        sign_files_as_they_are(bundle)
        with pytest.raises(VerificationRefused) as caught:
            verify(bundle.folder, [bundle.trusted])
        assert caught.value.reason == "external_data_path"
        write(bundle.folder, {"unet/model.onnx": good})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_graph_or_are_refused(content: bytes) -> None:
    try:
        external_tensors("m.onnx", content, SIZES)
    except VerificationRefused:
        return


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_graph_is_a_graph_or_is_refused(data: st.DataObject) -> None:
    nested = graph([node("If", "", attribute(field(6, graph()), field(5, tensor("t", raw=bytes(8)))))], [FINE_TENSOR])
    content = bytearray(model(nested))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        for found in external_tensors("unet/model.onnx", bytes(content), SIZES):
            assert found.path in SIZES
            assert found.offset + found.length <= SIZES[found.path]
    except VerificationRefused:
        return
