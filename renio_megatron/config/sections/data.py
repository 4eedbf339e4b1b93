"""Settings of where problems come from and how the two models see them."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.templates import check_template
from renio_megatron.config.validators import require_choice, require_positive


@dataclass(frozen=True)
class SourceInfo:
    """Properties of a source that are known before its data is read.

    Attributes:
        opener: `module:function`, (DataConfig, split) -> Source.
        settings: keys of this section that it reads and others do not.
        has_records: whether the user supplies its records, with columns: then all that a run will use are checked
            before it starts, and a column may name a record's teacher.
        check: `module:function`, (DataConfig, split) -> None, which checks the files before a rank starts; or None.
    """

    opener: str
    settings: tuple[str, ...] = ()
    has_records: bool = False
    check: str | None = None


_SOURCES = "renio_megatron.data.sources"
SOURCES: dict[str, SourceInfo] = {
    "modchain": SourceInfo(f"{_SOURCES}.generated:modchain_source"),
    "jsonl": SourceInfo(
        f"{_SOURCES}.files:jsonl_source", ("path", "eval_path"), has_records=True, check=f"{_SOURCES}.files:check_jsonl"
    ),
    "datasets": SourceInfo(
        f"{_SOURCES}.files:datasets_source",
        ("path", "eval_path", "subset", "split", "eval_split"),
        has_records=True,
        check=f"{_SOURCES}.files:check_datasets",
    ),
    "reasoning_gym": SourceInfo(f"{_SOURCES}.generated:reasoning_gym_source", ("task", "size")),
}
"""Name in `data.source` -> its properties."""

_GRADERS = "renio_megatron.evaluation.graders"
GRADERS: dict[str, str] = {
    "number": f"{_GRADERS}:number_grader",
    "math": f"{_GRADERS}:math_grader_of",
    "code": f"{_GRADERS}.code:code_grader",
    "modchain": f"{_GRADERS}:modchain_grader",
    "reasoning_gym": f"{_GRADERS}:reasoning_gym_grader",
}
"""Name in `data.grader` -> `module:function`, (DataConfig, source of the records) -> Grader."""


NEED_NO_ANSWERS = ("code",)
"""Graders of records without an answer."""
SANDBOXES = ("namespaces", "landlock", "unsafe")
"""Names in `data.sandbox`, the best first."""


def is_place(grader: str) -> bool:
    """Whether `data.grader` names a user's own function.

    >>> is_place("my_module:grade"), is_place("math")
    (True, False)
    """
    module, colon, name = grader.rpartition(":")
    return bool(module and colon and name.isidentifier())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where problems come from and how the two models see them.

    Attributes:
        source: `modchain`, `jsonl`, `datasets` or `reasoning_gym`.
        seed: seed of the problems' order, and of the problems themselves where they are generated.
        path: file (`jsonl`); or directory or name of a data set of the library `datasets` (`datasets`), which is looked
            for in its cache before it is fetched.
        eval_path: file, directory or name of the evaluation problems; the generated sources need none, nor does a data
            set with an eval_split.
        subset: of a data set that holds several, the name of one.
        split, eval_split: splits of a data set; null: `train`, and `test` of eval_path.
        task: generator of `reasoning_gym`, for example `gsm_symbolic`.
        size: number of problems that `reasoning_gym` generates before they repeat.
        problem_key, solution_key, answer_key: columns of a record. Solution and answer are optional.
        teacher_key: column that names which of teacher.routes scores a record's completions.
        teacher_prompt_key: column with what the teacher sees in place of the problem, text or turns, where records have
            it and teacher_template is null.
        student_template, teacher_template: text of the prompt, with the fields {problem} and {solution}; a null
            teacher_template is the student's, which must have {problem}.
        student_view, teacher_view: name or file of a view, which stands for a template and a system turn: `math`,
            `math-bare`, `math-solution`, `code`, `code-bare`, `code-solution`, or a text file beside the recipe.
        student_system, teacher_system: system turn of a prompt, which needs `chat`; null: none, and for the teacher
            without a teacher_template the student's.
        chat: wrap the prompt in the tokenizer's chat template.
        enable_thinking: passed to the chat template of tokenizers that know it; null leaves it out.
        teacher_enable_thinking: enable_thinking of the teacher's view; null follows enable_thinking.
        grader: `number` (the last number of the completion), `math` (an expression in a box), `code` (a program, on the
            record's tests), `modchain`, `reasoning_gym`, a function of one's own as `module:function` or
            `path/file.py:function`, `none`, or null: the source's own grader, which for files is `number` where all
            answers are numbers, `math` for other answers, and `code` for records with tests.
        sandbox: where the grader `code` runs programs: `namespaces`, `landlock`, `unsafe` (nothing is kept out: inside
            a container of one's own), or null: the first of the former two that works.
        grader_errors: what an exception in the grader does: `raise` stops the run and names the prompt, `count_wrong`
            counts the completion as wrong, which `rollout/grader_error_frac` shows.
        max_prompt_length: tokens of the longest prompt that is used.
        overlong: what becomes of records whose prompts are longer, or which a model has too few positions for:
            `refuse` names the first and stops, `skip` leaves them out and says how many. Nothing is cut.
    """

    source: str = "modchain"
    seed: int = 1
    path: str | None = None
    eval_path: str | None = None
    subset: str | None = None
    split: str | None = None
    eval_split: str | None = None
    task: str | None = None
    size: int | None = None
    problem_key: str = "problem"
    solution_key: str = "solution"
    answer_key: str = "answer"
    teacher_key: str | None = None
    teacher_prompt_key: str = "teacher_prompt"
    student_template: str = "{problem}"
    teacher_template: str | None = None
    student_view: str | None = None
    teacher_view: str | None = None
    student_system: str | None = None
    teacher_system: str | None = None
    chat: bool = False
    enable_thinking: bool | None = None
    teacher_enable_thinking: bool | None = None
    grader: str | None = None
    sandbox: str | None = None
    grader_errors: str = "raise"
    max_prompt_length: int = 4096
    overlong: str = "refuse"

    @property
    def source_info(self) -> SourceInfo:
        """Properties of the source; raises `ConfigError` for a name that is not in `SOURCES`."""
        require_choice("data.source", self.source, SOURCES)
        return SOURCES[self.source]

    @property
    def has_eval_split(self) -> bool:
        """Whether the evaluation problems are a split of the source's that eval_split names."""
        return self.eval_split is not None and "eval_split" in self.source_info.settings

    def __post_init__(self) -> None:
        require_positive("data", size=self.size, max_prompt_length=self.max_prompt_length)
        if self.grader is not None and not is_place(self.grader):
            require_choice("data.grader", self.grader, (*GRADERS, "none", "a function of your own (module:function)"))
        if self.sandbox is not None:
            require_choice("data.sandbox", self.sandbox, SANDBOXES)
        require_choice("data.overlong", self.overlong, ("refuse", "skip"))
        require_choice("data.grader_errors", self.grader_errors, ("raise", "count_wrong"))
        check_template("data.student_template", self.student_template, ("problem",))
        if self.teacher_template is not None:
            check_template("data.teacher_template", self.teacher_template, ("problem", "solution"))
