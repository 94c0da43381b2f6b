"""Speaks to a running `granite serve` with the official OpenAI client.

    python scripts/oracle/check_openai_client.py http://127.0.0.1:8080 [--clients 64] [--max-tokens 8]

Checks a whole answer, a stream with usage, a stop string and refusals; then sends one request from each of many
clients at once: every one must get an answer or a 429. Prints counts; exits 1 when anything else happens.
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError

QUESTION = [{"role": "user", "content": "Say in one sentence what a bond is."}]


def check(holds: bool, what: str) -> None:
    print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        sys.exit(1)


def refused(kind: type[Exception], call) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def one_client(client: OpenAI, model: str, max_tokens: int) -> None:
    ask = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": max_tokens}
    whole = client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    check(bool(text) and whole.usage.completion_tokens <= max_tokens, f"whole answer: {text!r}, {whole.usage.to_dict()}")

    stream = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    check("".join(pieces) == text, f"the stream says the same in {len(stream)} chunks")
    check(stream[0].choices[0].delta.role == "assistant", "the first chunk names the role")
    check(stream[-1].usage == whole.usage, "the last chunk has the usage")
    check(stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason, "the chunk before it has the reason")

    word = text.split()[2]
    cut = client.chat.completions.create(**ask, stop=[word])
    check(text.startswith(cut.choices[0].message.content) and word not in cut.choices[0].message.content, f"stops before {word!r}")
    drawn = [client.chat.completions.create(**{**ask, "temperature": 1, "seed": 7}).choices[0].message.content for _ in range(2)]
    check(drawn[0] == drawn[1], "the same seed draws the same answer")
    check(refused(BadRequestError, lambda: client.chat.completions.create(**ask, n=2)), "n = 2 is refused")
    check(refused(NotFoundError, lambda: client.chat.completions.create(**{**ask, "model": "other"})), "an unknown model is refused")


def many_clients(url: str, key: str, model: str, clients: int, max_tokens: int) -> None:
    def ask(number: int) -> str:
        client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)
        try:
            stream = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=max_tokens, seed=number, stream=number % 2 == 0)
            if number % 2 == 0:
                reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
                return "answer" if reasons[-1] in ("stop", "length") else "torn"
            return "answer" if stream.choices[0].finish_reason in ("stop", "length") else "torn"
        except RateLimitError as error:
            return "429" if int(error.response.headers["retry-after"]) >= 1 else "429 without retry-after"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
            return f"error {type(error).__name__}"

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        counts = Counter(pool.map(ask, range(clients)))
    print(f"     {clients} clients at once, {time.monotonic() - started:.1f} s: {dict(counts)}")
    check(counts["answer"] + counts["429"] == clients and counts["answer"] > 0, "each got an answer or a 429")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=8)
    arguments = parser.parse_args()
    key = os.environ.get("GRANITE_API_KEY", "none")
    client = OpenAI(base_url=f"{arguments.url}/v1", api_key=key, max_retries=0, timeout=600)
    models = [model.id for model in client.models.list()]
    check(len(models) == 1 and client.models.retrieve(models[0]).id == models[0], f"models: {models}")
    one_client(client, models[0], arguments.max_tokens)
    many_clients(arguments.url, key, models[0], arguments.clients, arguments.max_tokens)


if __name__ == "__main__":
    main()
