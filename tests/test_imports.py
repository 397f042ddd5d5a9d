"""Who may import whom, read from the source and looked at in the running processes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APPLIANCE = sorted((ROOT / "appliance").rglob("*.py"))
FORBIDDEN = {
    "torch", "diffusers", "transformers", "provisioning", "pickle", "marshal", "shelve", "dill", "joblib", "requests", "httpx",
    "httpx2", "aiohttp", "urllib3", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "huggingface_hub",
}
# urllib.parse takes forms and addresses apart and opens nothing.
ALLOWED = {"urllib.parse"}
LOADED_NOWHERE = ("torch", "diffusers", "transformers", "requests", "httpx", "httpx2", "aiohttp", "urllib3", "huggingface_hub", "onnx")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_search_sees_the_appliance() -> None:
    assert len(APPLIANCE) > 20
    assert "onnxruntime" in imported(ROOT / "appliance/engine/sessions.py")


@pytest.mark.parametrize("path", APPLIANCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_of_the_appliance_imports_what_reaches_out_or_unpickles(path: Path) -> None:
    for name in imported(path):
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED):
            assert name.split(".")[0] not in FORBIDDEN, f"{path} imports {name}"


@pytest.mark.parametrize("path", APPLIANCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_engine_imports_onnxruntime_and_only_the_command_exits(path: Path) -> None:
    if "engine" not in path.parts:
        assert not any(name.split(".")[0] == "onnxruntime" for name in imported(path))
    if path.name != "__main__.py":
        assert "sys.exit" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "provisioning").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_provisioning_takes_only_trust_and_errors_from_the_appliance(path: Path) -> None:
    for name in imported(path):
        if name.split(".")[0] == "appliance":
            assert name.startswith(("appliance.trust", "appliance.errors")), f"{path} imports {name}"


def in_a_new_process(code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


REPORT = f"import json; print(json.dumps([name for name in {LOADED_NOWHERE!r} if name in sys.modules]))"


def test_a_generation_loads_no_torch_and_no_http_client_and_unpickles_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
unpickled = []
# pickle.find_class is raised by the unpickler for every global that it looks up (Python, audit events table);
# marshal.loads is how compiled modules are read, so it is not listened for.
sys.addaudithook(lambda event, _: unpickled.append(event) if event == "pickle.find_class" else None)
sys.argv[1:] = ["generate", "--seed", "1", "--steps", "2", "--out", sys.argv[1], "--prompt-file", sys.argv[2]]
from appliance.__main__ import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
assert "onnxruntime" in sys.modules
{REPORT.replace("[name", "unpickled + [name")}
"""
    (tmp_path / "prompt").write_text("a red apple", encoding="utf-8")
    assert in_a_new_process(code, str(tmp_path / "apple.png"), str(tmp_path / "prompt")) == []
    assert (tmp_path / "apple.png").exists()


def test_the_audit_hook_would_hear_an_unpickling() -> None:
    code = (
        "import sys, pickle, collections; heard = []; "
        "sys.addaudithook(lambda event, _: heard.append(event) if event == 'pickle.find_class' else None); "
        "pickle.loads(pickle.dumps(collections.OrderedDict())); import json; print(json.dumps(heard))"
    )
    assert in_a_new_process(code) == ["pickle.find_class"]


@pytest.mark.parametrize(
    ("process", "code"),
    [
        ("supervisor", "import sys; import appliance.__main__, appliance.supervisor; "),
        ("worker", "import sys; import appliance.web.server, appliance.web.app, gunicorn.workers.gthread, gunicorn.arbiter; "),
        ("engine", "import sys; import appliance.engine.process, appliance.engine.pipeline, appliance.engine.image; "),
    ],
)
def test_no_process_has_loaded_torch_or_an_http_client_library(process: str, code: str) -> None:
    assert in_a_new_process(code + REPORT) == [], process


def test_the_supervisor_and_the_worker_load_no_numpy_and_no_onnxruntime() -> None:
    probe = "import json; print(json.dumps([name for name in ('numpy', 'onnxruntime', 'PIL') if name in sys.modules]))"
    for code in (
        "import sys; import appliance.__main__, appliance.supervisor; ",
        "import sys; import appliance.web.server, appliance.web.app; ",
    ):
        assert in_a_new_process(code + probe) == []


def test_onnxruntime_writes_no_telemetry_file_in_the_engine_though_it_would_elsewhere(tmp_path: Path) -> None:
    def imported_with(code: str) -> list[str]:
        # Nor the variables by which the client knows a build machine, where it keeps still by itself.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT, env={**environment, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)})
        return [path.name for path in tmp_path.iterdir()]

    assert imported_with("import appliance.engine.sessions, onnxruntime") == []
    # The control: the package that is locked does have the client, and this is what it looks like.
    assert imported_with("import onnxruntime") != []
