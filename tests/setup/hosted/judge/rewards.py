from rnow.core import RewardArgs, get_response, llm_judge, reward


def question(args: RewardArgs, messages: list) -> str:
    return f"Expected: {args.metadata['answer']}\nGiven: {get_response(messages)}\nSame? Answer 1 or 0."


@reward(timeout=120)
async def awaited(args: RewardArgs, messages: list) -> float:
    return await llm_judge(question(args, messages), secrets=args.secrets)


@reward(timeout=120)
async def returned(args: RewardArgs, messages: list) -> float:
    return llm_judge(question(args, messages))


@reward(timeout=120)
def in_sync_code(args: RewardArgs, messages: list) -> float:
    score = llm_judge(
        question(args, messages), secrets=args.secrets, model="gpt-5-nano", timeout=30
    )
    return 1.0 if score > 0.5 else 0.0


GRADES = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "accuracy": {"type": "integer", "minimum": 0, "maximum": 10},
        "clarity": {"type": "integer", "minimum": 0, "maximum": 10},
    },
    "required": ["reasoning", "accuracy", "clarity"],
    "additionalProperties": False,
}


@reward(timeout=120)
async def graded(args: RewardArgs, messages: list) -> float:
    grade = llm_judge(
        f"Grade this from 0 to 10: {get_response(messages)}",
        secrets=args.secrets,
        schema=GRADES,
        score_key="accuracy",
        temperature=0.0,
        max_tokens=256,
    )
    return grade / 10.0


@reward(timeout=120)
def graded_in_sync_code(args: RewardArgs, messages: list) -> float:
    return (
        llm_judge(
            f"Grade this from 0 to 10: {get_response(messages)}",
            api_url=args.secrets["LLM_JUDGE_API_URL"],
            api_key=args.secrets["OPENAI_API_KEY"],
            schema=GRADES,
            score_key="clarity",
        )
        / 10.0
    )


@reward(timeout=120)
async def exact_or_judged(args: RewardArgs, messages: list) -> float:
    """The judge is asked only where the cheap check cannot tell."""
    if get_response(messages) == args.metadata["answer"]:
        return 1.0
    return llm_judge(question(args, messages), secrets=args.secrets)
