"""Views in recipes: a name or a file becomes a template and a system turn, and what is given later is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.config.views import SHIPPED, parse_view, read_view
from renio_megatron.data.prompt_views import student_view, teacher_view
from renio_megatron.errors import ConfigError
from renio_megatron.types import Record

RECIPE = """
model: modchain/student
teacher: {{model: modchain/teacher}}
data: {{{data}}}
output_dir: run
"""


def data_of(folder: Path, data: str, *overrides: str):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data))
    return load_recipe("train", path, overrides).config.data


def test_those_that_ship_have_the_structure_of_the_published_prompts():
    assert SHIPPED == ("code", "code-bare", "code-solution", "math", "math-bare", "math-solution")
    views = {name: read_view(name, "view", None) for name in SHIPPED}
    assert all(view.system is None and view.template.count("{problem}") == 1 for view in views.values())
    for task, word in (("math", r"\boxed{}"), ("code", "```python")):
        instruction = views[f"{task}-bare"].template.removeprefix("{problem}\n\n")
        assert word in instruction and "{" not in instruction.replace(r"\boxed{}", "")
        assert views[task].template == f"Problem: {{problem}}\n\n{instruction}"
        first, solution, transition, last = views[f"{task}-solution"].template.split("\n\n")
        assert (first, last) == ("Problem: {problem}", instruction)
        assert solution.splitlines()[2] == "{solution}" and len(solution.splitlines()) == 4 and transition


def test_a_name_and_a_file_beside_the_recipe(tmp_path):
    (tmp_path / "mine.txt").write_text("[system]\nBe brief.\n[user]\nQ: {problem}\nA hint: {solution}\n")
    data = data_of(tmp_path, "student_view: math, teacher_view: mine.txt, chat: true")
    assert data.student_template == read_view("math", "view", None).template
    assert (data.teacher_template, data.teacher_system) == ("Q: {problem}\nA hint: {solution}", "Be brief.")
    assert (data.student_view, data.teacher_view, data.student_system) == (None, None, None)
    record = Record("1 + 1?", solution="2")
    assert teacher_view(data).turns(record) == (("system", "Be brief."), ("user", "Q: 1 + 1?\nA hint: 2"))
    assert student_view(data).turns(record)[0][1].startswith("Problem: 1 + 1?\n\nWork")


def test_what_is_given_later_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        data_of(tmp_path, "student_view: math", "data.student_template=[{problem}]").student_template == "[{problem}]"
    )
    assert "Problem" in data_of(tmp_path, "student_template: '[{problem}]'", "data.student_view=math").student_template
    (tmp_path / "here.txt").write_text("[system]\nTwo.\n[user]\n{problem}!")
    data = data_of(tmp_path, "chat: true, student_system: One.", "data.student_view=here.txt")
    assert (data.student_template, data.student_system) == ("{problem}!", "One.")


def test_routes_have_views(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: modchain/student\nteacher: {routes: {a: {model: modchain/teacher, view: math-solution}, "
        "b: {model: modchain/teacher}}}\ndata: {source: jsonl, path: x, teacher_key: k, teacher_view: math}\n"
        "output_dir: run\n"
    )
    first, second = load_recipe("train", path).config.teachers
    assert "{solution}" in first.data.teacher_template and "{solution}" not in second.data.teacher_template
    assert second.data.teacher_template.startswith("Problem: {problem}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("student_view: maths", r"data\.student_view: there is no view 'maths'.*Did you mean 'math'\?.*code-solution"),
        ("student_view: math, student_template: 'x{problem}'", r"data\.student_view and data\.student_template both"),
        ("student_view: empty.txt", r"empty\.txt: the user's turn is empty"),
        ("student_view: wrong.txt", r"wrong\.txt: a view is text, or a line \[system\]"),
        ("student_view: none.txt", r"data\.student_template='Solve it\.' would give every record the same prompt"),
        ("student_view: bytes.txt", r"bytes\.txt cannot be read as UTF-8"),
        ("student_view: with.txt", r"data\.student_system needs data\.chat=true"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, data, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("[user]\n{problem}\n[system]\nx\n")
    (tmp_path / "none.txt").write_text("Solve it.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff{problem}")
    (tmp_path / "with.txt").write_text("[system]\nx\n[user]\n{problem}")
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, data)


def test_what_looks_like_an_interpolation_is_text(tmp_path):
    (tmp_path / "mine.txt").write_text("Cost ${{x}}: {problem}")
    assert data_of(tmp_path, "student_view: mine.txt").student_template == "Cost ${{x}}: {problem}"


def test_a_bracket_inside_a_text_is_text():
    assert parse_view("see [user] and\n [system]\n{problem}", "here").template == "see [user] and\n [system]\n{problem}"
