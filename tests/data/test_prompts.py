import json
import re
import string

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config

from renio_megatron.config import DataConfig
from renio_megatron.data.prompt_views import PromptView, encode_view
from renio_megatron.data.prompts import LengthLimits, PromptStream, check_views_differ
from renio_megatron.data.sources import build_source, modchain
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.models.tokenizer import check_same_tokenizer, load_tokenizer, padding_id
from renio_megatron.types import Record

CHAT = (
    "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}()"
    "{% elif enable_thinking is defined %}({% endif %}"
)


def characters(*, bos=False, chat=None, more=""):
    """A tokenizer with a token for each printable character, and for the marks of turns that its chat template writes;
    with `bos` it writes <s> before and </s> after a text."""
    symbols = ["<s>", "</s>", *string.printable, *more]
    core = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat
    if marks := sorted(set(re.findall(r"<\|\w+\|>", chat or ""))):
        tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def modchain_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("modchain")
    modchain.build_tokenizer(directory)
    return load_tokenizer(directory)


def stream(path, rows, tokenizer=None, *, with_completions=False, length_limits=None, **settings):
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="jsonl", path=str(file), eval_path=str(file), **settings)
    source = build_source(config, "train")
    return PromptStream(
        source, tokenizer or characters(), config, with_completions=with_completions, length_limits=length_limits
    )


def texts(prompt, tokenizer):
    return tokenizer.decode(list(prompt.student_ids)), tokenizer.decode(list(prompt.teacher_ids))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Problem: {problem}", "Problem: let {x} = {problem}{solution}"),
        ("{problem}|{solution}", "let {x} = {problem}{solution}|{problem}"),
        (r"{problem} in \boxed{}", r"let {x} = {problem}{solution} in \boxed{}"),
        ("{{problem}} {1}", "{problem} {1}"),
    ],
)
def test_braces_in_the_texts_survive(template, text):
    record = Record("let {x} = {problem}{solution}", solution="{problem}")
    assert PromptView(template, False, None, "data.student_template").fill(record) == text


def test_unknown_field_names_the_setting():
    with pytest.raises(ConfigError, match=r"data\.teacher_template may use .* got \{answer\}"):
        PromptView("{problem} {answer}", False, None, "data.teacher_template")


def test_missing_solution_names_the_record(tmp_path):
    rows = [{"problem": "a", "solution": "b"}, {"problem": "c"}]
    with pytest.raises(DataError, match=r"data\.jsonl:2: the record has no solution, and data\.teacher_template uses"):
        stream(tmp_path, rows, teacher_template="{problem} {solution}")
    with pytest.raises(DataError, match=r"data\.jsonl:2: the record has no solution, and fine-tuning"):
        stream(tmp_path, rows, with_completions=True)


def test_modchain_prompt_is_exactly_its_characters(modchain_tokenizer):
    config = DataConfig()
    source = build_source(config, "train")
    (prompt,) = PromptStream(source, modchain_tokenizer, config, with_completions=True).batch(7, 1)
    problem = modchain.make_problem(config.seed, "train", 7)
    assert prompt.index == 7
    assert prompt.student_ids == prompt.teacher_ids
    assert prompt.student_ids == tuple(modchain.SYMBOLS.index(symbol) for symbol in problem.prompt)
    assert prompt.completion_ids == tuple(modchain.SYMBOLS.index(symbol) for symbol in problem.solution + "$")
    assert prompt.record.answer == problem.answer


def test_beginning_of_text_only_where_the_tokenizer_writes_it():
    view, record = PromptView("{problem}", False, None, "data.student_template"), Record("ab")
    plain, with_bos = characters(), characters(bos=True)
    ids = (plain.get_vocab()["a"], plain.get_vocab()["b"])
    assert encode_view(view, record, plain) == ids
    assert encode_view(view, record, with_bos) == (0, *ids), "<s> before, and no </s> after"
    assert encode_view(view, Record("<s>ab"), with_bos) == (0, *ids)


def test_chat_template_and_thinking(tmp_path):
    tokenizer = characters(bos=True, chat=CHAT)
    settings = {"chat": True, "enable_thinking": False, "teacher_enable_thinking": True}
    (prompt,) = stream(tmp_path, [{"problem": "2+2?"}], tokenizer, **settings).batch(0, 1)
    assert texts(prompt, tokenizer) == ("<u>2+2?</u><a>()", "<u>2+2?</u><a>(")
    (prompt,) = stream(tmp_path, [{"problem": "2+2?"}], tokenizer, chat=True).batch(0, 1)
    assert texts(prompt, tokenizer) == ("<u>2+2?</u><a>",) * 2, "null leaves enable_thinking out"
    settings = {"chat": True, "enable_thinking": False}
    (prompt,) = stream(tmp_path, [{"problem": "2+2?"}], tokenizer, **settings).batch(0, 1)
    assert texts(prompt, tokenizer) == ("<u>2+2?</u><a>()",) * 2, "the teacher follows the student"


def test_chat_settings_that_cannot_work(tmp_path):
    rows = [{"problem": "a"}]
    with pytest.raises(ConfigError, match=r"data\.chat=true needs a tokenizer with a chat template"):
        stream(tmp_path, rows, chat=True)
    with pytest.raises(ConfigError, match=r"data\.enable_thinking needs data\.chat=true"):
        stream(tmp_path, rows, enable_thinking=False)
    with pytest.raises(ConfigError, match="does not read enable_thinking"):
        stream(tmp_path, rows, characters(chat="{{ messages[0].content }}"), chat=True, teacher_enable_thinking=True)


def test_two_views(tmp_path):
    tokenizer = characters()
    rows = [{"problem": "a", "solution": "b", "answer": "1"}]
    prompts = stream(tmp_path, rows, tokenizer, teacher_template="{problem} since {solution}").batch(0, 2)
    assert [texts(prompt, tokenizer) for prompt in prompts] == [("a", "a since b")] * 2
    check_views_differ(prompts, "initial")
    with pytest.raises(ConfigError, match=r"teacher\.kind=ema"):
        check_views_differ(stream(tmp_path, rows, tokenizer).batch(0, 2), "ema")


def test_batches_are_pieces_of_one_order(tmp_path):
    whole = stream(tmp_path, [{"problem": str(i)} for i in range(5)]).batch(0, 12)
    again = stream(tmp_path, [{"problem": str(i)} for i in range(5)])
    assert [*again.batch(0, 5), *again.batch(5, 7)] == whole
    assert [prompt.index for prompt in whole] == list(range(12))


def test_evaluation_prompts(tmp_path, modchain_tokenizer):
    tokenizer = characters()
    prompts = stream(tmp_path, [{"problem": str(i)} for i in range(5)], tokenizer).evaluation(9)
    assert [texts(prompt, tokenizer)[0] for prompt in prompts] == list("01234"), "a finite set is not repeated"
    config = DataConfig()
    endless = PromptStream(build_source(config, "train"), modchain_tokenizer, config)
    held_out = endless.evaluation(3)
    assert modchain_tokenizer.decode(list(held_out[2].student_ids)) == modchain.make_problem(1, "eval", 2).prompt


def test_prompt_lengths(tmp_path):
    rows = [{"problem": "12345", "solution": "678"}]
    assert stream(tmp_path, rows, max_prompt_length=5).batch(0, 1)
    with pytest.raises(DataError, match=r"data\.jsonl:1: the student's prompt has 5 tokens, .*max_prompt_length=4"):
        stream(tmp_path, rows, max_prompt_length=4).batch(0, 1)
    with pytest.raises(DataError, match="the teacher's prompt has 8 tokens"):
        stream(tmp_path, rows, max_prompt_length=5, teacher_template="{problem}{solution}").batch(0, 1)
    without_x = characters()
    without_x.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(DataError, match="the student's prompt has no tokens"):
        stream(tmp_path, [{"problem": "x"}], without_x).batch(0, 1)


def test_sequences_fit_the_positions_that_the_models_were_made_for(tmp_path):
    rows = [{"problem": "12345", "solution": "123", "answer": "1"}]
    settings = {"teacher_template": "{problem}{solution}"}  # 5 tokens for the student, 8 for the teacher

    def first(length_limits, *, evaluation=False, **more):
        prompts = stream(tmp_path, rows, length_limits=length_limits, **settings, **more)
        return prompts.evaluation(1) if evaluation else prompts.batch(0, 1)

    first(LengthLimits(student=8, teachers={"": 11}, completion=4))  # the last token is not read: 5 + 3, 8 + 3
    words = r"data.jsonl:1: the student's prompt of 5 tokens and a completion of up to 4 need 8 positions.*made for 7"
    with pytest.raises(DataError, match=words):
        first(LengthLimits(student=7, teachers={"": 11}, completion=4))
    with pytest.raises(DataError, match=r"the teacher's prompt of 8 tokens .* need 11 positions.*made for 10"):
        first(LengthLimits(student=8, teachers={"": 10}, completion=4))
    first(LengthLimits(student=8, teachers={"": 10}, completion=2, answer=4), evaluation=True)  # no teacher reads it
    with pytest.raises(DataError, match="a completion of up to 5 need 9 positions"):
        first(LengthLimits(student=8, completion=2, answer=5), evaluation=True)
    first(LengthLimits(student=8), with_completions=True)  # 5 + 3 of the solution + the end token, which is not read
    with pytest.raises(DataError, match="a completion of up to 4 need 8 positions"):
        first(LengthLimits(student=7), with_completions=True)


def test_text_that_the_tokenizer_does_not_know(tmp_path, modchain_tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:1: the tokenizer cannot encode 'what\?'"):
        stream(tmp_path, [{"problem": "what?"}], modchain_tokenizer).batch(0, 1)


def test_same_tokenizer():
    check_same_tokenizer(characters(), characters())
    check_same_tokenizer(characters(), characters(more="äö"))
    with pytest.raises(ConfigError, match=r"token 102 is 'ä' for the student and None .* 103 and 102 tokens"):
        check_same_tokenizer(characters(more="ä"), characters())
    with pytest.raises(ConfigError, match=r"token 102 is 'ä' for the student and 'ö'"):
        check_same_tokenizer(characters(more="äö"), characters(more="öä"))


def test_padding_falls_back_to_the_end_token(modchain_tokenizer):
    assert padding_id(characters()) == 1
    assert padding_id(modchain_tokenizer) == 16


def test_tokenizers_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "none")
    Qwen3Config(vocab_size=17).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{oops")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token(tmp_path):
    core = Tokenizer(models.WordLevel({"a": 0}))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="names no eos_token"):
        load_tokenizer(tmp_path)
