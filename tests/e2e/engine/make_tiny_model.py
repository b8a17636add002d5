#!/usr/bin/env python3
"""Write a tiny random-weight Llama model that vLLM serves like any other.

    make_tiny_model.py DIR [--seed N] [--mean-length N] [--heads N] [--key-value-heads N] [--layers N]

The model talks nonsense, but well-behaved nonsense:

* any input encodes (byte-level BPE), and every token it can emit is printable
  ASCII, so a stream has one non-empty text delta for nearly every token;
* the weights follow from --seed alone (and the vocabulary from the Python
  version's own documentation), so two servers on the same seed give the same
  greedy answer, and two seeds give different ones;
* when sampling at temperature 1 it ends by itself after about --mean-length
  tokens (0: never), and greedy decoding runs on to max_tokens.

Needs numpy, tokenizers and safetensors, which come with vLLM. Nothing is
downloaded.
"""

import argparse
import json
import math
import os
import pydoc_data.topics
import shutil
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 2048
HEAD_SIZE = 32  # the smallest the CPU attention kernel takes
CONTEXT = 8192
LOGIT_STD = 1.5
BANNED = -30.0  # logit offset of a token the model must not emit


class Shape(NamedTuple):
    """Sizes of a model that may differ; each head adds to its width."""

    heads: int = 2
    key_value_heads: int = 2
    layers: int = 2

    @property
    def hidden(self) -> int:
        return self.heads * HEAD_SIZE

    @property
    def intermediate(self) -> int:
        return 2 * self.hidden


BOS, EOS, START, END = "<|bos|>", "<|eos|>", "<|start|>", "<|end|>"
SPECIAL = [BOS, EOS, START, END]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "<|start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}"
    "<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # English prose that every CPython carries.
    topics = pydoc_data.topics.topics
    tok.train_from_iterator((topics[k] for k in sorted(topics)), trainer)
    if tok.get_vocab_size() != VOCAB:
        raise SystemExit(f"tokenizer has {tok.get_vocab_size()} tokens, wanted {VOCAB}")
    return tok


def token_bias(tok: Tokenizer, mean_length: int) -> np.ndarray:
    """What to add to each token's logit: 0, BANNED, or the end token's own."""
    bias = np.zeros(VOCAB, np.float32)
    for i in range(VOCAB):
        text = tok.decode([i], skip_special_tokens=True)
        if not text or any(c not in string.printable or c in "\r\t\x0b\x0c" for c in text):
            bias[i] = BANNED
    usable = int((bias == 0).sum())
    if mean_length > 0:
        # The others' exponentials sum to about usable * exp(std^2 / 2).
        bias[tok.token_to_id(EOS)] = math.log(usable / mean_length) + LOGIT_STD**2 / 2
    return bias


def build_weights(shape: Shape, seed: int, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Random weights whose hidden state keeps a constant in dimension 0.

    Nothing writes to dimension 0 after the embedding, and it is large beside
    the rest, so after the last norm it is close to sqrt(hidden) and the output
    head can use it as a bias.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> np.ndarray:
        return rng.normal(0.0, std, shape).astype(np.float32)

    hidden, intermediate = shape.hidden, shape.intermediate
    embed = normal(VOCAB, hidden, std=1.0)
    embed /= np.sqrt((embed[:, 1:] ** 2).mean(-1, keepdims=True))
    embed[:, 0] = 32.0
    w = {"model.embed_tokens.weight": embed, "model.norm.weight": np.ones(hidden, np.float32)}
    for n in range(shape.layers):
        p = f"model.layers.{n}."
        o_proj = normal(hidden, hidden, std=0.03)
        down = normal(hidden, intermediate, std=0.02)
        o_proj[0] = down[0] = 0.0
        # The norms would leave little beside the constant: drop it, scale the rest.
        norm = np.full(hidden, 4.0, np.float32)
        norm[0] = 0.0
        w |= {
            p + "input_layernorm.weight": norm,
            p + "post_attention_layernorm.weight": norm.copy(),
            p + "self_attn.q_proj.weight": normal(hidden, hidden, std=0.2),
            p + "self_attn.k_proj.weight": normal(shape.key_value_heads * HEAD_SIZE, hidden, std=0.2),
            p + "self_attn.v_proj.weight": normal(shape.key_value_heads * HEAD_SIZE, hidden, std=0.2),
            p + "self_attn.o_proj.weight": o_proj,
            p + "mlp.gate_proj.weight": normal(intermediate, hidden, std=0.2),
            p + "mlp.up_proj.weight": normal(intermediate, hidden, std=0.2),
            p + "mlp.down_proj.weight": down,
        }
    head = normal(VOCAB, hidden, std=1.0)
    head[bias != 0] = 0.0  # such a token's logit is its bias, in any context
    head[:, 0] = bias
    w["lm_head.weight"] = head
    return w


def calibrate(shape: Shape, w: dict[str, np.ndarray], bias: np.ndarray) -> None:
    """Scale the final norm so that the logits' spread is LOGIT_STD.

    Attention adds little once it averages over a long context, so a pass of
    every token through the MLPs alone tells how large the hidden state gets.
    """
    x = w["model.embed_tokens.weight"].astype(np.float64)

    def rms(v: np.ndarray) -> np.ndarray:
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5)

    for n in range(shape.layers):
        p = f"model.layers.{n}."
        h = rms(x) * w[p + "post_attention_layernorm.weight"]
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        up = h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    h = rms(x)
    head = w["lm_head.weight"][bias == 0]
    spread = (h[:, 1:] @ head[:, 1:].T).std()
    norm = w["model.norm.weight"]
    norm[1:] = LOGIT_STD / spread
    norm[0] = 1.0 / h[:, 0].mean()


def write_model(out: Path, shape: Shape, seed: int, mean_length: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tok = build_tokenizer()
    tok.save(str(out / "tokenizer.json"))
    eos = tok.token_to_id(EOS)
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": tok.token_to_id(BOS),
            "eos_token_id": eos,
            "dtype": "float32",
        },
        "generation_config.json": {"bos_token_id": tok.token_to_id(BOS), "eos_token_id": eos},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "additional_special_tokens": [START, END],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    bias = token_bias(tok, mean_length)
    weights = build_weights(shape, seed, bias)
    calibrate(shape, weights, bias)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("dir", type=Path)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--mean-length", type=int, default=128)
    ap.add_argument("--heads", type=int, default=Shape().heads)
    ap.add_argument("--key-value-heads", type=int, default=Shape().key_value_heads)
    ap.add_argument("--layers", type=int, default=Shape().layers)
    args = ap.parse_args()
    if args.dir.exists() and not list(args.dir.glob("*config.json")):
        raise SystemExit(f"{args.dir} exists and is no model")
    args.dir = args.dir.absolute()
    tmp = args.dir.with_name(f".{args.dir.name}.{os.getpid()}")
    write_model(tmp, Shape(args.heads, args.key_value_heads, args.layers), args.seed, args.mean_length)
    shutil.rmtree(args.dir, ignore_errors=True)
    tmp.rename(args.dir)


if __name__ == "__main__":
    main()
