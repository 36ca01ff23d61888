"""What users read: every public name's help is complete."""

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import spdf_jax as spdf

OBJECTS = {name: getattr(spdf, name) for name in spdf.__all__}
FUNCTIONS = {name: one for name, one in OBJECTS.items() if inspect.isfunction(one)}
CLASSES = {name: one for name, one in OBJECTS.items() if inspect.isclass(one)}
# Told apart by type, a constant has the help of its type: the package's own says what it is.
CONSTANTS = OBJECTS.keys() - FUNCTIONS.keys() - CLASSES.keys()


def section(name: str, title: str) -> str:
    """A section of a docstring, up to the next one or the example."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n(?=  ))*)", f"{inspect.getdoc(OBJECTS[name])}\n", re.MULTILINE)
    return found.group(1) if found else ""


def test_all_names_what_the_package_imports():
    imported = {name for name, one in vars(spdf).items() if not name.startswith("_") and not inspect.ismodule(one)}
    assert set(spdf.__all__) == imported


def test_the_package_names_everything():
    assert {name for name in OBJECTS if f"`{name}`" not in spdf.__doc__} == set()
    shown = pydoc.render_doc(spdf, renderer=pydoc.plaintext)
    assert {name for name in OBJECTS if name not in shown} == set()


def test_its_help_begins_with_every_name_on_one_screen():
    """40 lines of a terminal."""
    shown = pydoc.render_doc(spdf, renderer=pydoc.plaintext).splitlines()[:40]
    assert {name for name in OBJECTS if name not in "\n".join(shown)} == set()


def test_constants_are_said_to_be_constants():
    listed = spdf.__doc__[spdf.__doc__.index("Constants:") :]
    assert set(re.findall(r"`([A-Z_]+)`", listed)) == CONSTANTS


@pytest.mark.parametrize("name", FUNCTIONS | CLASSES)
def test_it_has_an_example_that_runs(name):
    """Examples are run where they stand, by ``pytest spdf_jax``."""
    doc = inspect.getdoc(OBJECTS[name])
    assert ">>> " in doc
    assert "+SKIP" not in doc


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_refuses(name):
    signature = inspect.signature(OBJECTS[name])
    taken = section(name, "Args")
    assert [p for p in signature.parameters if not re.search(rf"^ .*\b{p}\b.*: ", taken, re.MULTILINE)] == []
    if signature.return_annotation is not None:
        assert section(name, "Returns") or section(name, "Yields")
    if "raise InputError" in inspect.getsource(OBJECTS[name]):
        assert "InputError: " in section(name, "Raises")


@pytest.mark.parametrize("name", [name for name, one in CLASSES.items() if not issubclass(one, Exception)])
def test_a_class_says_what_it_holds(name):
    inherited = {"parent", "name"}  # Flax gives its modules these
    fields = inspect.get_annotations(OBJECTS[name]).keys() - inherited
    assert fields
    assert [
        field for field in fields if not re.search(rf"^ .*\b{field}\b.*: ", section(name, "Attributes"), re.M)
    ] == []


def test_sections_of_docstrings_are_indented_by_two():
    section = re.compile(r"^( *)(Args|Returns|Raises|Yields|Attributes):\n(?!\1  \S)", re.MULTILINE)
    assert [str(path) for path in Path(spdf.__file__).parent.rglob("*.py") if section.search(path.read_text())] == []
