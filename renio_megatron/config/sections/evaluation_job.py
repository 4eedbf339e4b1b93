"""Settings of `renio evaluate`, its `key=value` arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

from renio_megatron.config.sections.data import GRADERS, SANDBOXES, is_place
from renio_megatron.config.sections.parallel import ParallelConfig
from renio_megatron.config.sections.precision import PrecisionConfig
from renio_megatron.config.templates import check_template
from renio_megatron.config.validators import require_choice, require_device, require_positive
from renio_megatron.errors import ConfigError

OF_DRAWS = (
    *("temperature", "top_p", "top_k", "max_completion_length", "seed", "stop_token_ids", "stop_strings"),
    *("chat", "enable_thinking", "template", "system", "instruction", "grader"),
)
"""Settings that change what is drawn or how it is judged: one directory of results has one value of each."""
OF_LOCAL_MODELS = ("bf16", "device", "micro_batch_size", "stop_token_ids", "parallel", "precision")
"""Settings that a server does not see."""


@dataclass(frozen=True, kw_only=True)
class EvaluationJobConfig:
    """Settings of `renio evaluate`.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p, top_k: nucleus and top-k sampling; null keeps every token.
        max_completion_length: tokens after which a completion is cut; null: 4096, and for models of fewer positions
            half of these.
        seed: seed of the draws.
        stop_token_ids, stop_strings: tokens and texts that end a completion in addition to those of the model.
        chat: wrap a problem in the tokenizer's chat template; null: where there is one.
        enable_thinking: passed to the chat template; null leaves it out.
        template: text of the prompt, with the field {problem}.
        system: system turn of a prompt; null: none.
        view: name or file of a view in their place, as `data.student_view`.
        instruction: text put behind each problem, `''`: none; null: the benchmark's own, unless template or view has a
            text of its own.
        grader: as `data.grader`; null: the benchmark's own.
        sandbox: as `data.sandbox`.
        grader_errors: `count_wrong`, an exception of the grader counts as wrong and as ungraded, or `raise`.
        bf16: parameters in bf16; null: as a run has trained, and for other models where there is a GPU.
        device: `cpu`, GPUs are not used; null: they are, where there are any.
        micro_batch_size: sequences that a rank draws at a time.
        concurrency: requests that a server is sent at a time.
        timeout_s: seconds after which a request to a server is tried again.
        parallel, precision: sections, see `config.sections`.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_completion_length: int | None = None
    seed: int = 1
    stop_token_ids: list[int] | None = None
    stop_strings: list[str] | None = None
    chat: bool | None = None
    enable_thinking: bool | None = None
    template: str = "{problem}"
    system: str | None = None
    view: str | None = None
    instruction: str | None = None
    grader: str | None = None
    sandbox: str | None = None
    grader_errors: str = "count_wrong"
    bf16: bool | None = None
    device: str | None = None
    micro_batch_size: int = 32
    concurrency: int = 16
    timeout_s: float = 600.0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    def __post_init__(self) -> None:
        require_device(self.device)
        require_positive(
            "",
            top_k=self.top_k,
            max_completion_length=self.max_completion_length,
            micro_batch_size=self.micro_batch_size,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
        )
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0 (0: greedy); got {self.temperature}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must lie in (0, 1], or be null; got {self.top_p}.")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0; got {self.seed}.")
        if any(token < 0 for token in self.stop_token_ids or ()):
            raise ConfigError(f"stop_token_ids are token ids, from 0 on; got {self.stop_token_ids}.")
        if "" in (self.stop_strings or ()):
            raise ConfigError("stop_strings: an empty text ends every completion at once. Remove it.")
        if self.chat is False and self.system is not None:
            raise ConfigError("system is written by a chat template, and chat is false. Leave one of them out.")
        if self.chat is False and self.enable_thinking is not None:
            raise ConfigError("enable_thinking is read by a chat template, and chat is false. Leave one of them out.")
        if self.grader is not None and not is_place(self.grader):
            require_choice("grader", self.grader, (*GRADERS, "a function of your own (module:function)"))
        if self.sandbox is not None:
            require_choice("sandbox", self.sandbox, SANDBOXES)
        require_choice("grader_errors", self.grader_errors, ("raise", "count_wrong"))
        check_template("template", self.template, ("problem",))
