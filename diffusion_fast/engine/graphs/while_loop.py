"""CUDA graphs that repeat a captured step: one launch for the whole loop.

Where the driver has WHILE nodes (CUDA 12.4), the graph is one. Its body is the step as a child
graph and behind it a kernel of one thread, which compares the step's counter with the number of
rows and sets the condition. Elsewhere the graph is a chain of child graphs, one for each row.
Neither captures anything.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

NEEDS_DRIVER = 12040
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

# The kernel is a text for the driver's own compiler, so that nothing has to be built.
SET_CONDITION = b"""
.version 8.0
.target sm_80
.address_size 64
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.visible .entry set_condition(.param .u64 handle, .param .u64 counter, .param .u64 count)
{
    .reg .pred %below;
    .reg .b32 %value;
    .reg .b64 %handle, %counter, %count;
    .param .b64 first;
    .param .b32 second;
    ld.param.u64 %handle, [handle];
    ld.param.u64 %counter, [counter];
    ld.param.u64 %count, [count];
    ld.global.u64 %counter, [%counter];
    ld.global.u64 %count, [%count];
    setp.lt.s64 %below, %counter, %count;
    selp.u32 %value, 1, 0, %below;
    st.param.b64 [first], %handle;
    st.param.b32 [second], %value;
    call.uni cudaGraphSetConditional, (first, second);
    ret;
}
"""


def no_while_loop() -> str | None:
    """Why this machine has no WHILE nodes; None if it has."""
    try:
        version = _call(_driver().cuDriverGetVersion)
    except RuntimeError as error:
        return str(error)
    if version < NEEDS_DRIVER:
        have = f"{version // 1000}.{version % 1000 // 10}"
        return f"the driver is for CUDA {have}, and WHILE nodes need 12.4"
    return None


class _StepsGraph:
    """A graph put together from a captured step.

    Args:
        step: captured with ``keep_graph=True`` on ``device``, which is the current one.

    Raises:
        torch.OutOfMemoryError: the driver has no memory for it.
        RuntimeError: the driver refuses, with the call and the reason; or cuda-bindings, by which
            it is asked, is not installed.
    """

    bytes = 0

    def __init__(self, step: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._driver = driver = _driver()
        self._step, self._device = step, device
        self.pool: Hashable = step.pool()
        graph = _call(driver.cuGraphCreate, 0)
        try:
            self._fill(graph, driver.CUgraph(init_value=step.raw_cuda_graph()))
            self._graph = _call(driver.cuGraphInstantiate, graph, 0)
        finally:
            driver.cuGraphDestroy(graph)

    def _fill(self, graph: Any, step: Any) -> None:
        raise NotImplementedError

    def replay(self) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _call(self._driver.cuGraphLaunch, self._graph, self._driver.CUstream(init_value=stream))

    def __del__(self) -> None:
        if hasattr(self, "_graph"):
            self._driver.cuGraphExecDestroy(self._graph)


class WhileLoop(_StepsGraph):
    """Repeats a step while counter < count; at least once.

    Args:
        step: must raise the counter.
        counter, count: int64 [1] on the step's device.
    """

    def __init__(self, step: torch.cuda.CUDAGraph, counter: Tensor, count: Tensor) -> None:
        self._counter, self._count = counter, count
        self._module: Any = None
        super().__init__(step, counter.device)

    def _fill(self, graph: Any, step: Any) -> None:
        driver = self._driver
        handle, body = _add_while(driver, graph)
        done = _call(driver.cuGraphAddChildGraphNode, body, None, 0, step)
        self._module = _call(driver.cuModuleLoadData, SET_CONDITION + b"\0")
        addresses = self._counter.data_ptr(), self._count.data_ptr()
        kernel = _kernel(driver, self._module, int(handle), *addresses)
        _call(driver.cuGraphAddKernelNode, body, [done], 1, kernel)

    def __del__(self) -> None:
        super().__del__()
        if self._module is not None:
            self._driver.cuModuleUnload(self._module)


class UnrolledLoop(_StepsGraph):
    """A step so many times, one after the other."""

    def __init__(self, step: torch.cuda.CUDAGraph, times: int, device: torch.device) -> None:
        self._times = times
        super().__init__(step, device)

    def _fill(self, graph: Any, step: Any) -> None:
        last: list[Any] = []
        for _ in range(self._times):
            before = last or None
            last = [_call(self._driver.cuGraphAddChildGraphNode, graph, before, len(last), step)]


def _add_while(driver: Any, graph: Any) -> tuple[Any, Any]:
    """A WHILE node that begins as true at each launch: its handle and its empty body."""
    context = _call(driver.cuCtxGetCurrent)
    flags = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
    handle = _call(driver.cuGraphConditionalHandleCreate, graph, context, 1, flags)
    node = driver.CUgraphNodeParams()
    node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    node.conditional.handle = handle
    node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
    node.conditional.size = 1
    node.conditional.ctx = context
    # Since version 13 dependencies come with data about their edges.
    nothing = (None, None) if _version() >= 13 else (None,)
    _call(driver.cuGraphAddNode, graph, *nothing, 0, node)
    return handle, node.conditional.phGraph_out[0]


def _driver() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        message = "cuda-bindings is not installed (pip install cuda-bindings)"
        raise RuntimeError(message) from error


def _version() -> int:
    bindings: Any = importlib.import_module("cuda.bindings")
    return int(bindings.__version__.split(".")[0])


def _kernel(driver: Any, module: Any, handle: int, counter: int, count: int) -> Any:
    kernel = driver.CUDA_KERNEL_NODE_PARAMS()
    kernel.func = _call(driver.cuModuleGetFunction, module, b"set_condition")
    for axis in "XYZ":
        setattr(kernel, f"gridDim{axis}", 1)
        setattr(kernel, f"blockDim{axis}", 1)
    kernel.sharedMemBytes = 0
    kernel.kernelParams = (handle, counter, count), (ctypes.c_uint64,) * 3
    return kernel


def _call(function: Any, *args: Any) -> Any:
    """The result of a driver's function, whose first value is an error code."""
    error, *result = function(*args)
    if int(error) != 0:
        kind = torch.OutOfMemoryError if error.name == OUT_OF_MEMORY else RuntimeError
        raise kind(f"{function.__name__}: the CUDA driver answers {error.name}")
    return result[0] if result else None
