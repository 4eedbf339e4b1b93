"""What a feed-forward network of experts takes, in bytes of one rank.

The formulas follow Megatron's router, its alltoall dispatcher without fused permutation, and `SequentialMLP`. Each
token goes to several experts, as a row of its own there and back. Rows are taken to be spread evenly over the experts:
then a rank receives as many as it sends, and each of the ranks that share an expert has the rows of all of them.
"""

from __future__ import annotations

from renio_megatron.models.architecture import Experts
from renio_megatron.tools.plan.models import PlannedModel
from renio_megatron.tools.plan.workload import PassShape


def kept_bytes(model: PlannedModel, shape: PassShape, *, is_balanced: bool) -> int:
    """What autograd saves from the router to the sum of the experts' outputs.

    `is_balanced`: the load-balancing loss has a gradient, too.
    """
    experts, tokens = _experts(model), _tokens(shape)
    width = experts.ffn_hidden_size // shape.expert_tensor
    # A softmax over the chosen experts, or over all; the numbers of the chosen. A transposed copy of all experts'
    # probabilities, and which are chosen. Where a token's rows are, once for there and back.
    router = 4 * (experts.top_k if experts.normalized else experts.num_experts) + experts.top_k * 8
    router += experts.num_experts * (4 + 1) + experts.top_k * 8
    if is_balanced:  # a softmax over all, and two numbers that tell the sequence
        router += experts.num_experts * 4 + 16
    # Gate and up in one tensor, the activated gate, a copy of up, their product before and after it is multiplied by a
    # probability. Where experts are frozen their products keep no input: adapters are never beside them.
    entries = 5 * width if model.is_frozen else 6 * width + model.architecture.hidden_size
    return tokens * router + _rows(model, shape) * (entries * shape.bytes_per_value + 4)


def left_bytes(model: PlannedModel, shape: PassShape) -> int:
    """What a layer's dispatcher keeps of its last pass until the next one: probabilities, choices, places of rows."""
    if model.experts is None:
        return 0
    return _tokens(shape) * (model.experts.num_experts * (4 + 1) + model.experts.top_k * 8)


def forward_bytes(model: PlannedModel, shape: PassShape) -> int:
    """What the widest moment of a pass holds that keeps nothing.

    It is where the experts' outputs are put together, or where they are sent back. Under expert tensor parallelism that
    takes them in fp32, as the router's probabilities are.
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
    """Gradients that are alive together: of the rows there and back, of one expert's MLP, and two hidden states'."""
    experts, hidden = _experts(model), model.architecture.hidden_size
    here = experts.num_experts // shape.expert_model
    one = 3 * experts.ffn_hidden_size // shape.expert_tensor // here
    return (_rows(model, shape) * (2 * hidden + one) + 2 * _tokens(shape) * hidden) * shape.bytes_per_value


def _experts(model: PlannedModel) -> Experts:
    assert model.experts is not None
    return model.experts


def _tokens(shape: PassShape) -> int:
    """That this rank's router sees."""
    return shape.tokens // shape.share


def _rows(model: PlannedModel, shape: PassShape) -> int:
    """That this rank's experts see. Without sequence parallelism the ranks of an expert each send all tokens."""
    return _tokens(shape) * _experts(model).top_k * shape.expert_tensor
