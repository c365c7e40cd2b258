"""What it costs: ours against what one would write instead, side by side in one run.

    python -m benchmarks [--quick] [--only NAME ...] [--json FILE]

| room | what is measured |
|---|---|
| `one_message` | a first delivery and a duplicate, against hand-written SQLAlchemy; near, and through a slower network |
| `imports` | importing the package and asking the command line for help, against importing SQLAlchemy |
| `memory` | a worker's resident memory early and late |
| `rocketmq` | end to end from a real broker, against the bare client and against the same worker fed from memory |
| `measure`, `stage`, `shop`, `report`, `picture` | turns and ratios; servers; the work; what is printed, written and drawn |

Every figure is a ratio of two things measured in turn, round by round, on the same servers: a slow machine or a busy
neighbour slows both. Times alone are printed as information, and mean little elsewhere. Each measurement also counts rows:
one that lost or doubled a message ends with an error instead of a number.
"""
