"""The steps a mission file may name, each a function over a `Flying`; what they measure goes into the journal."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hil.bench.journal import read_events
from hil.campaign.admission import Admission
from hil.campaign.flying import MAILBOX_PORT, MODEL_PORT, Flying
from hil.client.console_shell import ConsoleShell
from hil.drivers.ssh import Upload
from hil.errors import BenchError, BoardError, HilError
from hil.inference import client as llm
from hil.inference import mailbox, onboard
from hil.inventory.mission_steps import (
    BootStep,
    CheckStep,
    EclipseStep,
    EndStep,
    LossOfSignalStep,
    QueryStep,
    ServeStep,
)
from hil.mission.passes import Contact
from hil.mission.shadow import Eclipse
from hil.model import Span

if TYPE_CHECKING:
    from hil.client.shell import AnyShell

# Mission seconds before AOS at which a skip lands, so that the edge itself is flown, not jumped over.
LEAD_S = 1.0
# Shorter contacts are not worth a connection.
SHORTEST_CONTACT_S = 120.0
# Wall seconds over which the idle power is measured, twenty samples of the power loop.
IDLE_S = 2.0
# Mission seconds before an eclipse at which its step begins, so that inference runs when the light goes.
ECLIPSE_LEAD_S = 60.0
# Wall seconds that shedding and restoring may take beyond the mission time at the step's rate: both end in real time.
EDGE_PATIENCE_S = 600.0
FILLER = "The satellite passed over the station and told it what it had seen. "


def boot(flying: Flying, step: BootStep) -> None:
    """Output on through the safety sequence, then firmware, kernel, login on the console and a shell: SSH on mgmt, or
    on the console where the bench file names no mgmt."""
    start = flying.board.console.mark()
    flying.board.power.on()
    await_boot(flying, start, switched_on(flying, "board_on"), cause="power on")
    shell = flying.board.shell
    directory = flying.type.onboard_dir
    # A flight starts with an empty payload: what an earlier one left must not pass for an upload.
    shell.run(["rm", "-rf", directory], timeout_s=30, check=True)
    shell.run(["mkdir", "-p", directory], timeout_s=20, check=True)
    put_file(shell, Path(onboard.__file__), f"{directory}/onboard.py")


def await_boot(flying: Flying, start: int, powered: float, cause: str) -> None:
    console, expect = flying.board.console, flying.type.boot
    deadline = powered + expect.timeout_s
    times = {}
    since: int | None = start
    for name, pattern in (("uboot_s", expect.firmware), ("kernel_s", expect.kernel), ("login_s", expect.login)):
        match = console.expect(pattern, max(deadline - time.monotonic(), 1.0), since=since, death=expect.death)
        since = None
        times[name] = match.t_mono - powered
    flying.say(f"  login after {times['login_s']:.1f} s")
    shell = flying.board.reconnect(timeout_s=max(deadline - time.monotonic(), 10.0))
    # A board without mgmt has its shell on the console: that is no SSH session, and is not told as one.
    times["shell_s" if isinstance(shell, ConsoleShell) else "ssh_s"] = time.monotonic() - powered
    flying.event("boot", cause=cause, **times)


def switched_on(flying: Flying, kind: str) -> float:
    """When the output went on, on the monotonic clock: the daemon's word, for boots that it began as well as ours."""
    return float([event for event in read_events(flying.journal.path) if event["kind"] == kind][-1]["on_mono"])


def put_file(shell: AnyShell, source: Path, target: str) -> None:
    """One small or preparatory file over mgmt, or the console of a board without, replacing what is there, durably."""
    if isinstance(shell, ConsoleShell):
        shell.put(source, target)
    else:
        shell.run(["rm", "-f", f"{target}.part"], timeout_s=20, check=True)
        Upload(source, target).run(shell, stall_s=30.0)
        shell.run(["mv", f"{target}.part", target], timeout_s=20, check=True)
    # A power cut within seconds leaves the renamed file empty otherwise, and an empty program "succeeds".
    shell.run(["sync"], timeout_s=60, check=True)


def serve(flying: Flying, step: ServeStep) -> None:
    """Start model server and mailbox on the board; healthy when the server answers over mgmt."""
    shell = flying.board.shell
    directory = flying.type.onboard_dir
    server = ["--host", "0.0.0.0", "--port", str(MODEL_PORT)]  # noqa: S104  (on the board, behind its two ports)
    kept = ["--host", "0.0.0.0", "--port", str(MAILBOX_PORT), "--server", f"http://127.0.0.1:{MODEL_PORT}"]  # noqa: S104
    started = time.monotonic()
    for command in (
        onboard_argv(flying, "serve-model", model_path(flying), *server, "--detach", f"{directory}/model.log"),
        onboard_argv(flying, "mailbox", *kept, "--dir", f"{directory}/mailbox", "--detach", f"{directory}/mailbox.log"),
    ):
        shell.run(command, timeout_s=20, check=True)
    try:
        flying.wait(
            "the model server is healthy",
            lambda: llm.health(shell.forward, f"http://127.0.0.1:{MODEL_PORT}"),
            timeout_s=step.timeout_s,
        )
    except BoardError as error:
        log = shell.run(["tail", "-n", "5", f"{directory}/model.log"], timeout_s=20).stdout.strip()
        raise BoardError(f"{error.message}; the end of its log:\n{log}") from None
    flying.event("serve_ready", load_s=time.monotonic() - started)
    flying.say(f"  model ready after {time.monotonic() - started:.1f} s")
    # What inference costs is the difference to this: the model loaded, nobody asking.
    if flying.interrupted.wait(IDLE_S):
        raise KeyboardInterrupt
    flying.event("idle", wall_s=IDLE_S)


def query(flying: Flying, step: QueryStep) -> None:
    """Ask every prompt, `repeat` times round, over the payload link at clock rate 1, inside contacts."""
    rule = Admission(step.first_estimate_s, step.admit_margin_s)
    contact = enter_contact(flying)
    for text in step.prompts * step.repeat:
        prompt = padded(text, step.pad_to_bytes)
        while not rule.admits(opening(flying, contact).end_s - flying.flight.state()["t_mission"]):
            contact = enter_contact(flying)
        predicted_s = None if rule.margin_s is None else rule.predicted_s
        try:
            result = _ask(flying, prompt, step.max_tokens, step.timeout_s, step="query", predicted_s=predicted_s)
        except llm.LinkLost as error:
            t_mission = flying.flight.state()["t_mission"]
            if predicted_s is None or t_mission < opening(flying, contact).end_s:
                raise  # nobody promised that it would end in time, or it was not loss of signal that ended it
            flying.event("query_lost", prompt_sha256=_sha256(prompt), predicted_s=predicted_s, message=error.message)
            flying.say(f"  {prompt!r} was let start and lost the signal: predicted {predicted_s:.1f} s")
            continue
        rule.taken_s.append(result.duration_s)
        flying.answers.setdefault(f"{prompt}|{step.max_tokens}", result.answer)


def padded(prompt: str, size: int | None) -> str:
    """The prompt after as much filler as makes it `size` bytes long; as it is when it is longer or no size is given."""
    missing = (size or 0) - len(prompt.encode())
    return prompt if missing <= 0 else (FILLER * (missing // len(FILLER) + 1))[: missing - 1] + "\n" + prompt


def check(flying: Flying, step: CheckStep) -> None:
    """After the cut: wait for the board that booted by itself, start the server, ask the first prompt again."""
    first = next(item.query for item in flying.mission.file.steps if item.query is not None)
    serve(flying, ServeStep())
    enter_contact(flying)
    prompt = padded(first.prompts[0], first.pad_to_bytes)
    result = _ask(flying, prompt, first.max_tokens, first.timeout_s, step="check")
    same = result.answer == flying.answers.get(f"{prompt}|{first.max_tokens}")
    flying.event("recovered", identical_answer=same, answer_sha256=_sha256(result.answer))
    flying.say(f"  the answer is {'identical' if same else 'DIFFERENT'} after the power cut")


def _ask(
    flying: Flying, prompt: str, max_tokens: int, timeout_s: float, step: str, predicted_s: float | None = None
) -> llm.ChatResult:
    address = flying.payload.address
    name = f"{step}-{_sha256(prompt)[:8]}"
    before = flying.flight.state()
    result = llm.stream_chat(
        flying.connect_payload,
        f"http://{address}:{MODEL_PORT}",
        _messages(flying, prompt),
        max_tokens,
        temperature=0.0,
        seed=flying.mission.file.seed,
        timeout_s=timeout_s,
        on_token=lambda text, t_s: flying.flight.record_tokens(name, 1, "payload"),
    )
    after = flying.flight.state()
    flying.event(
        "query",
        id=name,
        step=step,
        plane="payload",
        prompt=prompt,
        prompt_sha256=_sha256(prompt),
        answer=result.answer,
        answer_sha256=_sha256(result.answer),
        tokens=result.tokens,
        server_tokens=result.server_tokens,
        t_send_mono=result.t_send,
        t_first_mono=result.t_first,
        t_last_mono=result.t_last,
        duration_s=result.duration_s,
        ttft_s=result.ttft_s,
        rate_min=min(before["rate"], after["rate"]),
        rate_max=max(before["rate"], after["rate"]),
        link_up_throughout=before["link"]["up"] and after["link"]["up"],
        prompt_tps=result.timings.prompt_tps,
        decode_tps=result.timings.decode_tps,
        finish_reason=result.finish_reason,
        predicted_s=predicted_s,
    )
    flying.say(f"  {prompt!r} -> {result.answer.strip()!r} ({result.tokens} tokens in {result.duration_s:.1f} s)")
    return result


def loss_of_signal(flying: Flying, step: LossOfSignalStep) -> None:
    """Ask just before loss of signal, `repeat` times, each in the contact that delivered the answer before."""
    for _ in range(step.repeat):
        _letter(flying, step)


def _letter(flying: Flying, step: LossOfSignalStep) -> None:
    """One question: its answer is made and kept on board, fetched and acknowledged after next AOS."""
    address = flying.payload.address
    base = f"http://{address}:{MAILBOX_PORT}"
    contact = _current_contact(flying)
    flying.go_to(opening(flying, contact).end_s - step.before_los_s, "towards loss of signal")
    identity = uuid.uuid4().hex
    asked_at = flying.flight.state()["t_mission"]
    ground, seed = flying.connect_payload, flying.mission.file.seed
    messages, patience_s = _messages(flying, step.prompt), step.before_los_s
    mailbox.submit(ground, base, identity, messages, step.max_tokens, timeout_s=patience_s, temperature=0.0, seed=seed)
    flying.say("  question accepted on board; waiting for loss of signal")
    flying.wait("loss of signal", lambda: not flying.flight.state()["link"]["up"], timeout_s=patience_s + 30)
    # The bench, not the ground, looks over mgmt when the answer is stored: it must not skip over the inference.
    forward, local = flying.board.shell.forward, f"http://127.0.0.1:{MAILBOX_PORT}"
    at_los = mailbox.fetch(forward, local, identity, timeout_s=20).state
    stored = mailbox.fetch(forward, local, identity, wait_s=120, timeout_s=30).state
    if stored != "done":
        raise BoardError(f"board {flying.board_name}: the kept question is {stored!r} after 120 s, not answered")
    silent = _is_silent(flying, base)
    following = enter_contact(flying)
    letter = mailbox.fetch(ground, base, identity, timeout_s=60)
    text, tokens = letter.answer or "", letter.tokens or 0
    deliveries = _acknowledge(ground, base, identity)
    flying.flight.record_tokens(f"mailbox-{identity[:8]}", tokens, "payload")
    flying.event(
        "mailbox",
        id=identity,
        prompt=step.prompt,
        answer=text,
        answer_sha256=_sha256(text),
        tokens=tokens,
        state_at_los=at_los,
        los_during=at_los in ("queued", "running"),
        silent_after_los=silent,
        deliveries=deliveries,
        duplicates=max(deliveries - 1, 0),
        delivered_in_contact=following.station,
        latency_mission_s=flying.flight.state()["t_mission"] - asked_at,
    )
    flying.say(f"  delivered in the next contact: {text.strip()!r}")


def _acknowledge(ground: llm.Connect, base: str, identity: str) -> int:
    """How many deliveries the board admits: ours, acknowledged twice as after a lost reply, and a stranger's."""
    ours, strange = uuid.uuid4().hex, uuid.uuid4().hex
    admitted = set()
    for token in (ours, ours, strange):
        try:
            mailbox.acknowledge(ground, base, identity, token, timeout_s=60)
        except BoardError:
            continue  # refused: this answer is delivered already
        admitted.add(token)
    return len(admitted)


def _is_silent(flying: Flying, base: str) -> bool:
    """Whether the outage really is one: a connection over the payload link must not come up."""
    try:
        llm.request(flying.connect_payload, "GET", f"{base}/v1/queries", timeout_s=1.5)
    except llm.LinkLost:
        return True
    return False


def eclipse(flying: Flying, step: EclipseStep) -> None:
    """Into the last eclipse under continuous inference until the load is shed, then on until it is restored."""
    last = _last_eclipse(flying)
    flying.go_to(last.penumbra_entry_s - ECLIPSE_LEAD_S, "last eclipse")
    with continuous_inference(flying, step, "eclipse") as load:
        rate = flying.clock(step.clock_rate, cause="eclipse")
        patience_s = EDGE_PATIENCE_S + (last.duration_s + ECLIPSE_LEAD_S) / rate
        flying.wait(
            "the load is shed", lambda: _is_shed(flying, last.penumbra_exit_s), timeout_s=patience_s, every_s=0.2
        )
    flying.board.accept_power_cut()  # it was the aim
    flying.event("inference_load", **load)
    start = flying.board.console.mark()
    await_restored(flying, step.clock_rate)
    flying.say("  load restored; the board boots by itself")
    flying.clock(1.0, cause="boot")
    await_boot(flying, start, switched_on(flying, "load_restored"), cause="load restored")


def await_restored(flying: Flying, clock_rate: float) -> None:
    """Fly on at `clock_rate` until the load that was shed is restored, within an orbit."""
    flying.say(f"  load shed, state of charge {flying.flight.state()['soc']:.0%}")
    rate = flying.clock(clock_rate, cause="recharge")
    patience_s = EDGE_PATIENCE_S + flying.timeline.environment.orbit.period_s / rate
    flying.wait("the load is restored", lambda: _power(flying)["state"] == "on", timeout_s=patience_s, every_s=0.05)


def _is_shed(flying: Flying, end_s: float) -> bool:
    """Whether the load is shed. Raises BoardError when the eclipse ended at `end_s` without it."""
    state = flying.flight.state()
    power = state["power"]
    if power["state"] not in ("on", "shed"):
        flying.board.check()  # says who cut the power
    if power["state"] == "on" and state["t_mission"] > end_s:
        raise BoardError(
            f"board {flying.board_name}: the eclipse is over and its load was not shed: it drew "
            f"{power['power_w']:.1f} W at the end, its type says {flying.type.power.inference_w:g} W in inference",
            hint="a virtual board draws by the CPU time its emulator gets: is the host busy with something else?"
            if flying.type.modelled_power is not None
            else "measure the board in inference and plan the mission's battery for that",
        )
    return bool(power["state"] == "shed")


class Load(Protocol):
    """What continuous inference asks, again and again."""

    @property
    def prompt(self) -> str: ...
    @property
    def max_tokens(self) -> int: ...


class _Enough(Exception):
    """Ends an answer in the middle."""


@contextmanager
def continuous_inference(
    flying: Flying, load: Load, name: str, *, quiet_within_s: float = 5.0
) -> Iterator[dict[str, Any]]:
    """Keep the board busy over mgmt (no contact is needed for on-board work); counts tokens and wall seconds.

    At the end the answer under way is given up at its next token: the server stops when its connection goes.
    `t_quiet_mono` is when it was dropped, at the latest `quiet_within_s` after the end.
    """
    started = time.monotonic()
    told: dict[str, Any] = {
        "tokens": 0,
        "wall_s": 0.0,
        "plane": "mgmt",
        "t_start_mono": started,
        "t_last_mono": started,
    }
    stop = threading.Event()
    forward = flying.board.shell.forward

    def token(text: str, t_s: float) -> None:
        if stop.is_set():
            raise _Enough
        told["tokens"] += 1
        flying.flight.record_tokens(name, 1, "mgmt")

    def work() -> None:
        while not stop.is_set():
            try:
                llm.stream_chat(
                    forward,
                    f"http://127.0.0.1:{MODEL_PORT}",
                    _messages(flying, load.prompt),
                    load.max_tokens,
                    seed=flying.mission.file.seed,
                    timeout_s=120,
                    silence_s=30,
                    on_token=token,
                )
            except _Enough:
                break
            except HilError:
                # The power cut ends the connection; the step decides by the supply's state, not by this thread.
                stop.wait(0.5)
        told["t_quiet_mono"] = time.monotonic()

    thread = threading.Thread(target=work, name=f"hil-{name}-load", daemon=True)
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        told["wall_s"] = time.monotonic() - told["t_start_mono"]
        thread.join(timeout=quiet_within_s)
        told.setdefault("t_quiet_mono", time.monotonic())


def end(flying: Flying, step: EndStep) -> None:
    """Orderly end: the flight ends (output off and verified, link cleared)."""
    flying.flight.end()
    flying.board.power.off()


def _power(flying: Flying) -> dict[str, Any]:
    power: dict[str, Any] = flying.flight.state()["power"]
    return power


def next_contact(flying: Flying) -> Contact:
    """The next contact that has not begun and is long enough to be worth it."""
    now = flying.flight.state()["t_mission"]
    acquisition_s = flying.mission.file.link.acquisition_s
    for contact in flying.timeline.contacts:
        if contact.aos_s > now and contact.duration_s >= SHORTEST_CONTACT_S:
            up = flying.timeline.opening(contact)
            if up is not None and up.duration_s + acquisition_s >= SHORTEST_CONTACT_S:
                return contact
    raise BenchError(
        f"no contact of at least {SHORTEST_CONTACT_S:g} s is left in the mission's time span", hint="raise duration_h"
    )


def opening(flying: Flying, contact: Contact) -> Span:
    """From when to when the link is up in a contact: a link budget opens it after lock and closes it before LOS."""
    up = flying.timeline.opening(contact)
    if up is None:
        raise BenchError(f"the link to {contact.station} never comes up", hint="`hil mission compile` lists the rates")
    return up


def _current_contact(flying: Flying) -> Contact:
    now = flying.flight.state()["t_mission"]
    contact = flying.timeline.contact_at(now)
    if contact is None:
        raise BenchError("not inside a contact", hint="a loss_of_signal step follows a query step")
    return contact


def _last_eclipse(flying: Flying) -> Eclipse:
    """The last full eclipse that is still ahead and has a contact behind it, both before the flight's end."""
    now_s = flying.flight.state()["t_mission"]
    contacts = [
        item for item in flying.timeline.contacts if item.duration_s >= SHORTEST_CONTACT_S and item.aos_s < flying.end_s
    ]
    for eclipse in reversed(flying.timeline.eclipses):
        if (
            eclipse.umbra_entry_s is not None
            and eclipse.penumbra_entry_s > now_s
            and contacts
            and eclipse.penumbra_exit_s < contacts[-1].aos_s
        ):
            return eclipse
    raise BenchError(
        "no full eclipse with a contact behind it is left in the mission's time span", hint="raise duration_h"
    )


def enter_contact(flying: Flying) -> Contact:
    """Skip to the next contact, at clock rate 1, and wait until the link is up."""
    contact = next_contact(flying)
    flying.clock(1.0, cause="query")
    # The modem's acquisition is dead time at rate 1: land shortly before its end, so that the edge itself is flown.
    flying.go_to(opening(flying, contact).start_s - LEAD_S, "next contact")
    await_link(flying)
    flying.event("contact", station=contact.station, aos_s=contact.aos_s, los_s=contact.los_s)
    flying.say(f"  in contact with {contact.station}")
    return contact


def await_link(flying: Flying) -> None:
    acquisition_s = flying.mission.file.link.acquisition_s
    flying.wait(
        "the link is up", lambda: flying.flight.state()["link"]["up"], timeout_s=acquisition_s + 20, every_s=0.05
    )


def model_path(flying: Flying) -> str:
    return f"{flying.type.onboard_dir}/model.gguf"


def _messages(flying: Flying, prompt: str) -> list[dict[str, str]]:
    system = flying.mission.file.model.system_prompt
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": prompt}]


def onboard_argv(flying: Flying, *arguments: str) -> list[str]:
    return [flying.type.runtime_python, f"{flying.type.onboard_dir}/onboard.py", *arguments]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
