"""Ports for servers that tests start: no two of them are given the same one, whichever process asks."""

import subprocess
import sys

from exactly_once.testing.child import free_ports

ASK = """
from exactly_once.testing.child import free_ports
print(*(port for _ in range(150) for port in free_ports()), flush=True)
input()
"""


def test_processes_that_ask_together_are_given_no_port_twice() -> None:
    # given at random, 900 of 12,000 ports have 34 pairs of equal ones
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    try:
        given = [port for process in asking if process.stdout for port in process.stdout.readline().split()]
    finally:
        for process in asking:
            process.communicate("\n")
    assert len(given) == 6 * 150
    assert len(set(given)) == len(given)


def test_neighbours_belong_to_the_port_they_were_asked_for() -> None:
    (broker,) = free_ports(around=(-2, 0, 1))
    others = set(free_ports(100))
    assert len(others) == 100
    assert not others & {broker - 2, broker, broker + 1}


FORKS = """
import os
from exactly_once.testing.child import free_ports
mine = set(free_ports(5))
out, into = os.pipe()
if os.fork() == 0:
    os.write(into, " ".join(map(str, free_ports(20))).encode())
    os._exit(0)
os.wait()
theirs = set(map(int, os.read(out, 1000).split()))
print(len(theirs), len(theirs & (mine | set(free_ports(20)))))
"""


def test_a_forked_process_gives_ports_of_its_own() -> None:
    told = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["20", "0"]
