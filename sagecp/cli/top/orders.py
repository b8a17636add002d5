"""What the keys lead to: dialogs, calls, and what is said of their outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from sagecp.cli import render
from sagecp.cli.failures import from_client_error
from sagecp.cli.top import actions
from sagecp.cli.top.dialogs import Choice, ChoiceDialog, TextScreen
from sagecp.cli.top.help_text import help_lines
from sagecp.cli.top.printed import printed_lines
from sagecp.cli.top.rows import instance_row
from sagecp.cli.top.text import plain
from sagecp.client import ClientError
from sagecp.core.errors import ErrorReason
from sagecp.v1 import admin_service_pb2, inference_service_pb2, instance_pb2, scheduling_pb2

if TYPE_CHECKING:
    from sagecp.cli.top.app import TopApp

T = TypeVar("T")

_DETAILS_INTERVAL_S = 2.0
_GRACE_S = 30.0
_Order = Callable[..., Coroutine[Any, Any, instance_pb2.Instance]]


class Orders:
    """Leads from a key to what it does. Every failure becomes a notice; none ends the console."""

    def __init__(self, app: TopApp) -> None:
        self._app = app
        self._is_opening = False

    # Reading

    def show_help(self) -> None:
        """Explain the keys and the columns."""
        read_only = self._app.read_only
        self._app.push_screen(TextScreen("Help", lambda width: help_lines(width, read_only=read_only)))

    def show_details(self, instance_id: str) -> None:
        """Show an instance in full."""
        if self._is_chosen(instance_id):
            self._start(self._show_details(instance_id))

    async def _show_details(self, instance_id: str) -> None:
        from sagecp.cli.instance_details import show_one

        answer = await self._answer(actions.get_instance(self._app.client, instance_id))
        if answer is None:
            return
        shown = answer
        screen = TextScreen(
            f"Instance {instance_id}",
            lambda width: printed_lines(width, lambda: show_one(shown, "table")),
        )
        closed = asyncio.Event()
        self._is_opening = False
        await self._app.push_screen(screen, callback=lambda _: closed.set())
        while not await _happens(closed, _DETAILS_INTERVAL_S):
            if self._app.is_paused or self._app.picture.is_stale:
                continue
            try:
                shown = await actions.get_instance(self._app.client, instance_id)
            except ClientError as error:
                screen.set_heading(f"Instance {instance_id}, as it was: {_words(error, self._app)}")
                continue
            screen.set_heading(f"Instance {instance_id}")
            screen.show()

    def explain(self, instance_id: str) -> None:
        """List recent requests, of one instance or of all, and explain those that are chosen."""
        self._start(self._explain(instance_id))

    async def _explain(self, instance_id: str) -> None:
        requests = await self._answer(actions.recent_requests(self._app.client, instance_id))
        if requests is None:
            return
        where = f" of {instance_id}" if instance_id else ""
        if not requests:
            self._say(f"no requests{where} are known", "E lists those of all instances" if where else "")
            return
        chosen_id = ""
        while True:
            chosen_id = await self._choose(
                f"Recent requests{where}, newest first",
                "",
                [Choice(each.request_id, actions.request_text(each)) for each in requests],
                chosen_id=chosen_id,
            )
            if not chosen_id:
                return
            found = await self._answer(actions.explain(self._app.client, chosen_id))
            if found is not None:
                await self._app.push_screen_wait(_explanation(found))

    # Acting

    def drain(self, instance_id: str) -> None:
        """Drain an instance, after a question."""
        if self._may_act() and self._is_chosen(instance_id):
            self._start(self._drain(instance_id))

    async def _drain(self, instance_id: str) -> None:
        row = self._app.picture.instances[instance_id]
        choice = await self._choose(
            f"Drain {instance_id}?",
            f"It is {row.state}, with {render.plural(row.load, 'request')} in flight. It gets no new work.",
            [
                Choice("wait", "y  drain; what runs there finishes there", "y"),
                Choice("grace", f"g  drain; what still runs after {_GRACE_S:.0f} s goes on elsewhere", "g"),
                Choice("now", "m  drain; what runs there goes on elsewhere now", "m"),
                Choice("", "n  leave it as it is", "n"),
            ],
        )
        if choice:
            grace_s = {"wait": None, "grace": _GRACE_S, "now": 0.0}[choice]
            await self._order(instance_id, "drain", actions.drain, grace_s=grace_s)

    def resume(self, instance_id: str) -> None:
        """Have an instance take work again."""
        if self._may_act() and self._is_chosen(instance_id):
            if not self._app.picture.instances[instance_id].drained:
                self._say(f"{instance_id} is not drained", "there is nothing to take back")
                return
            self._start(self._order(instance_id, "resume", actions.resume))

    def sleep_or_wake(self, instance_id: str) -> None:
        """Have an engine sleep, or wake up where it sleeps."""
        if self._may_act() and self._is_chosen(instance_id):
            self._start(self._sleep_or_wake(instance_id))

    async def _sleep_or_wake(self, instance_id: str) -> None:
        row = self._app.picture.instances[instance_id]
        if row.sleeping:
            await self._order(instance_id, "wake", actions.wake)
            return
        choice = await self._choose(
            f"Have {instance_id} sleep?",
            f"It is {row.state}, with {render.plural(row.load, 'request')} in flight. It is drained first, "
            "then its engine frees its GPU memory.",
            [
                Choice("1", "1  sleep; the weights stay in the host's memory", "1"),
                Choice("2", "2  sleep; the weights are dropped, and waking takes longer", "2"),
                Choice("", "n  leave it as it is", "n"),
            ],
        )
        if choice:
            await self._order(instance_id, "sleep", actions.sleep, level=int(choice))

    async def _order(self, instance_id: str, what: str, order: _Order, **options: Any) -> None:  # noqa: ANN401
        """Give an order. Where the rest of the fleet could not carry the load, ask whether to force it."""
        client = self._app.client
        try:
            message = await order(client, instance_id, **options)
        except ClientError as error:
            if error.reason is not ErrorReason.DRAIN_REFUSED:
                self._refused(what, error)
                return
            choice = await self._choose(
                f"The control plane refuses to {what} {instance_id}",
                error.message,
                [
                    Choice("", "n  leave it as it is", "n"),
                    Choice("force", f"f  {what} it all the same", "f"),
                ],
            )
            if choice:
                await self._order(instance_id, what, order, **options, force=True)
            return
        row = instance_row(message, time.monotonic())
        self._app.picture.put_instances([row], time.time())
        self._app.show_picture()
        self._say(f"{what}: {instance_id} is {row.state}", f"{render.plural(row.load, 'request')} in flight")

    def change_policy(self) -> None:
        """Change how requests are ordered and placed."""
        if self._may_act():
            self._start(self._change_policy())

    async def _change_policy(self) -> None:
        now = await self._answer(actions.get_scheduling(self._app.client))
        if now is None:
            return
        config = now.config
        choice = await self._choose(
            f"Order and placement, version {config.version}", _why(now), _policy_choices(now)
        )
        field, _, name = choice.partition(":")
        if not field:
            return
        before = getattr(config, field)
        what = field.replace("_", " ")
        if before == name:
            self._say(f"{what} is {name} already", "nothing was changed")
            return
        confirmed = await self._choose(
            f"Change the {what} from {before} to {name}?",
            "It applies at once; waiting requests are put in the new order, and none is lost. "
            f"sagecp policy revert {config.version} goes back.",
            [Choice("yes", f"y  change it to {name}", "y"), Choice("", "n  leave it as it is", "n")],
        )
        if not confirmed:
            return
        wanted = scheduling_pb2.SchedulingConfig()
        setattr(wanted, field, name)
        changed = await self._answer(actions.set_scheduling(self._app.client, wanted, config.version))
        if changed is not None:
            self._say(f"{what} is {name}", f"version {changed.version} is in force")

    # What they share

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in the background; a key typed again before its screen is there does nothing."""
        if self._is_opening:
            work.close()
            return
        self._is_opening = True
        self._app.run_worker(self._run(work), name="order", exit_on_error=True)

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            self._is_opening = False

    async def _choose(self, heading: str, text: str, choices: list[Choice], **options: Any) -> str:  # noqa: ANN401
        # From here on the keys are the dialog's.
        self._is_opening = False
        return await self._app.push_screen_wait(ChoiceDialog(heading, text, choices, **options))

    async def _answer(self, call: Coroutine[Any, Any, T]) -> T | None:
        """Return what a call answers; ``None`` where it fails, and say why."""
        try:
            return await call
        except ClientError as error:
            self._refused("it", error)
            return None

    def _refused(self, what: str, error: ClientError) -> None:
        self._app.notify(
            _words(error, self._app),
            title=f"{what} did not work" if what != "it" else "that did not work",
            severity="error",
            timeout=8,
            markup=False,
        )

    def _say(self, heading: str, text: str) -> None:
        self._app.notify(text, title=heading, markup=False)

    def _may_act(self) -> bool:
        if self._app.read_only:
            self._app.notify(
                "this console was started with --read-only", title="nothing was changed",
                severity="warning", markup=False,
            )  # fmt: skip
        return not self._app.read_only

    def _is_chosen(self, instance_id: str) -> bool:
        if instance_id in self._app.picture.instances:
            return True
        self._say("no instance is chosen", "arrow keys choose one")
        return False


async def _happens(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event; return whether it happened in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _words(error: ClientError, app: TopApp) -> str:
    return plain(from_client_error(error, server=app.client.connection.target).message)


def _explanation(found: inference_service_pb2.ExplainRequestResponse) -> TextScreen:
    from sagecp.cli.explain import show_explanation

    return TextScreen(
        f"Request {found.request.request_id}",
        lambda width: printed_lines(width, lambda: show_explanation(found)),
    )


def _why(now: admin_service_pb2.GetSchedulingConfigResponse) -> str:
    in_force = f"{now.policy_in_force} is in force: " if now.policy_in_force else ""
    return f"{in_force}{now.policy_reason}"


def _policy_choices(now: admin_service_pb2.GetSchedulingConfigResponse) -> list[Choice]:
    groups = (
        ("scheduling_policy", "Order of waiting requests", now.available_scheduling_policies),
        ("routing_strategy", "Choice among instances", now.available_routing_strategies),
        ("load_balancer", "How load_balanced balances", now.available_load_balancers),
    )
    choices: list[Choice] = []
    for field, heading, names in groups:
        choices.append(Choice(f"heading:{field}", heading, enabled=False))
        for name in names:
            mark = "●" if getattr(now.config, field) == name else " "
            choices.append(Choice(f"{field}:{name}", f"  {mark} {name}"))
    return choices
