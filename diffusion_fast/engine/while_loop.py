"""A CUDA graph that repeats a captured step on the device: one launch for the whole loop.

The graph is a WHILE node (CUDA 12.4). Its body is the step as a child graph and behind it a kernel
of one thread, which compares the step's counter with the number of rows and sets the condition.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

NEEDS_DRIVER = 12040

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
        driver = _driver()
    except ImportError:
        return "cuda-bindings is not installed (pip install cuda-bindings)"
    try:
        version = _call(driver.cuDriverGetVersion)
    except RuntimeError as error:
        return str(error)
    if version < NEEDS_DRIVER:
        have = f"{version // 1000}.{version % 1000 // 10}"
        return f"the driver is for CUDA {have}, and WHILE nodes need 12.4"
    return None


class WhileLoop:
    """Repeats a captured step while counter < count; at least once.

    Args:
        step: captured with ``keep_graph=True``; it must raise the counter.
        counter, count: int64 [1] on the step's device, which is the current one.

    Raises:
        RuntimeError: the driver refuses; names the call and the reason.
    """

    bytes = 0

    def __init__(self, step: torch.cuda.CUDAGraph, counter: Tensor, count: Tensor) -> None:
        self._driver = driver = _driver()
        self._device = counter.device
        self._kept = step, counter, count
        with contextlib.ExitStack() as undo:
            graph = _call(driver.cuGraphCreate, 0)
            undo.callback(driver.cuGraphDestroy, graph)
            handle, body = _add_while(driver, graph)
            child = driver.CUgraph(init_value=step.raw_cuda_graph())
            done = _call(driver.cuGraphAddChildGraphNode, body, None, 0, child)
            self._module = _call(driver.cuModuleLoadData, SET_CONDITION + b"\0")
            addresses = counter.data_ptr(), count.data_ptr()
            kernel = _kernel(driver, self._module, int(handle), *addresses)
            _call(driver.cuGraphAddKernelNode, body, [done], 1, kernel)
            self._graph = _call(driver.cuGraphInstantiate, graph, 0)

    def replay(self) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _call(self._driver.cuGraphLaunch, self._graph, self._driver.CUstream(init_value=stream))

    def __del__(self) -> None:
        if hasattr(self, "_graph"):
            self._driver.cuGraphExecDestroy(self._graph)
        if hasattr(self, "_module"):
            self._driver.cuModuleUnload(self._module)


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
    return importlib.import_module("cuda.bindings.driver")


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
        raise RuntimeError(f"{function.__name__}: the CUDA driver answers {error.name}")
    return result[0] if result else None
