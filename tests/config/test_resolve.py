"""Resolving a stage's configuration.

Pins: precedence schema < preset < file < flags < KEY=VALUE, with an origin for every key; values typed by the schema
and not by YAML's guesses; every error is exit 2 and says file:line, key and the nearest valid key; verl's spellings;
`${oc.env:…}` for paths alone; config.yaml reads back to the same tree.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadcli.config.reading import nearest_key
from gadcli.config.resolve import load_resolved, resolve
from gadcli.config.schema import GadConfig
from gadcli.config.tree import config_hash, differences, flatten, schema_leaves, schema_sections
from gadcli.config.verl_names import RENAMED
from gadcli.errors import ConfigError, ExitCode


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def error_of(**arguments) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve("gad", **arguments)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


def test_without_anything_the_schema_speaks() -> None:
    resolved = resolve("gad")
    expected = GadConfig(stage="gad")
    assert resolved.config == expected
    assert set(resolved.origins.values()) == {"default"}


def test_a_stage_implies_its_objective_and_critic() -> None:
    # algorithm: seqkd is sft without a critic, warmup has 10 critic-only steps
    assert resolve("seqkd").config.actor.objective == "sft"
    assert resolve("seqkd").config.trainer.critic_warmup == -1
    assert resolve("warmup").config.trainer.critic_warmup == 10


def test_each_layer_goes_over_the_one_before_and_is_named_as_origin(write) -> None:
    file = write("rollout:\n  n: 3\n  temperature: 0.5\n  top_p: 0.9\nactor:\n  ppo_epochs: 5\n")
    resolved = resolve(
        "gad", "chengla-8b", file, {"rollout.temperature": 0.6, "rollout.top_p": 0.8}, ["rollout.top_p=0.7"]
    )
    rollout = resolved.config.rollout
    # preset n=8, T=.8; the file says 3, .5, .9; flags .6, .8; the word .7
    assert (rollout.n, rollout.temperature, rollout.top_p) == (3, 0.6, 0.7)
    assert resolved.origins["rollout.n"] == f"{file}:2"
    assert resolved.origins["actor.ppo_epochs"] == f"{file}:6"
    assert resolved.origins["rollout.temperature"] == "command line"
    assert resolved.origins["data.train_batch_size"].startswith("presets/chengla-8b.yaml:")
    assert resolved.origins["rollout.top_k"] == "default"


def test_a_flag_that_was_not_given_sets_nothing() -> None:
    assert resolve("gad", flags={"trainer.exp_name": None}).origins["trainer.exp_name"] == "default"


@pytest.mark.parametrize("written", ["1e-6", "1E-06", "1.0e-6", "0.000001", ".000001"])
def test_every_spelling_of_a_number_is_that_number(write, written: str) -> None:
    # YAML 1.1 reads 1e-6 (no dot) as text; the schema says float
    assert resolve("gad", config_file=write(f"actor:\n  optim:\n    lr: {written}\n")).config.actor.optim.lr == 1e-6
    assert resolve("gad", overrides=[f"actor.optim.lr={written}"]).config.actor.optim.lr == 1e-6


def test_a_quoted_number_is_refused_with_its_line(write) -> None:
    file = write('actor:\n  optim:\n    lr: "1e-6"\n')
    error = error_of(config_file=file)
    assert f"{file}:3: actor.optim.lr" in error.message
    assert error.hint == "write 1e-6 without quotes"


def test_a_misspelt_key_names_the_nearest(write) -> None:
    file = write("rollout:\n  tempratur: 1\n")
    error = error_of(config_file=file)
    assert error.message == f"{file}:2: unknown key rollout.tempratur"
    assert error.hint == "did you mean rollout.temperature?"
    assert nearest_key("critic.optm.lr") == "critic.optim.lr"
    assert nearest_key("ppo_epochs") == "actor.ppo_epochs"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("actor:\n  ppo_epochs: 1\n  ppo_epochs: 2\n", 3, "actor.ppo_epochs"),
        ("actor:\n  ppo_epochs: 1\nactor:\n  grad_clip: 1\n", 3, "actor"),
        ("actor.ppo_epochs: 1\nactor:\n  ppo_epochs: 1\n", 3, "actor.ppo_epochs"),  # two spellings of one key
    ],
)
def test_a_key_written_twice_is_refused(write, text: str, line: int, key: str) -> None:
    file = write(text)
    assert error_of(config_file=file).message.startswith(f"{file}:{line}: {key} is set twice")


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("rollout.n=0", "rollout.n is 0, but must be at least 1"),
        ("rollout.n=1.5", "must be a whole number"),
        ("rollout.n=", "must be a whole number"),
        ("rollout.n=0x10", "must be a whole number"),
        ("rollout.n=1e-1", "must be a whole number"),
        ("data.shuffle=maybe", "must be true or false"),
        ("data.shuffle=2", "must be true or false"),
        ("~data.shuffle", "a key cannot be removed"),
        ("data.train_files=[a.parquet", "lacks a bracket"),
        ("data.train_files=[a,,b]", "an item"),
        ("data.train_files=['a,b]", "a quote"),
        ("actor.optim.lr=inf", "must be a number"),
        ("actor.optim.lr=1e999", "must be finite"),
        ("actor.optim.lr=2", "at most 1"),
        ("critic.loss=finale", "must be one of original, v1, v2, v2_raw, final"),
        ("actor.optim=1", "actor.optim is a section"),
        ("rollout.n", "is not KEY=VALUE"),
        ("stage=seqkd", "stage is not set by hand"),
        ("trainer.exp_name=${oc.env:HOME}", "allowed in paths only"),
        ("trainer.output_dir=${trainer.exp_name}", "only ${oc.env:NAME} is understood"),
        ("actor.model.path=???", "has no value"),
    ],
)
def test_a_bad_override_says_what_is_wrong(word: str, complaint: str) -> None:
    assert complaint in error_of(overrides=[word]).message


def test_a_close_choice_is_offered() -> None:
    assert error_of(overrides=["critic.loss=finale"]).hint == "did you mean critic.loss=final?"
    other = error_of(overrides=["algorithm.adv_estimator=gspo"]).hint
    assert other == "did you mean actor.policy_loss.loss_mode=gspo?"
    assert error_of(overrides=["~data.shuffle"]).hint == "set it instead: data.shuffle=True"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("actor: [\n", "not valid YAML"),
        ("- 1\n", "`key: value` lines"),
        ("actor: 3\n", "is a section, not a value"),
        ("actor:\n  ppo_epochs: {a: 1}\n", "is a section, but must be a whole number"),
        ("data:\n  train_files: [[a]]\n", "a list that holds more than texts"),
        ("actor:\n  grad_clip: [1]\n", "is a list, but must be a number"),
        ("<<: {a: 1}\n", "plain words"),
        ("trainer:\n  exp_name: null\n", "is null"),
    ],
)
def test_a_malformed_file_is_refused(write, text: str, complaint: str) -> None:
    file = write(text)
    message = error_of(config_file=file).message
    assert complaint in message
    assert message.startswith(f"{file}:")


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(config_file=tmp_path / "no.yaml").message
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(config_file=tmp_path / "b.yaml").message


def test_words_that_yaml_takes_for_something_else_stay_text(write) -> None:
    config = resolve("gad", config_file=write("trainer:\n  exp_name: 2024\n  output_dir: no\n")).config
    assert (config.trainer.exp_name, config.trainer.output_dir) == ("2024", "no")


def test_lists_come_as_brackets_or_as_one_word(write) -> None:
    for word in ("data.train_files=[a.parquet, 'b c.parquet']", 'data.train_files=["a.parquet","b c.parquet"]'):
        assert resolve("gad", overrides=[word]).config.data.train_files == ["a.parquet", "b c.parquet"]
    assert resolve("gad", overrides=["data.train_files=*.parquet"]).config.data.train_files == ["*.parquet"]
    assert resolve("gad", overrides=["data.train_files=[]"]).config.data.train_files == []
    assert resolve("gad", config_file=write("data:\n  train_files: a\n")).config.data.train_files == ["a"]


ODD_NAMES = (
    "a,b.parquet", "step=100.parquet", "50%.parquet", "c#1.parquet", "two words.parquet", "it's.parquet",
    'say "x".jsonl', "数据.parquet", "x@y.parquet", "br[1].parquet", "[1].parquet", "$HOME.parquet", "~old.parquet",
    "a: b.parquet", "!x", "null", "a\\b.parquet", "- x", "{a}.parquet", "no", " led.parquet", "'q'.parquet",
)  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_files_name_arrives_as_it_is(name: str, tmp_path: Path) -> None:
    """In quotes any name, alone, in a list and beside another; without, whatever is no syntax of lists. It stays so
    in the run's config.yaml."""
    mark = '"' if '"' not in name else "'"
    quoted = f"{mark}{name}{mark}"
    words = {quoted: [name], f"[{quoted}]": [name], f"[{quoted}, b]": [name, "b"], f"['b',{quoted},]": ["b", name]}
    if name[0] not in "[' " and name != "null":
        words[name] = [name]
    if "," not in name and name[0] not in "'\" ":
        words |= {f"[{name}]": [name], f"[b,{name}]": ["b", name]}
    for word, expected in words.items():
        resolved = resolve("gad", overrides=[f"data.train_files={word}", f"trainer.output_dir={quoted}"])
        assert resolved.config.data.train_files == expected, word
        assert resolved.config.trainer.output_dir == name
        (tmp_path / "config.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
        assert load_resolved(tmp_path / "config.yaml") == resolved.config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("trainer.total_epochs=1.0", 1),
        ("trainer.total_epochs=2e0", 2),
        ("data.train_batch_size=1_024", 1024),
        ("actor.optim.lr=5E-6", 5e-6),
        ("actor.optim.lr= 1e-6 ", 1e-6),
        ("data.shuffle=yes", True),
        ("data.shuffle=Off", False),
        ("data.shuffle=0", False),
        ("data.val_files=null", []),
        ("data.val_files=[ ]", []),
        ("++trainer.seed=3", 3),
        ("+data.shuffle=False", False),
    ],
)
def test_values_are_read_as_hydra_and_python_write_them(write, word: str, value: object) -> None:
    key, _, text = word.lstrip("+").partition("=")
    assert flatten(resolve("gad", overrides=[word]).config)[key] == value
    if text != "[ ]":  # the same text in a file means the same
        assert flatten(resolve("gad", config_file=write(f"{key}: {text}\n")).config)[key] == value


def test_a_key_of_verls_without_counterpart_is_answered_with_ours() -> None:
    hint = error_of(overrides=["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]).hint
    assert "actor.micro_batch_tokens" in str(hint)
    assert "data.truncation=drop" in str(error_of(overrides=["data.filter_overlong_prompts=True"]).hint)
    assert resolve("gad", overrides=["actor_rollout_ref.rollout.name=vllm"]).config.rollout.engine == "vllm"


def test_every_name_of_verls_leads_to_a_key_that_exists() -> None:
    for ours in RENAMED.values():
        assert ours in schema_leaves() or ours.rstrip(".") in schema_sections()


def test_verls_spellings_reach_our_keys(write) -> None:
    words = [
        "actor_rollout_ref.actor.optim.lr=2e-6",
        "+actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.model.path=/m",
        "trainer.experiment_name=e",
    ]
    config = resolve("gad", overrides=words).config
    assert (config.actor.optim.lr, config.rollout.n) == (2e-6, 4)
    assert (config.actor.model.path, config.trainer.exp_name) == ("/m", "e")
    nested = "actor_rollout_ref:\n  actor:\n    ppo_epochs: 2\n  rollout:\n    n: 5\n  model:\n    path: /x\n"
    config = resolve("gad", config_file=write(nested)).config
    assert (config.actor.ppo_epochs, config.rollout.n, config.actor.model.path) == (2, 5, "/x")


def test_the_environment_fills_paths_but_never_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_HOME", "/data")
    monkeypatch.setenv("WANDB_API_KEY", "canary-3141")
    monkeypatch.delenv("NOT_SET_AT_ALL", raising=False)
    config = resolve("gad", overrides=["data.train_files=[${oc.env:DATA_HOME}/t.parquet]"]).config
    assert config.data.train_files == ["/data/t.parquet"]
    error = error_of(overrides=["trainer.output_dir=${oc.env:WANDB_API_KEY}"])
    assert "looks like a secret" in error.message
    assert "canary" not in error.message + str(error.hint)
    assert (
        "$NOT_SET_AT_ALL, which is not set" in error_of(overrides=["actor.model.path=${oc.env:NOT_SET_AT_ALL}"]).message
    )


def test_config_yaml_reads_back_to_the_same_tree(tmp_path: Path) -> None:
    words = ["actor.optim.lr=1e-6", "data.train_files=[a b.parquet,'数据.parquet']", "trainer.exp_name=x: #y"]
    resolved = resolve("warmup", "chengla-8b", overrides=words)
    for with_origins in (True, False):
        path = tmp_path / "config.yaml"
        path.write_text(resolved.to_yaml(with_origins), encoding="utf-8")
        assert load_resolved(path) == resolved.config
    assert "lr: 1.0e-06  # command line" in resolved.to_yaml()
    assert "# presets/chengla-8b.yaml:" in resolved.to_yaml()
    assert "#" not in resolved.to_yaml(with_origins=False).replace("x: #y", "")


def test_a_runs_config_is_taken_as_config_file_of_its_own_stage_only(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(resolve("warmup", "demo").to_yaml(), encoding="utf-8")
    assert resolve("warmup", config_file=path).config.rollout == resolve("warmup", "demo").config.rollout
    with pytest.raises(ConfigError, match="of stage warmup, not gad"):
        resolve("gad", config_file=path)


scalars = st.one_of(
    st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30),
    st.sampled_from(
        ["", "null", "~", "1e-6", "yes", "[a]", "{b: 1}", "'q'", '"', "# c", "a: b", "- x", "*a", "&a", "%", "@"]
    ),
)


@settings(max_examples=25, deadline=None)
@given(name=scalars, files=st.lists(scalars.filter(lambda text: "${" not in text and text != "???"), max_size=3))
def test_any_text_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, name: str, files: list[str]
) -> None:
    config = GadConfig()
    config.trainer.exp_name = "run-" + name.replace("${", "")
    config.data.train_files = files
    from gadcli.config.resolve import dump_yaml

    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(dump_yaml(config, {}), encoding="utf-8")
    assert load_resolved(path) == config


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_no_text_as_a_file_or_a_word_does_more_than_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "f.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for arguments in ({"config_file": path}, {"overrides": [text]}, {"overrides": [f"rollout.n={text}"]}):
        try:
            resolve("gad", **arguments)
        except ConfigError as error:
            assert error.message  # noqa: PT017


def test_neutral_keys_do_not_change_the_experiment() -> None:
    base = resolve("gad", "chengla-8b")
    same = resolve(
        "gad", "chengla-8b", overrides=["trainer.save_freq=7", "trainer.exp_name=other", "trainer.total_steps=9"]
    )
    other = resolve("gad", "chengla-8b", overrides=["trainer.seed=2"])
    assert config_hash(base.config) == config_hash(same.config)
    assert config_hash(base.config) != config_hash(other.config)
    assert differences(base.config, other.config) == [("trainer.seed", 1, 2)]


def test_every_key_has_a_meaning_and_a_legal_default() -> None:
    for leaf in schema_leaves().values():
        assert leaf.doc.strip(), leaf.key
        assert not leaf.choices or leaf.default in leaf.choices, leaf.key
        if isinstance(leaf.default, (int, float)) and not isinstance(leaf.default, bool):
            assert leaf.min is None or leaf.default >= leaf.min, leaf.key
            assert leaf.max is None or leaf.default <= leaf.max, leaf.key
    assert list(schema_leaves()) == list(flatten(GadConfig()))


def test_entries_of_a_mapping_come_from_files_and_words_and_are_merged(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "data:\n  template_kwargs:\n    enable_thinking: false\n    date_string: 26 Jul 2024\n    depth: 2\n"
    )
    words = ["data.template_kwargs={depth: 3, note: 'yes', list: [1, x]}", "data.template_kwargs.enable_thinking=true",
             "data.apply_chat_template_kwargs.flag=null"]  # fmt: skip
    found = resolve("gad", None, config, {}, words)
    expected = {"enable_thinking": True, "date_string": "26 Jul 2024", "depth": 3, "note": "yes", "list": [1, "x"],
                "flag": None}  # fmt: skip
    assert found.config.data.template_kwargs == expected
    again = tmp_path / "again.yaml"
    again.write_text(found.to_yaml())
    assert load_resolved(again).data.template_kwargs == expected
    for word in ("data.template_kwargs=7", "data.template_kwargs={a: ${oc.env:HOME}}", "data.template_kwargs={a: }}"):
        with pytest.raises(ConfigError, match=r"data\.template_kwargs"):
            resolve("gad", None, None, {}, [word])
