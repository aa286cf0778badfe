"""The process between rnow and a user's functions: hands out calls, watches the clock, kills and replaces.

It is run by its path, speaks ``frames`` on stdin and stdout, and imports nothing of the user's. Everything below it ends
with it. Below it are a zygote, which imports the user's file once, and the workers, which are copies of the zygote.

A call waits here until a worker is free: a sync worker has one at a time, the worker of the async functions many. A worker's
inbox is a socket of whole messages whose receiving end the supervisor holds too: what it takes back from there when a worker
ends was not begun, for sure, and goes to another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque

if __name__ == "__main__":
    # By path and isolated, so that neither PYTHONPATH nor the folder we stand in gets in the way.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

from rnow.processes.leash import descendants, end_all, reaped
from rnow.usercode import frames
from rnow.usercode.inbox import make_inbox, put, take
from rnow.usercode.processes import end_family, family, processes
from rnow.usercode.records import Call, Fault, Report, Settings, Worker, Zygote
from rnow.usercode.uplink import Uplink
from rnow.usercode.zygote import ASYNC, SYNC, run_importing_worker, run_zygote

_PR_SET_CHILD_SUBREAPER = 36
_WATCH = 0.25  # seconds between two looks at /proc while calls run
_ACK_WITHIN = 0.5  # seconds for an event loop to answer that it ended a call
_ACK_OF_CANCEL = 5.0  # the same where nobody waits for the call: a busy loop must not cost the other calls their lives
_FORK_WITHIN = 20.0
_GRACE = 2.0
_CHUNK = 256 * 1024
_ASYNC_CALLS = 256  # that one event loop has at once


class Supervisor:
    """The event loop. One per host."""

    _settings: Settings

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._uplink = Uplink(self._selector)
        self._output = -1
        self._incoming = frames.FrameReader()
        self._closing = False
        self._zygote: Zygote | None = None
        self._forks = True
        self._names: list[str] | None = None
        self._async_functions: set[int] = set()
        self._calls: dict[int, Call] = {}
        self._queues: dict[bool, deque[Call]] = {False: deque(), True: deque()}  # by is_async
        self._workers: list[Worker] = []
        self._next_watch = math.inf
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
            self._uplink.flush()
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
            kind, number, _, _, body = frames.unpack(message)
            if kind == frames.CALL:
                call = self._calls[number] = Call(message)
                call.is_async = call.function in self._async_functions
                self._queues[call.is_async].append(call)
            elif kind == frames.CANCEL:
                self._cancel(number)
            elif kind == frames.PING:
                self._uplink.send(frames.pack(frames.PONG))
            elif kind == frames.START:
                self._settings = json.loads(body)
                self._output = self._uplink.open_output(self._settings["log"])
                self._start_zygote()
        self._hand_out()

    def _fail(self, call: Call, fault: Fault) -> None:
        self._calls.pop(call.id, None)
        if not call.dropped:
            body = json.dumps(fault).encode()
            self._uplink.send(frames.pack(frames.RESULT, call=call.id, body=body))

    def _cancel(self, number: int) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        call.dropped = True
        if call.worker is None:
            del self._calls[number]
            self._queues[call.is_async].remove(call)
        elif call.is_async:
            self._tell_to_end(call, call.worker, _ACK_OF_CANCEL)
        else:
            self._kill(call.worker, {"fault": "cancelled"})

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
        due = time.monotonic() + self._settings["import_timeout"]
        zygote = self._zygote = Zygote(pid, control, due)
        self._selector.register(
            control, selectors.EVENT_READ, lambda: self._on_zygote(zygote, control)
        )
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
            zygote.due = math.inf
            report = json.loads(body)
            if kind == frames.READY:
                self._imported(zygote, report, body)
            else:
                self._import_failed(report)

    def _imported(self, zygote: Zygote, report: Report, body: bytes) -> None:
        functions = report["functions"]
        if self._names is None:
            self._names = [function["name"] for function in functions]
            self._async_functions = {
                index for index, function in enumerate(functions) if function["is_async"]
            }
            self._settings["names"] = self._names
            self._forks = report.get("forks", False)
            self._uplink.send(frames.pack(frames.READY, body=body))
        zygote.ready = True
        if self._settings["warm"] and not self._workers:
            if len(self._async_functions) < len(self._names):
                self._spawn(is_async=False)
            if self._async_functions:
                self._spawn(is_async=True)
        self._hand_out()

    def _import_failed(self, report: Fault) -> None:
        if self._names is None:
            self._uplink.send(frames.pack(frames.FAULT, body=json.dumps(report).encode()))
        words = f"{report.get('type', 'it')}: {report.get('message', report.get('kind'))}"
        for is_async in self._queues:
            self._fail_queued({"fault": "start", "why": words}, is_async=is_async)

    def _zygote_gone(self, zygote: Zygote, report: Fault) -> None:
        self._selector.unregister(zygote.control)
        zygote.control.close()
        self._zygote = None
        if zygote.due < math.inf:
            self._import_failed(report)

    # -- workers

    def _spawn(self, *, is_async: bool) -> None:
        if self._forks and self._zygote is None:
            self._start_zygote()
        if self._forks and (self._zygote is None or not self._zygote.ready):
            return  # asked again when it has reported
        inbox, back = make_inbox()
        outbox, far = socket.socketpair()
        worker = Worker(
            is_async=is_async,
            most_calls=_ASYNC_CALLS if is_async else 1,
            inbox=inbox,
            back=back,
            outbox=outbox,
            reader=frames.FrameReader(frames.MAX_ANSWER),
        )
        if self._forks and self._zygote is not None:
            with contextlib.suppress(OSError):  # it died: the sockets close, which says so
                ask = ASYNC if is_async else SYNC
                socket.send_fds(self._zygote.control, [ask], [back.fileno(), far.fileno()])
            patience = _FORK_WITHIN
        else:
            worker.pid = os.fork()
            if worker.pid == 0:
                try:
                    run_importing_worker(back, far, self._settings, self._output, is_async=is_async)
                finally:
                    os._exit(1)
            patience = self._settings["import_timeout"]
        far.close()
        outbox.setblocking(False)
        self._selector.register(outbox, selectors.EVENT_READ, lambda: self._on_worker(worker))
        self._workers.append(worker)
        worker.due = time.monotonic() + patience

    def _on_worker(self, worker: Worker) -> None:
        """What it says; its end, when it says nothing more. It may have been given up since it was heard."""
        while worker.outbox.fileno() >= 0:
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

    def _heard(self, worker: Worker, message: bytes) -> None:
        kind, number, _, _, body = frames.unpack(message)
        if kind == frames.HELLO:
            worker.pid = number
            if body:
                self._kill(worker, {"fault": "start", "why": body.decode()})
                return
            worker.ready, worker.due = True, math.inf
        elif kind == frames.RESULT:
            call = worker.calls.pop(number, None)
            if call is not None:
                self._calls.pop(number, None)
                if not call.dropped:
                    self._uplink.send(message)
        elif kind == frames.ACK:
            call = worker.calls.pop(number, None)
            if call is not None:
                self._fail(call, call.fault or {"fault": "cancelled"})
        elif kind == frames.WORN:
            self._kill(worker, {"fault": "worn"})
            return
        self._hand_out()

    def _kill(self, worker: Worker, fault: Fault) -> None:
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

    def _lost(self, worker: Worker, fault: Fault) -> None:
        """It is gone. What it had begun fails; what it had not goes to another."""
        self._take_back(worker)
        self._selector.unregister(worker.outbox)
        for end in (worker.inbox, worker.back, worker.outbox):
            end.close()
        self._workers.remove(worker)
        for call in worker.calls.values():
            self._fail(call, call.fault or fault)
        if not worker.ready and not any(other.ready for other in self._like(worker.is_async)):
            # Another try would end as this one: nobody is there to take the calls.
            if fault["fault"] != "start":
                fault = {"fault": "start", "why": "it ended before it was ready"}
            self._fail_queued(fault, is_async=worker.is_async)
        self._hand_out()

    def _take_back(self, worker: Worker) -> None:
        """What the worker has not begun returns to the head of the queue."""
        returned = []
        with contextlib.suppress(OSError):
            while message := take(worker.back, wait=False):
                _, kind, number, _, _ = frames.HEADER.unpack_from(message)
                call = worker.calls.get(number) if kind == frames.CALL else None
                if call is not None and not (call.dropped or call.fault):
                    del worker.calls[number]
                    call.worker, call.due = None, math.inf
                    returned.append(call)
        self._queues[worker.is_async].extendleft(reversed(returned))

    def _fail_queued(self, fault: Fault, *, is_async: bool) -> None:
        queue = self._queues[is_async]
        while queue:
            self._fail(queue.popleft(), fault)

    # -- handing out

    def _like(self, is_async: bool) -> list[Worker]:
        return [worker for worker in self._workers if worker.is_async == is_async]

    def _hand_out(self) -> None:
        """Give the calls that wait to workers that are free. Where some still wait, add workers, twice as many each time."""
        if self._names is None or self._closing:
            return
        for is_async, queue in self._queues.items():
            if not queue:
                continue
            workers = self._like(is_async)
            for worker in workers:
                while queue and worker.is_free() and self._give(worker, queue[0]):
                    queue.popleft()
            if queue and all(worker.ready for worker in workers):
                most = 1 if is_async else self._settings["workers"]
                for _ in range(min(len(queue), most - len(workers), max(1, len(workers)))):
                    self._spawn(is_async=is_async)
        if self._calls:
            self._watch_soon()

    def _give(self, worker: Worker, call: Call) -> bool:
        """False when its inbox is full: an event loop is busy, and will answer or be ended."""
        try:
            put(worker.inbox, call.message)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                return False
        worker.calls[call.id] = call
        call.worker = worker
        call.due = time.monotonic() + call.timeout
        return True

    # -- time

    def _patience(self) -> float | None:
        """Seconds until something is due."""
        due = self._next_watch
        if self._zygote is not None:
            due = min(due, self._zygote.due)
        for worker in self._workers:
            due = min(due, worker.due, *(call.due for call in worker.calls.values()))
        return max(0.0, due - time.monotonic()) if due < math.inf else None

    def _on_time(self) -> None:
        now = time.monotonic()
        zygote = self._zygote
        if zygote is not None and zygote.due <= now:
            end_family(zygote.pid)
            self._zygote_gone(zygote, {"kind": "timeout"})
        for worker in list(self._workers):
            if worker.due <= now:
                self._kill(worker, {"fault": "start", "why": "it was not ready in time"})
            for call in [call for call in worker.calls.values() if call.due <= now]:
                if call.worker is worker and worker in self._workers:
                    self._too_late(call, worker)
        if self._next_watch <= now:
            self._watch(now)

    def _too_late(self, call: Call, worker: Worker) -> None:
        if call.told:
            self._kill(worker, {"fault": "blocked"})
            return
        call.fault = {"fault": "timeout"}
        if worker.is_async:
            self._tell_to_end(call, worker, _ACK_WITHIN)
        else:
            self._kill(worker, call.fault)

    def _tell_to_end(self, call: Call, worker: Worker, patience: float) -> None:
        """Ask the event loop to end a call. When it does not answer within ``patience`` seconds, it is blocked."""
        with contextlib.suppress(OSError):  # full or dead: no answer will come
            put(worker.inbox, frames.pack(frames.CANCEL, call=call.id))
        call.told = True
        call.due = time.monotonic() + patience

    def _watch_soon(self) -> None:
        self._next_watch = min(self._next_watch, time.monotonic() + _WATCH)

    def _watch(self, now: float) -> None:
        """Count what user code has started. A limit of the kernel's would not bind root, nor tell tools apart."""
        limit = self._settings["processes"]
        table = processes()
        rest = descendants(os.getpid())
        busy = bool(self._calls) or (self._zygote is not None and self._zygote.due < math.inf)
        for worker in list(self._workers):
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
        self._next_watch = now + _WATCH if busy or rest else math.inf

    # -- ends

    def _on_child(self, wake: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        self._reap()
        while dead := [worker for worker in self._workers if worker.pid in self._status]:
            for worker in dead:
                self._on_worker(worker)
                if worker.outbox.fileno() >= 0:  # a child of its own still holds the other end
                    self._ended(worker)
        # What is left are orphans; the zygote's end is asked for when its socket closes.
        zygote = self._zygote.pid if self._zygote is not None else 0
        self._status = {pid: status for pid, status in self._status.items() if pid == zygote}

    def _reap(self) -> None:
        self._status |= reaped()

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
