"""Work on several CUDA streams beside the current one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

LOCAL = threading.local()  # .streams: {device: the streams of this thread there}


def streams_of(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """`count` streams, the same ones each time: PyTorch keeps memory, and cuBLAS a workspace, for every stream that is used.

    A thread has its own, for another one may be capturing a graph.
    """
    if not hasattr(LOCAL, "streams"):
        LOCAL.streams = {}
    streams = LOCAL.streams.setdefault(device, [])
    while len(streams) < count:
        streams.append(torch.cuda.Stream(device))
    return streams[:count]


class StreamGroup:
    """Streams that begin after all work of the current one so far, and that the current one goes on after.

    What what reads and writes must have been allocated before, or on that stream, and be kept until the end.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.streams = streams_of(device, count)
        self.current = torch.cuda.current_stream(device)

    def __enter__(self) -> StreamGroup:
        for stream in self.streams:
            stream.wait_stream(self.current)
        return self

    def run(self, index: int, work: Callable[[], None], after: Sequence[Any] = ()) -> Any:
        """Does `work` on a stream, after what is in it already and after the works for which `after` was returned."""
        for event in after:
            self.streams[index].wait_event(event)
        with torch.cuda.stream(self.streams[index]):
            work()
        return self.streams[index].record_event()

    def __exit__(self, *raised: object) -> None:
        for stream in self.streams:
            self.current.wait_stream(stream)

    def hand_over(self, *tensors: torch.Tensor | None) -> None:
        """Tensors that were allocated on a stream may be used, and freed, on the current stream."""
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self.current)
