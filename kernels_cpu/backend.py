"""The CPU as a backend."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.graph.backend import PartStage, Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_cpu.share import StageShare
from pyinfer.kernels_cpu.stage import CPUStage


class CPUBackend:
    """Numba and LLVM kernels on a persistent thread pool."""

    name = "cpu"

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> CPUStage:
        return CPUStage(graph, config, progress)

    def open_stages(
        self,
        graphs: Sequence[Graph],
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        """See `graph.backend.PartsBackend`."""
        share = StageShare(config, graphs[0], progress)
        lasts = last_readers or [len(graphs)] * len(graphs)
        stages = [
            CPUStage(graph, config, share=share, number=number, last_reader=last)
            for number, (graph, last) in enumerate(zip(graphs, lasts, strict=True))
        ]
        share.start(graphs, max(stage.n_records for stage in stages))
        try:
            for number, stage in enumerate(stages):
                stage.load(_part_of(progress, number, len(stages)))
        except BaseException:
            for stage in stages:
                stage.close()
            raise
        return list(stages)


def _part_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """For one of so many stages, whose shares are taken as equal."""
    if progress is None:
        return None
    return lambda what, share: progress(what, (number + share) / count)
