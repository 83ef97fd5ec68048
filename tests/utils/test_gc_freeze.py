"""What is there when a process settles is left alone; what comes later is collected as ever."""

import subprocess
import sys

SCRIPT = """
import gc, weakref
from asyncrl.utils import gc_freeze as garbage

class Node:
    def __init__(self):
        self.me = self  # only the collector can free it

forgotten = weakref.ref(Node())
kept = [Node() for _ in range(1000)]
garbage.settle()
assert forgotten() is None, "what was garbage before is freed"
assert not any(isinstance(one, Node) for one in gc.get_objects()), "what stays is looked at no more"
later = weakref.ref(Node())
plain = [[] for _ in range(100_000)]  # more than start a collection
assert later() is None, "what comes later is collected without being asked"
"""


def test_only_what_comes_after_settling_is_collected():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


BORROWED = (
    SCRIPT.split("forgotten", maxsplit=1)[0]
    + """
before = gc.get_threshold()
inside = Node()
gone = weakref.ref(inside)
with garbage.settled():
    assert gc.get_threshold() != before and gc.get_freeze_count() > 0
    del inside
    gc.collect()
    assert gone() is not None, "what was there is left alone"
assert gc.get_threshold() == before and gc.get_freeze_count() == 0
gc.collect()
assert gone() is None, "and collected as ever afterwards"
"""
)


def test_a_process_that_is_not_ours_alone_gets_its_collector_back():
    subprocess.run([sys.executable, "-c", BORROWED], check=True)
