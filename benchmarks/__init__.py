"""Measures what exactly_once costs: against the code that you would write instead, side by side in one run.

    python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--rows N]

| module | what is measured |
|---|---|
| `one_message` | a first delivery and a duplicate, against hand-written SQLAlchemy; near, and through a slower network |
| `duplicates` | the same with none, few, many and only duplicates; single and in batches |
| `groups` | batches of up to a hundred messages in one commit, on a cold table and on a hot one, with 1, 2 and 4 workers |
| `sets` | five hundred messages in one call, in two statements: against hand-written code, and against psycopg alone |
| `processes` | two processes against one |
| `table_size` | ten million retained rows against ten thousand |
| `peers` | against DBOS |
| `imports` | importing the package and asking the command line for help, against importing SQLAlchemy |
| `leases` | a message under a lease, and renewing a thousand leases |
| `memory` | a worker's resident memory early and late |
| `rocketmq` | end to end from a real broker, against the bare client and against the same worker fed from memory |
| `contenders`, `crew`, `raw`, `dbos_workflow`, `bare_clients` | what can be measured, by name; in processes of its own |
| `measure`, `stage` | turns and ratios; servers |
| `orders`, `shop` | the messages and the work |
| `report`, `picture` | what is printed, written and drawn |

Every figure is a ratio of two things measured in turn, round by round, on the same servers: a slow machine or a busy neighbour
slows both. Times alone are printed as information, and mean little on another machine. Each measurement also counts rows: if a
message was lost or doubled, it ends with an error instead of a number.
"""
