"""Reward functions that processes of their own import: nothing heavy here."""

import asyncio
import os
import signal
import threading

CALLS: list[int] = []


def alarmed(completions, **_columns):
    """As graders do it that have a time limit: by an alarm, inside try and except."""
    scores = []
    for text in completions:
        try:
            before = signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
            signal.alarm(1 if text == "loop" else 60)
            try:
                while text == "loop":
                    pass
                scores.append(float(text == "right"))
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
        except Exception:
            scores.append(-1.0)
    return scores


def where(log_metric, **_columns):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    log_metric("pid", os.getpid())
    return [float(threading.current_thread() is threading.main_thread())]


def strict(completions):
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    if completions == ["raise"]:
        raise KeyError("x")
    if completions == ["die"]:
        os._exit(3)
    if completions == ["hang"]:
        while True:
            pass
    return [1.0]


def plain(completions, **_columns):
    CALLS.append(os.getpid())
    return [float(len(text)) for text in completions]


class Judge:
    """An object, such as a judge's client."""

    def __init__(self, reward):
        self.reward = reward

    async def __call__(self, completions, **_columns):
        await asyncio.sleep(0)
        return [self.reward] * len(completions)


class Alarmed:
    def __call__(self, completions, **_columns):
        return alarmed(completions)


judge, alarmed_object = Judge(0.25), Alarmed()


def math_graded(completions, target, **_columns):
    from math_verify import parse, verify

    try:
        return [float(verify(parse(t), parse(c))) for c, t in zip(completions, target, strict=True)]
    except Exception:
        return [0.0] * len(completions)
