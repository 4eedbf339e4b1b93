"""`renio preview`, the prompt that a run shows, and templates that show nothing of a record."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from renio_megatron.cli.main import main
from renio_megatron.config.load import load_recipe
from renio_megatron.data.sources.modchain import make_problem
from renio_megatron.errors import ConfigError
from renio_megatron.models.shipped import SHIPPED, model_directory
from renio_megatron.models.tokenizer import load_tokenizer
from tests.data.test_prompts import characters
from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.paths import RECIPES, ROOT, kind_of_example
from tests.models.test_chat_template import CHATML, IGNORES


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["preview", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _tokenizers_are_there(recipe: Path) -> bool:
    config = load_recipe(kind_of_example(recipe), recipe).config
    names = [config.model, *(teacher.settings.model for teacher in config.teachers)]
    return all(name is None or name in SHIPPED or (ROOT / name / "tokenizer.json").is_file() for name in names)


def test_another_split_of_the_data_set_is_evaluated(tmp_path, capsys) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": make_problem(1, "train", index).prompt, "answer": "1"} for index in range(4)]
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "set")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: modchain/student\nteacher: {model: modchain/teacher}\nevaluate: {every: 1, samples: 2}\n"
        f"data: {{source: datasets, path: {tmp_path / 'set'}, eval_split: test}}\noutput_dir: run\n"
        "rollout: {max_completion_length: 8}\n"
    )
    assert shown(capsys, str(recipe), "--prompts", "1")["prompts"]
    with pytest.raises(ConfigError, match="eval_path is missing"):
        load_recipe("train", recipe, ["data.eval_split=null"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_example_is_shown(recipe: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    if not _tokenizers_are_there(recipe):
        pytest.skip("its tokenizers are not here")
    config = load_recipe(kind_of_example(recipe), recipe).config
    if config.data.source == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    found = shown(capsys, str(recipe), "--prompts", "2")
    tokenizer = load_tokenizer(model_directory(config.model, "model"))
    assert len(found["prompts"]) == 2
    for prompt in found["prompts"]:
        assert tokenizer.decode(prompt["student_ids"]) == prompt["student_text"]
        assert tokenizer.eos_token_id in found["student_ends"]
        if config.teachers:
            assert tokenizer.decode(prompt["teacher_ids"]) == prompt["teacher_text"]
            assert tokenizer.eos_token_id in found["teacher_ends"]
        else:
            assert prompt["teacher_text"] is None and prompt["completion_ids"][-1] == tokenizer.eos_token_id
    assert main(["preview", str(recipe), "--prompts", "1"]) == 0
    text = capsys.readouterr().out
    assert found["prompts"][0]["student_text"].splitlines()[0] in text
    assert f"{len(found['prompts'][0]['student_ids'])} tokens" in text and "completions end at" in text


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A distillation recipe on two records, with models of which only tokenizers and descriptions are there."""
    for name, chat, ends in (("student", CHATML, 1), ("teacher", CHATML, [1, 8])):
        directory = tmp_path / name
        characters(chat=chat).save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 104}))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    lines = [{"problem": "2+2?", "solution": "two and two", "answer": "4"}, {"problem": "3+3?", "answer": "6"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(tmp_path / "student"),
                "teacher": {"model": str(tmp_path / "teacher")},
                "data": {"source": "jsonl", "path": str(tmp_path / "data.jsonl"), "student_template": "Q: {problem}"},
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    return path


def test_what_is_shown_is_what_is_read(recipe: Path, capsys) -> None:
    settings = ["data.chat=true", "data.teacher_template={problem} or so", "rollout.stop_strings=[END]"]
    found = shown(capsys, str(recipe), *settings, "--prompts", "2")
    by_problem = {prompt["answer"]: prompt for prompt in found["prompts"]}
    assert by_problem["4"]["student_text"] == "<|im_start|>user\nQ: 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert by_problem["6"]["teacher_text"] == "<|im_start|>user\n3+3? or so<|im_end|>\n<|im_start|>assistant\n"
    assert found["student_ends"] == [1, "END"] and found["teacher_ends"] == [1, 8]
    [notice] = found["notices"]
    assert "Set rollout.stop_token_ids=[8]" in notice
    assert shown(capsys, str(recipe), "rollout.stop_token_ids=[8]")["notices"] == []


def test_a_person_sees_lengths_answers_and_notices(recipe: Path, capsys) -> None:
    characters(chat=IGNORES).save_pretrained(recipe.parent / "student")
    assert main(["preview", str(recipe), "data.chat=true", "--prompts", "1"]) == 0
    text = capsys.readouterr().out
    assert "student, " in text and " tokens:" in text and "answer '" in text
    assert "teacher sees the same" in text
    assert "note: the chat template of" in text and "add_generation_prompt" in text


def test_prompts_that_are_all_the_same_are_noticed(recipe: Path, capsys) -> None:
    (recipe.parent / "data.jsonl").write_text('{"problem": "2"}\n' * 3)
    [*_, notice] = shown(capsys, str(recipe), "rollout.stop_token_ids=[8]")["notices"]
    assert "prompts of the first 3 records are all the same" in notice


def test_a_recipe_of_fine_tuning_is_shown_with_its_completions(recipe: Path, capsys) -> None:
    values = yaml.safe_load(recipe.read_text())
    del values["teacher"]
    recipe.write_text(yaml.safe_dump(values))
    (recipe.parent / "data.jsonl").write_text('{"problem": "2", "solution": "two"}\n')
    found = shown(capsys, str(recipe), "--prompts", "1")
    [prompt] = found["prompts"]
    assert (prompt["student_text"], prompt["completion_text"]) == ("Q: 2", "two</s>")
    assert prompt["teacher_text"] is None and found["teacher_ends"] is None


def test_the_whole_prompt_of_fine_tuning_is_shown_also_where_it_is_learned(recipe: Path, capsys) -> None:
    values = yaml.safe_load(recipe.read_text())
    del values["teacher"]
    recipe.write_text(yaml.safe_dump(values))
    (recipe.parent / "data.jsonl").write_text(
        '{"problem": "2", "solution": "two"}\n{"problem": "3", "solution": "x"}\n'
    )
    found = shown(capsys, str(recipe), "completion_only_loss=false")
    assert {prompt["student_text"] for prompt in found["prompts"]} == {"Q: 2", "Q: 3"}
    assert found["notices"] == []


def test_a_teacher_that_is_the_student_and_sees_the_same_is_refused(recipe: Path, capsys) -> None:
    assert main(["preview", str(recipe), "teacher={kind: ema}"]) == 2
    assert "teacher.kind=ema, but the teacher's view of the first" in capsys.readouterr().err


def test_what_is_shown_is_what_fits_the_models(recipe: Path, capsys) -> None:
    for name in ("student", "teacher"):
        config = {"model_type": "llama", "vocab_size": 104, "max_position_embeddings": 20}
        (recipe.parent / name / "config.json").write_text(json.dumps(config))
    (recipe.parent / "data.jsonl").write_text('{"problem": "2"}\n{"problem": "2222222222"}\n')
    settings = ["data.overlong=skip", "rollout.max_completion_length=14", "rollout.stop_token_ids=[8]"]
    found = shown(capsys, str(recipe), *settings)
    assert [prompt["student_text"] for prompt in found["prompts"]] == ["Q: 2"]
    assert "leaves out 1 of the first 2 records" in found["notices"][0]


CHECK = ["rollout.max_completion_length=30", "train.global_batch_size=8", "train.micro_batch_size=4"]


@pytest.mark.slow
def test_a_first_step_is_looked_at_and_nothing_is_written(tmp_path: Path) -> None:
    """Also with ranks of the teacher's own, which end with the others."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: modchain/student\nteacher: {model: modchain/teacher, ranks: dedicated}\noutput_dir: run\n"
        "train: {train_iters: 1, global_batch_size: 8, micro_batch_size: 4}\n"
    )
    for nproc, settings in (("2", []), ("1", ["teacher.ranks=colocated"])):
        command = [sys.executable, "-m", "renio_megatron.cli.main", "preview", str(path), "--check", "--nproc", nproc]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        done = warm.run([*command, *CHECK, *settings], env=environment, cwd=tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "the first step's 8 completions, " in done.stdout
        for name in ("sampler", "tokens", "rows", "boundary", "ends"):
            assert f"\n  {name} " in done.stdout
        assert not (tmp_path / "run").exists()


def test_what_cannot_be_looked_at_is_told(recipe: Path, capsys) -> None:
    for arguments, words in (
        (["--check", "canaries=off"], "canaries=off leaves that out"),
        (["--nproc", "2"], "--nproc starts ranks for --check"),
    ):
        assert main(["preview", str(recipe), *arguments]) == 2
        assert words in capsys.readouterr().err
    values = yaml.safe_load(recipe.read_text())
    del values["teacher"]
    recipe.write_text(yaml.safe_dump(values))
    assert main(["preview", str(recipe), "--check"]) == 2
    assert "`renio sft` has neither" in capsys.readouterr().err


def test_mistakes_are_one_line(recipe: Path, capsys) -> None:
    for arguments in ([str(recipe), "data.path=nowhere"], ["nowhere.yaml"], [str(recipe), "model=nowhere"]):
        assert main(["preview", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


STUDENT_TEMPLATES = ["Q: {{problem}}", "Q: { problem }", "Q: <problem>", "Think step by step.", "", "{solution}"]


@pytest.mark.parametrize("template", STUDENT_TEMPLATES)
def test_a_template_without_a_record_is_refused(template: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.student_template=.* has no \{problem\}"):
        load_recipe("train", recipe, [f"data.student_template='{template}'"])
    if template != "{solution}":
        with pytest.raises(ConfigError, match=r"data\.teacher_template=.* has no \{problem\} or \{solution\}"):
            load_recipe("train", recipe, [f"data.teacher_template='{template}'"])
    else:
        load_recipe("train", recipe, ["data.teacher_template={solution}"])


@pytest.mark.matrix(2)
def test_a_run_shows_a_prompt_and_the_ends_at_its_start(tmp_path: Path, capsys) -> None:
    from tests.helpers.training_cases import save_models

    save_models(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": str(tmp_path / "student"),
                "teacher": {"model": str(tmp_path / "teacher")},
                "rollout": {"max_completion_length": 4},
                "train": {"train_iters": 1, "global_batch_size": 4},
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    done = warm.run(
        [sys.executable, "-m", "renio_megatron.cli.main", "train", str(recipe)],
        env={**os.environ, "PYTHONPATH": python_path()},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = shown(capsys, str(recipe), "--prompts", "1")
    assert found["prompts"][0]["student_text"] in done.stdout
    assert "completions end at '$' (15)" in done.stdout
    shutil.rmtree(tmp_path / "run")


PAGE = (ROOT / "docs" / "guides" / "prompts.md").read_text()


def test_the_commands_of_the_page_run(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    fences = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    commands = [line for fence in fences for line in fence.splitlines() if line]
    assert len(commands) == 3
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "renio"
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert ("student_ends" in json.loads(shown)) if "--json" in arguments else ("completions end at" in shown)


def test_the_settings_of_the_page_are_settings(recipe: Path) -> None:
    [section] = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    recipe.write_text(recipe.read_text() + section)
    rollout = load_recipe("train", recipe).config.rollout
    assert (rollout.stop_token_ids, rollout.stop_strings) == ([151645], ["</answer>"])


def test_the_page_names_every_column_that_is_recognized() -> None:
    from renio_megatron.data.sources.columns import ALIASES

    assert all(f"`{name}`" in PAGE for names in ALIASES.values() for name in names[1:])
