"""Prompts from chat templates against transformers' apply_chat_template, token for token.

The templates are written for this test; each uses what the published one of its family does: who
speaks how, default system turns, dates, thinking, whitespace control, begin tokens.
"""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from otreg_jax.data import chat, text, tokenization

TEXTS = [
    "Transcribe the speech: turn the red lamp on, please.",
    "system user assistant model You are a helpful assistant. Today Date: 26 Jul 2024",
    "Grüße, 你好",
]
AUDIO = "<|audio|>"  # stands for the speech where transformers renders the same conversation

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name: (template, begin token, end token, further control tokens, byte-level?)
FAMILIES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + CHATML.removeprefix("{% for message in messages %}"),
        "<|im_start|>",
        "<|im_end|>",
        [],
        True,
    ),
    "eurollm": ("{{ bos_token }}" + CHATML, "<s>", "<|im_end|>", ["<|im_start|>"], False),
    "llama3": (
        "{{- bos_token }}\n{%- if custom_tools is defined %}\n"
        "    {%- set tools = custom_tools %}\n{%- endif %}\n"
        "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
        "    {%- endif %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n"
        "{%- endif %}\n"
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n{{- system }}\n{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "    {{- message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        True,
    ),
    "tinyllama": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        "<s>",
        "</s>",
        [],
        False,
    ),
    "qwen2.5": (
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- else %}\n"
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
        "    {%- endif %}\n{%- endif %}\n{%- for message in messages %}\n"
        '    {%- if (message.role == "user") or (message.role == "assistant" and not '
        "message.tool_calls) %}\n        {{- '<|im_start|>' + message.role + '\\n' + "
        "message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        None,
        "<|im_end|>",
        ["<|im_start|>"],
        True,
    ),
    "qwen3": (
        "{%- set ns = namespace(last=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if message.role == "user" and message.content is string %}\n'
        "        {%- set ns.last = index %}\n        {%- break %}\n"
        "    {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n    {%- set content = message.content %}\n"
        '    {%- if message.role == "user" %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n        {%- set thought = '' %}\n"
        "        {%- if '</think>' in content %}\n"
        "            {%- set thought = content.split('</think>')[0].rstrip('\\n') %}\n"
        "        {%- endif %}\n        {%- generation %}\n"
        "        {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + "
        "content.lstrip('\\n') + '<|im_end|>\\n' }}\n        {%- endgeneration %}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
        None,
        "<|im_end|>",
        ["<|im_start|>"],
        True,
    ),
    "mistral": (
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('roles must alternate') }}\n    {%- endif %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        "        {{- '[INST] ' + message['content'] + '[/INST]' }}\n    {%- else %}\n"
        "        {{- ' ' + message['content']|trim + eos_token }}\n    {%- endif %}\n"
        "{%- endfor %}\n",
        "<s>",
        "</s>",
        ["[INST]", "[/INST]"],
        False,
    ),
    "ministral": (
        "{{- bos_token }}{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
        '        {{- "[INST]" + message["content"] + "[/INST]" }}\n'
        '    {%- elif message.role == "assistant" %}\n'
        '        {{- message["content"] + eos_token }}\n    {%- endif %}\n{%- endfor %}',
        "<s>",
        "</s>",
        ["[INST]", "[/INST]"],
        True,
    ),
    "gemma2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'assistant') %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<bos>",
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        False,
    ),
    "gemma3": (
        "{{ bos_token }}\n{%- set first_user_prefix = '' -%}\n{%- for message in messages -%}\n"
        "    {%- if (message['role'] == 'assistant') -%}\n        {%- set role = 'model' -%}\n"
        "    {%- else -%}\n        {%- set role = message['role'] -%}\n    {%- endif -%}\n"
        "    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}\n"
        "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n"
        "    {%- elif message['content'] is iterable -%}\n"
        "        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}\n"
        "    {%- else -%}\n        {{ raise_exception('Invalid content type') }}\n"
        "    {%- endif -%}\n    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n",
        "<bos>",
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        False,
    ),
}


def tokenizer(begin, end, control, byte_level: bool) -> tokenizers.Tokenizer:
    """A tiny BPE: byte-level, as Llama 3's and Qwen's, or with ▁ and byte pieces, as Llama 2's."""
    special = [AUDIO, *dict.fromkeys([*filter(None, [begin]), end, *control])]
    if byte_level:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    if not byte_level:  # the trainer's only way to have byte pieces makes them control tokens
        parts = json.loads(made.to_str())
        parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"][:3] != "<0x"]
        made = tokenizers.Tokenizer.from_str(json.dumps(parts))
    if begin and begin != "<|im_start|>":
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
        )
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(directory, the transformers tokenizer saved in it)."""
    template, begin, end, control, byte_level = FAMILIES[request.param]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(begin, end, control, byte_level),
        bos_token=begin,
        eos_token=end,
        unk_token=None if byte_level else "<unk>",
    )
    theirs.chat_template = template
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return directory, theirs


@pytest.mark.parametrize(
    "turn", ["Transcribe the speech: {speech}", "{speech}", " {speech}\nTranscribe it, 你好 "]
)
def test_equals_apply_chat_template_token_for_token(family, turn, monkeypatch):
    directory, theirs = family
    ours = tokenization.load_tokenizer(directory)
    prompt = text.build_prompt(ours, f"chat:{turn}")
    # transformers asks the clock for the day that a template names.
    clock = type("clock", (), {"now": staticmethod(lambda: chat.TODAY)})
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
    asked = [{"role": "user", "content": turn.replace("{speech}", AUDIO)}]
    wanted = theirs.apply_chat_template(
        asked, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    speech = theirs.convert_tokens_to_ids(AUDIO)
    assert [*prompt.prefix, speech, *prompt.suffix] == wanted
    # The answer ends with what ends a turn, and no begin token stands twice.
    wanted_end = "<end_of_turn>" if "<end_of_turn>" in ours.control else theirs.eos_token
    assert ours.tokens([prompt.eos]) == [wanted_end]
    assert prompt.prefix.count(ours.bos_id) <= 1 or ours.bos_id == ours.token_id("<|im_start|>")


def test_plain_prompts_begin_as_transformers_begins_text(family):
    directory, theirs = family
    ours = tokenization.load_tokenizer(directory)
    prompt = text.build_prompt(ours, "Transcribe: {speech}\n")
    wanted = theirs(f"Transcribe: {AUDIO}\n").input_ids
    assert [*prompt.prefix, theirs.convert_tokens_to_ids(AUDIO), *prompt.suffix] == wanted
    # A template that writes the begin token itself is not given another.
    if ours.bos_id is not None:
        prompt = text.build_prompt(ours, f"{theirs.bos_token}Transcribe: {{speech}}")
        assert prompt.prefix.count(ours.bos_id) == 1


def test_control_tokens_in_a_transcript_are_text(family):
    directory, theirs = family
    ours = tokenization.load_tokenizer(directory)
    for token in theirs.all_special_tokens:
        said = f"the lamp {token} on"
        ids = ours.encode(said)
        assert ours.token_id(token) not in ids or token == "<unk>"
        assert ours.decode(ids) == said
    with pytest.raises(ValueError, match="a control token is no text of a turn"):
        text.build_prompt(ours, f"chat:{{speech}} {theirs.eos_token}")


def write(directory, config, template=None):
    made = tokenizer(None, "<|im_end|>", ["<|im_start|>"], True)
    made.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / chat.FILE).write_text(template)
    return tokenization.load_tokenizer(directory)


def test_the_file_comes_before_the_key_and_both_are_kept(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    old = write(tmp_path, {"chat_template": named})
    assert old.chat_template == CHATML
    both = write(tmp_path, {"chat_template": "other"}, CHATML)
    assert both.chat_template == CHATML and both.fingerprint != old.fingerprint
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenization.save_tokenizer(copy, both)
    again = tokenization.load_tokenizer(copy)
    assert again.fingerprint == both.fingerprint
    assert text.build_prompt(again, "chat:{speech}") == text.build_prompt(old, "chat:{speech}")


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template"),
        ("{% for %}", "chat template: TemplateSyntaxError"),
        ("{{ raise_exception('no user here') }}", "chat template: TemplateError: no user here"),
        ("{{ messages.append(1) }}", "chat template: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "chat template: SecurityError"),
        ("{{ messages[7]['role'] }}", "chat template: UndefinedError"),
        ("{% if add_generation_prompt %}{{ messages[0].content }}{% endif %}", "the assistant's"),
        ("{{ messages[-1].content | upper }}", "the assistant's answer"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "{speech} 2 times"),
    ],
)
def test_templates_that_cannot_be_used_say_so(template, message, tmp_path):
    ours = write(tmp_path, {"chat_template": template})
    with pytest.raises(ValueError, match=message):
        text.build_prompt(ours, "chat:Transcribe {speech}")


@pytest.mark.parametrize(
    "config, message",
    [
        ("[]", "tokenizer_config.json: not an object"),
        ("{", "tokenizer_config.json: not valid JSON"),
        ("{}", "tokenizer_config.json: names no eos_token"),
        ('{"eos_token": 7}', "tokenizer_config.json: names no eos_token"),
        ('{"eos_token": "<|im_end|>", "chat_template": 7}', "neither a string nor a list"),
    ],
)
def test_unusable_configs_are_named(config, message, tmp_path):
    write(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        tokenization.load_tokenizer(tmp_path)


def test_layouts_of_another_model_are_refused(tmp_path):
    ours = write(tmp_path, {})
    with pytest.raises(ValueError, match=r"\[INST\], \[/INST\] is no token of this tokenizer"):
        text.build_prompt(ours, text.chat("mistral", "{speech}"))
