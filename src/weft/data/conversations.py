"""From a row to a conversation: messages, ShareGPT turns, Alpaca instructions, or plain text."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import did_you_mean

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "function_call": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "history", "text", "tools")


class Unfit(Exception):
    """Why a row gives no conversation, as a sentence. It says nothing of what the row's texts say."""


@dataclass(frozen=True)
class Conversation:
    """What was said, in the form that chat templates take. text: of a plain text, which no template touches."""

    messages: Sequence[Message] = ()
    tools: Sequence[Any] | None = None
    text: str | None = None

    def led_by(self, system: str) -> "Conversation":
        """The same with a system prompt, unless it has its own."""
        if not system or self.text is not None or self.messages[0]["role"] in ("system", "developer"):
            return self
        return Conversation(({"role": "system", "content": system}, *self.messages), self.tools)

    def variants(self) -> "Iterator[Conversation]":
        """The same conversation in the ways that templates differ in: a tool call has no content or an empty one, and
        its arguments are an object or, for templates that join them to their text, its JSON."""
        yield self
        if any("tool_calls" in said for said in self.messages):
            for content, shape in (({"content": ""}, same), ({}, written), ({"content": ""}, written)):
                messages = tuple(
                    {**content, **said, "tool_calls": list(map(shape, said["tool_calls"]))}
                    if "tool_calls" in said
                    else said
                    for said in self.messages
                )
                yield Conversation(messages, self.tools)


@dataclass(frozen=True)
class Reader:
    """How the rows of a source are read. columns: our name of a column -> the source's own."""

    form: str = "auto"
    columns: Mapping[str, str] | None = None

    def conversation(self, value: Any) -> Conversation:
        """The conversation of a row. Raises Unfit."""
        if not isinstance(value, Mapping):
            raise Unfit(f"expected an object, found a value of type {type(value).__name__}.")
        names = self.columns or {}
        row = {name: value[names.get(name, name)] for name in COLUMNS if value.get(names.get(name, name)) is not None}
        form = self.form if self.form != "auto" else form_of(row, value)
        return READERS[form](row)


def form_of(row: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """The format that a row's columns have. Raises Unfit when they have none."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    found = ", ".join(map(str, list(value)[:8])) or "none"
    raise Unfit(
        f"no column tells its format; it has {found}. Expected 'messages', 'conversations', 'instruction' or 'text'; "
        "name yours under 'columns'."
    )


def of_messages(row: Mapping[str, Any]) -> Conversation:
    """{messages: [{role, content, ...}], tools}."""
    return Conversation(tuple(map(message, of_list(row, "messages"), range(1, 1 << 31))), tools_of(row))


def of_sharegpt(row: Mapping[str, Any]) -> Conversation:
    """{conversations: [{from, value}], system, tools}; a list of {role, content} is read as messages."""
    turns = of_list(row, "conversations")
    if turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return of_messages({**row, "messages": turns})
    messages = []
    for number, turn in enumerate(turns, start=1):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in SHAREGPT_ROLES:
            advice = did_you_mean(str(speaker), list(SHAREGPT_ROLES))
            raise Unfit(f"turn {number} is from {speaker!r}. {advice}")
        messages.append(message({"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}, number))
    found = Conversation(tuple(messages), tools_of(row))
    return found.led_by(of_string(row, "system"))


def of_alpaca(row: Mapping[str, Any]) -> Conversation:
    """{instruction, input, output, system, history: [[question, answer], ...]}."""
    asked, given = of_string(row, "instruction"), of_string(row, "input")
    if "output" not in row:
        raise Unfit("'instruction' stands without 'output'.")
    turns = [*row.get("history", ()), (f"{asked}\n\n{given}" if given.strip() else asked, of_string(row, "output"))]
    messages = []
    for turn in turns:
        if not isinstance(turn, Sequence) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise Unfit("'history' is not a list of [question, answer].")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return Conversation(tuple(messages)).led_by(of_string(row, "system"))


def of_text(row: Mapping[str, Any]) -> Conversation:
    """{text}."""
    text = of_string(row, "text")
    if not text.strip():
        raise Unfit("'text' is missing or empty.")
    return Conversation(text=text)


READERS: Mapping[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "messages": of_messages,
    "sharegpt": of_sharegpt,
    "alpaca": of_alpaca,
    "text": of_text,
}


def of_list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    """A column that is a list with members, or the JSON of one."""
    value = row.get(name)
    if isinstance(value, str):
        value = parsed(value)
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        # A list of objects as older versions of `datasets` give it: an object of lists.
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple) or not value:
        raise Unfit(f"'{name}' is not a list of turns, or has none.")
    return value


def of_string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise Unfit(f"'{name}' is of type {type(value).__name__}. Expected a string.")
    return value


def message(value: Any, number: int) -> Message:
    """One message with its role and content checked; what else it has (tool_calls, reasoning_content, ...) is kept for
    the template."""
    if not isinstance(value, Mapping):
        raise Unfit(f"message {number} is of type {type(value).__name__}. Expected {{role, content}}.")
    role = value.get("role")
    if role not in ROLES:
        raise Unfit(f"message {number} has the role {role!r}. {did_you_mean(str(role), ROLES)}")
    kept = {name: item for name, item in value.items() if item is not None}
    if kept.get("tool_calls"):
        kept["tool_calls"] = [tool_call(call) for call in kept["tool_calls"]]
    else:
        kept.pop("tool_calls", None)
    content = kept.get("content")
    if isinstance(content, list | tuple):
        kept["content"] = joined(content, number)
    elif not isinstance(content, str) and not (content is None and role == "assistant" and "tool_calls" in kept):
        raise Unfit(f"message {number} ('{role}') has no content that is a string.")
    return kept


def joined(parts: Sequence[Any], number: int) -> str:
    """The text of a content that comes in parts. Raises Unfit for parts that are no text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Unfit(f"message {number} has a part of type '{kind}'. Expected texts alone.")
        texts.append(text)
    return "".join(texts)


def tool_call(call: Any) -> Any:
    """A call whose arguments are an object, as templates want them, where they come as its JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(known := parsed(arguments), dict):
        arguments = known
    return {**call, "function": {**function, "arguments": arguments}}


def same(call: Any) -> Any:
    return call


def written(call: Any) -> Any:
    """A call whose arguments are the JSON of an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def tools_of(row: Mapping[str, Any]) -> Sequence[Any] | None:
    """The tools that the model is told of."""
    tools = row.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = parsed(tools)
        if tools is None:
            raise Unfit("'tools' is a string that is not JSON.")
    if tools is not None and not isinstance(tools, list | tuple):
        raise Unfit(f"'tools' is of type {type(tools).__name__}. Expected a list.")
    return tools or None


def parsed(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
