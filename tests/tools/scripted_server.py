"""A server of the 2025 protocol over stdio that does what a test wants: ``python scripted_server.py '{"...": ...}'``.

Standard library only, so that it starts in no time. The script's keys:
``noise``: text written to stdout first. ``mute``: answers nothing. ``quit``: a message for stderr, then exit code 3.
``mute_list``: does not answer lists. ``endless``: every page of the list names another. ``tools``: the list, in pages of two.
``then``: the list after a call of ``change``, and ``tell``: whether it says so. ``file``: written on every start.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

SCRIPT = json.loads(sys.argv[1])
LOCK = threading.Lock()
STATE = {"tools": SCRIPT.get("tools", [])}


def send(**message: object) -> None:
    with LOCK:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


def text(value: str, **more: object) -> dict[str, object]:
    return {"content": [{"type": "text", "text": value}], **more}


def call(name: str, arguments: dict) -> object:
    match name:
        case "die":
            os._exit(7)
        case "hang":
            return None
        case "freeze":
            time.sleep(300)
        case "child":
            command = ["sleep", "300"]
            return text(str(subprocess.Popen(command, start_new_session=True).pid))
        case "environ":
            return text(json.dumps(dict(os.environ)))
        case "change":
            STATE["tools"] = SCRIPT["then"]
            if SCRIPT.get("tell"):
                send(method="notifications/tools/list_changed")
            return text("changed")
        case "flood":
            sys.stdout.write("x" * 2_000_000 + "\n")
            sys.stdout.flush()
            return text("x")
        case "raw":
            return arguments["result"]
    return text(f"{name}: {json.dumps(arguments)}")


def listed(cursor: str | None) -> dict[str, object]:
    start = int(cursor or 0)
    if SCRIPT.get("endless"):
        return {"tools": [], "nextCursor": str(start + 1)}
    page = {"tools": STATE["tools"][start : start + 2]}
    return page | ({"nextCursor": str(start + 2)} if start + 2 < len(STATE["tools"]) else {})


def main() -> None:
    if "file" in SCRIPT:
        with Path(SCRIPT["file"]).open("a") as file:
            file.write("started\n")
    if "quit" in SCRIPT:
        sys.stderr.write(SCRIPT["quit"])
        sys.exit(3)
    sys.stdout.write(SCRIPT.get("noise", ""))
    for line in sys.stdin:
        message = json.loads(line)
        method, params = message["method"], message.get("params", {})
        if "id" not in message or SCRIPT.get("mute"):
            continue
        if method == "initialize":
            result: object = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {"listChanged": True}},
                "serverInfo": {"name": "scripted", "version": "1"},
            }
        elif method == "tools/list" and not SCRIPT.get("mute_list"):
            result = listed(params.get("cursor"))
        elif method == "tools/call":
            result = call(params["name"], params.get("arguments", {}))
        elif method == "tools/list":
            result = None
        else:
            send(id=message["id"], error={"code": -32601, "message": f"no method {method}"})
            continue
        if result is not None:
            send(id=message["id"], result=result)


main()
