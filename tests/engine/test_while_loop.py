"""Loops of a captured step: the kernel compiles, and the driver is asked for the right graphs."""

from __future__ import annotations

import enum
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from diffusion_fast.engine.graphs.while_loop import (
    SET_CONDITION,
    UnrolledLoop,
    WhileLoop,
    no_while_loop,
)


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
def test_the_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    """By the compiler that the driver has built in."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    source = tmp_path / "set_condition.ptx"
    source.write_bytes(SET_CONDITION)
    options = [f"-arch=sm_{architecture}", "-o", str(tmp_path / "out.cubin")]
    subprocess.run([ptxas, *options, source], check=True, capture_output=True)
    assert b"set_condition" in (tmp_path / "out.cubin").read_bytes()


class Result(enum.IntEnum):
    SUCCESS = 0
    REFUSED = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Value:
    """Stands for the driver's structures: attributes as they come."""

    def __init__(self, init_value: int = 0) -> None:
        self.value = init_value

    def __int__(self) -> int:
        return self.value


class NodeParams(Value):
    def __init__(self) -> None:
        self.conditional = types.SimpleNamespace(phGraph_out=None)


class Driver:
    """Records what it is asked for; the function that ``refuses`` names fails, as ``how`` says."""

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeType = types.SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = types.SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")
    CUgraph = CUstream = CUDA_KERNEL_NODE_PARAMS = Value
    CUgraphNodeParams = NodeParams

    def __init__(self, version: int = 12040, refuses: str | None = None) -> None:
        self.version, self.refuses, self.how = version, refuses, Result.REFUSED
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, args))
            if name == self.refuses:
                return (self.how,)
            if name == "cuGraphAddNode":
                args[-1].conditional.phGraph_out = ["body"]
            results = {"cuDriverGetVersion": self.version, "cuGraphConditionalHandleCreate": 77}
            if name == "cuGraphAddChildGraphNode":
                results[name] = f"child {[called for called, _ in self.calls].count(name)}"
            return Result.SUCCESS, results.get(name, f"result of {name}")

        call.__name__ = name
        return call

    def asked(self, name: str) -> tuple[Any, ...]:
        (args,) = [args for called, args in self.calls if called == name]
        return args


def install(monkeypatch: pytest.MonkeyPatch, driver: Any, version: str = "13.0.1") -> None:
    bindings = types.ModuleType("cuda.bindings")
    bindings.__version__ = version
    for name, module in {"cuda.bindings": bindings, "cuda.bindings.driver": driver}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    stream = types.SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


class Step:
    def raw_cuda_graph(self) -> int:
        return 1234

    def pool(self) -> tuple[int, int]:
        return 0, 7


@pytest.mark.parametrize("version", ["12.9.4", "13.0.1"])
def test_the_graph(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    driver = Driver()
    install(monkeypatch, driver, version)
    assert no_while_loop() is None
    counter, count = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    loop = WhileLoop(Step(), counter, count)
    graph, node = "result of cuGraphCreate", driver.asked("cuGraphAddNode")
    assert driver.asked("cuGraphConditionalHandleCreate")[0] == graph
    assert driver.asked("cuGraphConditionalHandleCreate")[2:] == (1, 1)  # true at each launch
    assert node[:-1] == ((graph, None, 0) if version < "13" else (graph, None, None, 0))
    assert (node[-1].type, node[-1].conditional.type) == ("conditional", "while")
    assert (node[-1].conditional.handle, node[-1].conditional.size) == (77, 1)
    body, before, amount, child = driver.asked("cuGraphAddChildGraphNode")
    assert (body, before, amount, int(child)) == ("body", None, 0, 1234)
    body, before, amount, kernel = driver.asked("cuGraphAddKernelNode")
    assert (body, before, amount) == ("body", ["child 1"], 1)
    assert kernel.kernelParams[0] == (77, counter.data_ptr(), count.data_ptr())
    assert kernel.func == "result of cuModuleGetFunction"
    assert driver.asked("cuGraphInstantiate") == (graph, 0)
    loop.replay()
    launched, stream = driver.asked("cuGraphLaunch")
    assert (launched, int(stream)) == ("result of cuGraphInstantiate", 5)
    del loop
    released = [name for name, _ in driver.calls if "Destroy" in name or "Unload" in name]
    assert released == ["cuGraphDestroy", "cuGraphExecDestroy", "cuModuleUnload"]


def test_the_unrolled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of the same step, which an old driver can do as well."""
    driver = Driver(version=12020)
    install(monkeypatch, driver)
    loop = UnrolledLoop(Step(), 3, torch.device("cuda:1"))
    nodes = [args for name, args in driver.calls if name == "cuGraphAddChildGraphNode"]
    parents = {(graph, int(step)) for graph, _, _, step in nodes}
    assert parents == {("result of cuGraphCreate", 1234)}
    before = [(before, amount) for _, before, amount, _ in nodes]
    assert before == [(None, 0), (["child 1"], 1), (["child 2"], 1)]
    assert driver.asked("cuGraphInstantiate") == ("result of cuGraphCreate", 0)
    assert (loop.pool, loop.bytes) == ((0, 7), 0)
    loop.replay()
    launched, stream = driver.asked("cuGraphLaunch")
    assert (launched, int(stream)) == ("result of cuGraphInstantiate", 5)
    del loop
    released = [name for name, _ in driver.calls if "Destroy" in name or "Unload" in name]
    assert released == ["cuGraphDestroy", "cuGraphExecDestroy"]


@pytest.mark.parametrize(
    "refuses", ["cuGraphCreate", "cuGraphAddNode", "cuModuleLoadData", "cuGraphInstantiate"]
)
def test_what_the_driver_refuses_is_named(monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    driver = Driver(refuses=refuses)
    install(monkeypatch, driver)
    counter = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"{refuses}: the CUDA driver answers REFUSED"):
        WhileLoop(Step(), counter, counter)
    created = refuses != "cuGraphCreate"
    assert [name for name, _ in driver.calls].count("cuGraphDestroy") == created


@pytest.mark.parametrize("refuses", ["cuGraphAddChildGraphNode", "cuGraphInstantiate"])
def test_out_of_memory_is_told_apart(monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    driver = Driver(refuses=refuses)
    driver.how = Result.CUDA_ERROR_OUT_OF_MEMORY
    install(monkeypatch, driver)
    with pytest.raises(torch.OutOfMemoryError, match=f"{refuses}: the CUDA driver answers CUDA_"):
        UnrolledLoop(Step(), 2, torch.device("cuda"))


def test_why_there_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(version=12020))
    assert no_while_loop() == "the driver is for CUDA 12.2, and WHILE nodes need 12.4"
    install(monkeypatch, Driver(refuses="cuDriverGetVersion"))
    assert no_while_loop() == "cuDriverGetVersion: the CUDA driver answers REFUSED"
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    why = "cuda-bindings is not installed (pip install cuda-bindings)"
    assert no_while_loop() == why
    with pytest.raises(RuntimeError, match=re.escape(why)):
        UnrolledLoop(Step(), 2, torch.device("cuda"))
