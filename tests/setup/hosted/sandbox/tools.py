import subprocess

from rnow.core.tool import tool


@tool(sandbox=True)
def run_python(code: str) -> str:
    """Execute Python code in isolation."""
    exec(code)
    return "Success"


@tool(sandbox=True, timeout=120)
def execute(code: str) -> dict:
    """Run a program and say what came of it.

    Args:
        code: Python
    """
    done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, timeout=60)
    return {"stdout": done.stdout, "returncode": done.returncode}


@tool(sandbox=True)
def write_file(path: str, content: str) -> dict:
    """Write a file.

    Args:
        path: Where
        content: What
    """
    with open(path, "w") as file:
        file.write(content)
    return {"success": True, "path": path}


@tool(sandbox=True)
def read_file(path: str) -> dict:
    """Read a file.

    Args:
        path: Which
    """
    try:
        with open(path) as file:
            return {"content": file.read()}
    except FileNotFoundError:
        return {"error": f"File not found: {path}"}
