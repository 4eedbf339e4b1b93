"""Memory of a mixture-of-experts layer, in bytes of one rank.

The formulas follow Megatron's router, its alltoall dispatcher without fused permutation, and `SequentialMLP`. Each
token is sent to several experts, as a separate row there and back. Rows are assumed to be spread evenly over the
experts: then a rank receives as many as it sends, and each of the ranks that share an expert has the rows of all.
"""

from __future__ import annotations

from renio_megatron.models.architecture import Experts
from renio_megatron.tools.plan.models import PlannedModel
from renio_megatron.tools.plan.workload import PassShape


def kept_bytes(model: PlannedModel, shape: PassShape, *, is_balanced: bool) -> int:
    """Bytes that autograd saves from the router to the sum of the experts' outputs.

    `is_balanced`: the load-balancing loss also has a gradient.
    """
    experts, tokens = _experts(model), _tokens(shape)
    width = experts.ffn_hidden_size // shape.expert_tensor
    # A softmax over the chosen experts, or over all; the numbers of the chosen. A transposed copy of all experts'
    # probabilities, and which are chosen. Where a token's rows are, once for there and back.
    router = 4 * (experts.top_k if experts.normalized else experts.num_experts) + experts.top_k * 8
    router += experts.num_experts * (4 + 1) + experts.top_k * 8
    if is_balanced:  # a softmax over all, and two values that identify the sequence
        router += experts.num_experts * 4 + 16
    # Gate and up in one tensor, the activated gate, a copy of up, their product before and after it is multiplied by a
    # probability. Where experts are frozen their products keep no input: experts never have adapters.
    entries = 5 * width if model.is_frozen else 6 * width + model.architecture.hidden_size
    return tokens * router + _rows(model, shape) * (entries * shape.bytes_per_value + 4)


def left_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Bytes that a layer's dispatcher keeps until its next pass: probabilities, routing map, row indices."""
    if model.experts is None:
        return 0
    return _tokens(shape) * (model.experts.num_experts * (4 + 1) + model.experts.top_k * 8)


def forward_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Peak bytes of a pass that saves nothing.

    The peak is where the experts' outputs are combined, or where they are sent back. Under expert tensor parallelism
    the latter takes them in fp32, the dtype of the router's probabilities.
    """
    experts, bytes_per_value, hidden = _experts(model), shape.bytes_per_value, model.architecture.hidden_size
    rows, sent = _rows(model, shape), _tokens(shape) * experts.top_k
    around = 2 * _tokens(shape) * hidden * bytes_per_value
    # The rows as they leave, and as they arrive where that is not the same.
    traveling = sent * hidden * bytes_per_value * (2 if shape.expert_model > 1 else 1)
    here = experts.num_experts // shape.expert_model
    inside = rows * (2 * hidden + 5 * experts.ffn_hidden_size // shape.expert_tensor // here) * bytes_per_value
    joining = rows * 3 * hidden * bytes_per_value
    if shape.expert_tensor > 1:
        joining += (rows if bytes_per_value < 4 else 0) * hidden * 4 + sent * hidden * 4
    return around + traveling + max(inside, joining)


def backward_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Bytes of gradients that are alive together: of the rows there and back, one expert's MLP, and two hidden
    states."""
    experts, hidden = _experts(model), model.architecture.hidden_size
    here = experts.num_experts // shape.expert_model
    one = 3 * experts.ffn_hidden_size // shape.expert_tensor // here
    return (_rows(model, shape) * (2 * hidden + one) + 2 * _tokens(shape) * hidden) * shape.bytes_per_value


def _experts(model: PlannedModel) -> Experts:
    assert model.experts is not None
    return model.experts


def _tokens(shape: PassShape) -> int:
    """Tokens that this rank's router sees."""
    return shape.tokens // shape.share


def _rows(model: PlannedModel, shape: PassShape) -> int:
    """Rows that this rank's experts see. Without sequence parallelism the ranks of an expert each send all tokens."""
    return _tokens(shape) * _experts(model).top_k * shape.expert_tensor
