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
    assert (data.student_template, data.student_system) == ("{problem}!", "Two.")
    for system, said in (("null", None), ("Three.", "Three.")):
        data = data_of(tmp_path, "chat: true, student_view: here.txt", f"data.student_system={system}")
        assert (data.student_template, data.student_system) == ("{problem}!", said)
    data = data_of(tmp_path, "chat: true, student_view: here.txt", "data.student_template=[{problem}]")
    assert (data.student_template, data.student_system) == ("[{problem}]", None)
    data = data_of(tmp_path, "chat: true, student_system: One.", "data.student_view=math")
    assert data.student_system == "One."


def test_null_that_is_given_later_switches_a_view_off(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(RECIPE.format(data="teacher_view: math-solution, student_view: math"))
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\ndata: {teacher_template: null, student_template: null}\n")
    assert load_recipe("train", base).config.data.teacher_template is not None
    data = load_recipe("train", child).config.data
    assert (data.student_template, data.teacher_template) == ("{problem}", None)
    assert load_recipe("train", base, ["data.teacher_template=null"]).config.data.teacher_template is None
    again = load_recipe("train", child, ["data.teacher_view=math"]).config.data
    assert again.teacher_template.startswith("Problem: {problem}")
    assert load_recipe("train", base, ["data.teacher_view=null"]).config.data.teacher_template is None


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
        (
            "student_view: none.txt",
            r"data\.student_view \(\S+none\.txt\)='Solve it\.' would give every record the same prompt",
        ),
        ("student_view: bytes.txt", r"bytes\.txt cannot be read as UTF-8"),
        (
            "student_view: with.txt",
            r"the system turn of data\.student_view \(\S+with\.txt\) is set .*chat is false",
        ),
        (
            "student_view: braces.txt",
            r"data\.student_view \(\S+braces\.txt\) may use the fields .* got \{a\}",
        ),
        ("student_view: math, student_template: null", r"data\.student_view and data\.student_template both"),
        ("chat: true, student_view: with.txt, student_system: x", r"data\.student_view and data\.student_system both"),
        ("chat: true, student_view: with.txt, student_system: null", r"student_view and data\.student_system both"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, data, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("[user]\n{problem}\n[system]\nx\n")
    (tmp_path / "none.txt").write_text("Solve it.")
    (tmp_path / "braces.txt").write_text("\\frac{a}{b}: {problem}")
    (tmp_path / "bytes.txt").write_bytes(b"\xff{problem}")
    (tmp_path / "with.txt").write_text("[system]\nx\n[user]\n{problem}")
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, data)


def test_what_looks_like_an_interpolation_is_text(tmp_path):
    (tmp_path / "mine.txt").write_text("Cost ${{x}}: {problem}")
    assert data_of(tmp_path, "student_view: mine.txt").student_template == "Cost ${{x}}: {problem}"


def test_a_bracket_inside_a_text_is_text():
    assert parse_view("see [user] and\n [system]\n{problem}", "here").template == "see [user] and\n [system]\n{problem}"


def test_a_message_about_a_view_names_the_view(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: modchain/student\ndata: {teacher_view: math-solution}\noutput_dir: run\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe("sft", path)
    assert str(caught.value).startswith("data.teacher_view (math-solution) is set but would be ignored: supervised")
    route = "{{model: modchain/teacher, view: {}}}"
    routes = f"teacher: {{routes: {{a: {route.format('math')}, b: {route.format('math-bare')}}}}}\n"
    data = "data: {source: jsonl, path: x, teacher_key: k, teacher_view: math}\n"
    path.write_text(f"model: modchain/student\n{routes}{data}output_dir: run\n")
    with pytest.raises(ConfigError, match=r"^data\.teacher_view \(math\) is set .* each of teacher\.routes has"):
        load_recipe("train", path)
    (tmp_path / "odd.txt").write_text("{odd} {problem}")
    path.write_text(path.read_text().replace("math-bare", "odd.txt"))
    with pytest.raises(ConfigError, match=r"^teacher\.routes\.b\.view \(\S+odd\.txt\) may use the fields"):
        load_recipe("train", path)


def test_a_system_turn_falls_away_with_the_chat_template(tmp_path):
    (tmp_path / "here.txt").write_text("[system]\nTwo.\n[user]\n{problem}!")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data="chat: true, student_view: here.txt, teacher_system: One."))
    recipe = load_recipe("train", path, ["data.chat=false"])
    data = recipe.config.data
    assert (data.student_template, data.student_system, data.teacher_system) == ("{problem}!", None, None)
    (line,) = recipe.dropped_lines()
    said = f"the system turn of data.student_view ({tmp_path / 'here.txt'}), data.teacher_system: data.chat is false"
    assert line.startswith(f"left out of the recipe: {said}")
    path.write_text(
        "model: modchain/student\nteacher: {routes: {a: {model: modchain/teacher, system: One.}}}\n"
        "data: {source: jsonl, path: x, teacher_key: k, chat: true}\noutput_dir: run\n"
    )
    assert set(load_recipe("train", path, ["data.chat=false"]).dropped) == {"teacher.routes.a.system"}


def test_a_mark_of_the_byte_order_is_no_text(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbf[system]\nx\n[user]\n{problem}!\n")
    data = data_of(tmp_path, "student_view: mine.txt, chat: true")
    assert (data.student_template, data.student_system) == ("{problem}!", "x")
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.format(data="student_template: '{problem}?'").lstrip().encode())
    assert load_recipe("train", path).config.data.student_template == "{problem}?"


def test_a_self_teacher_may_differ_by_its_system_turn_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: modchain/student\nteacher: {kind: initial}\ndata: {chat: true}\noutput_dir: run\n")
    same = "data.teacher_template='{problem}'"
    for settings in ([], [same]):
        with pytest.raises(ConfigError, match="kind=initial with the student's own view"):
            load_recipe("train", path, settings)
    for settings in (["data.teacher_system=Know"], [same, "data.teacher_system=Know"], [same, "data.student_system=S"]):
        assert load_recipe("train", path, settings).config.teachers[0].kind == "initial"
