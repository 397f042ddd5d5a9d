"""From a diffusers folder to a bundle: what is in it, that it draws what diffusers draws, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from transformers import CLIPTokenizer

from appliance.engine.noise import NoiseStream
from appliance.engine.pipeline import Pipeline
from appliance.engine.tokenizer import PromptTokenizer
from appliance.errors import BadRequest
from appliance.request import SAMPLERS, GenerationRequest
from appliance.trust.description import ModelDescription, NoiseSchedule
from appliance.trust.key import TrustedKey
from appliance.trust.verify import VerifiedModel, verify
from provisioning.export import export
from provisioning.onnx_graphs import SMALLEST_HALVED
from provisioning.sign import KeyPair, keygen, sign
from provisioning.sources import Source, schedule_of
from tests.provisioning import tiny

PREDICTIONS = ("epsilon", "v_prediction")
GRAPHS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
PSNR = 40.0     # dB: the least that the whole pipeline and diffusers' may agree by


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks about missing neighbours out of the tests' output, and torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny model in diffusers' layout for each prediction type, fp16, and one in fp32."""
    root = tmp_path_factory.mktemp("sources")
    made = {prediction: tiny.make(root / prediction, prediction=prediction) for prediction in PREDICTIONS}
    return {**made, "fp32": tiny.make(root / "fp32", dtype=torch.float32)}


@pytest.fixture(scope="module")
def licence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a licence file."""
    path = tmp_path_factory.mktemp("licence") / "LICENSE.txt"
    path.write_text("Do as you like.\n")
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """Return a key pair of this run's own."""
    return keygen(tmp_path_factory.mktemp("keys") / "test.pem")


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path], licence: Path, keys: KeyPair
) -> dict[str, Path]:
    """Return each source's signed bundle; that of `fp32` keeps its weights beside its graphs."""
    root = tmp_path_factory.mktemp("bundles")
    for name, source in sources.items():
        export(source, root / name, licence=licence, source_text="random", largest_inline=0 if name == "fp32" else 1 << 30)
        sign(root / name, keys.private)
    return {name: root / name for name in sources}


@pytest.fixture(scope="module")
def models(bundles: dict[str, Path], keys: KeyPair) -> dict[str, VerifiedModel]:
    """Return each bundle, verified."""
    return {name: verify(bundle, [TrustedKey.load(keys.public)]) for name, bundle in bundles.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its path, the signature aside."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if path != "model.sig"}


# ── What a bundle holds ───────────────────────────────────────────────────────


def test_a_bundle_holds_the_files_of_the_design_and_no_others(bundles: dict[str, Path]) -> None:
    graphs = {f"{graph}/model.onnx" for graph in GRAPHS}
    others = {"model.json", "tokenizer/tokenizer.json", "LICENSE", "mlbom.cdx.json"}
    assert contents(bundles["epsilon"]).keys() == graphs | others
    assert contents(bundles["fp32"]).keys() == graphs | others | {f"{graph}.data" for graph in graphs}


def test_two_exports_of_one_source_are_the_same_bytes(
    tmp_path: Path, sources: dict[str, Path], bundles: dict[str, Path], licence: Path
) -> None:
    # From another path, under another name: nothing of where it lay is in it.
    elsewhere = tmp_path / "some" / "other place"
    shutil.copytree(sources["epsilon"], elsewhere)
    export(elsewhere, tmp_path / "again", licence=licence, source_text="random", name="epsilon")
    assert contents(tmp_path / "again") == contents(bundles["epsilon"])
    assert contents(elsewhere) == contents(sources["epsilon"])     # the source is left as it was


@pytest.mark.parametrize("name", ["epsilon", "fp32"])
def test_no_path_of_the_machine_and_no_version_is_in_a_graph(bundles: dict[str, Path], name: str) -> None:
    for graph in GRAPHS:
        path = bundles[name] / graph / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        assert (model.producer_name, model.producer_version, model.doc_string) == ("darkroom", "", "")
        assert not model.metadata_props
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        content = path.read_bytes()
        for trace in (b"site-packages", b".py", b"/tmp/", b"/home/", str(bundles[name].parent).encode()):
            assert trace not in content


@pytest.mark.parametrize("name", ["epsilon", "fp32"])
def test_graphs_are_of_standard_operators_at_a_stated_opset(bundles: dict[str, Path], name: str) -> None:
    for graph in GRAPHS:
        model = onnx.load(bundles[name] / graph / "model.onnx", load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
        assert {node.domain for node in model.graph.node} == {""}


def test_weights_of_a_half_precision_source_are_stored_in_half_and_are_the_very_numbers(
    sources: dict[str, Path], bundles: dict[str, Path]
) -> None:
    graph = onnx.load(bundles["epsilon"] / "unet" / "model.onnx").graph
    halved = {entry.name.removesuffix(".half"): onnx.numpy_helper.to_array(entry)
              for entry in graph.initializer if entry.data_type == onnx.TensorProto.FLOAT16}
    weights = {f"network.{name}": tensor.numpy() for name, tensor in Source.at(sources["epsilon"]).load_unet().state_dict().items()}
    assert halved.keys() == {name for name, values in weights.items() if values.size >= SMALLEST_HALVED} != set()
    for name, values in halved.items():
        assert np.array_equal(values.astype(np.float32), weights[name])


def test_weights_of_a_single_precision_source_keep_every_bit_in_a_file_beside_the_graph(
    sources: dict[str, Path], bundles: dict[str, Path]
) -> None:
    graph = onnx.load(bundles["fp32"] / "unet" / "model.onnx").graph
    weights = {f"network.{name}": tensor.numpy() for name, tensor in Source.at(sources["fp32"]).load_unet().state_dict().items()}
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    assert stored.keys() == weights.keys()
    assert all(np.array_equal(stored[name], weights[name]) for name in weights)
    references = onnx.load(bundles["fp32"] / "unet" / "model.onnx", load_external_data=False).graph.initializer
    offsets = [int(entry.value) for tensor in references for entry in tensor.external_data if entry.key == "offset"]
    assert len(offsets) == len(weights)
    assert all(offset % 4096 == 0 for offset in offsets)


def test_the_description_says_what_the_source_says(models: dict[str, VerifiedModel]) -> None:
    description = models["v_prediction"].description
    assert description.schedule == NoiseSchedule(
        1000, 0.00085, 0.012, "scaled_linear", "v_prediction", "leading", 1, False, False
    )
    assert (description.latents.channels, description.latents.downscale, description.latents.scaling_factor) == (4, 8, 0.18215)
    assert (description.text.max_length, description.text.hidden_size) == (77, 32)
    assert description.sizes.native == (64, 64)
    assert description.name == "v_prediction"
    assert models["v_prediction"].licence_text == "Do as you like.\n"


def test_what_is_said_about_a_model_ends_up_in_its_description(
    tmp_path: Path, sources: dict[str, Path], licence: Path
) -> None:
    about = tmp_path / "about.json"
    said = {"notes": "A sampler.", "licence": "MIT", "vocabulary": {"subjects": ["apple"], "words": ["red"], "examples": ["x"]},
            "defaults": {"sampler": "euler", "steps": 8, "guidance_scale": 2, "negative_prompt": "blue"}}
    about.write_text(json.dumps(said))
    told: list[tuple[str, int, int]] = []
    export(sources["epsilon"], tmp_path / "out", licence=licence, source_text="here", name="Mine", about=about,
           report=lambda *step: told.append(step))
    description = ModelDescription.parse((tmp_path / "out" / "model.json").read_bytes())
    assert (description.name, description.notes, description.licence, description.source) == ("Mine", "A sampler.", "MIT", "here")
    assert description.defaults.steps == 8
    assert description.vocabulary is not None
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert told[-1][1] == told[-1][2]


def test_the_bill_of_materials_has_the_digest_of_every_file(models: dict[str, VerifiedModel]) -> None:
    model = models["fp32"]
    document = json.loads(model.content("mlbom.cdx.json"))
    listed = {entry["name"]: entry["hashes"][0]["content"] for entry in document["components"]}
    assert listed == {path: digest for path, digest in model.digests.items() if path != "mlbom.cdx.json"}
    component = document["metadata"]["component"]
    assert (document["bomFormat"], document["specVersion"], component["type"]) == ("CycloneDX", "1.6", "machine-learning-model")


def test_a_tokenizer_of_vocabulary_and_merges_alone_becomes_one_that_the_engine_reads(
    sources: dict[str, Path], models: dict[str, VerifiedModel]
) -> None:
    assert not (sources["epsilon"] / "tokenizer" / "tokenizer.json").exists()
    model = models["epsilon"]
    [chunk] = PromptTokenizer(model.content("tokenizer/tokenizer.json"), model.description.text).encode("A red apple, bleu!")
    theirs = CLIPTokenizer.from_pretrained(sources["epsilon"] / "tokenizer")
    assert chunk.ids.tolist() == theirs("A red apple, bleu!", padding="max_length", max_length=77).input_ids


# ── That it computes what torch computes ──────────────────────────────────────


def run(bundle: Path, graph: str, **inputs: Any) -> Any:
    """Return the one output of a bundle's graph."""
    session = onnxruntime.InferenceSession(bundle / graph / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def relative(ours: Any, theirs: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max())


@pytest.mark.parametrize("name", ["epsilon", "fp32"])
@pytest.mark.parametrize(("rows", "height", "width", "tokens"), [(1, 8, 8, 77), (2, 8, 8, 77), (2, 7, 10, 154), (3, 13, 9, 231)])
def test_the_denoising_network_answers_as_in_torch_at_sizes_it_was_not_traced_at(
    sources: dict[str, Path], bundles: dict[str, Path], name: str, rows: int, height: int, width: int, tokens: int
) -> None:
    torch.manual_seed(1)
    latents, timestep, context = torch.randn(rows, 4, height, width), torch.tensor([333.25]), torch.randn(rows, tokens, 32)
    theirs = Source.at(sources[name]).load_unet()(latents, timestep, encoder_hidden_states=context).sample
    assert relative(run(bundles[name], "unet", latents=latents, timestep=timestep, context=context), theirs) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_the_text_encoder_answers_as_in_torch(sources: dict[str, Path], bundles: dict[str, Path], rows: int) -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 500, (rows, 77))
    theirs = Source.at(sources["epsilon"]).load_text_encoder()(ids).last_hidden_state
    assert relative(run(bundles["epsilon"], "text_encoder", ids=ids), theirs) < 1e-5


@pytest.mark.parametrize(("rows", "height", "width"), [(1, 8, 8), (2, 7, 11)])
def test_decoder_and_encoder_answer_as_in_torch(
    sources: dict[str, Path], bundles: dict[str, Path], rows: int, height: int, width: int
) -> None:
    torch.manual_seed(1)
    vae = Source.at(sources["epsilon"]).load_vae()
    latents, image = torch.randn(rows, 4, height, width), torch.rand(rows, 3, 8 * height, 8 * width) * 2 - 1
    assert relative(run(bundles["epsilon"], "vae_decoder", latents=latents), vae.decode(latents).sample) < 1e-5
    assert relative(run(bundles["epsilon"], "vae_encoder", image=image), vae.encode(image).latent_dist.parameters) < 1e-5


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ddim": DDIMScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "euler_a": EulerAncestralDiscreteScheduler.from_config,
    "heun": HeunDiscreteScheduler.from_config,
    "dpmpp_2m": DPMSolverMultistepScheduler.from_config,
    "dpmpp_2m_sde": lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler.from_config,
    "lcm": LCMScheduler.from_config,
}
STOCHASTIC = {
    "euler_a": "scheduling_euler_ancestral_discrete", "dpmpp_2m_sde": "scheduling_dpmsolver_multistep", "lcm": "scheduling_lcm",
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_the_whole_pipeline_draws_what_diffusers_draws_from_the_same_noise(
    sources: dict[str, Path], models: dict[str, VerifiedModel], monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None], sampler: str, prediction: str, guidance: float,
) -> None:
    warnings.simplefilter("ignore")     # diffusers 0.42 warns of its own use of numpy 2; pytest takes this back after the test
    reference = tiny.reference(sources[prediction])
    reference.scheduler = SCHEDULERS[sampler](reference.scheduler.config)
    noise = NoiseStream((11,), (4, 8, 8))
    drawn: list[int] = []

    def their_noise(*_: Any, **__: Any) -> torch.Tensor:
        drawn.append(len(drawn))
        return torch.from_numpy(noise.step(drawn[-1]))

    for module in STOCHASTIC.values():
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", their_noise)
    theirs = reference(
        "a red apple", negative_prompt="blue", num_inference_steps=6, guidance_scale=guidance, height=64, width=64,
        latents=torch.from_numpy(noise.initial()), output_type="np",
    ).images[0]
    pipeline = Pipeline(models[prediction], threads=1)
    request = GenerationRequest.parse(
        {"prompt": "a red apple", "negative_prompt": "blue", "steps": 6, "guidance_scale": guidance, "sampler": sampler, "seed": 11},
        pipeline.description, fresh_seed=0,
    )
    [ours] = pipeline.generate(request, on_step=lambda _: None, cancelled=lambda: False)
    error = np.mean((ours.pixels.astype(np.float64) - np.rint(theirs * 255)) ** 2)
    psnr = float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
    record_property("psnr", psnr)
    print(f"{sampler} {prediction} guidance {guidance}: {psnr:.1f} dB")
    assert np.std(theirs) > 0.02, "a picture of one colour would agree with anything"
    assert bool(drawn) == (sampler in STOCHASTIC)
    assert psnr >= PSNR


def test_weights_beside_the_graph_are_loaded_from_verified_memory_and_draw_the_same(
    models: dict[str, VerifiedModel], bundles: dict[str, Path], sources: dict[str, Path], licence: Path, tmp_path: Path,
    keys: KeyPair,
) -> None:
    export(sources["fp32"], tmp_path / "inline", licence=licence, source_text="random")
    sign(tmp_path / "inline", keys.private)
    inline = verify(tmp_path / "inline", [TrustedKey.load(keys.public)])
    for path in bundles["fp32"].rglob("*.data"):    # what was verified is in memory: the files may go
        path.rename(path.with_suffix(".gone"))
    try:
        drawn = []
        for model in (models["fp32"], inline):
            pipeline = Pipeline(model, threads=1)
            request = GenerationRequest.parse({"prompt": "red", "steps": 2}, pipeline.description, fresh_seed=5)
            [picture] = pipeline.generate(request, on_step=lambda _: None, cancelled=lambda: False)
            drawn.append(picture.pixels)
    finally:
        for path in bundles["fp32"].rglob("*.gone"):
            path.rename(path.with_suffix(".data"))
    assert any(models["fp32"].external.values())
    assert np.array_equal(drawn[0], drawn[1])


# ── What is refused ───────────────────────────────────────────────────────────


@pytest.fixture
def broken(tmp_path: Path, sources: dict[str, Path]) -> Path:
    """Return a copy of a good source to break."""
    shutil.copytree(sources["epsilon"], tmp_path / "source")
    return tmp_path / "source"


def configure(path: Path, **changes: object) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickle_the_unet(source: Path) -> None:
    """Leave pickled weights alone."""
    (source / "unet" / "diffusion_pytorch_model.safetensors").rename(source / "unet" / "diffusion_pytorch_model.bin")


def cut_the_vae_short(source: Path) -> None:
    """Truncate a weight file."""
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_weight(source: Path) -> None:
    """Write a text encoder without one of its weights."""
    from safetensors.torch import load_file, save_file

    path = source / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "final_layer_norm.weight" in name)]
    save_file(weights, path)


def poison_a_weight(source: Path) -> None:
    """Write a UNet one of whose weights is no number."""
    from safetensors.torch import load_file, save_file

    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "pickle": (pickle_the_unet, "pickle", r"unet/diffusion_pytorch_model\.bin: .*pickle"),
    "no index": (lambda s: (s / "model_index.json").unlink(), "source", "model_index.json"),
    "index no JSON": (lambda s: (s / "model_index.json").write_text("{"), "config", "model_index.json"),
    "no unet": (lambda s: shutil.rmtree(s / "unet"), "component_missing", "unet"),
    "no tokenizer": (lambda s: shutil.rmtree(s / "tokenizer"), "component_missing", "tokenizer"),
    "no scheduler": (lambda s: shutil.rmtree(s / "scheduler"), "component_missing", "scheduler"),
    "sdxl": (lambda s: configure(s / "model_index.json", _class_name="StableDiffusionXLPipeline"), "family", "SDXL"),
    "something else": (lambda s: configure(s / "model_index.json", _class_name="Kandinsky"), "family", "Kandinsky"),
    "another encoder": (lambda s: configure(s / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]), "family",
                        "text_encoder"),
    "inpainting": (lambda s: configure(s / "unet" / "config.json", in_channels=9), "family", "9 channels"),
    "inpainting in name": (lambda s: configure(s / "model_index.json", _class_name="StableDiffusionInpaintPipeline"), "family",
                           "4 channels in"),
    "lcm": (lambda s: configure(s / "unet" / "config.json", time_cond_proj_dim=256), "family", "time_cond_proj_dim"),
    "sd 2": (lambda s: configure(s / "unet" / "config.json", use_linear_projection=True), "family", "SD 2"),
    "strangers": (lambda s: configure(s / "unet" / "config.json", cross_attention_dim=64), "config", "do not belong together"),
    "cut short": (cut_the_vae_short, "component_unreadable", "vae: cannot be loaded"),
    "weight lost": (lose_a_weight, "component_incomplete", "final_layer_norm"),
    "weight poisoned": (poison_a_weight, "weights_not_finite", "conv_in.weight"),
    "thresholding": (lambda s: configure(s / "scheduler" / "scheduler_config.json", thresholding=True), "scheduler", "thresholding"),
    "trained betas": (lambda s: configure(s / "scheduler" / "scheduler_config.json", trained_betas=[0.1, 0.2]), "scheduler",
                      "trained_betas"),
    "unknown prediction": (lambda s: configure(s / "scheduler" / "scheduler_config.json", prediction_type="flow"), "description",
                           "prediction_type"),
    "flow matching": (lambda s: configure(s / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
                      "scheduler", "FlowMatch"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_source_that_is_not_as_it_should_be_is_refused_and_leaves_nothing(
    broken: Path, licence: Path, tmp_path: Path, breakage: str
) -> None:
    alter, reason, said = BREAKAGES[breakage]
    alter(broken)
    (tmp_path / "to").mkdir()
    with pytest.raises(BadRequest, match=said) as caught:
        export(broken, tmp_path / "to" / "out", licence=licence, source_text="random")
    assert caught.value.reason == reason
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_a_single_file_is_refused_with_the_way_out(tmp_path: Path, licence: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"x" * 100)
    with pytest.raises(BadRequest) as caught:
        export(file, tmp_path / "out", licence=licence, source_text="random")
    assert caught.value.reason == ("source" if suffix == ".safetensors" else "pickle")
    assert caught.value.hint


def test_a_bundle_is_never_written_over(tmp_path: Path, sources: dict[str, Path], licence: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="exists"):
        export(sources["epsilon"], tmp_path / "out", licence=licence, source_text="random")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe"])
def test_a_licence_and_a_source_are_required(tmp_path: Path, sources: dict[str, Path], licence: Path, content: bytes) -> None:
    bad = tmp_path / "LICENSE"
    bad.write_bytes(content)
    with pytest.raises(BadRequest, match="LICENSE"):
        export(sources["epsilon"], tmp_path / "out", licence=bad, source_text="random")
    with pytest.raises(BadRequest, match="missing|cannot be read"):
        export(sources["epsilon"], tmp_path / "out", licence=tmp_path / "none", source_text="random")
    with pytest.raises(BadRequest, match="source"):
        export(sources["epsilon"], tmp_path / "out", licence=licence, source_text=" ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["[]", "{", '{"family": "sd1"}', '{"defaults": {"steps": 0}}', '{"notes": 3}'])
def test_a_description_that_is_no_description_is_refused(
    tmp_path: Path, sources: dict[str, Path], licence: Path, said: str
) -> None:
    about = tmp_path / "about.json"
    about.write_text(said)
    with pytest.raises(BadRequest):
        export(sources["epsilon"], tmp_path / "out", licence=licence, source_text="random", about=about)
    assert {path.name for path in tmp_path.iterdir()} == {"about.json"}


def test_too_little_room_on_the_disk_is_seen_before_anything_is_written(
    tmp_path: Path, sources: dict[str, Path], licence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BadRequest, match="MiB are free"):
        export(sources["epsilon"], tmp_path / "out", licence=licence, source_text="random")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    tmp_path: Path, sources: dict[str, Path], licence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.parent.name == "vae_decoder":
            raise OSError(28, "No space left on device")
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadRequest, match="no space left"):
        export(sources["epsilon"], tmp_path / "out", licence=licence, source_text="random")
    assert list(tmp_path.iterdir()) == []


# ── Schedules ─────────────────────────────────────────────────────────────────

# As published with SD 1.5, and the other schedulers that fine-tunes come with.
PNDM = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False}


def test_the_scheduler_of_sd_15_becomes_its_schedule() -> None:
    assert schedule_of(PNDM) == NoiseSchedule(1000, 0.00085, 0.012, "scaled_linear", "epsilon", "leading", 1, False, False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, {"timestep_spacing": "linspace"}),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
         {"timestep_spacing": "trailing", "rescale_zero_snr": True}),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        ({"_class_name": "LMSDiscreteScheduler", "beta_schedule": "linear"}, {"beta_schedule": "linear"}),
    ],
    ids=str,
)
def test_what_a_scheduler_leaves_out_is_its_own_default(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    schedule = schedule_of({**PNDM, **changes})
    assert {name: getattr(schedule, name) for name in expected} == expected


@pytest.mark.parametrize(
    "changes",
    [{"_class_name": "DDIMScheduler", "clip_sample": True}, {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
     {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, {"_class_name": "LCMScheduler"}, {"_class_name": 3},
     {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}],
    ids=str,
)
def test_a_scheduler_that_would_not_be_honoured_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        schedule_of({**PNDM, **changes})
    assert caught.value.reason == "scheduler"


def test_every_scheduler_that_is_read_is_one_that_diffusers_has() -> None:
    from provisioning import sources as module

    assert all(hasattr(diffusers, name) for name in module._SCHEDULERS)
    assert not re.search(r"Flow|LCM", " ".join(module._SCHEDULERS))
