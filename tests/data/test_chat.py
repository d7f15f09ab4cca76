"""Masks: right for every turn, in every kind of template."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data.chat import ROLES, encode_chat, encode_completion, end_of_turn

CHATML = ["chatml", "default_system", "marked", "marked_short", "marked_long", "no_prompt", "strict_tools"]
# template -> (end-of-turn text, whether it trims contents, text that a turn begins with)
ENDS = {
    **{name: ("<|im_end|>", False, "") for name in CHATML},
    "llama3": ("<|eot_id|>", True, ""),
    "gemma": ("<end_of_turn>", True, ""),
    "mistral": ("</s>", False, " "),
    "r1": ("<eos>", False, ""),
    "plain": ("\n### end", False, ""),
}


def talk(*turns):
    """user, assistant, user, ... in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]


def trained(tokenizer, example):
    """The stretches of text that carry loss."""
    runs, run = [], []
    for token, weight in zip([*example["tokens"], 0], [*example["weights"], 0], strict=True):
        if weight:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", ENDS)
def test_every_assistant_turn_with_its_end(tokenizer_with, template):
    tokenizer = tokenizer_with(template)
    end, _, begin = ENDS[template]
    example = encode_chat(tokenizer, talk("Hello 你好", "I am Kiln", "name?", "Kiln. 是"))
    assert trained(tokenizer, example) == [f"{begin}I am Kiln{end}", f"{begin}Kiln. 是{end}"]


@pytest.mark.parametrize("template", [*ENDS, "qwen3", "glm"])
def test_tokens_are_those_of_the_rendered_text(tokenizer_with, template):
    tokenizer = tokenizer_with(template)
    messages = talk("Hello  world", "  I am\n", "again", "\nKiln")
    hf = tokenizer.source
    text = hf.apply_chat_template(messages, tokenize=False)
    assert tokenizer.render(messages) == text
    assert encode_chat(tokenizer, messages)["tokens"].tolist() == hf(text, add_special_tokens=False)["input_ids"]


def test_same_mask_as_transformers_makes_from_markers(tokenizer_with):
    tokenizer = tokenizer_with("marked")
    for messages in (talk("a", "b", "c", "d"), talk("Hello", "I am a helper "), [{"role": "system", "content": "x"}]):
        out = tokenizer.source.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = encode_chat(tokenizer, messages)
        assert example["tokens"].tolist() == out["input_ids"]
        assert example["weights"].tolist() == out["assistant_masks"]


CONTENT = st.lists(
    st.sampled_from(
        [
            "a",
            "Hello",
            " ",
            "\n",
            "assistant",
            "user\n",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            "是",
            "I am",
            "😀",
            ".",
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@hypothesis_settings(max_examples=60, deadline=None)
@given(turns=st.lists(CONTENT, min_size=1, max_size=6), system=st.none() | CONTENT)
@pytest.mark.parametrize("template", ["chatml", "default_system", "marked_short", "no_prompt", "llama3", "gemma"])
def test_random_conversations(tokenizer_with, template, turns, system):
    """Contents that repeat each other, equal the template's own text or consist of spaces."""
    tokenizer = tokenizer_with(template)
    end, trims, _ = ENDS[template]
    messages = talk(*turns)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    example = encode_chat(tokenizer, messages)
    found = "".join(trained(tokenizer, example))
    expected = "".join((answer.strip() if trims else answer) + end for answer in answers)
    # a token may span the header's last newline and the content's first: then it is trained
    assert found.replace("\n", "") == expected.replace("\n", "")
    newlines = found.count("\n") - expected.count("\n")
    assert 0 <= newlines <= 2 * len(answers)
    assert tokenizer.decode(example["tokens"]) == tokenizer.render(messages)


@hypothesis_settings(max_examples=60, deadline=None)
@given(turns=st.lists(CONTENT, min_size=2, max_size=6), system=st.none() | CONTENT)
def test_markers_change_nothing(tokenizer_with, turns, system):
    messages = ([{"role": "system", "content": system}] if system is not None else []) + talk(*turns)
    examples = [
        encode_chat(tokenizer_with(name), messages) for name in ("chatml", "marked", "marked_short", "marked_long")
    ]
    for other in examples[1:]:
        np.testing.assert_array_equal(other["tokens"], examples[0]["tokens"])
        np.testing.assert_array_equal(other["weights"], examples[0]["weights"])


def test_qwen3_drops_old_thoughts_and_trains_the_last(tokenizer_with):
    tokenizer = tokenizer_with("qwen3")
    messages = talk("q", "<think>\nold\n</think>\n\nfirst", "r", "<think>\nnew\n</think>\n\nsecond")
    example = encode_chat(tokenizer, messages)
    assert trained(tokenizer, example) == ["first<|im_end|>", "<think>\nnew\n</think>\n\nsecond<|im_end|>"]
    plain = encode_chat(tokenizer, talk("q", "first", "r", "second"))
    assert trained(tokenizer, plain) == ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]
    split = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}]
    assert trained(tokenizer, encode_chat(tokenizer, split)) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]


def tool_talk(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "system", "content": "Use tools"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2"},
    ]


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tool_calls_are_trained_and_results_are_not(tokenizer_with, arguments):
    tokenizer = tokenizer_with("qwen3")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    example = encode_chat(tokenizer, tool_talk(arguments), tools=[{"type": "function", "function": {"name": "add"}}])
    assert trained(tokenizer, example) == [
        f"{call}<|im_end|>",
        f"Two\n{call}\n{call}<|im_end|>",
        "<think>\n\n</think>\n\nIt is 2<|im_end|>",
    ]


def test_template_that_refuses_results_without_calls(tokenizer_with):
    tokenizer = tokenizer_with("strict_tools")
    runs = trained(tokenizer, encode_chat(tokenizer, tool_talk({"a": 1})))
    assert len(runs) == 3
    assert runs[0].startswith("<tool_call>")
    assert runs[1].startswith("Two<tool_call>")
    assert runs[2] == "It is 2<|im_end|>"
    assert all(run.endswith("<|im_end|>") for run in runs)


def test_a_template_that_wants_content_beside_tool_calls(tokenizer_with):
    text = "{% for m in messages %}{{ m.role }}: {{ '' + m.content }}{{ m.tool_calls or '' }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_with("chatml").with_chat_template(text)
    runs = trained(tokenizer, encode_chat(tokenizer, [{"role": "user", "content": "q"}, tool_talk({})[2]]))
    assert len(runs) == 1
    assert "add" in runs[0]
    assert runs[0].endswith("]<|im_end|>")


def test_mistral_moves_the_system_prompt(tokenizer_with):
    tokenizer = tokenizer_with("mistral")
    messages = [{"role": "system", "content": "Be brief"}, *talk("q", "one", "r", "two")]
    runs = trained(tokenizer, encode_chat(tokenizer, messages))
    assert [run.strip() for run in runs] == ["one</s>", "two</s>"]


def test_glm_stops_at_the_next_role(tokenizer_with):
    tokenizer = tokenizer_with("glm")
    assert trained(tokenizer, encode_chat(tokenizer, talk("q", "one", "r", "two"))) == ["one<|user|>", "two"]
    assert end_of_turn(tokenizer) == ""
    assert end_of_turn(tokenizer_with("llama3")) == "<|eot_id|>"


def test_roles_to_train_on_and_weights(tokenizer_with):
    tokenizer = tokenizer_with("chatml")
    messages = [{"role": "system", "content": "S"}, *talk("q", "one", "r", "two")]
    example = encode_chat(tokenizer, messages, ("user", "assistant"))
    assert trained(tokenizer, example) == [f"{text}<|im_end|>" for text in ("q", "one", "r", "two")]
    weighted = [*messages]
    weighted[2] = {**messages[2], "weight": 0}
    weighted[4] = {**messages[4], "loss_weight": 0.5}
    for name in ("chatml", "marked"):
        example = encode_chat(tokenizer_with(name), weighted)
        assert trained(tokenizer, example) == ["two<|im_end|>"]
        assert set(example["weights"].tolist()) == {0.0, 0.5}
    silent = encode_chat(tokenizer, [*messages[:-1], {**messages[-1], "train": False}])
    assert trained(tokenizer, silent) == ["one<|im_end|>"]
    with pytest.raises(ValueError, match="weight must be a number"):
        encode_chat(tokenizer, [{"role": "assistant", "content": "x", "weight": "much"}])


def test_roles_for_colour(tokenizer_with):
    tokenizer = tokenizer_with("chatml")
    example = encode_chat(tokenizer, [{"role": "system", "content": "Be"}, *talk("q", "one")], roles=True)
    named = {role: tokenizer.decode(example["tokens"][example["roles"] == number]) for number, role in enumerate(ROLES)}
    assert (named["system"], named["user"], named["assistant"]) == ("Be", "q", "one<|im_end|>")


def test_first_message_may_be_the_assistants(tokenizer_with):
    for name in ("chatml", "default_system", "llama3"):
        tokenizer = tokenizer_with(name)
        example = encode_chat(tokenizer, [{"role": "assistant", "content": "Hi"}, *talk("q", "one")])
        end = end_of_turn(tokenizer)
        assert trained(tokenizer, example) == [f"Hi{end}", f"one{end}"]


def test_text_parts_are_joined(tokenizer_with):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokenizer = tokenizer_with("chatml")
    example = encode_chat(tokenizer, [{"role": "assistant", "content": parts}])
    assert trained(tokenizer, example) == ["ab<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        (["hello"], "message 1 must be an object with a 'role'"),
        ([{"role": "user"}], "neither 'content' nor 'tool_calls'"),
        ([{"role": "user", "content": 3}], "'content' must be text"),
    ],
)
def test_malformed_messages(tokenizer_with, messages, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer_with("chatml"), messages)


def test_a_template_that_refuses(tokenizer_with):
    with pytest.raises(ValueError, match=r"refuses this conversation \(user, user\): roles must alternate"):
        encode_chat(tokenizer_with("gemma"), [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_template_without_findable_turns(tokenizer_with):
    for text in ("{{ 1 }} always the same", "{{ messages[-1].content }} {{ messages[-1].content }}"):
        tokenizer = tokenizer_with("chatml").with_chat_template(text)
        with pytest.raises(ValueError, match=r"cannot tell which tokens message 2.*generation"):
            encode_chat(tokenizer, talk("q", "one"))


def test_prompt_and_completion(tokenizer_with):
    tokenizer = tokenizer_with(None, "plain")
    example = encode_completion(tokenizer, "What is", " your name?")
    assert example["tokens"].tolist() == [*tokenizer.encode("What is your name?"), tokenizer.eos_ids[0]]
    assert trained(tokenizer, example) == [" your name?</s>"]
    whole = encode_completion(tokenizer, "What is", " it</s>", completion_only=False)
    assert trained(tokenizer, whole) == ["What is it</s>"]
    assert trained(tokenizer, encode_completion(tokenizer, "", "abc", add_eos=False)) == ["abc"]
