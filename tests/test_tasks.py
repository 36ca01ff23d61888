"""Tasks: every released text is read once, inputs stay in one split, files that are not what they should be are named."""

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from spdf_jax.data import Example, Task, TaskConfig, load_task, prepare_tfds, seen_categories
from spdf_jax.data.restaurant import restaurant_task
from spdf_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the released files lie beside the project, not in it")


def inputs(examples) -> set[str]:
    return {example.context for example in examples}


def n_texts(examples) -> int:
    return sum(len(example.references) for example in examples)


def rows_csv(rows, header=("mr", "ref")) -> str:
    return "".join(",".join(f'"{value}"' for value in row) + "\n" for row in (header, *rows))


def write(folder, **files) -> str:
    """Writes files, named with two underscores for the dot."""
    for name, content in files.items():
        file = Path(folder, name.replace("__", "."))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def entry_xml(triples, texts, category="City", comment="good") -> str:
    triples = "".join(f"<mtriple>{triple}</mtriple>" for triple in triples)
    texts = "".join(f'<lex comment="{comment}" lid="Id1">{text}</lex>' for text in texts)
    return (
        f'<entry category="{category}" eid="Id7" size="1"><originaltripleset><otriple>o | o | o</otriple>'
        f"</originaltripleset><modifiedtripleset>{triples}</modifiedtripleset>{texts}</entry>"
    )


def xml(*entries) -> str:
    return f"<?xml version='1.0' encoding='utf-8'?><benchmark><entries>{''.join(entries)}</entries></benchmark>"


# --- config ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "e2"}, "task.name: 'e2' is not one of '', 'restaurant', 'e2e', .*; did you mean 'e2e'"),
        ({"name": "webnlg"}, r"task\.path is empty: task\.name='webnlg' needs"),
        ({"name": "restaurant", "test_examples": 0}, "task.test_examples: 0 must be at least 1 and at most"),
        ({"name": "restaurant", "train_examples": 10**6}, "task.train_examples: 1000000 must be"),
        ({"name": "restaurant", "seed": -1}, "task.seed: -1 must be at least 0"),
    ],
)
def test_configs_that_cannot_work(config, message):
    with pytest.raises(InputError, match=message):
        TaskConfig(**config)


def test_no_task_is_a_config_but_not_a_task():
    with pytest.raises(InputError, match=r"task\.name is empty: choose one of restaurant, e2e"):
        load_task(TaskConfig())


def test_a_task_is_read_once_and_kept(tmp_path):
    config = TaskConfig("e2e", write(tmp_path, devset__csv=rows_csv([(f"name[{n}]", "A.") for n in range(40)])))
    task = load_task(config)
    (tmp_path / "devset.csv").unlink()
    assert load_task(config) is task


# --- restaurant ---


@pytest.fixture(scope="module")
def restaurant() -> Task:
    return load_task(TaskConfig("restaurant", train_examples=1500, validation_examples=100, test_examples=100))


def test_restaurant_has_the_sizes_asked_for_and_disjoint_inputs(restaurant):
    splits = [inputs(split) for split in restaurant[:3]]
    assert [len(split) for split in splits] == [1500, 100, 100]
    assert len(set.union(*splits)) == 1700
    assert restaurant.style == "e2e"


def test_restaurant_references_are_two_to_six_different_texts(restaurant):
    counts = Counter(len(example.references) for split in restaurant[:3] for example in split)
    assert set(counts) == {2, 3, 4, 5, 6}
    assert min(counts.values()) > 150
    for example in restaurant.train:
        assert len(set(example.references)) == len(example.references)
    texts = [text for example in restaurant.train for text in example.references]
    assert len(set(texts)) > 0.99 * len(texts)


# What says a value, found apart from the generator's own tables: one pattern for an attribute and its value.
SAID = {
    "food": lambda value: rf"\b{value}\b",
    "priceRange": lambda value: {
        "cheap": r"\bcheap\b|inexpensive|low-priced|low prices|easy on the wallet|Prices are low|not spend much",
        "moderate": r"moderately priced|mid-priced|moderate price|middle price range|Prices are moderate",
        "high": r"(?<!in)expensive|high-priced|high price|Prices are high",
    }[value],
    "customer rating": lambda value: rf"\b{value}\b",
    "area": lambda value: rf"\b(?i:in|at|on) the {value}\b",
    "familyFriendly": lambda value: {
        "yes": r"(?<!not )family-friendly|child-friendly|welcomes children|welcomes families|good choice for families"
        r"|Children are welcome|Families are welcome",
        "no": r"adults-only|adults only|not admit|not family-friendly|not a place for families|not admitted",
    }[value],
    "near": lambda value: rf"(?i:near|close to|a short walk from) the {value}\b",
    "eatType": lambda value: rf"\b{value}\b",
}


def attributes(example) -> dict[str, str]:
    return {key.strip(): value for key, value in re.findall(r"([a-zA-Z ]+)\[([^\]]+)\]", example.context)}


def test_restaurant_references_say_every_attribute_once_and_no_other(restaurant):
    values = {}
    for example in restaurant.train:
        for key, value in attributes(example).items():
            values.setdefault(key, set()).add(value)
    for example in restaurant.train[:400]:
        said = attributes(example)
        for text in example.references:
            rest = text.replace(said["name"], "NAME")
            assert "NAME" in rest
            for key, pattern in SAID.items():
                for value in values[key]:
                    times = len(re.findall(pattern(value), rest))
                    if key == "eatType":  # the noun may come back: "The pub serves ..."
                        assert (times > 0) == (said.get(key) == value), (key, value, text)
                    else:
                        assert times == (said.get(key) == value), (key, value, text)


def test_restaurant_reads_as_sentences(restaurant):
    for example in restaurant.train:
        for text in example.references:
            assert re.fullmatch(r"[A-Z][^.]*\.( [A-Z][^.]*\.)*", text), text
            assert "  " not in text
            assert " ," not in text
            assert not re.search(r"\b[Aa] [aeioAEIO]|\b[Aa]n [^aeioAEIO]", text), text


def test_restaurant_is_the_same_everywhere_and_another_with_another_seed(restaurant):
    fewer = restaurant_task(train_examples=30, validation_examples=5, test_examples=7, seed=0)
    assert fewer[:3] == (restaurant.train[:30], restaurant.validation[:5], restaurant.test[:7])
    assert restaurant.train[0] == Example(
        "name[Harvest Table], food[French], priceRange[moderate], customer rating[1 out of 5]",
        (
            "Harvest Table is rated 1 out of 5 by its customers. Harvest Table is moderately priced. "
            "The venue serves French food.",
            "Harvest Table, a French spot rated 1 out of 5 by its customers, is moderately priced.",
            "Harvest Table, a moderately priced place serving French food, scores 1 out of 5.",
            "Harvest Table, a mid-priced place with a customer rating of 1 out of 5, offers French dishes.",
        ),
    )
    other = restaurant_task(train_examples=30, validation_examples=5, test_examples=7, seed=1)
    assert not inputs(other.train) & inputs(fewer.train)


# --- E2E ---


def test_e2e_groups_references_by_input_and_keeps_released_splits(tmp_path):
    path = write(
        tmp_path,
        trainset__csv=b"\xef\xbb\xbf"
        + rows_csv([("name[A]", "An A."), ("name[B]", "A B."), ("name[A]", " An A. ")]).encode(),
        devset__csv=rows_csv([("name[C]", "A C,\nin two lines.")]),
        testset__csv='"mr"\n"name[D]"\n',
        testset_w_refs__csv=rows_csv([("name[D]", "It says D.".replace('"', '""')), ("name[A]", "A.")]),
    )
    assert load_task(TaskConfig("e2e", path)) == Task(
        train=(Example("name[A]", ("An A.", "An A.")), Example("name[B]", ("A B.",))),
        validation=(Example("name[C]", ("A C,\nin two lines.",)),),
        test=(Example("name[D]", ("It says D.",)), Example("name[A]", ("A.",))),
        style="e2e",
    )


def test_files_without_a_test_split_halve_the_inputs_of_the_development_set(tmp_path):
    dev = rows_csv([(f"name[{n}]", f"{n} {k}.") for k in range(3) for n in range(60)])
    task = load_task(TaskConfig("e2e", write(tmp_path, trainset__csv=rows_csv([("name[A]", "A.")]), devset__csv=dev)))
    assert [n_texts(split) for split in (task.train, (*task.validation, *task.test))] == [1, 180]
    assert {len(example.references) for example in task.validation + task.test} == {3}
    assert min(len(task.validation), len(task.test)) > 20
    more = write(tmp_path, devset__csv=dev + '"name[new]","New."\n')
    grown = load_task(TaskConfig("e2e", more + "/"))  # another config, so it is read again
    assert inputs(task.test) <= inputs(grown.test)
    assert inputs(task.validation) <= inputs(grown.validation)


@needs_shared
@pytest.mark.parametrize("file", ["", "devset.csv"])
def test_real_e2e_development_set_is_split_by_input(file):
    path = SHARED / "e2e"
    task = load_task(TaskConfig("e2e", str(path / file)))
    with (path / "devset.csv").open(newline="") as stream:
        rows = [(row["mr"].strip(), row["ref"].strip()) for row in csv.DictReader(stream)]
    read = [(example.context, text) for split in task[:3] for example in split for text in example.references]
    assert Counter(read) == Counter(rows)
    assert len(read) == 4672
    splits = [inputs(split) for split in task[:3]]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 547
    assert 0.7 < len(splits[0]) / 547 < 0.9


# --- WebNLG ---


def test_webnlg_reads_good_texts_of_the_modified_triples(tmp_path):
    train = xml(
        entry_xml(["A_B | in | C", "C | is | &quot;D&quot;"], ["A &amp; B.", " A B. "]),
        entry_xml(["A_B | in | C", "C | is | &quot;D&quot;"], ["Again."], category="Food"),
        entry_xml(["X | y | Z"], ["bad"], comment="bad"),
    )
    dev = xml(*(entry_xml([f"{n} | y | Z"], [f"{n}.", ""]) for n in range(40)))
    test = xml(entry_xml(["A | b | C"], ["One."], category="City"), entry_xml(["D | b | C"], ["Two."], category="Moon"))
    task = load_task(TaskConfig("webnlg", write(tmp_path, train__xml=train, dev__xml=dev, test__xml=test)))
    assert task.train == (Example('A_B : in : C | C : is : "D"', ("A & B.", "A B.", "Again."), "City"),)
    assert [n_texts(split) for split in task[:3]] == [1 + 2, 40, 2]
    assert task.style == "webnlg"
    assert seen_categories(task) == {"City"}


@pytest.mark.parametrize("release", [2, 3])
def test_webnlg_is_read_as_released(release, tmp_path):
    """Version 3 and the challenge's own: a folder a split, one a number of triples; of the test files that with texts."""
    files = {
        f"{split}/{n}triples/{category}.xml": xml(entry_xml([f"{split}{n} | in | {category}"], ["A.", "B."], category))
        for split in ("train", "dev")
        for n in (1, 2)
        for category in ("Airport", "Food")
    }
    unmarked = xml(entry_xml(["t | in | Food"], ["Text."], "Food", comment=""))
    inputs_only = xml(entry_xml(["t | in | Food"], [], "Food"))
    if release == 3:
        files["test/rdf-to-text-generation-test-data-with-refs-en.xml"] = unmarked
        files["test/rdf-to-text-generation-test-data-without-refs-en.xml"] = inputs_only
        files["test/semantic-parsing-test-data-with-refs-en.xml"] = inputs_only
    else:
        files["test/testdata_with_lex.xml"] = unmarked
        files["test/testdata_no_lex.xml"] = inputs_only
    task = load_task(TaskConfig("webnlg", write(tmp_path, **files)))
    for split, examples in (("train", task.train), ("dev", task.validation)):
        expected = {f"{split}{n} : in : {category}" for n in (1, 2) for category in ("Airport", "Food")}
        assert inputs(examples) == expected
        assert {example.references for example in examples} == {("A.", "B.")}
    assert task.test == (Example("t : in : Food", ("Text.",), "Food"),)


def test_webnlg_takes_the_english_texts(tmp_path):
    both = entry_xml(["a | b | c"], ["Text."]).replace("</entry>", '<lex comment="good" lang="ru">Текст.</lex></entry>')
    other = xml(entry_xml(["d | b | c"], ["D."]))
    task = load_task(TaskConfig("webnlg", write(tmp_path, train__xml=xml(both), dev__xml=other, test__xml=other)))
    assert task.train == (Example("a : b : c", ("Text.",), "City"),)


@pytest.mark.parametrize("marks", [(".no-ol", ".no-ol"), ("", ""), (".no-ol", "")])
def test_cleaned_e2e_is_read_as_released(marks, tmp_path):
    header = ("mr", "ref", "fixed", "orig_mr")
    files = {
        f"{name}.csv": rows_csv([(f"name[{name}]", "A.", "1", "old")], header)
        for name in ("train-fixed", "devel-fixed", f"train-fixed{marks[0]}", f"devel-fixed{marks[1]}", "test-fixed")
    }
    task = load_task(TaskConfig("e2e", write(tmp_path, **files)))
    read = [split[0].context for split in task[:3]]
    assert read == [f"name[train-fixed{marks[0]}]", f"name[devel-fixed{marks[1]}]", "name[test-fixed]"]


@needs_shared
def test_real_webnlg_has_every_good_text_of_train():
    task = load_task(TaskConfig("webnlg", str(SHARED / "webnlg")))
    raw = (SHARED / "webnlg" / "train.xml").read_text()
    n_all, n_good = raw.count("<lex "), raw.count('<lex comment="good"')
    assert n_all == 18102
    assert n_texts(task.train) == n_good == n_all - raw.count('comment="bad"') - raw.count('comment="toFix"')
    assert not inputs(task.validation) & inputs(task.test)
    assert len(seen_categories(task)) == 10
    assert "Aarhus_Airport : cityServed : Aarhus" in inputs(task.train)


@pytest.mark.parametrize("where", ["before", "utf-16"])
def test_xml_entities_are_refused_before_they_expand(where, tmp_path):
    bomb = '<!DOCTYPE b [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><benchmark>&b;</benchmark>'
    content = bomb.encode("utf-16") if where == "utf-16" else bomb.encode()
    with pytest.raises(InputError, match=r"train\.xml: (has a DOCTYPE, whose entities are never expanded|not UTF-8)"):
        load_task(TaskConfig("webnlg", write(tmp_path, train__xml=content)))


def test_external_entities_are_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    bomb = f'<!DOCTYPE b SYSTEM "{tmp_path}/secret.txt"><benchmark/>'
    with pytest.raises(InputError, match="DOCTYPE"):
        load_task(TaskConfig("webnlg", write(tmp_path, train__xml=bomb)))


# --- DART ---


def test_dart_lower_cases_relations_only(tmp_path):
    item = {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "HOME_TOWN", "NC"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "s", "text": "It joined.\ud83d"}, {"source": "s", "text": " "}],
    }
    files = {f"dart_{split}__json": json.dumps([item]) for split in ("train", "dev", "test")}
    task = load_task(TaskConfig("dart", write(tmp_path, **files)))
    example = Example("Mars Hill : joined : 1973 | Mars Hill : home_town : NC", ("It joined.\ufffd",))
    assert task == Task((example,), (example,), (example,), "dart")


@needs_shared
def test_real_dart_development_set_is_split_by_input():
    task = load_task(TaskConfig("dart", str(SHARED / "dart")))
    items = json.loads((SHARED / "dart" / "dart-v1.1.1-full-dev.json").read_text())
    assert sum(n_texts(split) for split in task[:3]) == sum(len(item["annotations"]) for item in items)
    splits = [inputs(split) for split in task[:3]]
    triplesets = {json.dumps([[s, r.lower(), o] for s, r, o in item["tripleset"]]) for item in items}
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(triplesets)
    assert "Newberry College : nickname : Wolves" in set.union(*splits)


# --- Curation ---


@pytest.mark.parametrize("column", ["article", "article_content"])
def test_curation_drops_empty_pairs_and_splits_by_article(column, tmp_path):
    long_article = "word " * 60_000  # over the csv module's own limit of a field
    rows = [(str(n), f"Article {n}.", f"Summary {n}.") for n in range(300)]
    rows += [("x", "", "No article."), ("x", "No summary.", " "), ("x", long_article, "Long.")]
    before = csv.field_size_limit()
    task = load_task(TaskConfig("curation", write(tmp_path, c__csv=rows_csv(rows, ("title", column, "summary")))))
    assert csv.field_size_limit() == before
    pairs = {(example.context, *example.references) for split in task[:3] for example in split}
    assert pairs == {row[1:] for row in rows[:300]} | {(long_article.strip(), "Long.")}
    assert sum(len(split) for split in task[:3]) == 301
    assert 0.7 < len(task.train) / 301 < 0.9
    assert task.style == "perplexity"


# --- files that are not what they should be ---

GOOD_XML, GOOD_CSV = xml(entry_xml(["a | b | c"], ["A."])), rows_csv([("name[A]", "A.")])
GOOD_JSON = json.dumps([{"tripleset": [["a", "b", "c"]], "annotations": [{"text": "A."}]}])


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("e2e", {}, r"none of the released files is there; expected trainset\*\.csv, devset\*\.csv, testset"),
        (
            "e2e",
            {"trainset.csv": "", "devset.csv": "", "test-fixed.csv": ""},
            r"trainset\.csv and test-fixed\.csv are of two releases; keep the files of one there",
        ),
        (
            "webnlg",
            {"train.xml": "", "train/1triples/Food.xml": ""},
            r"train\.xml and train/1triples/Food\.xml are of two",
        ),
        ("webnlg", {"train.csv": "x"}, r"none of the released files is there; expected train\*\.xml"),
        (
            "e2e",
            {"trainset.csv": "", "trainset_old.csv": ""},
            r"more than one file for train \(trainset\.csv, trainset_",
        ),
        ("e2e", {"trainset.csv": "", "testset.csv": ""}, r"only trainset\.csv, testset\.csv; add the .*devset\*\.csv"),
        ("e2e", {"devset.csv": ""}, r"devset\.csv:1: columns \[\], but mr,ref are needed"),
        ("e2e", {"devset.csv": "mr\nname[A]\n"}, r"devset\.csv:1: columns \['mr'\], but mr,ref are needed; give"),
        ("e2e", {"devset.csv": GOOD_CSV + "\nname[B]\n"}, r"devset\.csv:4: 1 fields under 2 columns; quote or remove"),
        ("e2e", {"devset.csv": GOOD_CSV + "a,b,c\n"}, r"devset\.csv:3: 3 fields under 2 columns"),
        ("e2e", {"devset.csv": GOOD_CSV + 'a,"b" c\n'}, r"devset\.csv:3: not CSV .*; fix or remove the row"),
        ("e2e", {"devset.csv": GOOD_CSV + "name[B],\n"}, r"devset\.csv:3: an empty mr or ref; fix or remove"),
        (
            "e2e",
            {"devset.csv": "mr,ref\nna\xefve,x\n".encode("latin-1")},
            r"devset\.csv: not UTF-8 \(byte 9\); convert",
        ),
        ("e2e", {"devset.csv": "mr,ref\n"}, r"no example with a reference in the train split; give more data"),
        ("curation", {"c.csv": GOOD_CSV}, r"c\.csv:1: columns .*, but article_content,summary or article,summary are"),
        ("webnlg", {"train.xml": "<benchmark>\n<entry>\n</benchmark>"}, r"train\.xml:3: not well-formed XML .*; fetch"),
        ("webnlg", {"train.xml": "<html/>"}, r"train\.xml: no <entry> in it; give a file in the WebNLG"),
        ("webnlg", {"train.xml": xml(entry_xml([], ["A."]))}, r"entry 1 \(eid Id7\): no modifiedtripleset/mtriple"),
        ("webnlg", {"train.xml": xml(entry_xml(["a | b"], ["A."]))}, r"entry 1 \(eid Id7\): triple 'a \| b' is not"),
        (
            "webnlg",
            {"train.xml": GOOD_XML, "dev.xml": GOOD_XML},
            "no example with a reference in the (test|validation)",
        ),
        ("dart", {"dart-dev.json": "[1,"}, r"dart-dev\.json: not JSON .*; fetch it again"),
        ("dart", {"dart-dev.json": "[" * 100_000}, r"dart-dev\.json: not JSON"),
        ("dart", {"dart-dev.json": "{}"}, r"dart-dev\.json: a dict, not a list"),
        (
            "dart",
            {"dart-dev.json": GOOD_JSON[:-1] + ', {"tripleset": [["a", "b"]], "annotations": []}]'},
            "item 2: expec",
        ),
        ("dart", {"dart-dev.json": '[{"tripleset": [["a", "b", 1]], "annotations": []}]'}, "item 1: expected"),
        ("dart", {"dart-dev.json": '[{"tripleset": [], "annotations": []}]'}, "item 1: an empty tripleset"),
        ("dart", {"dart-dev.json": '[{"tripleset": [["a", "b", "c"]]}]'}, "item 1: expected"),
        ("dart", {"dart-dev.json": "[3]"}, "item 1: expected"),
        ("tfds", {}, r"task\.path=.*: ends in 'files', not in restaurant, e2e"),
    ],
)
def test_malformed_files_are_named(name, files, message, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder, **files)
    with pytest.raises(InputError, match=message) as caught:
        load_task(TaskConfig(name, str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["e2e", "webnlg", "dart", "curation", "tfds"])
def test_a_path_where_nothing_is(name, tmp_path):
    with pytest.raises(InputError, match=r"task\.path=.*: (no such file or folder|no prepared dataset found)"):
        load_task(TaskConfig(name, str(tmp_path / "dart")))


# --- TensorFlow Datasets ---


def test_tfds_round_trip_in_array_record(tmp_path):
    task = xml(entry_xml(["é | b | 漢"], ["One\ntwo.", "Two."], category="Ö"), entry_xml(["z | b | c"], ["Z."]))
    dev = xml(*(entry_xml([f"{n} | y | Z"], [f"{n}."]) for n in range(30)))
    config = TaskConfig("webnlg", write(tmp_path, train__xml=task, dev__xml=dev))
    prepared = prepare_tfds(config, str(tmp_path / "tfds"))
    assert prepared == TaskConfig("tfds", str(tmp_path / "tfds" / "webnlg"))
    assert load_task(prepared) == load_task(config)
    assert list((tmp_path / "tfds/webnlg/1.0.0").glob("*.array_record*"))
    with pytest.raises(InputError, match="is there already; remove it or choose another data_dir"):
        prepare_tfds(config, str(tmp_path / "tfds"))
    with pytest.raises(InputError, match="is prepared already"):
        prepare_tfds(prepared, str(tmp_path / "other"))


def test_tfds_reads_the_prepared_files_as_plain_tfds_does(tmp_path):
    import tensorflow_datasets as tfds

    config = TaskConfig("restaurant", train_examples=3, validation_examples=2, test_examples=1)
    prepare_tfds(config, str(tmp_path))
    source = tfds.data_source("restaurant", split="train", data_dir=tmp_path)
    assert [row["context"].decode() for row in source] == [example.context for example in load_task(config).train]


@pytest.mark.parametrize("damage", ["info", "records", "gone"])
def test_tfds_that_is_damaged(damage, tmp_path):
    path = prepare_tfds(TaskConfig("restaurant", train_examples=3), str(tmp_path)).path
    info, records = Path(path, "1.0.0/dataset_info.json"), next(Path(path, "1.0.0").glob("*train*"))
    if damage == "gone":
        records.unlink()
    else:
        {"info": info, "records": records}[damage].write_text("{")
    with pytest.raises(InputError, match=r"not readable .*; remove it and prepare it with prepare_tfds") as caught:
        load_task(TaskConfig("tfds", path))
    assert "\n" not in str(caught.value)


def test_tfds_runs_no_code_that_files_name_and_no_tensorflow(tmp_path):
    path = prepare_tfds(TaskConfig("restaurant", train_examples=3), str(tmp_path)).path
    Path(path, "1.0.0/features.json").write_text('{"pythonClassName": "evil.Feature"}')
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    code = (
        "import sys; from spdf_jax.data import TaskConfig, load_task\n"
        f"assert len(load_task(TaskConfig('tfds', {path!r})).train) == 3\n"
        "assert not {'evil', 'tensorflow'} & set(sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
