"""Graphs of a verified bundle, made ready to run by ONNX Runtime.

A `Network` is made from the bytes that were verified, never from a path: the graph as bytes, and weights that it keeps beside
itself as buffers of the same model. Nothing here writes a file, loads a library or opens a connection.

Rules, in order:

1. Inputs and outputs are bound once, to arrays that the caller owns and writes between runs: a run allocates nothing of ours
   and copies nothing.
2. The same inputs give the same bytes: deterministic kernels, a stated number of threads, one operator at a time.
3. ONNX Runtime says nothing: neither telemetry nor log lines, and of its exceptions only the kind is passed on, since their
   text holds names and paths.
4. Threads without work sleep, between runs and within them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from appliance.errors import EngineError
from appliance.trust.verify import VerifiedModel

Array = NDArray[np.float32] | NDArray[np.int64]
PROVIDER: Final = "CPUExecutionProvider"

_FATAL: Final = 4       # ONNX Runtime's severity from which on it logs: nothing but the line before an abort
_TYPES: Final[Mapping[str, type]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; a dimension is a number where the graph fixes it and None where it varies."""

    name: str
    type: type
    dims: tuple[int | None, ...]


class Network:
    """One graph, loaded."""

    def __init__(self, model: VerifiedModel, path: str, *, threads: int) -> None:
        """Load the graph at `path`; raises `EngineError` if ONNX Runtime cannot."""
        self.path = path
        options = _options(threads)
        # By the location that the graph gives; the bytes are the model's own, and live longer than the session's creation.
        beside = {tensor.location: model.content(tensor.path) for tensor in model.external.get(path, ())}
        if beside:
            options.add_external_initializers_from_files_in_memory(
                list(beside), list(beside.values()), [len(content) for content in beside.values()]
            )
        try:
            self._session: Any = onnxruntime.InferenceSession(model.content(path), options, providers=[PROVIDER])
        except Exception as error:      # noqa: BLE001 - ONNX Runtime's exceptions have no common base
            raise EngineError(
                "graph_unusable", f"{path}: ONNX Runtime cannot load this graph ({type(error).__name__})",
                hint="export the model again with this version of darkroom-provision",
            ) from None

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Return what the graph reads."""
        return tuple(map(_port, self._session.get_inputs()))

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Return what the graph gives."""
        return tuple(map(_port, self._session.get_outputs()))

    def bind(self, **arrays: Array) -> BoundRun:
        """Return a run over these arrays: each input and output of the graph by name, C-contiguous."""
        binding = self._session.io_binding()
        for ports, bind in ((self.inputs, binding.bind_ortvalue_input), (self.outputs, binding.bind_ortvalue_output)):
            for port in ports:
                array = arrays[port.name]
                if not array.flags.c_contiguous or array.dtype != port.type:
                    raise ValueError(f"{port.name}: a C-contiguous array of {port.type.__name__} is bound, or a copy would be")
                # On the CPU this wraps the array's memory and copies nothing.
                bind(port.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return BoundRun(self.path, self._session, binding, tuple(arrays.values()))


class BoundRun:
    """One graph over fixed arrays: write the inputs, call `run`, read the outputs."""

    def __init__(self, path: str, session: Any, binding: Any, arrays: tuple[Array, ...]) -> None:
        self._path = path
        self._session = session
        self._binding = binding
        self.arrays = arrays        # held, since the binding holds their addresses alone

    def run(self) -> None:
        """Compute the outputs from the inputs. Raises `EngineError`."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:      # noqa: BLE001 - as above
            out_of_memory = "alloc" in str(error).lower()
            raise EngineError(
                "out_of_memory" if out_of_memory else "graph_failed",
                f"{self._path}: " + ("not enough memory for a picture of this size" if out_of_memory
                                     else f"ONNX Runtime could not run this graph ({type(error).__name__})"),
                hint="try a smaller picture" if out_of_memory else None,
            ) from None


def usable_cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def _options(threads: int) -> Any:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.use_deterministic_compute = True
    # Threads that have no work sleep and do not spin for it: where a page, a browser or another engine shares the processors,
    # spinning was measured to double the time of a step (ADR 0004).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _port(entry: Any) -> Port:
    dims = tuple(dim if isinstance(dim, int) else None for dim in entry.shape)
    return Port(entry.name, _TYPES.get(entry.type, object), dims)
