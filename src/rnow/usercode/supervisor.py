"""The process between rnow and a user's functions: hands out calls, watches the clock, kills and replaces.

It is run by its path, speaks ``frames`` on stdin and stdout, and imports nothing of the user's. Everything below it ends
with it. Below it are a zygote, which imports the user's file once, and the workers, which are copies of the zygote.

A worker's inbox is a socket of whole messages whose receiving end the supervisor holds too. What it takes back from there
was not begun, for sure, and may go to another worker: that is how calls queued behind one that hangs are rescued.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from typing import Any

if __name__ == "__main__":
    # By path and isolated, so that neither PYTHONPATH nor the folder we stand in gets in the way.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

from rnow.processes.leash import descendants, end_all
from rnow.usercode import frames
from rnow.usercode.inbox import make_inbox, put, take
from rnow.usercode.processes import end_family, family, processes
from rnow.usercode.records import Call, Worker, Zygote
from rnow.usercode.uplink import Uplink
from rnow.usercode.zygote import ASYNC, SYNC, run_importing_worker, run_zygote

_PR_SET_CHILD_SUBREAPER = 36
_TICK = 0.01
_STEAL_AFTER = 0.02  # seconds that one call may hold up those behind it
_WATCH = 0.25  # seconds between two looks at /proc while calls run
_ACK_WITHIN = 0.5  # seconds for an event loop to answer that it ended a call
_ACK_OF_CANCEL = 5.0  # the same where nobody waits for the call: a busy loop must not cost the other calls their lives
_FORK_WITHIN = 20.0
_GRACE = 2.0
_MAX_DEPTH = 16
_DEPTH_SECONDS = 0.002  # a worker is given about this much work at once
_CHUNK = 256 * 1024


class Supervisor:
    """The event loop. One per host."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._settings: dict[str, Any] = {}
        self._uplink = Uplink(self._selector)
        self._output = -1
        self._incoming = frames.FrameReader()
        self._closing = False
        self._zygote: Zygote | None = None
        self._forks = True
        self._names: list[str] | None = None
        self._async_functions: set[int] = set()
        self._calls: dict[int, Call] = {}
        self._queue: deque[Call] = deque()
        self._async_queue: deque[Call] = deque()
        self._sync: list[Worker] = []
        self._shared: Worker | None = None
        self._seconds: dict[int, float] = {}
        self._timers: list[tuple[float, int, str, Any]] = []
        self._timer = 0
        self._next_tick: float | None = None
        self._next_watch: float | None = None
        self._status: dict[int, int] = {}

    def run(self) -> None:
        """Serve until stdin closes."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake, notify = os.pipe()
        for end in (wake, notify):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        os.set_blocking(0, False)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._on_child(wake))
        self._selector.register(0, selectors.EVENT_READ, self._on_input)
        while not (self._closing or self._uplink.broken):
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._on_time()
            self._uplink.release(more=any(worker.calls for worker in self._sync))
        self._close()

    # -- rnow's side

    def _on_input(self) -> None:
        try:
            data = os.read(0, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._closing = True
            return
        for message in self._incoming.feed(data):
            kind, call, _, _, body = frames.unpack(message)
            if kind == frames.CALL:
                self._accept(Call(message))
            elif kind == frames.CANCEL:
                self._cancel(call)
            elif kind == frames.PING:
                self._uplink.send(frames.pack(frames.PONG))
            elif kind == frames.START:
                self._start(json.loads(body))
        self._hand_out()

    def _start(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._output = self._uplink.open_output(settings["log"])
        self._start_zygote()

    def _fail(self, call: Call, fault: dict[str, Any]) -> None:
        self._calls.pop(call.id, None)
        if not call.dropped:
            body = json.dumps(fault).encode()
            self._uplink.hold(frames.pack(frames.RESULT, call=call.id, body=body))

    def _cancel(self, number: int) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        worker = call.worker
        if worker is not None and not worker.is_async:
            self._take_back(worker)
            worker = call.worker
        if worker is None:
            del self._calls[number]
            for queue in (self._queue, self._async_queue):
                with contextlib.suppress(ValueError):
                    queue.remove(call)
            return
        if worker.is_async:
            call.dropped = True
            self._tell_to_end(call, {})
        elif self._still_runs(call, worker):
            call.dropped = True
            self._kill(worker, {"fault": "cancelled"})

    def _still_runs(self, call: Call, worker: Worker) -> bool:
        """Whether a sync worker is at this call. It may have answered it, and be at the next one, without our having heard:
        killing it would then end a call that nobody wants to end."""
        self._on_worker(worker)
        return self._calls.get(call.id) is call and call.worker is worker

    # -- the zygote

    def _start_zygote(self) -> None:
        control, far = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                control.detach()  # closed with everything else; the number may then be another file's
                run_zygote(far, self._settings, self._output)
            finally:
                os._exit(1)
        far.close()
        zygote = self._zygote = Zygote(pid, control)
        self._selector.register(
            control, selectors.EVENT_READ, lambda: self._on_zygote(zygote, control)
        )
        self._at(time.monotonic() + self._settings["import_timeout"], "import", zygote)
        self._watch_soon()

    def _on_zygote(self, zygote: Zygote, control: socket.socket) -> None:
        try:
            data = control.recv(_CHUNK)
        except OSError:
            data = b""
        if not data:
            self._zygote_gone(zygote, {"kind": "ended", "status": self._wait_for(zygote.pid)})
            return
        for message in zygote.reader.feed(data):
            kind, _, _, _, body = frames.unpack(message)
            zygote.said = True
            report = json.loads(body)
            if kind == frames.READY:
                self._imported(zygote, report, body)
            else:
                self._import_failed(report)

    def _imported(self, zygote: Zygote, report: dict[str, Any], body: bytes) -> None:
        functions = report["functions"]
        if self._names is None:
            self._names = [function["name"] for function in functions]
            self._async_functions = {
                index for index, function in enumerate(functions) if function["is_async"]
            }
            self._settings["names"] = self._names
            self._settings["injected"] = {
                function["name"]: bool(function.get("injected")) for function in functions
            }
            self._forks = report["forks"]
            self._uplink.send(frames.pack(frames.READY, body=body))
        zygote.ready = True
        if self._settings["warm"] and not self._sync and self._shared is None:
            if len(self._async_functions) < len(self._names):
                self._spawn(is_async=False)
            if self._async_functions:
                self._spawn(is_async=True)
        self._hand_out()

    def _import_failed(self, report: dict[str, Any]) -> None:
        if self._names is None:
            self._uplink.send(frames.pack(frames.FAULT, body=json.dumps(report).encode()))
        words = f"{report.get('type', 'it')}: {report.get('message', report.get('kind'))}"
        self._fail_queued({"fault": "start", "why": words}, of_async=None)

    def _zygote_gone(self, zygote: Zygote, report: dict[str, Any]) -> None:
        self._selector.unregister(zygote.control)
        zygote.control.close()
        self._zygote = None
        if not zygote.said:
            self._import_failed(report)

    # -- workers

    def _spawn(self, *, is_async: bool) -> None:
        inbox, back = make_inbox()
        outbox, far = socket.socketpair()
        largest = frames.max_answer(self._settings["result_bytes"])
        worker = Worker(is_async, inbox, back, outbox, largest)
        if self._forks:
            if self._zygote is None or not self._zygote.ready:
                for end in (inbox, back, outbox, far):
                    end.close()
                if self._zygote is None:
                    self._start_zygote()
                return  # asked again when it has reported
            with contextlib.suppress(OSError):  # it died: the sockets close, which says so
                ask = ASYNC if is_async else SYNC
                socket.send_fds(self._zygote.control, [ask], [back.fileno(), far.fileno()])
            patience = _FORK_WITHIN
        else:
            pid = os.fork()
            if pid == 0:
                try:
                    run_importing_worker(back, far, self._settings, self._output, is_async=is_async)
                finally:
                    os._exit(1)
            worker.pid = pid
            patience = self._settings["import_timeout"]
        far.close()
        outbox.setblocking(False)
        self._selector.register(outbox, selectors.EVENT_READ, lambda: self._on_worker(worker))
        if is_async:
            self._shared = worker
        else:
            self._sync.append(worker)
        self._at(time.monotonic() + patience, "start", worker)

    def _on_worker(self, worker: Worker) -> None:
        """What it says; its end, when it says nothing more."""
        while True:
            try:
                data = worker.outbox.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._ended(worker)
                return
            try:
                for message in worker.reader.feed(data):
                    self._heard(worker, message)
            except frames.BadFrame:
                self._kill(worker, {"fault": "died", "status": None})
                return
            if worker.outbox.fileno() < 0:
                return

    def _heard(self, worker: Worker, message: bytes) -> None:
        kind, number, _, seconds, body = frames.unpack(message)
        if kind == frames.HELLO:
            worker.pid = number
            if body:
                self._kill(worker, {"fault": "start", "why": body.decode()})
                return
            worker.ready = True
            self._hand_out()
        elif kind == frames.RESULT:
            call = worker.calls.pop(number, None)
            if call is None:
                return
            self._calls.pop(number, None)
            call.message = b""
            before = self._seconds.get(call.function, seconds)
            self._seconds[call.function] = 0.8 * before + 0.2 * seconds
            if not call.dropped:
                self._uplink.hold(message)
            if not worker.is_async and worker.calls:
                self._begin(worker, next(iter(worker.calls.values())))
            self._hand_out()
        elif kind == frames.ACK:
            call = worker.calls.pop(number, None)
            if call is not None:
                self._fail(call, call.fault or {"fault": "cancelled"})
                self._hand_out()
        elif kind == frames.WORN:
            self._kill(worker, {"fault": "worn"})

    def _begin(self, worker: Worker, call: Call) -> None:
        worker.started = time.monotonic()
        call.deadline = worker.started + call.timeout
        self._at(call.deadline, "call", call)

    def _kill(self, worker: Worker, fault: dict[str, Any]) -> None:
        if worker.pid:
            end_family(worker.pid)
        self._lost(worker, fault)

    def _ended(self, worker: Worker) -> None:
        """It ended by itself."""
        status = self._wait_for(worker.pid)
        # Its children have another parent now, but its session.
        for pid in family(processes(), worker.pid) if worker.pid else ():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._lost(worker, {"fault": "died", "status": status})

    def _lost(self, worker: Worker, fault: dict[str, Any]) -> None:
        """It is gone. What it had begun fails; what it had not goes to another."""
        self._take_back(worker)
        self._selector.unregister(worker.outbox)
        for end in (worker.inbox, worker.back, worker.outbox):
            end.close()
        if worker is self._shared:
            self._shared = None
        else:
            self._sync.remove(worker)
        for call in list(worker.calls.values()):
            self._fail(call, call.fault or fault)
        if not worker.ready and not any(other.ready for other in self._sync if not worker.is_async):
            # Another try would end as this one: nobody is there to take the calls.
            if fault["fault"] != "start":
                fault = {"fault": "start", "why": "it ended before it was ready"}
            self._fail_queued(fault, of_async=worker.is_async)
        self._hand_out()

    def _take_back(self, worker: Worker) -> None:
        """What the worker has not begun returns to the head of the queue."""
        returned = []
        while True:
            try:
                message = take(worker.back, wait=False)
            except OSError:
                break
            if not message:
                break
            _, kind, number, _, _ = frames.HEADER.unpack_from(message)
            call = worker.calls.pop(number, None) if kind == frames.CALL else None
            if call is not None:
                call.worker = None
                call.deadline = 0.0
                if call.dropped or call.fault:
                    self._fail(call, call.fault or {"fault": "cancelled"})
                else:
                    returned.append(call)
        queue = self._async_queue if worker.is_async else self._queue
        queue.extendleft(reversed(returned))

    def _fail_queued(self, fault: dict[str, Any], *, of_async: bool | None) -> None:
        for queue, is_async in ((self._queue, False), (self._async_queue, True)):
            if of_async is None or of_async == is_async:
                while queue:
                    self._fail(queue.popleft(), fault)

    # -- handing out

    def _accept(self, call: Call) -> None:
        self._calls[call.id] = call
        queue = self._async_queue if call.function in self._async_functions else self._queue
        queue.append(call)

    def _hand_out(self) -> None:
        if self._names is None or self._closing:
            return
        self._hand_out_async()
        for worker in self._sync:
            if not self._queue:
                break
            self._fill(worker)
        if self._queue and not self._sync:
            self._spawn(is_async=False)
        if self._calls:
            self._watch_soon()
        if self._next_tick is None and self._needs_tick():
            self._next_tick = time.monotonic() + _TICK

    def _needs_tick(self) -> bool:
        return (
            bool(self._async_queue)
            or (bool(self._queue) and len(self._sync) < self._settings["workers"])
            or any(len(worker.calls) > 1 for worker in self._sync)
        )

    def _fill(self, worker: Worker) -> None:
        """Give a sync worker about two milliseconds of work."""
        if not worker.ready:
            return
        if worker.calls and time.monotonic() - worker.started > _STEAL_AFTER:
            return
        while self._queue:
            usual = self._seconds.get(self._queue[0].function)
            depth = 1 if usual is None else _DEPTH_SECONDS / max(usual, 1e-6)
            if len(worker.calls) >= min(max(depth, 1), _MAX_DEPTH):
                return
            call = self._queue[0]
            if not self._give(worker, call):
                return
            self._queue.popleft()
            if len(worker.calls) == 1:
                self._begin(worker, call)

    def _hand_out_async(self) -> None:
        if not self._async_queue:
            return
        worker = self._shared
        if worker is None:
            self._spawn(is_async=True)
            return
        while (
            self._async_queue
            and worker.ready
            and len(worker.calls) < self._settings["async_calls"]
            and self._give(worker, self._async_queue[0])
        ):
            self._begin(worker, self._async_queue.popleft())

    def _give(self, worker: Worker, call: Call) -> bool:
        """False when its inbox is full."""
        try:
            put(worker.inbox, call.message)
        except OSError as error:
            # A worker that has just died is found out by its outbox; its calls come back then.
            if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                return False
        worker.calls[call.id] = call
        call.worker = worker
        return True

    # -- time

    def _at(self, when: float, what: str, subject: Any) -> None:
        self._timer += 1
        heapq.heappush(self._timers, (when, self._timer, what, subject))
        if self._timer % 256 == 0:  # most calls end long before their time
            self._timers = [entry for entry in self._timers if self._still_due(*entry)]
            heapq.heapify(self._timers)

    def _still_due(self, when: float, _: int, what: str, subject: Any) -> bool:
        if what == "call":
            return self._calls.get(subject.id) is subject and subject.deadline == when
        if what == "ack":
            return self._calls.get(subject.id) is subject and subject.worker is not None
        if what == "start":
            return not subject.ready and subject.outbox.fileno() >= 0
        return not subject.said and self._zygote is subject

    def _patience(self) -> float | None:
        """Seconds until something is due."""
        moments = (self._next_tick, self._next_watch, self._uplink.due())
        due = [moment for moment in moments if moment is not None]
        if self._timers:
            due.append(self._timers[0][0])
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _on_time(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            entry = heapq.heappop(self._timers)
            if not self._still_due(*entry):
                continue
            _, _, what, subject = entry
            if what == "call":
                self._too_late(subject)
            elif what == "ack":
                self._kill(subject.worker, {"fault": "blocked"})
            elif what == "start":
                self._kill(subject, {"fault": "start", "why": "it was not ready in time"})
            else:
                end_family(subject.pid)
                self._zygote_gone(subject, {"kind": "timeout"})
        if self._next_tick is not None and self._next_tick <= now:
            self._next_tick = None
            self._tick(now)
        if self._next_watch is not None and self._next_watch <= now:
            self._watch(now)

    def _too_late(self, call: Call) -> None:
        worker = call.worker
        if worker is None:
            return
        fault = {"fault": "timeout"}
        if worker.is_async:
            self._tell_to_end(call, fault)
        elif self._still_runs(call, worker):
            call.fault = fault
            self._kill(worker, fault)

    def _tell_to_end(self, call: Call, fault: dict[str, Any]) -> None:
        """Ask the event loop to end a call. When it does not answer at once, it is blocked."""
        worker = call.worker
        if worker is None:
            return
        call.fault = call.fault or fault or None
        call.deadline = 0.0
        with contextlib.suppress(OSError):  # full or dead: no answer will come
            put(worker.inbox, frames.pack(frames.CANCEL, call=call.id))
        patience = _ACK_WITHIN if fault else _ACK_OF_CANCEL
        self._at(time.monotonic() + patience, "ack", call)

    def _tick(self, now: float) -> None:
        """Calls are waiting: rescue those behind a slow one, and add workers, twice as many each time."""
        for worker in list(self._sync):
            if len(worker.calls) > 1 and now - worker.started > _STEAL_AFTER:
                self._take_back(worker)
        self._hand_out()
        waiting = len(self._queue)
        if waiting and all(worker.ready for worker in self._sync):
            room = self._settings["workers"] - len(self._sync)
            for _ in range(min(waiting, room, max(1, len(self._sync)))):
                self._spawn(is_async=False)
        if self._next_tick is None and self._needs_tick():
            self._next_tick = now + _TICK

    def _watch_soon(self) -> None:
        if self._next_watch is None:
            self._next_watch = time.monotonic() + _WATCH

    def _watch(self, now: float) -> None:
        """Count what user code has started. A limit of the kernel's would not bind root, nor tell tools apart."""
        limit = self._settings["processes"]
        table = processes()
        rest = descendants(os.getpid())
        busy = bool(self._calls) or (self._zygote is not None and not self._zygote.said)
        for worker in self._workers():
            if worker.pid:
                members = family(table, worker.pid)
                rest -= members | {worker.pid}
                busy = busy or bool(members)
                if len(members) > limit:
                    self._kill(worker, {"fault": "processes", "limit": limit})
        zygote = self._zygote
        if zygote is not None:
            members = family(table, zygote.pid)
            rest -= members | {zygote.pid}
            if len(members) > limit:
                end_family(zygote.pid)
                self._zygote_gone(zygote, {"kind": "processes", "limit": limit})
        # Those that left their parents and their session: whose they are cannot be told any more.
        if len(rest) > limit:
            for pid in rest:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self._next_watch = now + _WATCH if busy or rest else None

    # -- ends

    def _on_child(self, wake: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        self._reap()
        while dead := [worker for worker in self._workers() if worker.pid in self._status]:
            for worker in dead:
                if worker.outbox.fileno() >= 0:
                    self._on_worker(worker)
                if worker.outbox.fileno() >= 0:  # a child of its own still holds the other end
                    self._ended(worker)
        # What is left are orphans; the zygote's end is asked for when its socket closes.
        zygote = self._zygote.pid if self._zygote is not None else 0
        self._status = {pid: status for pid, status in self._status.items() if pid == zygote}

    def _workers(self) -> list[Worker]:
        return [*self._sync, *([self._shared] if self._shared is not None else [])]

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._status[pid] = status

    def _wait_for(self, pid: int) -> int | None:
        """How ``pid`` ended, in the words of waitpid; None when it did not within a moment, and was killed."""
        for _ in range(10 if pid else 0):
            self._reap()
            if pid in self._status:
                return os.waitstatus_to_exitcode(self._status[pid])
            time.sleep(0.005)
        if pid:
            end_family(pid)
        return None

    def _close(self) -> None:
        end_all(lambda: descendants(os.getpid()), _GRACE, self._reap)
        if self._output >= 0:
            os.close(self._output)
        self._uplink.close()


if __name__ == "__main__":
    Supervisor().run()
