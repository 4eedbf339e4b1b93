"""Settings of the parallel layout, under Megatron's names."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_positive
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the model. The data-parallel size follows from the world size.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size (stages of each
            pipeline rank; null: one), context_parallel_size, sequence_parallel, use_distributed_optimizer,
            overlap_grad_reduce, overlap_param_gather: as in Megatron.
        expert_model_parallel_size, expert_tensor_parallel_size (null: the tensor-parallel size): as in Megatron: ranks
            that share the experts of a layer, and that share each expert. They are among the tensor, context and data
            ranks.
        make_vocab_size_divisible_by: as in Megatron; the padded vocabulary is a multiple of this times the
            tensor-parallel size.
        distributed_timeout_minutes: timeout of collectives, after which a rank stops waiting for a dead one.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    make_vocab_size_divisible_by: int = 1
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        require_positive("parallel", **{key: value for key, value in vars(self).items() if not isinstance(value, bool)})
        if self.virtual_pipeline_model_parallel_size == 1:
            raise ConfigError(
                "parallel.virtual_pipeline_model_parallel_size=1 is a plain pipeline; set null, or at least 2."
            )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks that share one expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of a layer's experts."""
        return self.expert_model_parallel_size * self.expert_tensor_ranks

    def describe(self, num_ranks: int | None = None) -> str:
        """The sizes of the axes in one line; the data-parallel one where `num_ranks` is given.

        >>> ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2).describe(8)
        'TP 2 x SP x PP 1 x CP 2 x DP 2'
        """
        sizes = {
            f"TP {self.tensor_model_parallel_size}": True,
            "SP": self.sequence_parallel,
            f"PP {self.pipeline_model_parallel_size}": True,
            f"VPP {self.virtual_pipeline_model_parallel_size}": self.virtual_pipeline_model_parallel_size is not None,
            f"CP {self.context_parallel_size}": self.context_parallel_size > 1,
            f"DP {(num_ranks or 0) // self.model_ranks}": num_ranks is not None,
            f"EP {self.expert_model_parallel_size}": self.expert_model_parallel_size > 1,
            f"ETP {self.expert_tensor_parallel_size}": self.expert_tensor_parallel_size is not None,
        }
        return " x ".join(name for name, is_shown in sizes.items() if is_shown)

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)
