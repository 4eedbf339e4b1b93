"""On-policy distillation in a Megatron loop of one's own: megatron-core's models, schedules, DDP and optimizer as they
are, and a `forward_step` and a `loss_func` from here. Random tokens stand for prompts and completions.

    torchrun --standalone --nproc-per-node 4 examples/megatron_loop.py --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron import WeightingConfig
from renio_megatron.megatron import LoopBatch, MegatronDistillation, run_on_cpu

run_on_cpu()  # before Megatron is imported; nothing where CUDA is
# ruff: noqa: E402
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB, PADDED, ROWS, LENGTH, PROMPT = 61, 64, 2, 24, 8


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--micro-batches", type=int, default=2, help="of each rank, in a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--per-token", action="store_true", help="calculate_per_token_loss of Megatron's configuration")
    return parser.parse_args()


def start(args: argparse.Namespace) -> torch.device:
    """Megatron's groups on this rank's device."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(args.tp, args.pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return device


def model_of(hidden_size: int, num_layers: int, std: float, seed: int, args: argparse.Namespace, device: Any) -> Any:
    """Megatron's GPTModel; its logits are vocabulary-parallel."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.float32,
        init_method_std=std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=args.per_token,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).to(device)


def run(model: Any, batches: list[LoopBatch], forward_step: Any, **how: Any) -> list[Any]:
    """Megatron's own schedule over a step's micro-batches."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        **how,
    )


def teach(teacher: Any, batches: list[LoopBatch]) -> list[LoopBatch]:
    """The batches with the teacher's logits, a pass of its own over the same schedule; on the last stage alone."""

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        return model(batch.tokens, batch.position_ids, None), lambda output, non_loss_data: output

    with torch.no_grad():
        logits = run(teacher, batches, forward_step, forward_only=True, collect_non_loss_data=True)
    taught = zip(batches, logits, strict=True) if logits else ((batch, None) for batch in batches)
    return [LoopBatch(b.tokens, b.position_ids, b.labels, b.loss_mask, teacher=answer) for b, answer in taught]


def draw(step: int, data_rank: int, number: int, device: torch.device) -> list[LoopBatch]:
    """Micro-batches of one step; completions begin after the prompt, and differ in length."""
    generator = torch.Generator().manual_seed(1000 * step + data_rank)
    batches = []
    for _ in range(number):
        text = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
        ends = torch.randint(PROMPT + 1, LENGTH + 1, (ROWS, 1), generator=generator)
        places = torch.arange(LENGTH).expand(ROWS, LENGTH)
        mask = (places >= PROMPT - 1) & (places < ends - 1)
        batches.append(LoopBatch(*(x.to(device) for x in (text[:, :-1], places, text[:, 1:], mask))))
    return batches


def main() -> None:
    """A few steps; the loss falls."""
    args = arguments()
    device = start(args)
    student, teacher = (model_of(*size, args, device) for size in ((32, 2, 0.1, 1), (48, 4, 0.3, 2)))
    config = student.config
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), student)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    distillation = MegatronDistillation(VOCAB, weighting=WeightingConfig(threshold=0.3))
    data = parallel_state.get_data_parallel_group()
    for step in range(1, args.steps + 1):
        batches = teach(teacher, draw(step, data.rank(), args.micro_batches, device))
        weights = distillation.weigh(model, batches)  # of the whole batch: all ranks, all micro-batches
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(model, batches, distillation.forward_step(weights), forward_only=False)
        optimizer.step()
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            total = torch.stack([one["loss"] for one in losses]).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            if data.rank() == 0:
                print(f"step {step} loss {total[0] / total[1]:.6f} largest weight {weights.sample.weights.max():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
