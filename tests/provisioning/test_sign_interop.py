"""Interoperable both ways with the public `model-signing` package, and graphs of the public `onnx` package are read right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from appliance.errors import VerificationRefused
from appliance.trust.onnx_graph import external_tensors
from appliance.trust.verify import TrustedKey, verify
from tests.bundles import Signed, signed_bundle


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
        (tensor.name, info.location, info.offset, info.length)
        for tensor in loaded.graph.initializer for info in [ExternalDataInfo(tensor)]
    ]
    sizes = {"unet/weights.bin": (tmp_path / "weights.bin").stat().st_size}
    found = external_tensors("unet/model.onnx", path.read_bytes(), sizes)
    assert [(tensor.name, tensor.location, tensor.offset, tensor.length) for tensor in found] == expected
    assert len(found) == 3
