"""Interoperable both ways with the public `model-signing` package, and graphs of the public `onnx` package are read right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from appliance.errors import VerificationRefused
from appliance.trust.onnx_graph import DOMAINS, external_tensors
from appliance.trust.verify import TrustedKey, verify
from tests.bundles import EXTERNAL, Signed, field, graph, model, node, signed_bundle, tensor


@pytest.fixture
def bundle(tmp_path: Path) -> Signed:
    return signed_bundle(tmp_path)


def model_signing(verb: str, bundle: Path, option: str, key: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the public program in a process of its own: it brings a network stack and warnings of its own along."""
    command = [sys.executable, "-W", "ignore", "-m", "model_signing", verb, "key", option, str(key)]
    signature = str(bundle / "model.sig")
    return subprocess.run(
        [*command, "--signature", signature, *more, str(bundle)], capture_output=True, text=True, check=False,
        env={**os.environ, "OTEL_SDK_DISABLED": "true"},
    )


def test_the_public_program_verifies_our_bundle(bundle: Signed) -> None:
    public = bundle.private.with_name("key.pub.pem")
    run = model_signing("verify", bundle.folder, "--public_key", public)
    assert run.returncode == 0, run.stderr
    (bundle.folder / "unet/weights.bin").write_bytes(b"12345678")
    assert model_signing("verify", bundle.folder, "--public_key", public).returncode != 0, "the control: it does look"


def test_we_verify_a_bundle_that_the_public_program_signed(bundle: Signed) -> None:
    ours = verify(bundle.folder, [bundle.trusted]).digest
    # Three times, because the order of keys in its payload changes from run to run.
    for _ in range(3):
        (bundle.folder / "model.sig").unlink()
        run = model_signing("sign", bundle.folder, "--private_key", bundle.private)
        assert run.returncode == 0, run.stderr
        assert verify(bundle.folder, [bundle.trusted]).digest == ours


def test_what_the_public_program_ignores_is_refused_all_the_same(bundle: Signed) -> None:
    (bundle.folder / "model.sig").unlink()
    (bundle.folder / "extra").touch()
    ignored = ("--ignore-paths", str(bundle.folder / "extra"))
    assert model_signing("sign", bundle.folder, "--private_key", bundle.private, *ignored).returncode == 0
    public = bundle.private.with_name("key.pub.pem")
    assert model_signing("verify", bundle.folder, "--public_key", public).returncode == 0, "the control: it ignores the file"
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [bundle.trusted])
    assert caught.value.reason == "file_unlisted"
    (bundle.folder / "extra").unlink()
    verify(bundle.folder, [bundle.trusted])


def test_a_bundle_with_another_hash_of_the_public_program_is_refused(bundle: Signed) -> None:
    script = (
        "import sys, model_signing as m; h = m.hashing.Config().use_file_serialization(hashing_algorithm='blake2');"
        "m.signing.Config().set_hashing_config(h).use_elliptic_key_signer(private_key=sys.argv[2])"
        ".sign(sys.argv[1], sys.argv[1] + '/model.sig')"
    )
    (bundle.folder / "model.sig").unlink()
    command = [sys.executable, "-W", "ignore", "-c", script, str(bundle.folder), str(bundle.private)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [bundle.trusted])
    assert caught.value.reason == "serialization"


def test_the_hint_is_that_of_the_public_program(bundle: Signed) -> None:
    assert TrustedKey.load(bundle.private.with_name("key.pub.pem")).fingerprint == bundle.trusted.fingerprint
    (bundle.folder / "model.sig").unlink()
    model_signing("sign", bundle.folder, "--private_key", bundle.private)
    assert bundle.trusted.fingerprint in (bundle.folder / "model.sig").read_text()


def test_a_graph_that_the_onnx_package_wrote_lists_the_same_external_data(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.full((64, 64), n, np.float32), f"w{n}") for n in range(3)]
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    inside = helper.make_graph([helper.make_node("Identity", ["w1"], ["z"])], "inside", [], [result])
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True])),
            helper.make_node("If", ["c"], ["y"], then_branch=inside, else_branch=inside),
            helper.make_node("MatMul", ["x", "w0"], ["m"]),
            helper.make_node("FusedMatMul", ["m", "w2"], ["n"], domain="com.microsoft", alpha=0.5),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)])
    helper.set_model_props(model, {"made by": "a test"})
    path = tmp_path / "model.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    loaded = onnx.load(str(path), load_external_data=False)
    expected = [
        (one.name, info.location, info.offset, info.length)
        for one in loaded.graph.initializer for info in [ExternalDataInfo(one)]
    ]
    sizes = {"unet/weights.bin": (tmp_path / "weights.bin").stat().st_size}
    found = external_tensors("unet/model.onnx", path.read_bytes(), sizes)
    assert [(one.name, one.location, one.offset, one.length) for one in found] == expected
    assert len(found) == 3


def attribute(*content: bytes) -> bytes:
    return field(1, "a") + b"".join(content)


NESTED = model(
    graph(
        [
            node(
                "If", "ai.onnx",
                attribute(
                    field(5, tensor("t", raw=bytes(8))),
                    field(6, graph([node("Relu", "com.microsoft")], [tensor("q", raw=bytes(4))])),
                    field(22, field(1, tensor("s", raw=bytes(4)))),
                ),
            )
        ],
        [tensor("w", external=EXTERNAL)],
    )
)


def inside(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto | onnx.TensorProto]:
    """Give every node and tensor that the public parser finds, however deep."""
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for one in graph.node:
        yield one
        for attribute in one.attribute:
            yield from [attribute.t, *attribute.tensors]
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            for inner in [attribute.g, *attribute.graphs]:
                yield from inside(inner)
    for pair in sparse:
        yield from (pair.values, pair.indices)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_what_is_accepted_of_a_damaged_graph_is_what_the_public_parser_sees(data: st.DataObject) -> None:
    content = bytearray(NESTED)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        ours = external_tensors("unet/model.onnx", bytes(content), {"unet/weights.bin": 8})
        theirs = onnx.ModelProto()
        theirs.ParseFromString(bytes(content))
    except (VerificationRefused, DecodeError):
        return
    assert not theirs.functions
    assert not theirs.training_info
    outside = []
    for found in inside(theirs.graph):
        if isinstance(found, onnx.NodeProto):
            assert found.domain in DOMAINS
            assert found.op_type != "EPContext"
        elif found.external_data or found.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in found.external_data}
            outside.append((found.name, entries["location"], int(entries.get("offset", "0")), int(entries["length"])))
    assert [(mine.name, mine.location, mine.offset, mine.length) for mine in ours] == outside
