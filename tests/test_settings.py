"""The table of settings: what is outside a range is refused, in one message, before anything else;
what belongs together is checked together; the document follows from the table."""

import inspect
import math
import pathlib
import re

import jax
import pytest
from toy_run import tone_config

from otreg_jax import config as config_lib
from otreg_jax import optim, otreg, preflight, rules, settings, sharding
from otreg_jax import train as train_lib

ROOT = pathlib.Path(__file__).parent.parent
ROWS = settings.ROWS


def usable():
    """A configuration that nothing is wrong with."""
    config = config_lib.default()
    config.data.train = "train.jsonl"
    return config


def put(config, key, value):
    """Sets a value of any type, which a ConfigDict would refuse."""
    *groups, name = key.split(".")
    for group in groups:
        with config.unlocked():  # the name of a stage is new
            config[group] = config.get(group, {})
        config = config[group]
    with config.unlocked(), config.ignore_type():
        config[name] = value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_values_outside_of_what_is_allowed_are_refused(row):
    assert len(row.allowed.outside) >= 2
    key = row.key.replace("*", "new")
    for value in row.allowed.outside:
        config = usable()
        put(config, key, value)
        if isinstance(config_lib.flatten(config).get(key), float) and value is True:
            continue  # ConfigDicts make 1.0 of it
        lines = config_lib.problems(config)
        assert any(f"{key}=" in line for line in lines) or f" {key}" in lines[0], value


@pytest.mark.parametrize("row", settings.TABLE.values(), ids=lambda row: row.key)
def test_defaults_are_allowed_and_rows_say_what_they_are(row):
    assert row.allowed.accepts(row.default)
    assert row.allowed.words and row.meaning


def test_the_defaults_fit_together():
    assert config_lib.problems(usable()) == []


def test_everything_wrong_is_said_at_once():
    config = usable()
    for row in settings.TABLE.values():
        put(config, row.key, row.allowed.outside[0])
    values = config_lib.flatten(config)
    with pytest.raises(ValueError) as error:
        config_lib.check(config)
    for key, value in values.items():
        assert f"{key}={value!r}: must be {settings.TABLE[key].allowed.words}" in str(error.value)


# What users set and what was once accepted, or ended in a trace: each must be named by its key.
IMPOSSIBLE = [
    {"optim.learning_rate": -1.0},
    {"optim.learning_rate": math.nan},
    {"optim.warmup_steps": -5},
    {"optim.warmup_steps": 1001},
    {"data.augment.speeds": ()},
    {"data.augment.speeds": (0, 1)},
    {"data.augment.speeds": (-1, 1)},
    {"data.augment.noise_snr": (20, 0)},
    {"data.augment.noise_prob": 2.0},
    {"data.augment.time_masks": -1},
    {"data.augment.freq_masks": -1},
    {"data.augment.time_width": -1},
    {"data.augment.freq_width": -1},
    {"data.augment.time_width": 3001, "data.augment.time_masks": 1},
    {"data.augment.freq_width": 81, "data.augment.freq_masks": 1},
    {"data.max_utterances": -3},
    {"data.num_buckets": 0},
    {"data.features": "foo"},
    {"data.temperature": 0.0},
    {"data.temperature": -1.0},
    {"data.num_workers": -1},
    {"data.max_duration": 0.0},
    {"data.max_duration": -1.0},
    {"tokenizer.model_type": "foo"},
    {"tokenizer.vocab_size": 3},
    {"tokenizer.vocab_size": 100_000},
    {"adapter.stack": 0},
    {"adapter.dropout": 1.5},
    {"lora.rank": 0},
    {"lora.pattern": "("},
    {"freeze": "("},
    {"optim.multipliers": (("^encoder/",),)},
    {"optim.multipliers": (("(", 1.0),)},
    {"optim.clip_norm": 0.0},
    {"ctc.scale": 0.0},
    {"llm.num_heads": 3, "llm.num_kv_heads": 2},
    {"llm.head_dim": 7},
    {"llm.head_dim": 0},
    {"llm.mlp_dim": 0},
    {"llm.embed_dim": -1},
    {"llm.pretrain.num_steps": -1},
    {"encoder.num_heads": 5},
    {"encoder.strides": ()},
    {"seed": -1},
    {"decode.max_tokens": -1},
    {"data.dev": "nowhere.jsonl"},
    {"data.test": "a=nowhere.jsonl"},
    {"data.test": "a=train.jsonl,a=train.jsonl"},
    {"data.augment.noise": "nowhere.jsonl"},
    {"data.augment.rir": "nowhere.jsonl"},
    {"data.data_root": "nowhere"},
    {"tokenizer.path": "nowhere"},
    {"encoder.path": "nowhere/at/all"},
    {"llm.path": "some/model"},  # a hub id without a revision
    {"model.path": "nowhere"},
    {"lora.path": "nowhere"},
    {"data.window": 5.0},  # and audio of up to 30 s
    {"data.window": 30.0, "data.features": "step"},
    {"data.window_masked": True},
    {"adapter.norm": "table", "adapter.path": "nowhere"},
    {"adapter.kind": "ultravox", "adapter.hidden_dim": 33},
    {"prompt": "no speech"},
    {"otreg.layer": 2},
    {"otreg.layer_weights": (0.5,), "otreg.layer": 1},
    {"otreg.layer_weights": (0.5, 0.0, 0.5)},
    {"otreg.window": 0.0},
    {"otreg.after_ctc": True, "otreg.weight": 1.0},
    {"otreg.structure": 1.0},
    {"otreg.structure": 0.5, "otreg.plan": "position", "otreg.position_weight": 1.0},
    {"adapter.kind": "conformer", "adapter.hidden_dim": 100},
    {"optim.restart_step": 990},  # leaves less than the warm-up
    {"otreg.plan": "position"},
    {"mesh.fsdp": -1},
    {"mesh.fsdp": 0},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_an_impossible_setting_ends_before_anything_is_read_or_made(changes, manifest, tmp_path):
    config = config_lib.default()
    config.data.train = str(manifest)
    for key, value in changes.items():
        put(config, key, value)
    with pytest.raises(ValueError) as error:
        train_lib.train(config, tmp_path / "run")
    key, value = next(iter(changes.items()))
    assert str(error.value).startswith("config: ") and f"{key}={value!r}" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_group_without_its_keys_and_a_key_that_is_none_are_named():
    config = usable()
    config.optim = {}
    config.otreg.wieght = 1.0
    lines = config_lib.problems(config)
    assert any(line.startswith("optim lacks optim.learning_rate,") for line in lines)
    assert "otreg.wieght=1.0: no such setting (did you mean 'otreg.weight'?)" in lines
    assert len(lines) == 2


def test_synthetic_speech_needs_its_keys():
    config = config_lib.default()
    config.synthetic.update({"num_train": 5, "voices": 1})
    lines = config_lib.problems(config)
    assert any(line.startswith("synthetic.voices=1: no such setting") for line in lines)
    assert any(line.startswith("synthetic lacks synthetic.rate,") for line in lines)
    config.synthetic.sentences = "sentences.txt"  # and these need no templates
    assert len(config_lib.problems(config)) == 1


def test_files_are_looked_for_where_they_are_read(tmp_path, manifest):
    config = config_lib.default()
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "speech-dev.array_record-00000-of-00001").write_text("")
    config.data.train = f"{manifest}, {folder}:dev ,gs://bucket/train.jsonl"
    config.data.test = f"a={manifest},b={folder}:dev"
    assert preflight.missing_files(config) == []
    config.data.train = f"{manifest},{folder}"  # its split "train"
    config.data.test = f"a={manifest},b={tmp_path / 'none.jsonl'}"
    train, test = preflight.missing_files(config)
    assert train.startswith(f"data.train={str(folder)!r}: ") and "no whole split 'train'" in train
    assert test == f"data.test='b={tmp_path}/none.jsonl': no such manifest, and no data set"
    config.data.train, config.data.test = "", ""
    config.synthetic.sentences = f"de={manifest}, {tmp_path / 'none.txt'}"
    assert preflight.missing_files(config) == [
        f"synthetic.sentences='{tmp_path}/none.txt': no such file"
    ]


ALL_KERNELS = "llm/layers/attn/[qv]/kernel"


@pytest.mark.parametrize(
    "changes, messages",
    [
        (dict(freeze="^encodr/"), ["freeze='^encodr/': matches no parameter"]),
        (dict(freeze=".*"), ["freeze='.*': matches every parameter"]),
        (dict(lora__pattern="llm/nothing"), ["lora.pattern='llm/nothing': ", "no parameter"]),
        (dict(lora__pattern=".*"), ["lora.pattern='.*': ", "no Dense kernel"]),
        (
            dict(lora__pattern=ALL_KERNELS, freeze="^llm/"),
            ["freeze='^llm/', lora.pattern=", "'^llm/(?!.*/lora_[ab]$)'"],
        ),
        (dict(optim__multipliers=(("^encodr/", 0.5),)), ["optim.multipliers: '^encodr/'"]),
        (
            dict(freeze="^llm/", optim__multipliers=(("^llm/", 0.5),)),
            ["'^llm/' matches no parameter that is trained"],
        ),
        (
            dict(freeze="^encodr/", lora__pattern="x", optim__multipliers=(("zz", 0.5),)),
            ["freeze='^encodr/'", "lora.pattern='x'", "'zz' matches"],
        ),
    ],
)
def test_regexes_that_match_nothing_or_everything_or_each_other(
    changes, messages, manifest, tmp_path
):
    with pytest.raises(ValueError) as error:
        train_lib.train(tone_config(manifest, **changes), tmp_path / "run")
    for message in messages:
        assert message in str(error.value)
    assert "stages." not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_regexes_that_fit_are_taken(manifest):
    config = tone_config(manifest, freeze="^(encoder|llm)/(?!.*/lora_[ab]$)")
    config.lora.pattern = ALL_KERNELS
    config.optim.multipliers = (("lora_b$", 2.0), ("^adapter/", 0.5))
    preflight.check_model(config, sharding.make_mesh(config))


def test_what_asks_for_layers_that_the_model_lacks_is_named(manifest):
    """As of a pretrained LLM, whose depth only its config.json says."""
    config = tone_config(manifest)
    depth = config.llm.num_layers
    config.otreg.layer_weights = (0.5,) * (depth + 1)
    with pytest.raises(ValueError, match=rf"otreg.layer_weights=\(.*\): at most {depth}") as error:
        preflight.check_model(config, sharding.make_mesh(config))
    assert "otreg.layer=" not in str(error.value)


def test_rules_speak_of_settings_that_exist():
    assert all(settings.find(key) for rule in rules.RULES for key in rule.keys)


def test_the_method_and_the_recipes_have_the_same_defaults():
    """But for text_set: `regularizer` needs token ids for the recipes' "unique"."""
    for name, parameter in inspect.signature(otreg.regularizer).parameters.items():
        row = settings.TABLE.get(f"otreg.{name}")
        if row and name != "text_set":
            assert row.default == parameter.default, name


def test_the_document_is_the_table():
    document = (ROOT / "docs" / "configuration.md").read_text()
    assert document == config_lib.as_markdown() + "\n", (
        "run python -m otreg_jax.config --markdown > docs/configuration.md"
    )
    for row in ROWS:
        assert f"| `{row.key}` |" in document


def test_a_device_count_is_no_part_of_the_values():
    """The values are checked without a device: `jax` may be told later which ones there are."""
    before = jax.config.jax_platforms
    config_lib.check(usable())
    assert jax.config.jax_platforms == before


def test_what_a_longer_run_does_to_its_schedules_is_said():
    stored = config_lib.default()
    stored.num_steps, stored.optim.warmup_steps = 20, 2
    config = config_lib.ConfigDict(stored.to_dict())
    assert preflight.resume_notes(stored, config, 18) == []
    config.num_steps = 40
    (line,) = preflight.resume_notes(stored, config, 18)
    rates = re.fullmatch(
        r"num_steps: 20 -> 40: from step 18 on the learning rate (\S+) instead of (\S+)", line
    )
    now, before = (float(optim.learning_rate(c)(18)) for c in (config, stored))
    assert float(rates[1]) == pytest.approx(now, rel=5e-3)
    assert float(rates[2]) == pytest.approx(before, rel=5e-3)
    assert now > 4 * before
    for c in (stored, config):
        c.otreg.update(weight=1.0, position_weight=3.0, position_weight_final=0.0)
    assert "position_weight 1.65 instead of 0.3" in preflight.resume_notes(stored, config, 18)[0]
    config.num_steps = 10
    assert "nothing is left to train" in preflight.resume_notes(stored, config, 18)[0]
