"""A conversation in the terminal: history, system prompt, text as it comes."""

import re
import time
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.markup import escape

from configs.errors import UsageError
from decode.load import Model
from decode.sampling import SEEDS, Sampling
from decode.stream import Memory, stream

HELP = """\
/system TEXT   set the system prompt (without TEXT: the template's own) and start anew
/clear         start anew
/retry         another answer to the last question
/exit          leave (also Ctrl-D; Ctrl-C stops an answer)"""


@dataclass
class Chat:
    """Where a conversation stands."""

    model: Model
    sampling: Sampling
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system prompt first (None: the template may put its own)."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns


def run_chat(model: Model, sampling: Sampling, system: str | None = None, console: Console | None = None) -> None:
    """Talk until /exit or the end of the input."""
    console = console or Console()
    chat = Chat(model, sampling, system)
    model.tokenizer.render([{"role": "user", "content": "?"}])  # no template: say so before the first question
    console.print("[dim]/help lists the commands[/dim]")
    while True:
        try:
            line = console.input("[bold green]>[/bold green] ").strip()
        except EOFError:
            console.print()
            return
        if line == "/exit":
            return
        if line:
            _turn(chat, line, console)


def _turn(chat: Chat, line: str, console: Console) -> None:
    """Obey a command or answer a message."""
    command, _, rest = line.partition(" ")
    if not re.fullmatch(r"/[a-z]+", command):
        chat.turns.append({"role": "user", "content": line})
    elif command == "/retry":
        while chat.turns and chat.turns[-1]["role"] == "assistant":
            chat.turns.pop()
        if not chat.turns:
            console.print("[yellow]there is no question yet[/yellow]")
            return
    elif command in ("/clear", "/system"):
        chat.turns.clear()
        if command == "/system":
            chat.system = rest.strip() or None
        console.print("[dim]a new conversation[/dim]")
        return
    else:
        if command != "/help":
            console.print(f"[yellow]unknown command {escape(command)}[/yellow]")
        console.print(HELP, markup=False, highlight=False, soft_wrap=True)
        return
    _answer(chat, console)


def _answer(chat: Chat, console: Console) -> None:
    """Stream the answer to the last message; Ctrl-C keeps what has come so far."""
    tokenizer, said = chat.model.tokenizer, ""
    try:
        prompt = tokenizer.encode(tokenizer.render(chat.messages, add_generation_prompt=True))
        room = chat.model.arch.max_position - len(prompt)
        sampling = replace(chat.sampling, max_new_tokens=max(1, min(chat.sampling.limit(len(prompt)), room)))
        start, pieces = time.perf_counter(), stream(chat.model, prompt, sampling, chat.memory)
        try:
            while True:
                piece = next(pieces)
                said += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except StopIteration as end:
            done = end.value
            speed = len(done.tokens) / (time.perf_counter() - start)
            console.print(f"\n[dim]{len(done.tokens)} tokens, {speed:.0f}/s[/dim]", highlight=False)
        except KeyboardInterrupt:
            pieces.close()
            console.print("\n[dim]stopped[/dim]")
    except UsageError as error:
        chat.turns.pop()
        console.print(f"[red]{escape(str(error))}[/red]\n[dim]/clear starts a new conversation[/dim]")
        return
    chat.turns.append({"role": "assistant", "content": said})
    chat.sampling = replace(chat.sampling, seed=(chat.sampling.seed + 1) % SEEDS)
