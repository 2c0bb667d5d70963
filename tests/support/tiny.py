"""A tiny Llama with a byte-level tokenizer, and tiny tasks, that lm-eval loads offline.

Every byte is one token, so contexts and continuations split exactly and any text round-trips. The
ranks that fit its width of 32 are small ones, such as ``coupling_ranks=4+8``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

_CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_model(folder: str | Path, *, dtype: str = "float32", **config_overrides) -> str:
    """Write a deterministic random model and its tokenizer; return the folder for ``pretrained=``.

    Args:
        folder: created where it does not exist.
        dtype: of the saved weights.
        **config_overrides: fields of `LlamaConfig`, such as ``num_hidden_layers=2``.
    """
    tokenizer = _tokenizer()
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(
        **CONFIG | special | {"vocab_size": len(tokenizer), "dtype": dtype} | config_overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Weights of the usual size would make attention uniform and every choice as likely.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    names = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=_CHAT,
        clean_up_tokenization_spaces=False,
    )


_COLOURS = ("red", "green", "blue", "black", "white", "brown")
_THINGS = ("sky", "grass", "snow", "coal", "earth", "blood", "sea", "milk")


def _documents(kind: str) -> list[dict]:
    """Eight documents, each different in wording and in length."""
    documents = []
    for i, thing in enumerate(_THINGS):
        colour, other = _COLOURS[i % 6], _COLOURS[(i + 2) % 6]
        documents.append(
            {
                "choice": {
                    "question": f"What colour is the {thing}?",
                    "choices": [_COLOURS[(i + j) % 6] for j in range(4)],
                    "gold": i % 4,
                },
                "generate": {"question": f"Name the colour of the {thing}.", "answer": colour},
                "winogrande": {
                    "before": f"The {thing} beside the {_THINGS[i - 1]} is {colour} because the ",
                    "options": [thing, _THINGS[i - 1]],
                    "after": f"is never {other}.",
                    "gold": i % 2,
                },
                "blimp": {"good": f"The {thing} is {colour}.", "bad": f"The {thing} are {colour}."},
                "rolling": {
                    "page": f"The {thing} is {colour}. It was {other} before, "
                    + "and so on, " * (i + 1)
                },
            }[kind]
        )
    return documents


_ACCURACY = """\
output_type: multiple_choice
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

TASKS = {
    "choice": _ACCURACY
    + """\
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
fewshot_split: test
""",
    "generate": """\
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    # A context per choice, as upstream: the text is the gold index, the choices are the contexts.
    "winogrande": _ACCURACY
    + """\
doc_to_text: gold
doc_to_choice: "{{[before + options[0], before + options[1]]}}"
doc_to_target: after
""",
    # No context at all.
    "blimp": _ACCURACY
    + """\
doc_to_text: ""
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
}

KINDS = tuple(TASKS)


def save_task(folder: str | Path, kind: str) -> str:
    """Write a task of eight documents into ``folder``, an ``--include_path``; return its name.

    Args:
        folder: created where it does not exist; several kinds may share it.
        kind: one of `KINDS`.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data, name = folder / f"{kind}.jsonl", f"tiny_{kind}"
    data.write_text("".join(json.dumps(document) + "\n" for document in _documents(kind)))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    head = (
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\n"
        "test_split: test\n"
    )
    (folder / f"{name}.yaml").write_text(f"{head}{TASKS[kind]}metadata:\n  version: 1.0\n")
    return name
