"""What each loss on raw embeddings makes of a published model's embedding table.

    python -m benchmarks.real_table --llms=smollm2-135m,gemma3-270m --sentences=FILE

Nothing is trained. "Speech" is the transcript's own rows of the table, each three times over, plus
noise as long as the row and an offset that all speech shares, as long again. A loss that is right
knows the token in it, and is low where speech is the very text. --sentences: transcripts, one a
line. Results: benchmarks/results/real_table.json; `python -m benchmarks.tables` shows them in
docs/stages.md.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import common, tables
from otreg_jax import otreg, pretrained
from otreg_jax.data import tokenization
from otreg_jax.losses.common import unit
from otreg_jax.losses.infonce import infonce_loss

REPEATS = 3  # speech positions a token
SCALE, TEMPERATURE = 10.0, 0.1  # of the configuration: ctc.scale, infonce.temperature
BATCHES, BATCH, WIDTH = 8, 16, 64  # WIDTH: tokens of a transcript at most


def batches(ids: list[list[int]], rng: np.random.Generator):
    """BATCHES of (tokens int [B, T], mask bool [B, T])."""
    ids = [tokens for tokens in ids if 0 < len(tokens) <= WIDTH]
    for _ in range(BATCHES):
        tokens_BT, mask_BT = np.zeros((2, BATCH, WIDTH), int)
        for b, i in enumerate(rng.choice(len(ids), BATCH, replace=False)):
            tokens_BT[b, : len(ids[i])], mask_BT[b, : len(ids[i])] = ids[i], 1
        yield tokens_BT, mask_BT.astype(bool)


def spoken(text_BTD, rng) -> np.ndarray:
    """Speech [B, S, D] of text: each row REPEATS times, with noise and an offset as long as it."""
    speech_BSD = np.repeat(text_BTD, REPEATS, axis=1)
    length = lambda x: np.linalg.norm(x, axis=-1, keepdims=True)
    noise_BSD, offset_D = (
        rng.standard_normal(shape) for shape in (speech_BSD.shape, speech_BSD.shape[-1:])
    )
    noise_BSD *= length(speech_BSD) / length(noise_BSD)
    offset_D *= np.median(length(text_BTD)[length(text_BTD) > 0]) / length(offset_D)
    return (speech_BSD + noise_BSD + offset_D).astype(np.float32)


def ctc_nats(table_VD, tokens: np.ndarray) -> float:
    """Mean of -log softmax(SCALE cos) at the row of each token itself, the blank left out: what CTC
    with cosine logits has left where speech is the very text."""
    unit_VD = unit(jnp.asarray(table_VD))
    logits_NV = SCALE * unit_VD[tokens] @ unit_VD.T
    return float(jnp.mean(jax.nn.logsumexp(logits_NV, axis=1) - SCALE))


def lowest_infonce(text_BTD, mask_BT) -> tuple[float, float]:
    """The lowest InfoNCE that pooled speech can have (400 steps of Adam), and the mean cosine of
    that speech to its own text."""
    pooled_BD = unit(jnp.sum(jnp.where(mask_BT[..., None], text_BTD, 0), axis=1))
    alone_B1 = np.ones((len(pooled_BD), 1), bool)
    loss = lambda x_BD: infonce_loss(x_BD[:, None], alone_B1, text_BTD, mask_BT, TEMPERATURE)
    optimizer = optax.adam(0.02)

    def step(carry, _):
        x_BD, state = carry
        updates, state = optimizer.update(jax.grad(loss)(x_BD), state)
        return (optax.apply_updates(x_BD, updates), state), None

    (x_BD, _), _ = jax.lax.scan(step, (pooled_BD, optimizer.init(pooled_BD)), length=400)
    return float(loss(x_BD)), float(jnp.mean(jnp.sum(unit(x_BD) * pooled_BD, axis=-1)))


@functools.partial(jax.jit, static_argnames="center")
def plan_share(speech_BSD, text_BTD, mask_BT, center: str):
    """The share of a plan by similarity alone that is on the token which each position repeats."""
    mask_BS = jnp.repeat(mask_BT, REPEATS, axis=1)
    plan_BST = otreg.regularizer(speech_BSD, text_BTD, mask_BS, mask_BT, center=center).plan
    own_ST = jnp.repeat(jnp.eye(text_BTD.shape[1]), REPEATS, axis=0)
    return jnp.sum(plan_BST * own_ST) / jnp.sum(plan_BST)


def nearest(speech_BSD, table_VD, tokens_BT, mask_BT, center: bool) -> float:
    """How often the row in use that is nearest by cosine to a speech position is its token's;
    center: without the mean of speech and the mean of the table."""
    speech_ND = speech_BSD[np.repeat(mask_BT, REPEATS, axis=1)]
    said_N = np.repeat(tokens_BT, REPEATS, axis=1)[np.repeat(mask_BT, REPEATS, axis=1)]
    if center:
        speech_ND, table_VD = speech_ND - speech_ND.mean(0), table_VD - table_VD.mean(0)
    found_N = np.argmax(unit(speech_ND) @ unit(table_VD).T, axis=1)
    return float(np.mean(found_N == said_N))


def measure(folder: Path, sentences: list[str]) -> dict:
    """The figures of one model's table."""
    rng = np.random.default_rng(0)
    tokenizer = tokenization.load_tokenizer(folder)
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    used = np.unique(np.concatenate(encoded))
    all_VD = np.asarray(pretrained.load_llm(folder)[1]["embed"]["embedding"])
    used_VD = all_VD[used]
    ids = [np.searchsorted(used, tokens).tolist() for tokens in encoded]
    unit_VD = used_VD / np.linalg.norm(used_VD, axis=1, keepdims=True)
    some = rng.choice(np.concatenate(ids), 512)  # as often as they occur
    figures = {
        "rows": len(all_VD),
        "rows_in_use": len(used),
        "mean_cosine": float(np.square(np.linalg.norm(unit_VD.mean(0)))),
        "ctc_nats": {
            "all": ctc_nats(all_VD, used[some]),
            "in_use": ctc_nats(used_VD, some),
            "all_centred": ctc_nats(all_VD - all_VD.mean(0), used[some]),
        },
    }
    found = []
    for tokens_BT, mask_BT in tqdm.tqdm(batches(ids, rng), total=BATCHES, desc=folder.name):
        text_BTD = np.where(mask_BT[..., None], used_VD[tokens_BT], 0).astype(np.float32)
        speech_BSD = spoken(text_BTD, rng)
        center = otreg.text_centering(text_BTD, mask_BT, "mean")
        centred_BTD = otreg.remove_common(text_BTD, mask_BT, center)
        row = {}
        for name, how, x_BTD in (("raw", "none", text_BTD), ("centred", "mean", centred_BTD)):
            row[f"infonce_at_text_{name}"] = float(
                infonce_loss(x_BTD, mask_BT, x_BTD, mask_BT, TEMPERATURE)
            )
            row[f"infonce_lowest_{name}"], row[f"infonce_cosine_{name}"] = lowest_infonce(
                x_BTD, mask_BT
            )
            row[f"plan_share_{name}"] = float(plan_share(speech_BSD, text_BTD, mask_BT, how))
            row[f"nearest_{name}"] = nearest(speech_BSD, used_VD, tokens_BT, mask_BT, how == "mean")
        found.append(row)
    return figures | {key: statistics.mean(row[key] for row in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--llms", required=True, help="directories of language models, comma-separated"
    )
    parser.add_argument("--sentences", required=True, type=Path, help="transcripts, one a line")
    args = parser.parse_args()
    sentences = args.sentences.read_text().splitlines()
    result = {
        "batch": BATCH,
        "machine": common.describe_machine("ott-jax"),
        "models": {Path(d).name: measure(Path(d), sentences) for d in args.llms.split(",")},
    }
    (tables.RESULTS / "real_table.json").write_text(json.dumps(result, indent=1) + "\n")
    print(tables.TABLES["real_table"]())


if __name__ == "__main__":
    main()
