"""When each word of a manifest is spoken, by a Whisper model's own cross-attention.

    python -m benchmarks.word_times --whisper=whisper-base IN.jsonl OUT.jsonl

OUT is IN with "words": [[word, start, end], ...]. Whisper reads the transcript (teacher forcing),
and dynamic time warping finds the monotone path through what its decoder attends to, as in
OpenAI's word timestamps (Radford et al. 2022, openai/whisper's timing.py): attention of the upper
half of the layers, standardized over tokens and smoothed over time. Where IN has words, the median
distance of their edges to these is printed. Needs torch and transformers. At most 30 s a line.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import scipy.ndimage
import tqdm

from benchmarks import laptop
from otreg_jax.data import audio, manifest

FRAME = 0.02  # seconds between the encoder's outputs
SMOOTHED = 7  # frames


def monotone_path(cost_TF: np.ndarray) -> np.ndarray:
    """First frame of every row on the cheapest path from corner to corner, int [T].

    Dynamic time warping with steps down, right and diagonal (Sakoe & Chiba 1978).
    """
    T, F = cost_TF.shape
    total = np.full((T + 1, F + 1), np.inf)
    total[0, 0] = 0.0
    for t in range(T):
        for f in range(F):
            best = min(total[t, f], total[t, f + 1], total[t + 1, f])
            total[t + 1, f + 1] = cost_TF[t, f] + best
    first = np.zeros(T, int)
    t, f = T, F
    while t > 0:
        first[t - 1] = f - 1
        steps = {(t - 1, f - 1): 0, (t - 1, f): 1, (t, f - 1): 2}
        t, f = min(steps, key=lambda at: (total[at], steps[at]))
    return first


def spans(pieces: list[str]) -> list[tuple[str, int, int]]:
    """Words of a text that tokens spell, [first, last) token of each."""
    found = []
    for i, piece in enumerate(pieces):
        if piece.startswith(" ") or not found:
            found.append((piece.strip(), i, i + 1))
        else:
            word, start, _ = found[-1]
            found[-1] = (word + piece.strip(), start, i + 1)
    return found


def word_times(model, processor, samples_N: np.ndarray, text: str, lang: str) -> list[list]:
    """[word, start, end] of every word, in seconds."""
    import torch

    features = processor.feature_extractor(
        samples_N, sampling_rate=audio.SAMPLE_RATE, return_tensors="pt"
    ).input_features
    tokenizer = processor.tokenizer
    head = laptop.whisper_prompt(processor, lang)
    ids = tokenizer.encode(" " + text, add_special_tokens=False)
    # One more than the text: when the next token is said, the last word is over.
    asked = torch.tensor([[*head, *ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        heard = model.get_encoder()(features)
        out = model(encoder_outputs=heard, decoder_input_ids=asked, output_attentions=True)
    upper = out.cross_attentions[len(out.cross_attentions) // 2 :]
    num_frames = min(-(-len(samples_N) // int(FRAME * audio.SAMPLE_RATE)), 1500)
    attention_HTF = torch.cat(upper, dim=1)[0, :, len(head) - 1 : -1, :num_frames].float().numpy()
    deviation = attention_HTF.std(axis=1, keepdims=True) + 1e-9
    attention_HTF = (attention_HTF - attention_HTF.mean(axis=1, keepdims=True)) / deviation
    attention_HTF = scipy.ndimage.median_filter(attention_HTF, (1, 1, SMOOTHED))
    first_T = monotone_path(-attention_HTF.mean(axis=0))
    edges = FRAME * np.append(first_T, num_frames)
    whole = len(samples_N) / audio.SAMPLE_RATE
    pieces = [tokenizer.decode([token]) for token in ids]
    at = lambda i: round(float(min(edges[i], whole)), 3)
    return [[word, at(a), at(b)] for word, a, b in spans(pieces)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--whisper", required=True, help="directory of a Whisper model")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    model, processor = laptop.load_whisper(args.whisper, attn_implementation="eager")
    texts = [x for x in args.source.read_text().splitlines() if x.strip()]
    utterances = manifest.read_manifest(args.source)
    if len(texts) != len(utterances):
        sys.exit(f"word_times: {args.source}: {len(texts)} lines, {len(utterances)} of them usable")
    lines, distances = [], []
    for text, utterance in zip(tqdm.tqdm(texts, unit="utt"), utterances, strict=True):
        words = word_times(
            model, processor, audio.load_audio(utterance), utterance.text, utterance.lang or "en"
        )
        if len(words) == len(utterance.words):
            theirs = np.array([[start, end] for _, start, end in utterance.words])
            distances += np.abs(theirs - [[start, end] for _, start, end in words]).ravel().tolist()
        line = json.loads(text)
        # Its audio is found from wherever OUT is.
        line |= {"audio_filepath": str(Path(utterance.audio).absolute()), "words": words}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    args.target.write_text("".join(lines))
    if distances:
        print(f"edges: {1000 * np.median(distances):.0f} ms from those of {args.source} (median)")


if __name__ == "__main__":
    main()
