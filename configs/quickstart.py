"""Ten minutes on a laptop: a tiny spoken language model on speech that eSpeak NG makes on the spot.

Six voices speak 800 sentences of a small grammar (commands, numbers, dates); a 2-layer LLM first
learns the grammar's text and to copy, then is frozen; a 2-layer encoder and an adapter learn to
feed it. Test sets: held-out sentences by the training voices (dev), by other voices, faster, in a
reverberant room, in noise. Three arms, one run each; all three, compared in one report:

    bash launch/train_local.sh

    python -m otreg_jax.train --config=configs/quickstart.py:otreg --workdir=runs/quickstart

and `quickstart.py:ce`, `quickstart.py:position` likewise, with work directories of their own.

`position` is the control: its transport plan comes from positions alone and never looks at the
embeddings, so the difference to `otreg` is what the similarity term adds.
"""

from otreg_jax import config as config_lib

ARMS = ("otreg", "ce", "position")

SLOTS = {
    "number": "one two three four five six seven eight nine ten eleven twelve".split(),
    "tens": "twenty thirty forty fifty".split(),
    "unit": "minutes hours seconds days".split(),
    "room": "kitchen bedroom garage office garden".split(),
    "device": "light fan heater radio camera".split(),
    "state": "on off".split(),
    "person": "anna peter maria david laura".split(),
    "month": "january march april july august october".split(),
    "day": "monday tuesday friday sunday".split(),
}
TEMPLATES = (
    "set a timer for {number} {unit}",
    "set the {device} timer to {tens} {number} {unit}",
    "turn the {room} {device} {state}",
    "turn {state} the {device} in the {room} at {number}",
    "call {person} in {tens} {number} {unit}",
    "remind {person} on {day} at {number} {tens}",
    "meet {person} and {person} on {month} {number}",
    "move the meeting with {person} from {day} to {day}",
    "send {tens} {number} messages to {person}",
)


def get_config(arm: str = "otreg"):
    """The recipe of one arm: otreg, ce or position."""
    if arm not in ARMS:
        raise ValueError(f"configs/quickstart.py:{arm}: no such arm, choose from {', '.join(ARMS)}")
    c = config_lib.default()
    c.num_steps = 500
    c.checkpoint_every = 250
    c.freeze = "^encoder/positions/|^llm/"
    c.synthetic.update(
        {
            "num_train": 800,
            "num_test": 100,
            "seed": 0,
            "lang": "en",
            "rate": 175,  # words a minute
            # (eSpeak voice + variant, pitch 0-99)
            "train_voices": (
                ("en-us", 40),
                ("en-us+f2", 55),
                ("en-gb", 50),
                ("en-gb+m3", 35),
                ("en-us+m7", 60),
                ("en-gb+f4", 65),
            ),
            "other_voices": (
                ("en-us+f3", 50),
                ("en-gb+m5", 45),
                ("en-us+m1", 30),
                ("en-gb+f1", 70),
                ("en-gb-scotland", 50),
                ("en-us+croak", 45),
            ),
            "conditions": {
                "voices": {"voices": "other"},
                "fast": {"rate": 1.3},
                "reverb": {"reverb": 0.4},
                "noise": {"snr": 10.0},
            },
            "templates": TEMPLATES,
            "slots": {name: tuple(words) for name, words in SLOTS.items()},
        }
    )
    c.tokenizer.model_type = "word"
    c.tokenizer.vocab_size = 120
    c.encoder.strides = (2, 2, 2)  # 12.5 positions a second
    c.encoder.max_positions = 200
    c.data.max_duration = 15.0
    c.llm.pretrain.num_steps = 400
    if arm != "ce":
        c.otreg.weight = 3.0
        c.otreg.position_weight = 3.0
        c.otreg.epsilon = 0.05
    if arm == "position":
        c.otreg.plan = "position"
    return c
