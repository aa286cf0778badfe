from rnow.core import RewardArgs, get_response, reward


@reward(sandbox=True, timeout=120)
async def code_runs(args: RewardArgs, messages: list) -> float:
    """The answer is a program that ends well."""
    import subprocess

    done = subprocess.run(
        ["python3", "-c", get_response(messages)], capture_output=True, timeout=60
    )
    return 1.0 if done.returncode == 0 else 0.0
